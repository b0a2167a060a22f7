"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pagedllm_core.errors import PagedLLMError


class Logprob(NamedTuple):
    """One token's log-probability under the model's own distribution.

    Attributes:
        logprob: Natural logarithm of the probability, from the raw logits (before penalties and temperature).
        rank: Rank in the vocabulary, 1 for the most likely token.
        decoded_token: The token's text on its own.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One of the sequences that a request generated (or, while streaming, what is new of it).

    Attributes:
        index: Position among the request's outputs, from 0.
        text: Decoded text, without the stop string or end token (unless asked for).
        token_ids: Generated ids, including the end token that stopped generation.
        cumulative_logprob: Sum of the chosen tokens' log-probabilities so far (for beams: the beam's final score).
            None where log-probabilities were not asked for and not needed.
        logprobs: One dictionary per token, or None where not asked for.
        finish_reason: "stop", "length" or "abort" once finished, else None.
        stop_reason: The stop string or stop token id that ended it; None for the model's end token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """True once the sequence has a finish reason."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """What one request cost. Times are in seconds.

    Attributes:
        queued_s: From submission to the first step it took part in.
        time_to_first_token_s: From submission to the first generated token.
        total_s: From submission to the end.
        prompt_tokens: Tokens in the prompt.
        cached_tokens: Prompt tokens whose keys and values were found in the prefix cache.
        output_tokens: Generated tokens over all sequences that are returned.
        preemptions: How often the request was preempted.
    """

    queued_s: float = 0.0
    time_to_first_token_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0

    def copy(self) -> RequestMetrics:
        """The same numbers, to be kept. Many times faster than `dataclasses.replace`, and done for every token."""
        return RequestMetrics(
            self.queued_s, self.time_to_first_token_s, self.total_s, self.prompt_tokens, self.cached_tokens,
            self.output_tokens, self.preemptions,
        )  # fmt: skip


@dataclass(slots=True)
class RequestOutput:
    """A request's result; while streaming it holds only what is new since the last one.

    Attributes:
        request_id: The request's id.
        prompt: The prompt's text, or None where token ids were given.
        prompt_token_ids: The prompt's ids.
        prompt_logprobs: One entry per prompt token, the first None; None where not asked for.
        outputs: The sequences, in order of their index (best first for beams and `best_of`).
        finished: True on the last output of the request.
        metrics: Costs and times so far.
        error: Why the request failed, or None. Only `Engine.step` returns such outputs; everything above it raises.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: PagedLLMError | None = None
