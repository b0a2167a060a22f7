"""`deterministic=True`: proves at start-up that a row's logits do not depend on what else is in the step."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.model.probe import StepFunction

logger = logging.getLogger("pagedllm.model")

_LENGTHS = (1, 2, 3, 5, 16, 23, 40)
_CHUNKS = (1, 2, 3, 4, 7, 16)
SHORT, LONG = max(_LENGTHS), 300  # tokens; the long ones are more than two tiles of keys on a GPU


def shapes_that_differ(
    logits: StepFunction, vocab_size: int, num_blocks: int, block_size: int, longest: int = SHORT
) -> list[str]:
    """Compare the last token's logits of a sequence alone and at once with those in chunks, and in company.

    Args:
        logits: Computes a step over a pool that nobody uses yet.
        vocab_size: Tokens are below it.
        num_blocks: Blocks of the pool; what does not fit is left out.
        block_size: Tokens in a block.
        longest: Tokens of the longest sequence.

    Returns:
        The shapes whose logits have other bits; none where the model is deterministic.
    """
    lengths = sorted({*(one for one in _LENGTHS if one < longest), longest})
    blocks = [-(-length // block_size) for length in lengths]
    firsts = np.cumsum([0, *blocks])
    rows = [number for number in range(len(lengths)) if firsts[number + 1] <= num_blocks]
    tokens = np.random.default_rng(0).integers(0, vocab_size, (len(lengths), longest))
    tables = np.zeros((len(lengths), max(blocks)), dtype=np.int32)
    for row in rows:
        tables[row, : blocks[row]] = np.arange(firsts[row], firsts[row + 1])

    def step(spans: Iterable[tuple[int, int, int]]) -> torch.Tensor:
        """Compute positions `start` .. `end` - 1 of each row; the logits of their last ones."""
        spans = list(spans)
        counts = np.array([end - start for _, start, end in spans])
        owner = np.repeat([row for row, _, _ in spans], counts)
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        starts = np.concatenate([[0], np.cumsum(counts)])
        batch = ForwardBatch(
            token_ids=tokens[owner, positions],
            positions=positions,
            slot_mapping=tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size,
            query_starts=starts.astype(np.int32),
            context_lens=np.array([end for _, _, end in spans], dtype=np.int32),
            block_tables=tables[[row for row, _, _ in spans]],
            logits_rows=starts[1:] - 1,
        )
        return logits(batch).clone()  # they are valid until the next step only

    alone = [step([(row, 0, lengths[row])])[0] for row in rows]
    different = []
    together = step((row, 0, lengths[row]) for row in rows)
    if not all(torch.equal(one, other) for one, other in zip(alone, together, strict=True)):
        different.append(f"{len(rows)} sequences together")
    short = max(row for row in rows if lengths[row] <= SHORT)
    chunked = [(short, chunk) for chunk in _CHUNKS]
    chunked += [(rows[-1], chunk) for chunk in (77, longest - 1) if rows[-1] != short]  # too long for chunks of 1
    for row, chunk in chunked:
        for start in range(0, lengths[row], chunk):
            last = step([(row, start, min(start + chunk, lengths[row]))])[0]
        if not torch.equal(last, alone[row]):
            different.append(f"chunks of {chunk}")
    for company in range(1, len(rows)):
        last = step((row, lengths[row] - 1, lengths[row]) for row in rows[: company + 1])[0]
        if not torch.equal(last, alone[0]):
            different.append(f"decoding beside {company} others")
    return different
