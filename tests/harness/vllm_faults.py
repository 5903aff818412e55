"""What runs in a rank of vLLM under test: the worker, with the fault that ``fault.txt`` of the model's folder names.

A fault of one rank is the last one's, also where that is the only one; with `` on rank 1`` behind its name it is that one's.
``choices read`` is none: routers of vLLM's CPU build count as plain, and choices are read out of buffers without any graph.

In vLLM's interpreter: it imports nothing of the project.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from torch import nn

worker = runpy.run_path(str(Path(__file__).parents[2] / "harness" / "subjects" / "vllm_worker.py"), run_name="worker")

READ = "choices read"
SCALES = {"scaled": 1.05, "doubled": 2.0}
"""The second one shows in 16 bits, too."""
CODE: dict[str, Any] = worker["Served"].load.__globals__
ROUTERS = CODE["ROUTERS"]


class Served(worker["Served"]):  # type: ignore[misc]
    """Plants the fault when the weights are loaded and not yet packed."""

    fault = ""

    def load(self, folder: str, **args: Any) -> None:
        path = Path(folder) / "fault.txt"
        self.fault = path.read_text() if path.is_file() else ""
        self.num_rows = args["max_num_batched_tokens"]
        CODE["ROUTERS"] = (*ROUTERS, "CPURouter") if self.fault == READ else ROUTERS
        super().load(folder, **args)

    def loaded(self, model: nn.Module) -> None:
        name, _, rank = self.fault.partition(" on rank ")
        is_here = self.tp_rank == (int(rank) if rank else self.tp_size - 1)
        layer: Any = model.get_submodule("model.layers.1") if name else None
        if name == READ:
            self._rows_to_read = self.num_rows
        if name in SCALES and is_here:
            layer.mlp.gate_up_proj.weight.data.mul_(SCALES[name])
        elif name == "experts doubled" and is_here:
            layer.mlp.experts.routed_experts.w2_weight.data.mul_(2.0)
        elif name == "not reduced":
            layer.self_attn.o_proj.reduce_results = False
        elif name == "swapped" and is_here:
            qkv = layer.self_attn.qkv_proj
            keys = qkv.num_heads * qkv.head_size
            size = qkv.num_kv_heads * qkv.head_size
            rows = qkv.weight.data
            rows[keys : keys + 2 * size] = rows[keys : keys + 2 * size].roll(size, 0)
        super().loaded(model)
