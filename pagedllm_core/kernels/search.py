"""Limits on the distance from a row's best token, found without sorting, and draws within them.

A token's distance, (best - logit) / temperature, is a non-negative float; its bits, as an integer, sort like it. So
the smallest limit within which enough tokens (top-k), or enough mass (top-p), lie is found exactly by a search over
integers:

    low                                                  high
     |------|------|------|------|------|------|------|------|        one pass over the tokens weighs what lies within
            1.2    3.9    7.0 ▲  8.8 ...                              each pivot; the range between two pivots remains
                          goal 7.5

A range of 2^31 takes 8 passes with 16 pivots. The passes read a list of candidates only, the tokens within a limit that
is known before. Weights, exp(-distance), are summed in float64.

All functions here run inside a program that holds one row; `start` points to the row's first logit. Lists are in order
of token id, and are written and read by the same program.

Source: bucketSelect in Alabi et al., "Fast k-Selection Algorithms for Graphics Processing Units" (2012), here over the
floats' bits, and for sums of weights as well as counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(64)  # tokens of a group
FARTHEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest finite float
_TILE = tl.constexpr(1024)  # tokens that are held at a time
_PIVOTS = tl.constexpr(16)  # a search over tokens divides its range by this in each pass
_FEW_PIVOTS = tl.constexpr(4)  # likewise over the groups' best tokens, which all lie in registers


@triton.jit
def distance_of(score, top, temperature):
    """How far a logit is below the best one: int32 bits of a non-negative float."""
    return tl.math.div_rn(top - score, temperature).to(tl.int32, bitcast=True)


@triton.jit
def weight_of(distance):
    """What a token weighs, relative to the best one: float32."""
    return tl.exp(-distance.to(tl.float32, bitcast=True))


@triton.jit
def weight_within(distance, limit):
    """The same in float64, and 0 beyond the limit."""
    exact = tl.exp(-distance.to(tl.float32, bitcast=True).to(tl.float64))
    return tl.where(distance <= limit, exact, 0.0)


@triton.jit
def _pivots(low, high, COUNT: tl.constexpr):
    """Limits that divide low .. high evenly, the last one `high` or more, and how far they are apart."""
    step = (high - low) // COUNT + 1
    return low + step * (tl.arange(0, COUNT) + 1) - 1, step


@triton.jit
def search_groups(distance, weight, goal, high):
    """The smallest limit, `high` at most, within which the groups' best tokens alone weigh `goal`."""
    low = high * 0
    while low < high:
        pivots, step = _pivots(low, high, _FEW_PIVOTS)
        weighed = tl.sum(tl.where(distance[:, None] <= pivots[None, :], weight[:, None], 0.0), axis=0)
        low = tl.minimum(low + tl.sum((weighed < goal).to(tl.int32), axis=0) * step, high)
        high = low + tl.minimum(high - low, step - 1)
    return high


@triton.jit
def list_kept(listed, count, number, kept):
    """Append the numbers that are kept to a list of `count`; its new length."""
    kept = kept.to(tl.int32)
    tl.store(listed + count + tl.cumsum(kept, axis=0) - 1, number, mask=kept != 0)
    return count + tl.sum(kept, axis=0)


@triton.jit
def _tokens_of_groups(groups, count, place, vocabulary):
    """A tile's worth of tokens from the list's group number `place` on: their ids, `vocabulary` or more for none."""
    number = place + tl.arange(0, _TILE // GROUP)
    group = tl.load(groups + number, mask=number < count, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.reshape(tl.where((number < count)[:, None], token, vocabulary), [_TILE])


@triton.jit
def list_tokens(start, groups, num_groups, candidates, top, temperature, vocabulary, limit):
    """List the tokens within the limit, which are in the listed groups; how many there are."""
    count = 0
    for place in range(0, num_groups, _TILE // GROUP):
        token = _tokens_of_groups(groups, num_groups, place, vocabulary)
        score = tl.load(start + token, mask=token < vocabulary, other=float("-inf"))
        count = list_kept(candidates, count, token, distance_of(score, top, temperature) <= limit)
    return count


@triton.jit
def rank_of(start, groups, num_groups, vocabulary, chosen):
    """1, and 1 more for each token above `chosen`, which are in the listed groups."""
    rank = 1
    for place in range(0, num_groups, _TILE // GROUP):
        token = _tokens_of_groups(groups, num_groups, place, vocabulary)
        score = tl.load(start + token, mask=token < vocabulary, other=float("-inf"))
        rank += tl.sum((score > chosen).to(tl.int32), axis=0)
    return rank


@triton.jit
def _tile(start, candidates, count, place, top, temperature):
    """A tile of candidates and their distances, which are infinite beyond the list's end.

    No list stands for the first `count` tokens from `start` on.
    """
    number = place + tl.arange(0, _TILE)
    token = number
    if candidates is not None:
        token = tl.load(candidates + number, mask=number < count, other=0)
    score = tl.load(start + token, mask=number < count, other=float("-inf"))
    return token, distance_of(score, top, temperature)


@triton.jit
def search_tokens(start, candidates, count, top, temperature, goal, high, BY_COUNT: tl.constexpr):
    """The smallest limit, `high` at most, within which the candidates number, or weigh, `goal`."""
    low = high * 0
    while low < high:
        pivots, step = _pivots(low, high, _PIVOTS)
        reached = tl.zeros([_PIVOTS], tl.float64)
        for place in range(0, count, _TILE):
            _, distance = _tile(start, candidates, count, place, top, temperature)
            if BY_COUNT:
                weight = tl.full([_TILE], 1.0, tl.float32)
            else:
                weight = weight_of(distance)
            inside = distance[:, None] <= pivots[None, :]
            reached += tl.sum(tl.where(inside, weight[:, None], 0.0), axis=0).to(tl.float64)
        low = tl.minimum(low + tl.sum((reached < goal).to(tl.int32), axis=0) * step, high)
        high = low + tl.minimum(high - low, step - 1)
    return high


@triton.jit
def mass_within(start, candidates, count, top, temperature, limit):
    """What the candidates within the limit weigh: float64."""
    total = tl.zeros([], tl.float64)
    for place in range(0, count, _TILE):
        _, distance = _tile(start, candidates, count, place, top, temperature)
        total += tl.sum(weight_within(distance, limit), axis=0)
    return total


@triton.jit
def first_beyond(token, weight, before, target, vocabulary):
    """The first token up to which more than `target` is summed up, `vocabulary` for none; and the last with weight.

    The sum may miss a target at its very end by a rounding; the last token with weight is meant then.
    """
    beyond = (before + tl.cumsum(weight, axis=0) > target) & (weight > 0)
    found = tl.min(tl.where(beyond, token, vocabulary), axis=0)
    last = tl.max(tl.where(weight > 0, token, -1), axis=0)
    return found, last


@triton.jit
def draw(start, candidates, count, top, temperature, vocabulary, limit, target):
    """Invert the cumulative distribution: the first candidate up to which more than `target` is summed up."""
    summed = tl.zeros([], tl.float64)
    found, last = vocabulary, -1
    for place in range(0, count, _TILE):
        token, distance = _tile(start, candidates, count, place, top, temperature)
        weight = weight_within(distance, limit)
        here, latest = first_beyond(token, weight, summed, target, vocabulary)
        found, last = tl.minimum(found, here), tl.maximum(last, latest)
        summed += tl.sum(weight, axis=0)
    return tl.where(found < vocabulary, found, last)
