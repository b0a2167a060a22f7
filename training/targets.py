"""Where a dialogue's answers come from: the places that attention heads are taught to look at."""

from __future__ import annotations

import random
import re
from itertools import pairwise

from tokenizers import Encoding

from .attention import Kind, Target
from .grammar import STOP, stem

Texts = list[tuple[int, str, Encoding]]
_WORD = re.compile(r"[^\W\d_]{3,}")
_SENTENCE = re.compile(r"(?<=[.!?]) |\n+(?:[-*•–] |\d+\. )?")
_PART = re.compile(r'"([^"]{2,})"|(?<=: )(-?[0-9][0-9.]+)')


def span(encoding: Encoding, begin: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters between two places."""
    inside = [i for i, (a, b) in enumerate(encoding.offsets) if b > begin and a < end]
    return inside[0], inside[-1] + 1


def find_source(texts: Texts, answer: str) -> tuple[int, int] | None:
    """The positions of the tokens of the first earlier place that holds the answer word for word."""
    if len(answer) < 4:
        return None
    for offset, text, encoding in texts:
        begin = text.find(answer)
        if begin >= 0:
            first, last = span(encoding, begin, begin + len(answer))
            return offset + first, offset + last
    return None


def content_spans(text: str, begin: int, end: int) -> list[tuple[str, int, int]]:
    """The stems of the content words between two places of a text, with their own places."""
    words = [(m.group(), m.start(), m.end()) for m in _WORD.finditer(text, begin, end)]
    return [(stem(word), a, b) for word, a, b in words if word.lower() not in STOP]


def find_words(texts: Texts, question: str, answer: str) -> list[Target]:
    """Pairs of places where the question and the sentence of the answer use the same word; the later looks back."""
    asked = next(((o, t, e, t.rfind(question)) for o, t, e in reversed(texts) if question in t), None)
    stated = next(((o, t, e, t.find(answer)) for o, t, e in texts if answer in t), None)
    if asked is None or stated is None:
        return []
    found = []
    offset, text, encoding, begin = stated
    places: dict[str, tuple[int, int]] = {}
    for name, a, b in content_spans(text, begin, begin + len(answer)):
        first, last = span(encoding, a, b)
        places.setdefault(name, (offset + first, offset + last))
    offset, text, encoding, begin = asked
    for name, a, b in content_spans(text, begin, begin + len(question)):
        if name in places:
            first, last = span(encoding, a, b)
            here, there = (offset + first, offset + last), places[name]
            early, late = sorted([here, there])
            found.append((Kind.MATCH, late[1] - 1, *early))
    return found


def copies(ids: list[int], query: int, first: int, last: int) -> list[Target]:
    """For the tokens after `query`, which copy a source: the token of the source that comes next."""
    found = []
    for step, source in enumerate(range(first + 1, last), query + 1):
        if step + 1 >= len(ids) or ids[step + 1] != ids[source]:
            break
        found.append((Kind.COPY, step, source, source + 1))
    return found


def find_starts(text: str, encoding: Encoding, offset: int, rng: random.Random) -> list[Target]:
    """Some words of a text, each with the first token of its sentence."""
    marks = [match.end() for match in _SENTENCE.finditer(text)]
    found = []
    for mark, after in pairwise([*marks, len(text)]):
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < after and b > mark]
        if len(inside) > 3:
            query = rng.choice(inside[2:])
            found.append((Kind.START, offset + query, offset + inside[0], offset + inside[0] + 1))
    return found


def find_values(texts: Texts, answer: str, encoding: Encoding) -> list[tuple[int, int, int]]:
    """For every key and value in a JSON answer: the token before it, and where the conversation last mentions it."""
    found = []
    for match in _PART.finditer(answer):
        group = 1 if match.group(1) else 2
        if match.group(group) in ("name", "arguments") and "<tool_call>" in answer:
            continue
        value = re.compile(rf"(?<!\w){re.escape(match.group(group))}(?!\w)")
        query = span(encoding, match.start(group), match.end(group))[0] - 1
        for offset, text, source in reversed(texts):
            place = value.search(text)
            if place:
                first, last = span(source, *place.span())
                found.append((query, offset + first, offset + last))
                break
    return found
