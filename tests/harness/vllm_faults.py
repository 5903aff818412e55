"""What runs in a rank of vLLM under test: the worker, with the fault that ``fault.txt`` of the model's folder names.

In vLLM's interpreter: it imports nothing of the project.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from torch import nn

worker = runpy.run_path(str(Path(__file__).parents[2] / "harness" / "subjects" / "vllm_worker.py"), run_name="worker")

SCALES = {"scaled": 1.05, "doubled": 2.0}
"""The second one shows in 16 bits, too."""


class Served(worker["Served"]):  # type: ignore[misc]
    """Plants the fault when the weights are loaded and not yet packed."""

    fault = ""

    def load(self, folder: str, **args: Any) -> None:
        path = Path(folder) / "fault.txt"
        self.fault = path.read_text() if path.is_file() else ""
        super().load(folder, **args)

    def loaded(self, model: nn.Module) -> None:
        layer: Any = model.get_submodule("model.layers.1") if self.fault else None
        if self.fault in SCALES and self.tp_rank == self.tp_size - 1:
            layer.mlp.gate_up_proj.weight.data.mul_(SCALES[self.fault])
        elif self.fault == "not reduced":
            layer.self_attn.o_proj.reduce_results = False
        elif self.fault == "swapped" and self.tp_rank == 1:
            qkv = layer.self_attn.qkv_proj
            keys = qkv.num_heads * qkv.head_size
            size = qkv.num_kv_heads * qkv.head_size
            rows = qkv.weight.data
            rows[keys : keys + 2 * size] = rows[keys : keys + 2 * size].roll(size, 0)
        super().loaded(model)
