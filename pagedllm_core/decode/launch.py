"""The host's side of the sampling kernels: stage the rows, launch, and read the copy of what came out."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.decode.device import SampledTokens, SampleRow
from pagedllm_core.decode.logprobs import ScoredTokens, num_logprobs
from pagedllm_core.decode.sample import uniform
from pagedllm_core.decode.staging import ROW, History, Ints, Prepared, Staged, Staging
from pagedllm_core.kernels import beams
from pagedllm_core.kernels.rules import apply_rules
from pagedllm_core.kernels.sampling import Workspace, sample_rows, score_rows
from pagedllm_core.request import Request, Sequence

Array = npt.NDArray[Any]
_NONE: Ints = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class _Lists:
    """Pairs of lists of one length, one after the other; `ends` is where each begins, and where the last one ends."""

    first: list[Ints] = field(default_factory=list)
    second: list[Ints] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])

    def add(self, first: Ints, second: Ints) -> None:
        self.first.append(first)
        self.second.append(second)
        self.ends.append(self.ends[-1] + len(first))

    def joined(self) -> list[Ints]:
        if not self.ends[-1]:
            return [_NONE, _NONE]
        return [np.concatenate(self.first), np.concatenate(self.second)]


class KernelSampler:
    """What `DeviceSampler` does, by kernels. All launches go to one stream.

    Two staging buffers are used in turn, so that a step can be staged while the one before is under way.

    Args:
        device: Where the logits are.
        vocab_size: Width of the logits.
        max_rows: Most rows of one launch.
    """

    def __init__(self, device: torch.device, vocab_size: int, max_rows: int) -> None:
        self._device, self._vocab_size = device, vocab_size
        self._work = Workspace.allocate(max_rows, vocab_size, device)
        self._stagings = [Staging(device, max_rows), Staging(device, max_rows)]
        self._pendings: list[_Copied | None] = [None, None]
        self._turn = 0
        self._no_tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self._prepared: weakref.WeakKeyDictionary[Request, Prepared] = weakref.WeakKeyDictionary()
        self._histories: weakref.WeakKeyDictionary[Sequence, History] = weakref.WeakKeyDictionary()

    def launch(self, logits: torch.Tensor, rows: list[SampleRow], carried_tokens: torch.Tensor | None) -> _Copied:
        """As `DeviceSampler.launch`."""
        self._turn ^= 1
        earlier = self._pendings[self._turn]
        if earlier is not None:
            earlier.settle()  # two steps ago: no wait where its result was read
        staged, num_changed, num_filtered = self._stage(rows)
        carried = self._no_tokens if carried_tokens is None else carried_tokens
        changed = apply_rules(logits, staged, num_changed, carried) if num_changed else None
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        summary = torch.empty((len(rows), 4), dtype=torch.int32, device=self._device)
        sample_rows(logits, changed, num_filtered, staged, self._work, tokens, summary)
        counts = [num_logprobs(row.request) for row in rows]
        most = max((count for count in counts if count is not None), default=None)
        top = None
        if most is not None:
            score_rows(logits, staged, self._work, tokens, summary)
            top = _most_likely(logits, most)
        pending = _Copied(tokens, summary, most is not None, top, [row.row for row in rows])
        self._pendings[self._turn] = pending
        return pending

    def warm_up(self) -> None:
        """As `DeviceSampler.warm_up`."""
        logits = torch.zeros((1, self._vocab_size), dtype=torch.float32, device=self._device)
        record = np.zeros(1, dtype=ROW)
        record["temperature"] = record["top_p"] = record["repetition"] = record["top_k"] = record["scored"] = 1
        record["carried"], record["reach"] = -1, np.inf
        staged = self._stagings[0].put(np.zeros(1), record, [_NONE] * 4)
        tokens = torch.empty(1, dtype=torch.int64, device=self._device)
        summary = torch.empty((1, 4), dtype=torch.int32, device=self._device)
        for changed in (None, apply_rules(logits, staged, 1, self._no_tokens)):
            for num_filtered in (0, 1):
                sample_rows(logits, changed, num_filtered, staged, self._work, tokens, summary)
        score_rows(logits, staged, self._work, tokens, summary)
        for count in (1, 2):
            _most_likely(logits, count)
        tokens.tolist()  # the staging buffer may be written again once all is done

    def _stage(self, rows: list[SampleRow]) -> tuple[Staged, int, int]:
        """Send the rows' records and lists to the device; how many rows are changed, and how many are filtered."""
        prepared = [self._prepare(row.request) for row in rows]
        records = np.frombuffer(bytearray(b"".join(one.record for one in prepared)), dtype=ROW)
        records["source"] = [row.row for row in rows]
        records["carried"] = [row.carried for row in rows]
        records["place"] = -1
        filtered = np.array([one.filtered for one in prepared])
        records["filtered"] = np.where(filtered, np.cumsum(filtered) - 1, -1)
        changed = [
            number for number, one in enumerate(prepared) if one.active and one.changes(_num_generated(rows[number]))
        ]
        edits, past = _Lists(), _Lists()
        for number in changed:
            row, one = rows[number], prepared[number]
            edits.add(*one.edits(_num_generated(row)))
            past.add(*(self._history(row.sequence, one) if one.penalised else (_NONE, _NONE)))
        if changed:
            records["place"][changed] = range(len(changed))
            records["edits"][changed], records["edits_end"][changed] = edits.ends[:-1], edits.ends[1:]
            records["past"][changed], records["past_end"][changed] = past.ends[:-1], past.ends[1:]
        numbers = uniform(
            np.array([row.request.sampling.seed for row in rows], dtype=np.uint64),
            np.array([row.child for row in rows], dtype=np.uint64),
            np.array([len(row.sequence.token_ids) + (row.carried >= 0) for row in rows], dtype=np.uint64),
        )
        staged = self._stagings[self._turn].put(numbers, records, [*edits.joined(), *past.joined()])
        return staged, len(changed), int(filtered.sum())

    def _prepare(self, request: Request) -> Prepared:
        found = self._prepared.get(request)
        if found is None:
            found = self._prepared[request] = Prepared(request, self._vocab_size, num_logprobs(request) is not None)
        return found

    def _history(self, sequence: Sequence, prepared: Prepared) -> tuple[Ints, Ints]:
        found = self._histories.get(sequence)
        if found is None:
            found = self._histories[sequence] = History(sequence, prepared.repeats)
        return found.follow(sequence)


