"""The clinic's leaflets and questions, and how an answer is traced to its leaflet. Needs no framework."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LEAFLETS = HERE / "leaflets"
QUESTIONS = HERE / "questions.json"
HELD_OUT = HERE / "questions_held_out.json"
TOP_K = 4
READ = 1
SYSTEM = "Answer the question from the leaflets."
USER = "Leaflet:\n{context_str}\n\nQuestion: {query_str}"
SENTENCE_END = r"(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?<=[.!?])\s+"
MAX_TOKENS = 80
_QUOTED = 0.75


@dataclass(frozen=True)
class Leaflet:
    """One leaflet.

    Attributes:
        name: Its file.
        title: Its first line, or the PDF file's title.
        text: The rest.
    """

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Some sentences of a leaflet, as they are searched and read."""

    leaflet: Leaflet
    text: str

    def __str__(self) -> str:
        """As the model reads it."""
        return f"{self.leaflet.title}\n{self.text}"


@dataclass(frozen=True)
class Question:
    """One question of the file.

    Attributes:
        text: What is asked.
        leaflet: The file that answers it, or None where none does.
        keys: A right answer holds one of these.
    """

    text: str
    leaflet: str | None
    keys: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """True where the answer holds what a right one holds, or says that it does not know where nobody could."""
        if self.leaflet is None:
            return is_unknown(answer)
        return any(key.lower() in answer.lower() for key in self.keys)


@dataclass(frozen=True)
class Citation:
    """Where an answer comes from: a leaflet and its sentence."""

    leaflet: Leaflet
    sentence: str


@dataclass(frozen=True)
class Reply:
    """An answer with its sources.

    Attributes:
        question: What was asked.
        answer: What the model wrote.
        passages: What retrieval found, the best first; the model read the first ones.
        citation: Where the answer comes from, if it is a leaflet's sentence.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Of those, the ones that another request's blocks held already.
    """

    question: str
    answer: str
    passages: tuple[Passage, ...]
    citation: Citation | None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def found(self) -> tuple[Leaflet, ...]:
        """The leaflets that retrieval found, the best first."""
        return leaflets_of(self.passages)


def read_leaflets(folder: Path = LEAFLETS) -> list[Leaflet]:
    """All leaflets of a folder, text files and PDF files."""
    return [read_leaflet(path) for path in sorted(folder.iterdir()) if path.suffix in (".txt", ".pdf")]


def read_leaflet(path: Path) -> Leaflet:
    """One leaflet. Its lines are joined, since those of a PDF file end wherever the page does."""
    if path.suffix == ".txt":
        title, _, text = path.read_text(encoding="utf-8").strip().partition("\n")
        return Leaflet(path.name, title.strip(), " ".join(text.split()))
    from pypdf import PdfReader

    reader = PdfReader(path)
    text = " ".join(word for page in reader.pages for word in page.extract_text().split())
    title = str((reader.metadata and reader.metadata.title) or path.stem)
    return Leaflet(path.name, title, text.removeprefix(title).strip())


def read_questions(path: Path = QUESTIONS) -> list[Question]:
    """The file of questions."""
    items: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [Question(item["question"], item["leaflet"], tuple(item["answer"])) for item in items]


def is_unknown(answer: str) -> bool:
    """True where an answer says that the leaflets do not tell."""
    return "don't know" in answer.replace("’", "'").lower()


def leaflets_of(passages: Iterable[Passage], count: int = TOP_K) -> tuple[Leaflet, ...]:
    """The first few leaflets that passages come from, in their order."""
    return tuple(dict.fromkeys(passage.leaflet for passage in passages))[:count]


def cite(answer: str, read: Iterable[Leaflet]) -> Citation | None:
    """The sentence that an answer quotes: of all that were read, the one with the most of its words, if it has most."""
    words = set(_words(answer))
    if not words or is_unknown(answer):
        return None
    sentences = [(leaflet, sentence) for leaflet in read for sentence in _sentences(leaflet.text)]
    if not sentences:
        return None
    scores = [len(words & set(_words(sentence))) / len(words | set(_words(sentence))) for _, sentence in sentences]
    best = max(range(len(scores)), key=scores.__getitem__)
    return Citation(*sentences[best]) if scores[best] >= _QUOTED else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(SENTENCE_END, text) if part]
