"""What the sampling kernels read of each row, and how it comes to the device: one copy from pinned memory a step.

    uniforms   float64 [max_rows]          the random number of each row
    records    ROW     [max_rows]          one record per row, below
    tail       int32                       token lists: edits, their biases, past tokens, their counts

A list is named by its first and last + 1 entry, as in a compressed sparse row matrix. Each list starts on 16 bytes, so
that the kernels' pointers are always aligned alike.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.decode.sample import GREEDY_BELOW
from pagedllm_core.request import Request, Sequence

ROW = np.dtype(
    [
        ("source", "i4"),  # row of the step's logits
        ("place", "i4"),  # row of the changed logits, -1 where they are left as they are
        ("filtered", "i4"),  # number among the rows with min-p, top-k or top-p, -1 where it has none
        ("temperature", "f4"),  # 0 is greedy
        ("reach", "f4"),  # min-p: -log of it, infinity where off
        ("top_k", "i4"),  # 0 where off
        ("top_p", "f4"),  # 1 where off
        ("scored", "i4"),  # 1 where the chosen token's log-probability is wanted
        ("only", "i4"),  # 1 where only the tokens of the edits are allowed
        ("edits", "i4"),  # first and last + 1 entry of the edits: tokens whose logit a number is added to
        ("edits_end", "i4"),
        ("past", "i4"),  # likewise of the past: distinct tokens, and how often each was generated
        ("past_end", "i4"),
        ("repetition", "f4"),
        ("presence", "f4"),
        ("frequency", "f4"),
        ("carried", "i4"),  # place of the newest token among the carried ones, -1 where it is in the past
    ]
)

Ints = npt.NDArray[np.int32]
_ALIGNED = 4  # numbers of 4 bytes


def column(name: str) -> int:
    """Where a field lies in a record, counted in numbers of 4 bytes."""
    offset: int = ROW.fields[name][1]  # type: ignore[index]
    return offset // 4


class History:
    """The distinct tokens of a sequence, and how often each was generated; follows the sequence as it grows.

    Args:
        sequence: The sequence.
        with_prompt: Count the prompt's tokens, too (0 times generated).
    """

    def __init__(self, sequence: Sequence, with_prompt: bool) -> None:
        self._places: dict[int, int] = {}
        self._tokens, self._counts = array("i"), array("i")
        self._seen = 0 if with_prompt else sequence.prompt_length

    def follow(self, sequence: Sequence) -> tuple[Ints, Ints]:
        """Tokens and counts, int32 each."""
        for place in range(self._seen, len(sequence.token_ids)):
            token = sequence.token_ids[place]
            if token not in self._places:
                self._places[token] = len(self._tokens)
                self._tokens.append(token)
                self._counts.append(0)
            self._counts[self._places[token]] += place >= sequence.prompt_length
        self._seen = len(sequence.token_ids)
        # Copies, as an array that is looked into cannot grow.
        return np.frombuffer(self._tokens, np.int32).copy(), np.frombuffer(self._counts, np.int32).copy()


class Prepared:
    """What of a request is the same at every step.

    Attributes:
        record: The bytes of its record, with the step's own fields still to be filled.
        filtered: True where tokens are drawn within min-p, top-k or top-p.
        active: True where the logits may be changed.
        penalised: True where past tokens matter.
        repeats: True where the prompt's matter, too.
        min_tokens: Generated tokens before which end tokens are forbidden.

    Args:
        request: The request.
        vocab_size: Width of the logits.
        scored: True where its tokens' log-probabilities are wanted.
    """

    def __init__(self, request: Request, vocab_size: int, scored: bool) -> None:
        params, sampling, rules = request.params, request.sampling, request.rules
        record = np.zeros((), dtype=ROW)
        record["temperature"] = sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0
        record["reach"] = abs(math.log(sampling.min_p)) if sampling.min_p > 0 else math.inf
        record["top_k"] = sampling.top_k if sampling.top_k < vocab_size else 0
        record["top_p"] = sampling.top_p
        record["scored"], record["only"] = scored, bool(params.allowed_token_ids)
        record["repetition"] = rules.repetition_penalty
        record["presence"], record["frequency"] = params.presence_penalty, params.frequency_penalty
        self.record = record.tobytes()
        self.filtered = bool(record["temperature"] > 0) and bool(
            record["top_k"] > 0 or sampling.top_p < 1 or sampling.min_p > 0
        )
        self.repeats = rules.repetition_penalty != 1.0
        self.penalised = bool(self.repeats or params.presence_penalty or params.frequency_penalty)
        self.active = rules.active
        self.min_tokens = params.min_tokens
        self._always = bool(params.allowed_token_ids or params.logit_bias or rules.bad_word_ids)
        bad = [word[0] for word in rules.bad_word_ids]
        self._late = _edits(request, bad)
        self._early = _edits(request, [*bad, *rules.end_token_ids]) if params.min_tokens else self._late

    def changes(self, generated: int) -> bool:
        """True where the logits are changed once `generated` tokens are there."""
        return self.penalised or generated < self.min_tokens or self._always

    def edits(self, generated: int) -> tuple[Ints, Ints]:
        """Tokens, and the bits of what is added to their logits, once `generated` tokens are there."""
        return self._early if generated < self.min_tokens else self._late


def _edits(request: Request, forbidden: list[int]) -> tuple[Ints, Ints]:
    biases = dict(request.params.logit_bias or {})
    biases.update(dict.fromkeys(forbidden, -np.inf))
    if request.params.allowed_token_ids:
        biases = {token: biases.get(token, 0.0) for token in request.params.allowed_token_ids}
    tokens = np.fromiter(biases, dtype=np.int32, count=len(biases))
    return tokens, np.fromiter(biases.values(), dtype=np.float32, count=len(biases)).view(np.int32)


@dataclass(slots=True)
class Staged:
    """A step's rows on the device.

    Attributes:
        uniforms: float64 [rows].
        records: int32 [rows, fields].
        edit_tokens: int32, and the float32 biases beside them.
        edit_biases: float32.
        past_tokens: int32, and the int32 counts beside them.
        past_counts: int32.
    """

    uniforms: torch.Tensor
    records: torch.Tensor
    edit_tokens: torch.Tensor
    edit_biases: torch.Tensor
    past_tokens: torch.Tensor
    past_counts: torch.Tensor


class Staging:
    """A pinned buffer on the host and its twin on the device.

    The host's half may be written again once the copy has been made, which its user knows from an event.

    Args:
        device: Where the rows go.
        max_rows: Most rows of one step.
    """

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self._device, self._max_rows = device, max_rows
        self._tail = _aligned(2 * max_rows) + _aligned(max_rows * (ROW.itemsize // 4))
        self._grow(self._tail + 1024)

    def _grow(self, size: int) -> None:
        self._host = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._twin = torch.empty(size, dtype=torch.int32, device=self._device)

    def put(self, uniforms: npt.NDArray[np.float64], records: npt.NDArray[np.void], lists: list[Ints]) -> Staged:
        """Copy a step's rows to the device; the four lists are those of `Staged`, biases as int32 views."""
        starts = [self._tail]
        for one in lists:
            starts.append(starts[-1] + _aligned(len(one)))
        if starts[-1] > len(self._host):
            self._grow(2 * starts[-1])
        host = self._host.numpy()
        host[: 2 * len(uniforms)] = uniforms.view(np.int32)
        first = _aligned(2 * self._max_rows)
        width = ROW.itemsize // 4
        host[first : first + width * len(records)] = records.view(np.int32)
        for start, one in zip(starts, lists, strict=False):
            host[start : start + len(one)] = one
        used = starts[-1] if starts[-1] > self._tail else first + width * len(records)
        self._twin[:used].copy_(self._host[:used], non_blocking=True)
        edit_tokens, edit_biases, past_tokens, past_counts = (
            self._twin[start : max(end, start + _ALIGNED)] for start, end in pairwise(starts)
        )
        return Staged(
            self._twin[: 2 * len(uniforms)].view(torch.float64),
            self._twin[first : first + width * len(records)].view(-1, width),
            edit_tokens,
            edit_biases.view(torch.float32),
            past_tokens,
            past_counts,
        )


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
