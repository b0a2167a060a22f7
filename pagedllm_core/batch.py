"""One step's work: which sequences compute how many tokens, and the arrays that say so to the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.request import Request, Sequence


class ScheduledRow(NamedTuple):
    """Positions `start` .. `end` - 1 of one sequence, their slots already assigned.

    `samples` is True where the row reaches the last known token, so that the next one is chosen after the step.
    """

    request: Request
    sequence: Sequence
    start: int
    end: int
    samples: bool


@dataclass
class ScheduledBatch:
    """What the scheduler decided for one step.

    Attributes:
        rows: The sequences that compute, in order.
        swap_out: (device, host) blocks to copy first.
        swap_in: (host, device) blocks to copy next.
        copies: (source, destination) blocks to copy before the forward pass.
        exhausted: Requests that cannot grow although they have the pool to themselves.
        forced: Tokens that a grammar left no choice about, added after the step without one of their own.
    """

    rows: list[ScheduledRow] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    exhausted: list[Request] = field(default_factory=list)
    forced: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.end - row.start for row in self.rows)

    def to_forward(self) -> ForwardBatch:
        """Pack the rows into one ragged row of tokens; logits are asked for where a token is chosen or scored.

        A token that only the device knows yet is 0 here; `ForwardBatch.carried` says where it comes from.
        """
        rows = self.rows
        query_starts = list(accumulate((row.end - row.start for row in rows), initial=0))
        total = query_starts[-1]
        token_ids = np.empty(total, dtype=np.int64)
        positions = np.empty(total, dtype=np.int64)
        slots = np.empty(total, dtype=np.int64)
        block_tables = np.zeros((len(rows), max(len(row.sequence.table) for row in rows)), dtype=np.int32)
        logits_rows: list[int] = []
        first = 0
        for number, (request, sequence, start, end, samples) in enumerate(rows):
            table = sequence.table
            block_tables[number, : len(table)] = table.ids
            after = first + end - start
            if end - start == 1:
                token_ids[first] = sequence.token_ids[start] if start < len(sequence.token_ids) else 0
                positions[first] = start
                slots[first] = table.slot(start)
            else:
                token_ids[first:after] = sequence.token_ids[start:end]
                positions[first:after] = np.arange(start, end)
                slots[first:after] = table.slots(start, end)
            if wants_prompt_logprobs(request) and start < sequence.prompt_length:
                logits_rows.extend(range(first, after))
            elif samples:
                logits_rows.append(after - 1)
            first = after
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_starts=np.array(query_starts, dtype=np.int32),
            context_lens=np.array([row.end for row in rows], dtype=np.int32),
            block_tables=block_tables,
            logits_rows=np.array(logits_rows, dtype=np.int64),
        )


def wants_prompt_logprobs(request: Request) -> bool:
    """True while the request's prompt is still to be scored."""
    return request.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt_token_ids)
