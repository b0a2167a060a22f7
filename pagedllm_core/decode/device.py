"""Sampling without waiting: a step's tokens are chosen on the device, and the host looks at them later.

    launch(logits n) ──► Pending n ──► .tokens  int64 [rows] on the device: input ids of step n + 1
                                  └──► .result() waits for the copy to the host: the step's only synchronisation

The tokens are those of `sample` on the logits that `LogitsRules.apply` makes, up to float noise: a draw depends on the
request's seed, the sequence's index and the token's position alone. On CUDA the work is done by
`pagedllm_core.kernels.sampling`; elsewhere, and without Triton, by `sample` itself, at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from pagedllm_core.batch import wants_prompt_logprobs
from pagedllm_core.decode.logprobs import ScoredTokens, num_logprobs, score_tokens
from pagedllm_core.decode.sample import Draw, most_likely, sample
from pagedllm_core.kernels import has_triton
from pagedllm_core.request import Request, Sequence

if TYPE_CHECKING:
    from pagedllm_core.decode.launch import KernelSampler


class SampleRow(NamedTuple):
    """One token to be chosen.

    Attributes:
        request: Whose token it is.
        sequence: The sequence whose tokens precede it.
        child: Index of the sequence that takes it (another one than `sequence.index` where a prompt forks).
        row: Its row of the step's logits.
        carried: Where the host does not know the sequence's newest token yet: that token's place in
            `carried_tokens`. It counts as a token of the sequence. -1 where `sequence.token_ids` is complete.
    """

    request: Request
    sequence: Sequence
    child: int
    row: int
    carried: int = -1


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What the host learns of a step, one entry per launched row.

    Attributes:
        tokens: The chosen tokens; 0 where none was possible.
        possible: False where every token is forbidden, or the logits hold NaN or infinity.
        scored: Log-probabilities under the model's own distribution, or None where no row asks for any.
    """

    tokens: list[int]
    possible: list[bool]
    scored: ScoredTokens | None


class Pending(Protocol):
    """Tokens that are chosen, or will have been by the time the device comes to it."""

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [rows] on the sampler's device; valid for all later work on the same stream."""

    def result(self) -> SampledTokens:
        """The same on the host, with scores; waits for the device where it has to. May be called again."""


class DeviceSampler:
    """Chooses the tokens of a step.

    Args:
        device: Where the logits are.
        vocab_size: Width of the logits.
        max_rows: Most rows of one launch.
        kernels: Use the Triton kernels; None: on CUDA, where Triton is installed.
    """

    def __init__(self, device: torch.device, vocab_size: int, max_rows: int, kernels: bool | None = None) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        if kernels is None:
            kernels = device.type == "cuda" and has_triton()
        self._kernels: KernelSampler | None = None
        if kernels:
            from pagedllm_core.decode.launch import KernelSampler

            self._kernels = KernelSampler(device, vocab_size, max_rows)

    def accepts(self, request: Request) -> bool:
        """True where all that the request asks for is covered; else it is `advance`'s, which waits for the device.

        Not covered: beams, guided output, the caller's own logits processors, bad words of several tokens, and a
        prompt whose log-probabilities are still being collected. Penalties are covered, carried tokens included.
        """
        return (
            request.beams is None
            and request.grammar is None
            and not request.params.logits_processors
            and all(len(word) == 1 for word in request.rules.bad_word_ids)
            and not wants_prompt_logprobs(request)
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels, which takes seconds where Triton has not cached them; nothing without kernels."""
        if self._kernels is not None:
            self._kernels.warm_up()

    @torch.inference_mode()
    def launch(
        self, logits: torch.Tensor, rows: list[SampleRow], carried_tokens: torch.Tensor | None = None
    ) -> Pending:
        """Start choosing one token per row; waits for nothing.

        Args:
            logits: float32 [n, vocabulary], raw; may be overwritten by later work on the same stream.
            rows: What to choose, of requests that are accepted; at most `max_rows`.
            carried_tokens: int64 on the device, what `SampleRow.carried` points into: usually `tokens` of the step
                before.

        Raises:
            ValueError: Too many rows, logits of another shape or kind, or a carried row without `carried_tokens`.
        """
        self._check(logits, rows, carried_tokens)
        if self._kernels is not None:
            return self._kernels.launch(logits, rows, carried_tokens)
        return _sample_now(logits, rows, carried_tokens)

    def _check(self, logits: torch.Tensor, rows: list[SampleRow], carried_tokens: torch.Tensor | None) -> None:
        if not 0 < len(rows) <= self.max_rows:
            raise ValueError(f"rows: {len(rows)} of them; this sampler takes 1 to {self.max_rows}")
        if logits.dim() != 2 or logits.shape[1] != self.vocab_size or logits.dtype != torch.float32:
            raise ValueError(f"logits: {logits.dtype} {tuple(logits.shape)}; give float32 [rows, {self.vocab_size}]")
        if carried_tokens is None and any(row.carried >= 0 for row in rows):
            raise ValueError("carried_tokens: is missing, and a row's newest token is in it")


@dataclass(frozen=True, slots=True)
class _Ready:
    """Tokens that the host knows already."""

    tokens: torch.Tensor
    sampled: SampledTokens

    def result(self) -> SampledTokens:
        return self.sampled


def _sample_now(logits: torch.Tensor, rows: list[SampleRow], carried_tokens: torch.Tensor | None) -> Pending:
    """The path without kernels: `sample` and `score_tokens`, waited for."""
    raw = logits[[row.row for row in rows]]
    processed = raw.clone() if any(row.request.rules.active for row in rows) else raw
    carried = [] if carried_tokens is None else carried_tokens.tolist()
    for place, row in enumerate(rows):
        if row.request.rules.active:
            processed[place] = row.request.rules.apply(processed[place], _complete(row, carried))
    best, possible = most_likely(processed)
    if not bool(possible.all()):
        best = best.where(possible, 0)
        processed = processed.where(possible[:, None], 0.0)
    draws = [Draw(row.request.sampling, row.child, len(row.sequence.token_ids) + (row.carried >= 0)) for row in rows]
    tokens = sample(processed, draws, best).where(possible, 0)
    scored = score_tokens(raw, tokens, [num_logprobs(row.request) for row in rows])
    return _Ready(tokens, SampledTokens(tokens.tolist(), possible.tolist(), scored))


def _complete(row: SampleRow, carried: list[int]) -> Sequence:
    """The row's sequence with its newest token."""
    if row.carried < 0:
        return row.sequence
    sequence = row.sequence.detach()
    sequence.token_ids.append(carried[row.carried])
    return sequence
