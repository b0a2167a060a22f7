"""One step of a request's beam search over its sequences: select, finish, fork, drop."""

from __future__ import annotations

import torch

from pagedllm_core.decode.beam import BeamState, Candidate, best_candidates
from pagedllm_core.decode.finish import finish_sequence, take_token
from pagedllm_core.decode.guided import force, mask_logits
from pagedllm_core.decode.logprobs import score_tokens
from pagedllm_core.errors import NO_TOKEN, RequestFailedError
from pagedllm_core.outputs import Logprob
from pagedllm_core.request import Request, Sequence

MAX_ROUNDS = 16  # looks for candidates that fit the budget of a guided search, before beams follow their closings


def advance_beams(request: Request, state: BeamState[Sequence], logits: torch.Tensor) -> None:
    """Let the beams of a request take their next tokens.

    Args:
        request: All its running sequences have just been computed to their last token.
        state: Its search.
        logits: float32 [beams, vocabulary], raw, in the order of `request.active`.

    Raises:
        RequestFailedError: No token is possible.
    """
    parents = request.active
    logprobs = logits.log_softmax(dim=-1)
    if request.rules.active:
        rows = [request.rules.apply(row.clone(), parent) for row, parent in zip(logprobs, parents, strict=True)]
        logprobs = torch.stack(rows)
    candidates = _candidates(logprobs, request, state, parents)
    if not candidates:
        raise RequestFailedError(NO_TOKEN)
    entries = _entries(request, logits, candidates)
    ends = set(request.rules.end_token_ids)
    tried: dict[Candidate, Sequence] = {}

    def attempt(candidate: Candidate) -> Sequence:
        """The candidate as a sequence of its own, without blocks."""
        if candidate not in tried:
            tried[candidate] = parents[candidate.parent].detach()
            _extend(tried[candidate], request, candidate, entries)
        return tried[candidate]

    def is_end(candidate: Candidate) -> bool:
        may_end = candidate.token in ends or bool(request.params.stop) or request.grammar is not None
        return may_end and attempt(candidate).finished

    going_on, done = state.step(candidates, parents[0].num_generated + 1, is_end, attempt)
    if done:
        conclude(request, state)
        return
    children = [_child(request, parents, going_on, place) for place in range(len(going_on))]
    for place, (child, candidate) in enumerate(zip(children, going_on, strict=True)):
        child.index = place
        _extend(child, request, candidate, entries)
    for parent in parents:
        if parent not in children:
            parent.rewind()
    request.sequences = children


def _candidates(
    logprobs: torch.Tensor, request: Request, state: BeamState[Sequence], parents: list[Sequence]
) -> list[Candidate]:
    """The best continuations; of a guided search only those that can still be completed within the budget."""
    if request.grammar is None:
        return best_candidates(logprobs, state)
    guides = [parent.guide for parent in parents]
    logprobs = mask_logits(logprobs, guides)
    for row, guide in zip(logprobs, guides, strict=True):
        if guide is not None and float(row.max()) == -torch.inf:
            force(row, guide.way_on)
    room = request.max_tokens - parents[0].num_generated - 1
    for _ in range(MAX_ROUNDS):
        candidates = best_candidates(logprobs, state)
        wrong = [one for one in candidates if (guide := guides[one.parent]) and not guide.fits(one.token, room)]
        if not wrong:
            return candidates
        for one in wrong:
            guide = guides[one.parent]
            if guide is not None and one.token == int(logprobs[one.parent].argmax()):  # of a beam, what it would do
                guide.refuse(one.token, room)
            logprobs[one.parent, one.token] = -torch.inf
        for number in {one.parent for one in wrong}:
            guide = guides[number]
            if guide is not None and float(logprobs[number].max()) == -torch.inf:
                force(logprobs[number], guide.way_on)
    for row, guide in zip(logprobs, guides, strict=True):
        if guide is not None:
            force(row, guide.way_on)
    return best_candidates(logprobs, state)


def conclude(request: Request, state: BeamState[Sequence]) -> None:
    """The search is over: the best finished hypotheses take the place of the running beams."""
    for sequence in request.sequences:
        sequence.rewind()
    request.sequences = []
    for place, (score, hypothesis) in enumerate(state.finished[: request.params.n]):
        hypothesis.index = place
        hypothesis.cumulative_logprob = score
        request.sequences.append(hypothesis)


def conclude_early(request: Request, state: BeamState[Sequence], reason: str) -> None:
    """End the search now; the running beams compete with what is finished, at the length they have."""
    for score, sequence in zip(list(state.scores), request.active, strict=True):
        hypothesis = sequence.detach()
        finish_sequence(hypothesis, request, reason)
        state.add_finished(state.rule.finished_score(score, max(1, sequence.num_generated)), hypothesis)
    conclude(request, state)


def _child(request: Request, parents: list[Sequence], going_on: list[Candidate], place: int) -> Sequence:
    """The first child of a parent takes its place; others fork, before anybody writes on or is released."""
    number = going_on[place].parent
    if number not in [earlier.parent for earlier in going_on[:place]]:
        return parents[number]
    child = parents[number].fork(place)
    request.sequences.append(child)  # known from now on, so that its blocks are released whatever happens
    return child


def _extend(
    sequence: Sequence, request: Request, candidate: Candidate, entries: dict[Candidate, dict[int, Logprob]]
) -> None:
    sequence.cumulative_logprob = candidate.score
    if candidate in entries:
        sequence.logprobs.append(entries[candidate])
    take_token(sequence, request, candidate.token)


def _entries(
    request: Request, logits: torch.Tensor, candidates: list[Candidate]
) -> dict[Candidate, dict[int, Logprob]]:
    """The candidates' log-probabilities, where the caller asked for them."""
    count = request.params.logprobs
    if count is None:
        return {}
    rows = logits[[candidate.parent for candidate in candidates]]
    tokens = torch.tensor([candidate.token for candidate in candidates], device=logits.device)
    scored = score_tokens(rows, tokens, [count] * len(candidates))
    if scored is None:
        return {}
    return {candidate: scored.entry(row, count, request.decode_token) for row, candidate in enumerate(candidates)}
