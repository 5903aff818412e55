"""Is the checkpoint itself whole? Asked before any rank starts, so that a damaged file is not taken for a finding."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.preflight import check_checkpoint as check_for_engine
from engine.config import ModelConfig
from reference.checkpoints import read_config, weight_shapes


def check_checkpoint(folder: Path) -> None:
    """Look at the config and at every file's header, at no tensor, as engine and reference do when they load.

    Raises:
        CheckpointError: naming file and tensor or key, if one of them can't load the checkpoint.
    """
    check_for_engine(folder, ModelConfig.from_folder(folder))
    weight_shapes(read_config(folder))
