"""What a request's owner gets to see: what is new of a streamed request, everything of a finished one."""

from __future__ import annotations

from pagedllm_core.outputs import CompletionOutput, RequestOutput
from pagedllm_core.request import Request, Sequence


def build_output(request: Request) -> RequestOutput:
    """What the request's owner has not seen yet. Called once per step in which the request advanced."""
    finished = not request.active
    request.metrics.output_tokens = sum(sequence.num_generated for sequence in _returned(request))
    prompt_logprobs, request.prompt_scored = None if request.prompt_scored else request.prompt_logprobs, True
    outputs = [
        _delta(sequence, request, index)
        for index, sequence in enumerate(_returned(request))
        if sequence.finished or sequence.num_generated > sequence.num_delivered
    ]
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=[output for output in outputs if output is not None],
        finished=finished,
        metrics=request.metrics.copy(),
    )


def _returned(request: Request) -> list[Sequence]:
    """The sequences the caller gets, in order; of `best_of` the most likely `n`."""
    if request.beams is not None:
        return request.sequences
    if request.params.best_of is None:
        return sorted(request.sequences, key=lambda sequence: sequence.index)
    ranked = sorted(request.sequences, key=lambda sequence: -sequence.cumulative_logprob)
    return ranked[: request.params.n]


def _delta(sequence: Sequence, request: Request, index: int) -> CompletionOutput | None:
    if sequence.finish_delivered:
        return None
    sequence.finish_delivered = sequence.finished
    start = sequence.num_delivered
    sequence.num_delivered = sequence.num_generated
    scored = request.params.logprobs is not None
    ranked = scored or request.beams is not None or request.params.best_of is not None
    return CompletionOutput(
        index=index,
        text=sequence.detokenizer.take(sequence.finished) if sequence.detokenizer else "",
        token_ids=sequence.token_ids[sequence.prompt_length + start :],
        cumulative_logprob=sequence.cumulative_logprob if ranked else None,
        logprobs=sequence.logprobs[start:] if scored else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
