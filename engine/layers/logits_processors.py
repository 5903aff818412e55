"""Changes logits as a request's parameters ask, before the temperature: bias, penalties, bad words, allowed tokens, min_p.

Every operation is of one row and its own tokens, so a row's result depends neither on the batch nor on tp_size. The order is
vLLM's: bias, repetition penalty, frequency and presence penalty; what may not be drawn is -inf, which none of them changes.

Shape suffixes: R = rows, V = vocabulary, P = rows with penalties, A = rows with allowed tokens, X = (row, token) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.scheduling.processing import Processing
from engine.scheduling.sequence import IN_FLIGHT


def process_logits(logits_RV: Tensor, processing: Processing, newest_R: Tensor) -> Tensor:
    """New logits ``[R, V]``, float32, or float64 if they were.

    Args:
        logits_RV: whole and unpadded; they stay as they are.
        processing: of the same rows, on their device.
        newest_R: int64, the newest token of each row's sequence; read where the host did not know it.
    """
    result_RV = logits_RV.to(torch.promote_types(torch.float32, logits_RV.dtype), copy=True)
    pairs = processing.bias_row_X, processing.bias_token_X
    result_RV.index_put_(pairs, processing.bias_X.to(result_RV.dtype), accumulate=True)
    if processing.penalised_row_P.numel():
        result_RV[processing.penalised_row_P] = _penalised(result_RV[processing.penalised_row_P], processing, newest_R)
    if processing.banned_row_X.numel():
        # Added, not written: of two bans of one token either may hold.
        holds_X = newest_R[processing.banned_row_X] == processing.banned_after_X
        ban_X = torch.zeros_like(holds_X, dtype=result_RV.dtype).masked_fill(holds_X, -torch.inf)
        result_RV.index_put_((processing.banned_row_X, processing.banned_token_X), ban_X, accumulate=True)
    if processing.allowed_row_A.numel():
        allowed_AV = result_RV.new_zeros((len(processing.allowed_row_A), result_RV.shape[1]), dtype=torch.bool)
        allowed_AV[processing.allowed_place_X, processing.allowed_token_X] = True
        result_RV[processing.allowed_row_A] = result_RV[processing.allowed_row_A].masked_fill(~allowed_AV, -torch.inf)
    # p < min_p * p_best, in logits: x / T < x_best / T + log(min_p).
    lowest_R1 = (result_RV.amax(dim=-1) + processing.floor_R)[:, None]
    return result_RV.masked_fill_(result_RV < lowest_R1, -torch.inf)


def _penalised(logits_PV: Tensor, processing: Processing, newest_R: Tensor) -> Tensor:
    unknown_X = newest_R[processing.penalised_row_P][processing.seen_row_X].clamp(min=0)  # drawn from nothing: for nobody
    token_X = torch.where(processing.seen_token_X == IN_FLIGHT, unknown_X, processing.seen_token_X)
    place = processing.seen_row_X, token_X
    output_PV = torch.zeros_like(logits_PV, dtype=torch.int64).index_put_(place, processing.seen_is_output_X, accumulate=True)
    seen_PV = torch.zeros_like(logits_PV, dtype=torch.bool)
    seen_PV[place] = True
    repetition_P1, frequency_P1, presence_P1 = (
        each[:, None].to(logits_PV.dtype) for each in (processing.repetition_P, processing.frequency_P, processing.presence_P))
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(seen_PV, repeated_PV, logits_PV)
    return logits_PV - frequency_P1 * output_PV - presence_P1 * (output_PV > 0)