def _num_generated(row: SampleRow) -> int:
    return row.sequence.num_generated + (row.carried >= 0)


def _most_likely(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The most likely tokens of all rows of the step: float32 and int64 [n, count]."""
    count = min(count, logits.shape[1])
    if count == 0:
        return None
    if count > beams.MAX_COUNT:
        values, tokens = logits.topk(count, dim=-1)
        return values, tokens
    starts = torch.arange(len(logits) + 1, dtype=torch.int32, device=logits.device)
    return beams.select_best(logits, count, starts, 1)


class _Copied:
    """A launched step, whose outcome is on its way to the host.

    Args:
        tokens: int64 [rows], on the device.
        summary: int32 [rows, 4], as `sample_rows` and `score_rows` leave it.
        scored: True where some row is scored.
        top: Values and tokens of the logits' most likely ones, [n, count] each, or None.
        sources: Each row's row of the logits.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        summary: torch.Tensor,
        scored: bool,
        top: tuple[torch.Tensor, torch.Tensor] | None,
        sources: list[int],
    ) -> None:
        self.tokens = tokens
        self._scored, self._sources = scored, sources
        # Copies that do not block land in pinned memory, which torch keeps for the next ones.
        self._copies = [one.to("cpu", non_blocking=True) for one in (tokens, summary, *(top or ()))]
        self._event: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def settle(self) -> None:
        """Wait until the device has done all of it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None

    def result(self) -> SampledTokens:
        """As `Pending.result`."""
        self.settle()
        tokens, summary, *top = (one.numpy() for one in self._copies)
        return SampledTokens(tokens.tolist(), summary[:, 0].astype(bool).tolist(), self._scores(tokens, summary, top))

    def _scores(self, tokens: Array, summary: Array, top: list[Array]) -> ScoredTokens | None:
        if not self._scored:
            return None
        chosen, total = (np.ascontiguousarray(summary[:, place]).view(np.float32) for place in (2, 3))
        values, most_likely = top or (np.empty((max(self._sources) + 1, 0)),) * 2
        return ScoredTokens(
            tokens.tolist(),
            chosen.tolist(),
            summary[:, 1].tolist(),
            most_likely[self._sources].tolist(),
            (values[self._sources] - total[:, None]).tolist(),
        )
