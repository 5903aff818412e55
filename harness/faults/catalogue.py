"""The public bugs that the faults recreate, by number, and why some of them can't be planted here.

A short name for each: what kind of bug, in which project it was reported. The faults refer to these numbers.
"""

from __future__ import annotations

BUGS: dict[int, str] = {
    1: "the same shard on every rank (vLLM, GGUF loader)",
    3: "data of an uneven parameter lost (transformers)",
    4: "fused qkv cut naively (vLLM)",
    5: "[Q|K|V] cut into contiguous shares (NeMo)",
    6: "fused gate and up not merged (vLLM)",
    7: "fused expert halves in the wrong order (SGLang)",
    8: "fused parameter taken for a plain column shard (SGLang)",
    10: "custom LM-head loader ignores the rank (vLLM)",
    12: "replicated instead of cut (transformers)",
    13: "parameter never written (SGLang)",
    14: "row-parallel bias through the weight's loader (nano-vllm)",
    15: "tied head stays zero (Parallax)",
    17: "tied head wrong on other ranks (SGLang, vLLM)",
    18: "quantisation scales not cut (vLLM)",
    19: "scales of fused qkv not cut (TensorRT-LLM)",
    20: "input features reordered within a rank (vLLM, GPTQ)",
    21: "inflated size of a quantised head (TensorRT-LLM)",
    22: "biases not shared out by a converter (GPT-NeoX)",
    23: "fewer KV heads than ranks (transformers)",
    25: "norm of keys cut by the ranks (vLLM)",
    26: "as many KV heads as ranks, off by one (vLLM)",
    27: "KV sizes computed back from the ranks (SGLang)",
    29: "GQA groups from a default (TransformerEngine)",
    30: "norm over all heads computed on a slice (mlx-lm, exllamav3)",
    31: "reduce of a norm taken out as an optimisation (vLLM)",
    32: "slice of a norm's weight from the wrong rank (vLLM)",
    35: "row-parallel bias times tp_size (text-generation-inference)",
    36: "row-parallel bias times tp_size (MinivLLM)",
    37: "biases before one shared reduce (GPT-NeoX)",
    39: "bias on rank 0 alone, reported and right (nano-vllm)",
    40: "reduced twice (vLLM)",
    42: "one branch not reduced (tpu-inference)",
    44: "gathered into a temporary tensor (mini-sglang)",
    47: "other rounding in a fused all-reduce, no bug of logic (aiter)",
    48: "custom all-reduce races (vLLM)",
    50: "torn reads behind a relaxed barrier (vLLM)",
    51: "stale flag baked into a graph (vLLM, aiter)",
    52: "all-reduce faked during warm-up (vLLM)",
    54: "minimum became a sum (SGLang)",
    56: "gathered logits interleaved, for batches alone (mini-sglang)",
    59: "padded vocabulary not masked (tt-metal)",
    60: "padded vocabulary in the sampler (lmdeploy)",
    62: "vocabulary that does not split evenly (Megatron-LM)",
    64: "ALiBi slopes of the first heads on every rank (Megatron-DeepSpeed)",
    65: "ALiBi slopes from the local number of heads (FlashInfer)",
    67: "gate of the attention not cut (vLLM-Omni)",
    68: "another seed on each rank (vLLM)",
    69: "ranks of one launch draw different texts (vLLM)",
    71: "sampler without a seed (mini-sglang)",
    73: "number of blocks of each rank's own (nano-vllm)",
    74: "prefix hits differ between ranks (LMCache)",
    76: "preempted tokens not sent again (nano-vllm)",
    79: "one rank replays, another runs eager (pegainfer)",
    80: "message read before it is written (vLLM)",
    83: "message larger than its slot (nano-vllm)",
    84: "ranks outlive their driver (vLLM)",
    86: "killed rank not seen (TensorRT-LLM)",
    88: "too little shared memory (vLLM)",
}

_QUANTISED = "the engine runs unquantised checkpoints alone"
_SHARED_MEMORY = "the engine's messages go through sockets: there is no shared memory to get wrong"

NOT_PLANTED: dict[int, str] = {
    18: _QUANTISED,
    19: _QUANTISED,
    21: _QUANTISED,
    67: "no supported model gates its attention",
    80: _SHARED_MEMORY,
    83: _SHARED_MEMORY,
    88: _SHARED_MEMORY,
}
"""Reasons, by number."""
