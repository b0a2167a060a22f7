"""The seeded stream of training dialogues."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from .bank import capital
from .context_tasks import ContextTasks, Dialogue, lookup, recite
from .json_tasks import FIELDS, extraction
from .talk_tasks import memory, repeat, talk
from .tool_tasks import ToolMaker

# share of each task at the beginning and from a quarter of the training on
EARLY = {
    "context": 0.28,
    "leaflets": 0.0,
    "lookup": 0.20,
    "recite": 0.17,
    "tools": 0.06,
    "json": 0.08,
    "memory": 0.03,
    "talk": 0.02,
    "repeat": 0.16,
}
LATE = {
    "context": 0.20,
    "leaflets": 0.11,
    "lookup": 0.02,
    "recite": 0.01,
    "tools": 0.17,
    "json": 0.35,
    "memory": 0.06,
    "talk": 0.04,
    "repeat": 0.05,
}


_KEYS = {field.key for field in FIELDS}
_LONG_WORD = re.compile(r"^[A-Z][a-z]{4,}\b|\b[a-z]{5,}\b")
SPLICED = 0.4
"""Share of the dialogues about a text in which some words are no words."""


def rare_words(tokenizer: Tokenizer) -> list[str]:
    """For every token of letters a made-up word in lower case that is written with it, if one was found."""
    words = []
    for token, number in sorted(tokenizer.get_vocab().items()):
        piece = token.removeprefix("Ġ")
        if not (piece.isascii() and piece.isalpha()):
            continue
        before = [""] if piece != token else ["", *"bcdfghklmnprstvw", "ba", "le", "mo", "pri", "sta"]
        found = (one + piece.lower() + after for one in before for after in ("", "s", "en", "ock", "ul"))
        word = next((one for one in found if len(one) > 3 and number in tokenizer.encode(f" {one}").ids), None)
        words += [word] if word else []
    return sorted(set(words))


def mixture(progress: float) -> dict[str, float]:
    """The shares of the tasks at a progress between 0 and 1."""
    part = min(1.0, max(0.0, progress - 0.05) / 0.2)
    return {task: EARLY[task] * (1 - part) + LATE[task] * part for task in LATE}


def another_word(word: str, others: list[str], bank: list[str], rare: list[str], rng: random.Random) -> str:
    """A rare word, one of the bank, or the beginning of a word with the end of one of the others or of the bank."""
    if rare and rng.random() < 0.5:  # every token has to be written now and then, or a rare one is taken for others
        return rng.choice(rare)
    if rng.random() < 0.25:
        return rng.choice(bank)
    if rng.random() < 0.5:
        other = rng.choice(bank)  # its end is long, so that pieces of the vocabulary come up that few words have
        return word[: rng.randint(1, 2)] + other[rng.randint(1, min(3, len(other) - 2)) :]
    other = rng.choice(others)
    return word[: rng.randint(2, len(word) - 2)] + other[rng.randint(1, len(other) - 2) :]


def values_of(dialogue: Dialogue) -> str:
    """The texts of the values in the JSON answers of a dialogue, less the words of keys."""
    found: list[str] = []
    for message in dialogue.messages:
        if message["role"] == "assistant":
            for value in json.loads(message["content"]).values():
                found += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return " ".join(found)


def splice_words(dialogue: Dialogue, bank: list[str], rare: list[str], rng: random.Random) -> Dialogue:
    """Replace some long words of the answers everywhere by others or by two halves of different words.

    Such a word has to be copied from the text, piece by piece: it cannot be known. A question may have it without the
    capital or the plural of the sentence.
    """
    answers = [values_of(dialogue)] if dialogue.task == "json" else [answer for _, answer in dialogue.questions]
    words = sorted({word.lower() for answer in answers for word in _LONG_WORD.findall(answer)} - _KEYS)
    if len(words) < 2:
        return dialogue
    chosen = rng.sample(words, rng.randint(1, max(1, len(words) // 3)))
    spliced = {}
    for word in chosen:
        new = another_word(word, words, bank, rare, rng)
        spliced[word] = new
        if rng.random() < 0.15:  # shelf and shelves
            many = word.endswith("s")
            spliced[word.removesuffix("s")] = new[:-1] + rng.choice(["f", "fe"])
            spliced[word if many else f"{word}s"] = new[:-1] + "ves"
        elif word.endswith("s"):
            spliced.setdefault(word[:-1], new.removesuffix("s"))
        else:
            spliced.setdefault(f"{word}s", f"{new}s")

    def replace_one(found: re.Match[str]) -> str:
        new = spliced.get(found[0].lower())
        return found[0] if new is None else capital(new) if found[0][0].isupper() else new

    def replace(text: str) -> str:
        return re.sub(r"\b[A-Za-z][a-z]{3,}\b", replace_one, text)

    messages = [{**message, "content": replace(message["content"])} for message in dialogue.messages]
    questions = [(replace(question), replace(answer)) for question, answer in dialogue.questions]
    return Dialogue(dialogue.task, messages, dialogue.tools, questions)


class Generator:
    """Draws dialogues of all tasks from one seeded random source.

    Attributes:
        rare: Words that hold every token, `rare_words` of the tokenizer.
    """

    def __init__(self, seed: int, rare: Iterable[str] = ()) -> None:
        self.rng = random.Random(seed)
        self.rare = list(rare)
        self.context = ContextTasks()
        self.tools = ToolMaker()
        self.words = self.context.words()

    def dialogue(self, progress: float = 1.0) -> Dialogue:
        """The next dialogue."""
        shares = mixture(progress)
        task = self.rng.choices(list(shares), list(shares.values()))[0]
        if task == "context":
            size = self.rng.choice(
                [0.4, 0.6, 0.8]
                if progress < 0.3
                else [0.6, 0.8, 1.0, 1.3]
                if progress < 0.6
                else [0.6, 0.8, 1.0, 1.3, 1.6]
            )
            return self.spliced(self.context.qa(self.rng, size))
        if task == "tools":
            return self.tools.calls(self.rng)
        if task == "leaflets":
            return self.spliced(self.context.leaflets(self.rng))
        if task == "repeat":
            return repeat(self.rng, self.rare)
        if task == "json":
            return self.spliced(extraction(self.rng))
        simple = {
            "lookup": lookup,
            "recite": recite,
            "memory": memory,
            "talk": talk,
        }
        return simple[task](self.rng)

    def spliced(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue, in some cases with words that nobody knows."""
        if self.rng.random() < SPLICED:
            return splice_words(dialogue, self.words, self.rare, self.rng)
        return dialogue

    def stream(self, progress: float = 1.0) -> Iterator[Dialogue]:
        """Dialogues without end."""
        while True:
            yield self.dialogue(progress)
