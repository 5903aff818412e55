"""Prefill attention: ragged chunks of queries against their sequences' keys in the paged cache."""

from __future__ import annotations

import torch

from engine.kernels.attention_torch import paged_attention_torch
