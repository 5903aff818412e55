"""Twenty bugs that were written from the engine's source by somebody who had not seen the checks: see docs/faults.md.

Each is an edit of a function's source, as its author made it. Three of the twenty are bugs that were in the catalogue before:
13 is ``eos-of-the-config-alone``, 16 is ``row-bias-on-every-rank``, 19 is ``nucleus-of-the-whole-vocabulary``.
"""

from __future__ import annotations

from typing import Any

import engine.config as config_module
import engine.layers.rotary as rotary_module
import engine.layers.sampler as sampler_module
import engine.parallel.sharding as sharding_module
import engine.scheduling.batch as batch_module
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.ongoing import OngoingCompletion
from engine.frontend.requests import Admission
from engine.frontend.sampling import SamplingParams
from engine.parallel.group import TPGroup
from engine.scheduling.kv_cache import BlockManager
from engine.scheduling.scheduler import Scheduler
from harness.faults.base import Patches, fault
from harness.faults.edits import Edit, edit
from harness.faults.layers import BEFORE_O_PROJ


def _declare(name: str, what: str, checks: tuple[str, ...], *edits: Edit, where: str = "ranks", **how: Any) -> None:
    def plant(patch: Patches, tp: TPGroup) -> None:
        edit(patch, *edits)

    fault(name=name, what=what, checks=checks, where=where, **how)(plant)


