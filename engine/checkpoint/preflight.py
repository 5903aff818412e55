"""Does the checkpoint fit its config? Asked before any rank starts, so that one line says no, and not every rank."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.checkpoint.weights import load_weights
from engine.config import ModelConfig
from engine.layers.attention_backends import TorchBackend
from engine.layers.attention_layout import AttentionLayout
from engine.models.registry import family_of
from engine.parallel.group import SoloGroup
from engine.parallel.sharding import head_shard

logger = logging.getLogger(__name__)


def check_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Load the headers of the checkpoint's files into a model without memory: the loading itself checks names and shapes.

    Warns where the config ties the embeddings, but the checkpoint holds two that differ.

    Raises:
        CheckpointError: naming file and tensor, as loading would. Only values that can't be read are still to be found.
    """
    meta = torch.device("meta")
    layout = AttentionLayout(heads=head_shard(config.num_q_heads, config.num_kv_heads, tp_rank=0, tp_size=1),
                             head_dim=config.head_dim, block_size=16, dtype=torch.float32, device=meta)
    family = family_of(config.model_type)
    model = family.model(config, tp=SoloGroup(), dtype=torch.float32, device=meta, max_model_len=1, backend=TorchBackend(layout))
    load_weights(model, folder, modules=family.modules, tied=model.tied, headers_only=True)
    if config.hf_config.tie_word_embeddings and not config.tie_word_embeddings:
        logger.warning("tie_word_embeddings=true in folder=%s, but the checkpoint's lm_head.weight differs from its "
                       "model.embed_tokens.weight: they are not tied, as in transformers; set it to false", folder)
