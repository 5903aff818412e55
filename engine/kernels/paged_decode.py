"""Decode attention: one query token per sequence against its keys in the paged cache."""

from __future__ import annotations

import torch

from engine.kernels.attention_torch import paged_attention_torch