_declare(
    "other-completions-without-the-seed",
    "The completions of a prompt after the first draw from the engine's seed, whatever the request's is.",
    ("generation",),
    (Admission, "_admit", 'derive_seed("completion", seed', 'derive_seed("completion", self.seed'),
    where="driver", field="SamplingParams.n",
)
_declare(
    "ignore-eos-drops-a-named-eos",
    "With ignore_eos an end-of-sequence token does not end a completion even where the request names it as a stop token.",
    ("generation",),
    (Admission, "_admit",
     "stop_token_ids=frozenset((*params.stop_token_ids, *eos)),",
     "stop_token_ids=frozenset({*params.stop_token_ids, *eos} - {*(self.model_config.eos_token_ids if params.ignore_eos "
     "else ())}),"),
    where="driver", field="SamplingParams.ignore_eos",
)
_declare(
    "last-token-before-the-stop-string",
    'A stop string that the last allowed token completes cuts the text, and the reason is told as "length".',
    ("generation",),
    (OngoingCompletion, "take",
     '        if self._detokenizer.stop_string is not None:\n            self.finish("stop")\n            return\n',
     ""),
    (OngoingCompletion, "take",
     "        self.finish(token.finish_reason)\n",
     "        self.finish(token.finish_reason)\n    elif self._detokenizer is not None and self._detokenizer.stop_string is "
     'not None:\n        self.finish("stop")\n'),
    (OngoingCompletion, "finish", 'output.finish_reason, output.stop_reason = "stop", ', "output.stop_reason = "),
    where="driver", field="SamplingParams.stop",
)
_declare(
    "nothing-new-is-everything",
    "An item of a stream that brings no new token brings all of them again.",
    ("generation",),
    (OngoingCompletion, "delta", "output.logprobs[start:]", "output.logprobs[-num_tokens:]"),
    (OngoingCompletion, "delta", "output.token_ids[start:]", "output.token_ids[-num_tokens:]"),
    where="driver",
)
_declare(
    "stop-string-begun-too-early",
    "A stop string that begins in the text of the first min_tokens tokens and ends after it is not found.",
    ("generation",),
    (Detokenizer, "_find_stop", "self._num_exempt - len(stop) + 1", "self._num_exempt"),
    where="driver", field="SamplingParams.min_tokens",
)
_declare(
    "beginning-of-a-stop-string-streamed",
    "A stream shows the beginning of a stop string before the rest of it is drawn.",
    ("generation",),
    (OngoingCompletion, "take", "[: self._detokenizer.num_safe]", ""),
    where="driver", field="SamplingParams.stop",
)
_declare(
    "zero-is-none",
    "A seed of 0 and logprobs=0 are taken for None.",
    ("generation",),
    (SamplingParams, "__post_init__",
     "None if value is None else int(value)",
     'int(value) if value or name not in ("seed", "max_tokens", "logprobs") else None'),
    where="driver", field="SamplingParams.seed",
)
_declare(
    "token-in-flight-not-counted",
    "The token in flight does not count for min_tokens: stop tokens are banned for one token too many.",
    ("generation",),
    (batch_module, "_build_sampling",
     "if position - chunk.sequence.num_prompt_tokens",
     "if len(chunk.sequence.token_ids) - chunk.sequence.num_prompt_tokens"),
    field="SamplingBatch.banned_row_X",
)
_declare(
    "own-prefix-counted-as-a-hit",
    "A sequence that gave way and comes back reports the blocks of its own that it finds as cached.",
    ("generation",),
    (Scheduler, "schedule", "if not sequence.num_preemptions:", "if True:"),
)
_declare(
    "blocks-chained-to-the-first",
    "The hash of a block goes on from the first block's, not from that of the block before.",
    ("kv",),
    (BlockManager, "_hash_known_blocks", "hashes[-1] if hashes", "hashes[0] if hashes"),
)
_declare(
    "block-forgotten-too-late",
    "A block that is handed out again is forgotten by the prefix cache when its new content is registered, not at once.",
    ("kv",),
    (BlockManager, "grow", "        self._forget(block)\n", ""),
    (BlockManager, "register",
     "if block_hash not in self.block_of_hash and block not in self.hash_of_block:\n",
     "if block_hash not in self.block_of_hash:\n            self._forget(block)\n"),
)
_declare(
    "chunks-sorted-in-the-batch-alone",
    "One-token chunks come first in the batch and not in the list by which its tokens are handed out.",
    ("kv",),
    (Scheduler, "schedule", "chunks.sort(key=lambda chunk: chunk.num_tokens > 1)", "pass"),
    (batch_module, "build_batch",
     "    lengths = np.array(",
     "    chunks = sorted(chunks, key=lambda chunk: chunk.num_tokens > 1)\n    lengths = np.array("),
)
_declare(
    "first-rows-tell-of-the-head",
    "Whether a stored LM head differs from the embedding that it is tied to is judged by its first 64 rows.",
    ("weights",),
    (config_module, "_has_a_head_of_its_own",
     "get_tensor(one.name) for one in pair",
     "get_slice(one.name)[:64] for one in pair"),
    layout="llama-odd", field="ModelConfig.tie_word_embeddings",
)
_declare(
    "scaling-of-attention-lost",
    "The factor by which YaRN scales attention is left out where the config does not spell it out.",
    ("attention",),
    (rotary_module, "rope_frequencies",
     "inv_freq_D, scaling = ROPE_INIT_FUNCTIONS",
     'scaling = parameters.get("attention_factor") or 1.0\n    inv_freq_D, _ = ROPE_INIT_FUNCTIONS'),
    layout="llama-yarn", field="ModelConfig.hf_config",
)
_declare(
    "padding-between-the-shards",
    "The vocabulary is cut evenly, so that padding ends several shards, and is cut off once, at the end.",
    ("weights",),
    (sharding_module, "vocab_shard",
     "ids=range(start, min(start + local_size, vocab_size))",
     'ids=even_range(vocab_size, tp_rank=tp_rank, tp_size=tp_size, what="vocab_size")'),
    layout="llama-cut-group", tp_sizes=(3,),
)
_declare(
    "groups-counted-from-the-first-own-head",
    "The map from query to KV heads starts a group at the rank's first query head.",
    ("attention", "logits"),
    (sharding_module, "head_shard",
     "tuple(q_head // group - kv_heads.start for q_head in q_heads)",
     "tuple(index // group for index in range(len(q_heads)))"),
    layout="llama-nine-heads", module=BEFORE_O_PROJ,
)
_declare(
    "ban-written-into-the-logits",
    "Stop tokens are banned in place, and log-probabilities are those of what is left.",
    ("generation",),
    (sampler_module, "sample", "logits_RV = logits_RV.index_put(", "logits_RV.index_put_("),
    field="SamplingBatch.banned_token_X",
)
