"""What requests ask for in their logits: forbidden and favoured tokens, and penalties on tokens seen before.

Rows that are changed are copied first, as log-probabilities are those of the raw logits. The changes are sparse, so the
copy bounds them: one read and one write of each changed row. Their meaning is that of `LogitsRules.apply`.

Sources: repetition penalty, Keskar et al., "CTRL" (2019), with transformers' rule for scores below zero; presence and
frequency penalties as the OpenAI API defines them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagedllm_core.decode.staging import Staged, column

_SOURCE, _PLACE, _ONLY = tl.constexpr(column("source")), tl.constexpr(column("place")), tl.constexpr(column("only"))
_EDITS, _EDITS_END = tl.constexpr(column("edits")), tl.constexpr(column("edits_end"))
_PAST, _PAST_END = tl.constexpr(column("past")), tl.constexpr(column("past_end"))
_REPETITION, _PRESENCE = tl.constexpr(column("repetition")), tl.constexpr(column("presence"))
_FREQUENCY, _CARRIED = tl.constexpr(column("frequency")), tl.constexpr(column("carried"))
_COPIED = 4096  # numbers that one program copies
_LISTED = 512  # list entries that one program handles at a time


@triton.jit
def _copy_rows(logits, changed, records, vocabulary, stride, fields, BLOCK: tl.constexpr):
    """Copy the rows that are changed; -inf where only listed tokens are allowed. Grid: rows x blocks."""
    record = records + tl.program_id(0) * fields
    place = tl.load(record + _PLACE).to(tl.int64)
    if place >= 0:
        source = logits + tl.load(record + _SOURCE).to(tl.int64) * stride
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        end = tl.where(tl.load(record + _ONLY) != 0, 0, vocabulary)
        score = tl.load(source + token, mask=token < end, other=float("-inf"))
        tl.store(changed + place * vocabulary + token, score, mask=token < vocabulary)


@triton.jit
def _penalised(score, count, record):
    """A seen token's score, generated `count` times."""
    repetition = tl.load(record + _REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(record + _PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(record + _FREQUENCY).to(tl.float32, bitcast=True)
    score = tl.where(score < 0, score * repetition, tl.math.div_rn(score, repetition))
    return score - tl.where(count > 0, frequency * count.to(tl.float32) + presence, 0.0)


@triton.jit
def _apply_rules(
    logits, changed, records, edit_tokens, edit_biases, past_tokens, past_counts, carried_tokens,
    vocabulary, stride, fields, BLOCK: tl.constexpr,
):  # fmt: skip
    """Edit and penalise the rows that are changed. Grid: rows."""
    record = records + tl.program_id(0) * fields
    place = tl.load(record + _PLACE).to(tl.int64)
    if place >= 0:
        source = logits + tl.load(record + _SOURCE).to(tl.int64) * stride
        target = changed + place * vocabulary
        last = tl.load(record + _EDITS_END)
        for start in range(tl.load(record + _EDITS), last, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            token = tl.load(edit_tokens + entry, mask=entry < last, other=0)
            score = tl.load(source + token, mask=entry < last, other=0.0)
            score += tl.load(edit_biases + entry, mask=entry < last, other=0.0)
            tl.store(target + token, score, mask=entry < last)
        tl.debug_barrier()  # penalties read what other threads have edited
        number = tl.load(record + _CARRIED)
        carried = tl.load(carried_tokens + number, mask=number >= 0, other=-1)
        seen = 0
        last = tl.load(record + _PAST_END)
        for start in range(tl.load(record + _PAST), last, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            token = tl.load(past_tokens + entry, mask=entry < last, other=-2)
            again = (token == carried).to(tl.int32)
            count = tl.load(past_counts + entry, mask=entry < last, other=0) + again
            score = tl.load(target + token, mask=entry < last, other=0.0)
            tl.store(target + token, _penalised(score, count, record), mask=entry < last)
            seen += tl.sum(again, axis=0)
        if (carried >= 0) & (seen == 0):  # no penalty changes a score where the request has none
            once = tl.full((), 1, tl.int32)
            tl.store(target + carried, _penalised(tl.load(target + carried), once, record))


def apply_rules(logits: torch.Tensor, staged: Staged, num_changed: int, carried_tokens: torch.Tensor) -> torch.Tensor:
    """The changed rows of a step.

    Args:
        logits: float32 [n, vocabulary], raw, last stride 1.
        staged: The step's rows; `place` numbers the changed ones.
        num_changed: How many are.
        carried_tokens: int64, where the records' `carried` points; any where none does.

    Returns:
        float32 [num_changed, vocabulary].
    """
    rows, fields = staged.records.shape
    vocabulary = logits.shape[1]
    changed = torch.empty((num_changed, vocabulary), dtype=torch.float32, device=logits.device)
    _copy_rows[(rows, triton.cdiv(vocabulary, _COPIED))](
        logits, changed, staged.records, vocabulary, logits.stride(0), fields, BLOCK=_COPIED
    )
    _apply_rules[(rows,)](
        logits, changed, staged.records, staged.edit_tokens, staged.edit_biases, staged.past_tokens,
        staged.past_counts, carried_tokens, vocabulary, logits.stride(0), fields, BLOCK=_LISTED,
    )  # fmt: skip
    return changed
