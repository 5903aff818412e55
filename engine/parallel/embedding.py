"""Token embedding and LM head, split over vocabulary rows.

Shape suffixes: T = tokens, E = hidden size, R = rows to sample from, V = vocabulary, L = this rank's vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.layers.matmul import linear
from engine.parallel.group import TPGroup
from engine.parallel.parameter import LoadedWeight, ShardParameter, check_shape, rows_of
from engine.parallel.sharding import vocab_shard


class _VocabShardedWeight(nn.Module):
    """A ``[vocab, hidden]`` weight of which a rank holds ``[local_size, hidden]``, padding rows zero."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tp: TPGroup, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.shard = vocab_shard(vocab_size, tp_rank=tp.rank, tp_size=tp.size)
        self.weight = ShardParameter((self.shard.local_size, hidden_size), dtype=dtype, device=device,
                                     weight_loader=self.weight_loader)

    def weight_loader(self, param: ShardParameter, loaded_weight: LoadedWeight) -> None:
        """Write this rank's rows of a weight or bias, and zeros below them where the shard is padded.

        Raises:
            CheckpointError: if the shape is not that of the whole, unpadded weight.
        """
        check_shape(loaded_weight, (self.vocab_size, *param.shape[1:]))
        ids, local_size = self.shard.ids, self.shard.local_size
        if ids:
            param.write(rows_of(loaded_weight, ids), rows=range(len(ids)))
        param.write(param.data.new_zeros((local_size - len(ids), *param.shape[1:])), rows=range(len(ids), local_size))


class VocabParallelEmbedding(_VocabShardedWeight):
    """Looks token ids up in a table split over its rows.

    token_ids_T  [T] int        the same on every rank
    weight       [L, hidden]    this rank's rows
    x_TE         [T, hidden]    whole on every rank, after one all-reduce; bit-exact, as all ranks but one add -0.0
    """

    def forward(self, token_ids_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return nn.functional.embedding(token_ids_T, self.weight)
        ids = self.shard.ids
        is_mine_T = (token_ids_T >= ids.start) & (token_ids_T < ids.stop)
        row_T = torch.where(is_mine_T, token_ids_T - ids.start, 0)
        # -0.0, because x + -0.0 is x in every bit: 0.0 would turn an entry of -0.0 into 0.0.
        x_TE = nn.functional.embedding(row_T, self.weight).masked_fill_(~is_mine_T.unsqueeze(-1), -0.0)
        return self.tp.all_reduce(x_TE)


class ParallelLMHead(_VocabShardedWeight):
    """Logits over a vocabulary split by rows.

    x_RE         [R, hidden]    whole on every rank
    weight       [L, hidden]    this rank's rows
    bias         [L]            this rank's part, if there is one
    logits_RV    [R, vocab]     whole on every rank, after one all-gather; the padding is cut off, so that a padding row
                                can't win over a vocabulary of negative logits
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, bias: bool = False, tp: TPGroup, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(vocab_size, hidden_size, tp=tp, dtype=dtype, device=device)
        self.bias = (ShardParameter((self.shard.local_size,), dtype=dtype, device=device, weight_loader=self.weight_loader)
                     if bias else None)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Share the embedding's parameter: one tensor, loaded once."""
        self.weight = embedding.weight

    def forward(self, x_RE: Tensor) -> Tensor:
        return self.whole(self.shard_logits(x_RE))

    def shard_logits(self, x_RE: Tensor) -> Tensor:
        """This rank's logits ``[R, L]``, those of padding rows behind the others. No collective."""
        return linear(x_RE, self.weight, self.bias)

    def whole(self, logits_RL: Tensor) -> Tensor:
        """Logits ``[R, vocab]`` out of every rank's :meth:`shard_logits`, by one all-gather."""
        if self.tp.size == 1:
            return logits_RL
        # Only the last shards hold padding, so all of it stands at the end of the gathered vocabulary.
        return self.tp.all_gather(logits_RL, dim=-1)[:, : self.vocab_size]
