"""From a step's logits to longer sequences: choose tokens, fork, score, detokenize, stop."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pagedllm_core.batch import ScheduledBatch, wants_prompt_logprobs
from pagedllm_core.decode.beam_step import advance_beams, conclude_early
from pagedllm_core.decode.finish import finish_sequence, take_token
from pagedllm_core.decode.guided import Guide, force, mask_logits
from pagedllm_core.decode.logprobs import ScoredTokens, num_logprobs, score_tokens
from pagedllm_core.decode.sample import Draw, most_likely, sample
from pagedllm_core.errors import NO_TOKEN, PagedLLMError, RequestFailedError, as_failure, is_out_of_memory
from pagedllm_core.request import Request, RequestState, Sequence

Failures = dict[Request, PagedLLMError]
MAX_REJECTIONS = 16  # tokens that do not fit the budget of a guided output, before its closing is followed


class Choice(NamedTuple):
    """One token to be chosen: for child number `child` of `sequence`, from row `row` of the step's logits."""

    request: Request
    sequence: Sequence
    child: int
    row: int


@torch.inference_mode()
def advance(batch: ScheduledBatch, logits: torch.Tensor) -> Failures:
    """Let every sequence whose known tokens are all computed take its next token.

    Args:
        batch: The step that was run.
        logits: float32 [rows, vocabulary], the rows that `batch.to_forward()` asked for, in order.

    Returns:
        The requests that failed on their own (a caller's processor raised, no token was possible), with the reason.
    """
    failures: Failures = {}
    choices, beams = collect(batch, logits, failures)
    if choices:
        _advance_samples(choices, logits, failures, batch)
    for request, rows in beams.items():  # last: nothing that concerns the whole batch can fail after a beam moved
        try:
            if request.beams is not None:
                advance_beams(request, request.beams, logits[rows])
        except Exception as error:
            failures[request] = as_failure(request.request_id, error)
    return failures


def _advance_samples(choices: list[Choice], logits: torch.Tensor, failures: Failures, batch: ScheduledBatch) -> None:
    """Choose and add one token for each of the choices."""
    chosen = [choice.row for choice in choices]
    raw = logits if chosen == list(range(len(logits))) else logits[chosen]
    tokens = _choose(choices, raw, failures)
    scored = score_tokens(raw, tokens, [num_logprobs(choice.request) for choice in choices])
    for position, (choice, token) in enumerate(zip(choices, tokens.tolist(), strict=True)):
        if choice.request in failures:
            continue
        try:
            sequence = append_choice(choice, token, scored, position)
            batch.forced += _append_forced(sequence, choice.request)
        except Exception as error:
            failures[choice.request] = as_failure(choice.request.request_id, error)


def collect(
    batch: ScheduledBatch, logits: torch.Tensor, failures: Failures
) -> tuple[list[Choice], dict[Request, list[int]]]:
    """Which rows choose tokens, and which belong to which beam search; scores prompts on the way.

    Mirrors the order of `ScheduledBatch.to_forward`.

    Args:
        batch: The step that was run.
        logits: As in `advance`.
        failures: Receives the requests whose prompt could not be scored.

    Returns:
        The tokens to be chosen, forks before the sequences they share blocks with, and the rows of each beam search.

    Raises:
        MemoryError: There is too little for the scores.
    """
    choices: list[Choice] = []
    beams: dict[Request, list[int]] = {}
    first = 0
    for request, sequence, start, end, samples in batch.rows:
        count = 1 if samples else 0
        scores_prompt = wants_prompt_logprobs(request) and start < sequence.prompt_length
        if scores_prompt:
            count = end - start
        if sequence.finished or request.state is RequestState.FINISHED:  # it ended after the step was launched
            first += count
            continue
        if scores_prompt:
            try:
                _score_prompt(request, start, logits[first : first + count])
            except Exception as error:
                if is_out_of_memory(error):
                    raise  # a smaller step may fit
                failures[request] = as_failure(request.request_id, error)
        if samples and request.beams is not None:
            beams.setdefault(request, []).append(first + count - 1)
        elif samples and request not in failures:
            indices = [sequence.index] if request.forked else range(request.width)
            choices.extend(Choice(request, sequence, index, first + count - 1) for index in indices)
        first += count
    # Forks share their parent's blocks: all of them are made before the parent writes on or is released.
    choices.sort(key=lambda choice: choice.child == choice.sequence.index)
    return choices, {request: rows for request, rows in beams.items() if request not in failures}


