"""A sequence takes a token: does that end it, and what is its text then?"""

from __future__ import annotations

from pagedllm_core.decode.detokenize import Detokenizer
from pagedllm_core.request import Request, Sequence


def take_token(sequence: Sequence, request: Request, token: int) -> None:
    """Add a chosen token to a sequence, and set its finish reason where that was its last."""
    sequence.token_ids.append(token)
    params, guide = request.params, sequence.guide
    generated = sequence.num_generated
    may_stop = generated >= params.min_tokens  # end tokens were masked before; stop strings may still turn up
    if guide is not None:
        guide.advance(token)
        if token in guide.vocabulary.end_tokens:
            finish_sequence(sequence, request, "length" if guide.shortened else "stop", ended_by_token=True)
            return
        may_stop = may_stop and guide.accepting  # what a grammar asks for is not cut in the middle
    if may_stop and token in request.rules.eos_token_ids:
        finish_sequence(sequence, request, "stop", ended_by_token=True)
        return
    if may_stop and token in params.stop_token_ids:
        sequence.stop_reason = token
        finish_sequence(sequence, request, "stop", ended_by_token=True)
        return
    if request.decode is not None and (request.stream or params.stop):
        stop = _detokenizer(sequence, request).append([token], check_stop=may_stop)
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = "stop", stop
            return
    complete = guide is not None and guide.finished
    if generated >= request.max_tokens or (complete and params.ignore_eos):
        as_wanted = complete and guide is not None and not guide.shortened
        finish_sequence(sequence, request, "stop" if as_wanted else "length")


def finish_sequence(sequence: Sequence, request: Request, reason: str, ended_by_token: bool = False) -> None:
    """Set the finish reason and complete the text; the token that ended generation is no part of it."""
    sequence.finish_reason = reason
    if request.decode is None:
        return
    hidden = 1 if ended_by_token and not request.params.include_stop_str_in_output else 0
    detokenizer = _detokenizer(sequence, request)
    tokens = sequence.token_ids[sequence.prompt_length : len(sequence.token_ids) - hidden]
    detokenizer.append(tokens[detokenizer.num_tokens :], check_stop=False)
    detokenizer.finish()


def _detokenizer(sequence: Sequence, request: Request) -> Detokenizer:
    if sequence.detokenizer is None:
        if request.decode is None:
            raise RuntimeError("a request without a tokenizer has no text")
        params = request.params
        prompt = request.prompt_token_ids
        sequence.detokenizer = Detokenizer(request.decode, prompt, params.stop, params.include_stop_str_in_output)
    return sequence.detokenizer
