"""Models are built in turn: transformers sets a default of the whole process while it builds one."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.atlas.judge import reason
from harness.checks.base import raised
from reference.building import building
from reference.checkpoints import CheckpointError, random_checkpoint, weight_shapes
from reference.hf import Reference
from tests.reference.tiny import tiny_config


def test_threads_build_in_turn_and_leave_the_default_dtype_alone(tmp_path, monkeypatch):
    folder = random_checkpoint(tmp_path / "model", tiny_config())
    inside, most_inside = [], []

    def watched(build):
        def watch(*args, **kwargs):
            inside.append(build)
            most_inside.append(len(inside))
            time.sleep(0.02)  # long enough for the others to come in, if they may
            try:
                return build(*args, **kwargs)
            finally:
                inside.remove(build)

        return watch

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForCausalLM, name, watched(getattr(AutoModelForCausalLM, name)))
    config = tiny_config(dtype="bfloat16")
    jobs = [
        lambda: Reference.load(folder, "bfloat16"),
        lambda: Reference.load(folder, "exact"),
        lambda: weight_shapes(config),
        lambda: random_checkpoint(tmp_path / "another", config, dtype="bfloat16"),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result(timeout=60)
    assert len(most_inside) >= len(jobs)
    assert max(most_inside) == 1
    assert torch.get_default_dtype() == torch.float32


def test_a_thread_that_fails_hands_its_turn_on(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with ThreadPoolExecutor(2) as pool:
        failed = [pool.submit(Reference.load, tmp_path, "float32") for _ in range(2)]
        assert all(str(tmp_path) in str(one.exception(timeout=60)) for one in failed)
    assert weight_shapes(tiny_config())


def test_ctrl_c_in_the_middle_of_a_library_is_ctrl_c_whatever_its_clean_up_runs_into():
    class Mode(torch.overrides.TorchFunctionMode):
        def __exit__(self, *failure):
            super().__exit__(*failure)
            raise RuntimeError("trying to pop from empty mode stack")

    def interrupted(error):
        with Mode():
            raise error

    with pytest.raises(KeyboardInterrupt), building("transformers cannot build it"):
        interrupted(KeyboardInterrupt())
    with pytest.raises(CheckpointError, match="cannot build it: RuntimeError"), building("transformers cannot build it"):
        interrupted(ValueError())
    for told in (raised, reason):
        with pytest.raises(RuntimeError) as failure:
            interrupted(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            told(failure.value)
