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


def _outside(text: str) -> str:
    return rf"(?<!\w){text}(?!\w)"


def _mention(text: str, value: str, key: str) -> tuple[tuple[int, int], tuple[int, int] | None] | None:
    """Where a text has a value, and the key in the sentence around it; a sentence that has both is preferred."""
    spoken = re.compile(_outside(re.escape(key).replace("_", "[_ ]") or "$^"), re.IGNORECASE)
    marks = [0, *(mark.end() for mark in _SENTENCE.finditer(text)), len(text)]
    alone = None
    for match in re.finditer(_outside(re.escape(value)), text):
        begin, end = match.span()
        sentence = max(mark for mark in marks if mark <= begin), min(mark for mark in marks if mark >= end)
        names = [name.span() for name in spoken.finditer(text, *sentence)]
        names = [name for name in names if name[1] <= begin or name[0] >= end]
        if names:
            return match.span(), min(names, key=lambda name: abs(name[0] - begin))
        alone = alone or (match.span(), None)
    return alone


def _links(offset: int, source: Encoding, value: tuple[int, int], name: tuple[int, int] | None) -> list[Target]:
    """What a value in a text and the key beside it look at: the value's first token, and the earlier one of the two."""
    first, last = (offset + place for place in span(source, *value))
    found = [(Kind.BEGIN, query, first, first + 1) for query in range(first + 1, last)]
    if name:
        begin, end = (offset + place for place in span(source, *name))
        if begin < first:
            found += [(Kind.OWNER, query, begin, end) for query in range(first, last)]
        else:
            found += [(Kind.OWNED, end - 1, first, last)]
    return found


def find_values(
    texts: Texts, answer: str, encoding: Encoding, start: int
) -> tuple[list[tuple[int, int, int]], list[Target]]:
    """Where the keys and values of a JSON answer come from; its first token stands at `start`.

    Returns:
        For every key and value: the token of the answer before it, and where the conversation mentions it. And what
        the keys and values, there and here, should look at to find each other.
    """
    places: list[tuple[int, int, int]] = []
    targets: list[Target] = []
    key, named = "", (0, 0)
    for match in _PART.finditer(answer):
        group = 1 if match.group(1) else 2
        word = match.group(group)
        if word in ("name", "arguments") and "<tool_call>" in answer:
            key = ""
            continue
        here = span(encoding, match.start(group), match.end(group))
        is_key = answer.startswith(":", match.end())
        if is_key:
            key, named = word, here
        mentions = [(one, _mention(one[1], word, "" if is_key else key)) for one in reversed(texts)]
        known = [(one, *found) for one, found in mentions if found]
        if not known:
            continue
        (offset, _, source), value, name = next((one for one in known if one[2]), known[0])
        first, last = span(source, *value)
        places.append((here[0] - 1, offset + first, offset + last))
        if key and not is_key:
            targets.append((Kind.GATHER, start + here[0] - 1, start + named[0], start + named[1]))
            targets += _links(offset, source, value, name)
            if name:
                begin, end = span(source, *name)
                targets.append((Kind.MATCH, start + named[1] - 1, offset + begin, offset + end))
    return places, targets