def _choose(choices: list[Choice], raw: torch.Tensor, failures: Failures) -> torch.Tensor:
    """Process the logits and sample; int64 [choices]. Rows of failing requests get an arbitrary token."""
    logits = raw
    guides = [choice.sequence.guide for choice in choices]
    guided = any(guide is not None for guide in guides)
    if any(choice.request.rules.active for choice in choices):
        logits = raw.clone()
        for row, choice in enumerate(choices):
            if choice.request.rules.active and choice.request not in failures:
                try:
                    logits[row] = choice.request.rules.apply(logits[row], choice.sequence)
                except Exception as error:
                    failures[choice.request] = as_failure(choice.request.request_id, error)
    if guided:
        logits = mask_logits(logits, guides)
    best, possible = most_likely(logits)
    for row, is_possible in enumerate(possible.tolist()):
        if is_possible:
            continue
        guide = guides[row]
        if guide is None:
            failures.setdefault(choices[row].request, RequestFailedError(NO_TOKEN))
            best[row] = 0
        else:  # other rules forbid all that the grammar allows; what has a form goes on
            best[row] = guide.way_on
        logits = logits.clone() if logits is raw else logits
        force(logits[row], int(best[row]))
    draws = [Draw(choice.request.sampling, choice.child, choice.sequence.num_tokens) for choice in choices]
    tokens = sample(logits, draws, best)
    if guided:
        rooms = [choice.request.max_tokens - choice.sequence.num_generated - 1 for choice in choices]
        _keep_to_budget(tokens, logits, draws, guides, rooms)
    return tokens


def _keep_to_budget(
    tokens: torch.Tensor, logits: torch.Tensor, draws: list[Draw], guides: list[Guide | None], rooms: list[int]
) -> None:
    """Choose again, in place, where a guided output could not be completed any more."""
    rows = list(range(len(guides)))
    for attempt in range(MAX_REJECTIONS + 1):
        chosen = tokens.tolist()
        rows = [row for row in rows if (guide := guides[row]) and not guide.fits(chosen[row], rooms[row])]
        if not rows:
            return
        for row in rows:
            logits[row, chosen[row]] = -torch.inf
            guide = guides[row]
            if guide is not None:
                guide.refuse(chosen[row], rooms[row])
            if guide is not None and (attempt == MAX_REJECTIONS or float(logits[row].max()) == -torch.inf):
                force(logits[row], guide.way_on)
        tokens[rows] = sample(logits[rows], [draws[row] for row in rows])


def _child(choice: Choice) -> Sequence:
    """The sequence that takes the token: the parent itself, or a new fork of it."""
    request, parent = choice.request, choice.sequence
    if choice.child == parent.index:
        return parent
    child = parent.fork(choice.child)
    request.sequences.append(child)
    return child


def append_choice(choice: Choice, token: int, scored: ScoredTokens | None, position: int) -> Sequence:
    """Add a chosen token to its sequence, which may be a new fork, with its score where that is wanted.

    Args:
        choice: Which sequence it is for.
        token: The token.
        scored: Scores of all tokens of the step, or None.
        position: The token's place among them.

    Returns:
        The sequence that took it.
    """
    sequence, request = _child(choice), choice.request
    if scored is not None and num_logprobs(request) is not None:
        sequence.cumulative_logprob += scored.chosen[position]
        if request.params.logprobs is not None:
            sequence.logprobs.append(scored.entry(position, request.params.logprobs, request.decode_token))
    take_token(sequence, request, token)
    return sequence


def _append_forced(sequence: Sequence, request: Request) -> int:
    """Add what a grammar leaves no choice about, where nobody asked for its scores; returns how many tokens."""
    count = 0
    while (
        sequence.guide is not None
        and not sequence.finished
        and num_logprobs(request) is None
        and (token := sequence.guide.only()) is not None
    ):
        take_token(sequence, request, token)
        count += 1
    return count


def finish_early(request: Request, reason: str) -> None:
    """End every sequence that still generates, with the text it has."""
    if request.beams is not None:
        conclude_early(request, request.beams, reason)
        return
    for sequence in request.active:
        finish_sequence(sequence, request, reason)


def _score_prompt(request: Request, start: int, logits: torch.Tensor) -> None:
    """Score prompt tokens start + 1 .. start + rows, the ones that these rows predict."""
    done, count = request.prompt_logprobs, request.params.prompt_logprobs
    prompt = request.prompt_token_ids
    if done is None or count is None:
        return
    if not done:
        done.append(None)  # nothing predicts the first token
    targets = prompt[start + 1 : start + 1 + len(logits)]
    rows = logits[: len(targets)]
    scored = score_tokens(rows, torch.tensor(targets, device=logits.device), [count] * len(targets))
    if scored is not None:
        entries = [scored.entry(position, count, request.decode_token) for position in range(len(targets))]
        done.extend(entries[len(done) - start - 1 :])
