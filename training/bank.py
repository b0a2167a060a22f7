"""The hand-written fact bank: blocks of sentences and questions with slots, grouped by domain."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .values import SLOTS

_SLOT = re.compile(r"\{(\^?)([^{}]*)\}")
Slots = dict[str, Callable[[random.Random], str]]
DATA = Path(__file__).parent / "data"


@dataclass
class Block:
    """One kind of fact: bindings of its own slots, ways to state it and ways to ask for it."""

    domain: str
    bindings: dict[str, list[str]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)


@dataclass
class Fact:
    """A sentence with the questions that it answers."""

    sentence: str
    questions: list[str]
    key: str = ""


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def fill(pattern: str, context: dict[str, str], rng: random.Random, slots: Slots = SLOTS) -> str:
    """Fills the slots of a pattern; `{a|b}` chooses freely, other slots keep their value in the context."""

    def value(match: re.Match[str]) -> str:
        name = match.group(2)
        if "|" in name:
            text = rng.choice(name.split("|"))
        else:
            if name not in context:
                context[name] = slots[name.rstrip("0123456789")](rng)
            text = context[name]
        return capital(text) if match.group(1) else text

    while _SLOT.search(pattern):
        pattern = _SLOT.sub(value, pattern)
    return pattern


def parse(text: str) -> list[Block]:
    """Reads blocks: `#` starts a domain, `:` binds a slot to options, `=` holds sentences and `?` questions."""
    blocks: list[Block] = []
    domain, pending = "", dict[str, list[str]]()
    for line in filter(None, (raw.strip() for raw in text.splitlines())):
        mark, rest = line[0], line[1:].strip()
        if mark == "#":
            domain = rest
        elif mark == ":":
            slot, options = rest.split("=", 1)
            target = blocks[-1].bindings if blocks and not blocks[-1].questions else pending
            target[slot] = options.split("|")
        elif mark == "=":
            blocks.append(Block(domain, pending, rest.split(" / ")))
            pending = {}
        elif mark == "?":
            blocks[-1].questions += rest.split(" / ")
        else:
            raise ValueError(f"unknown line in the fact bank: {line}")
    return blocks


def load(*names: str) -> dict[str, list[Block]]:
    """The blocks of the named data files, by domain."""
    domains: dict[str, list[Block]] = {}
    for name in names:
        for block in parse((DATA / name).read_text(encoding="utf-8")):
            domains.setdefault(block.domain, []).append(block)
    return domains


def instantiate(block: Block, shared: dict[str, str], rng: random.Random, slots: Slots = SLOTS) -> Fact:
    """A fact of the block; `shared` remembers chosen subjects so that one document speaks about few of them."""
    context: dict[str, str] = {}
    for slot, options in block.bindings.items():
        key = "|".join(options)
        if key not in shared or rng.random() < 0.4:
            shared[key] = rng.choice(options)
        context[slot] = shared[key]
    sentence = capital(fill(rng.choice(block.sentences), context, rng, slots)).replace("..", ".")
    questions = [capital(fill(question, context, rng, slots)) for question in block.questions]
    return Fact(sentence, questions, block.sentences[0] + "|".join(context.get(slot, "") for slot in block.bindings))
