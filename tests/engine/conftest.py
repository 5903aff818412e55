"""Models for the engine's tests, random ones, each written or served once; and a look at what ranks leave behind."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from engine import LLM
from engine.ranks.ranks import Ranks
from reference.checkpoints import random_checkpoint
from reference.hf import Reference
from tests.engine.rank_jobs import footprint
from tests.engine.served import MakeLLM, blocks_in_use, open_llm
from tests.engine.support import tiny_config
from tests.engine.talking import Exact, talking_checkpoint

MakeCheckpoint = Callable[..., Path]
MakeReference = Callable[..., Reference]


@pytest.fixture(scope="session", autouse=True)
def one_intra_op_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``checkpoint(**changes)``: the folder of a random float32 model whose tiny config has these changes.

    ``shard_bytes`` splits it into files of at most so many bytes. Tests copy what they mean to change.
    """
    written: dict[str, Path] = {}

    def make(*, shard_bytes: int | None = None, seed: int = 0, **changes: Any) -> Path:
        key = json.dumps([shard_bytes, seed, changes], sort_keys=True)
        if key not in written:
            folder = tmp_path_factory.mktemp("checkpoint")
            written[key] = random_checkpoint(
                folder, tiny_config(**changes), seed=seed, max_shard_size=shard_bytes
            )
        return written[key]

    return make


@pytest.fixture(scope="session")
def reference() -> MakeReference:
    """``reference(folder, dtype)``: the Hugging Face model in that folder, loaded once a session."""
    loaded: dict[tuple[Path, str], Reference] = {}

    def load(folder: Path, dtype: str) -> Reference:
        if (folder, dtype) not in loaded:
            loaded[folder, dtype] = Reference.load(folder, dtype)
        return loaded[folder, dtype]

    return load


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Start multiprocessing's helpers and tqdm's, so that they do not count as left behind by the first test."""
    Ranks(2, fabric="gloo").close()
    tqdm(disable=True).close()  # a thread watches over all bars there will be
    torch.cuda.device_count()  # keeps a file of the driver's open


@pytest.fixture
def nothing_is_left_behind(fork_server: None) -> Iterator[None]:
    """Processes, ports, threads and files are what they were before the test, and there is no more shared memory."""
    before = footprint()
    there = set(before.pop("shared memory"))  # of other programs: it may go
    yield
    deadline = time.monotonic() + 3
    while True:
        after = footprint()
        more = set(after.pop("shared memory")) - there
        if (after == before and not more) or time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.05)
    assert after == before
    assert not more, "shared memory is left"


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small model that talks."""
    return talking_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def exact(talking: Path) -> Exact:
    """What the reference makes of the small model that talks."""
    return Exact(talking)


@pytest.fixture(scope="module")
def served(talking: Path) -> Iterator[MakeLLM]:
    """``served(tp_size)``: the model on so many ranks, kept for the whole module. Tests leave it idle."""
    running: dict[int, LLM] = {}

    def get(tp_size: int) -> LLM:
        if tp_size not in running:
            running[tp_size] = open_llm(talking, tp_size)
        return running[tp_size]

    yield get
    for llm in running.values():
        assert not llm._ranks._running, "a message is left under way"
        assert blocks_in_use(llm) == [0] * llm.config.tensor_parallel_size
        llm.close()
