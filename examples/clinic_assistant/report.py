"""Asks the questions of the file all at once, and shows how it went. Both scripts use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from material import Question, Reply, is_unknown
from tqdm.auto import tqdm

from pagedllm_core import list_engines

WIDTHS = (44, 60, 26)


@dataclass(frozen=True)
class Summary:
    """The figures of a run.

    Attributes:
        asked: Questions that a leaflet answers.
        hits: Of those, the ones whose leaflet was among those found.
        right: Of those, the ones with a right answer.
        cited: Of those, the ones with the right leaflet as their source.
        outside: Questions that no leaflet answers.
        unknown: Of those, the ones where the assistant says that it does not know.
        cached: Share of the prompts' tokens that were in the prefix cache.
        batch: Most sequences in one step.
        seconds: How long all of it took.
    """

    asked: int
    hits: int
    right: int
    cited: int
    outside: int
    unknown: int
    cached: float
    batch: int
    seconds: float

    def __str__(self) -> str:
        """A few lines."""
        return "\n".join(
            [
                f"retrieval hit@4        {self.hits} of {self.asked}",
                f"right answers          {self.right} of {self.asked}",
                f"right source cited     {self.cited} of {self.asked}",
                f"outside: don't know    {self.unknown} of {self.outside}",
                f"from the prefix cache  {self.cached:.0%} of the prompts' tokens",
                f"largest batch          {self.batch} sequences in one step",
                f"time                   {self.seconds:.1f} s",
            ]
        )


async def ask_all(ask: Callable[[str], Awaitable[Reply]], questions: Sequence[Question]) -> tuple[list[Reply], float]:
    """All questions at once, with a progress bar; the replies and the seconds it took."""
    started = time.perf_counter()
    with tqdm(total=len(questions), desc="asking", unit="question") as bar:

        async def one(question: Question) -> Reply:
            reply = await ask(question.text)
            bar.update()
            return reply

        replies = await asyncio.gather(*map(one, questions))
    return replies, time.perf_counter() - started


def summarize(questions: Sequence[Question], replies: Sequence[Reply], seconds: float) -> Summary:
    """The figures of a run."""
    pairs = list(zip(questions, replies, strict=True))
    inside = [(question, reply) for question, reply in pairs if question.leaflet is not None]
    outside = [reply for question, reply in pairs if question.leaflet is None]
    return Summary(
        asked=len(inside),
        hits=sum(question.leaflet in [leaflet.name for leaflet in reply.found] for question, reply in inside),
        right=sum(question.is_right(reply.answer) for question, reply in inside),
        cited=sum(source(reply) == question.leaflet for question, reply in inside),
        outside=len(outside),
        unknown=sum(is_unknown(reply.answer) for reply in outside),
        cached=sum(reply.cached_tokens for reply in replies) / max(1, sum(reply.prompt_tokens for reply in replies)),
        batch=max((engine.stats().max_batch_size for engine in list_engines()), default=0),
        seconds=seconds,
    )


def show(questions: Sequence[Question], replies: Sequence[Reply]) -> None:
    """The table of questions and answers."""
    print(row("question", "answer", "source", "right", "cached"))
    print("  ".join("-" * width for width in (*WIDTHS, 5, 6)))
    for question, reply in zip(questions, replies, strict=True):
        right = "yes" if question.is_right(reply.answer) else "NO"
        print(row(question.text, reply.answer, source(reply) or "-", right, str(reply.cached_tokens)))


def row(question: str, answer: str, leaflet: str, right: str, cached: str) -> str:
    """One line of the table."""
    cells = [cut(text, width).ljust(width) for text, width in zip((question, answer, leaflet), WIDTHS, strict=True)]
    return "  ".join([*cells, right.ljust(5), cached.rjust(6)])


def cut(text: str, width: int) -> str:
    """A text on one line that is no longer than this."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def source(reply: Reply) -> str | None:
    """The file that a reply cites."""
    return reply.citation.leaflet.name if reply.citation else None
