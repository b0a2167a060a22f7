"""Twenty-four questions to a clinic's leaflets: all at once in one shared batch, then one at a time.

    python examples/quickstart.py

Everything runs in this process, offline, on the bundled model. Each pass starts a fresh engine, so the second finds
nothing that the first one left behind.
"""

from __future__ import annotations

import asyncio
import json
import textwrap
import time
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_pagedllm import ChatPagedLLM
from tqdm.auto import tqdm

from pagedllm_core import EngineStats, list_engines, shutdown

CLINIC = Path(__file__).parent / "clinic"
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the question from the leaflet."),
        ("human", "Leaflet:\n{leaflet}\n\nQuestion: {question}"),
    ]
)


class Progress(BaseCallbackHandler):
    """One step of a progress bar for each answer."""

    def __init__(self, title: str, total: int) -> None:
        self.bar = tqdm(total=total, desc=title, unit="question")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def load_questions() -> list[dict[str, Any]]:
    """Each question with the text of its leaflet and the strings of which a right answer holds one."""
    questions = json.loads((CLINIC / "questions.json").read_text(encoding="utf-8"))
    for item in questions:
        item["leaflet"] = (CLINIC / "leaflets" / item["leaflet"]).read_text(encoding="utf-8").strip()
    return questions


def make_chain() -> Runnable[dict[str, Any], str]:
    """The chain under test. Making it loads nothing; the engine starts at the first call."""
    return PROMPT | ChatPagedLLM(model="tiny", temperature=0, max_tokens=80) | StrOutputParser()


def warm_up(chain: Runnable[dict[str, Any], str]) -> None:
    """Load the model outside the measured time."""
    chain.invoke({"leaflet": "The door is green.", "question": "Which colour does the door have?"})


async def ask_together(questions: list[dict[str, Any]]) -> tuple[list[str], float, EngineStats, float]:
    """All questions with one `abatch`: answers, seconds, the engine's counters, and the mean KV waste meanwhile."""
    chain = make_chain()
    await asyncio.to_thread(warm_up, chain)
    engine = list_engines()[0]
    progress = Progress("together", len(questions))
    started = time.perf_counter()
    answers = asyncio.ensure_future(chain.abatch(questions, config={"callbacks": [progress]}))
    waste = []
    while not answers.done():
        await asyncio.wait([answers], timeout=0.05)
        stats = await asyncio.to_thread(engine.stats)
        if stats.kv_blocks_used:
            waste.append(stats.kv_waste)
    seconds = time.perf_counter() - started
    progress.bar.close()
    return await answers, seconds, engine.stats(), sum(waste) / max(1, len(waste))


def ask_in_turn(questions: list[dict[str, Any]]) -> tuple[list[str], float]:
    """The same questions, each with an `invoke` of its own: answers and seconds."""
    chain = make_chain()
    warm_up(chain)
    progress = Progress("one by one", len(questions))
    started = time.perf_counter()
    answers = [chain.invoke(question, config={"callbacks": [progress]}) for question in questions]
    progress.bar.close()
    return answers, time.perf_counter() - started


def is_right(question: dict[str, Any], answer: str) -> bool:
    """True where the answer holds one of the strings that a right one holds."""
    return any(key.lower() in answer.lower() for key in question["answer"])


def show(questions: list[dict[str, Any]], answers: list[str]) -> int:
    """Print every question with its answer; returns how many are right."""
    right = 0
    for question, answer in zip(questions, answers, strict=True):
        correct = is_right(question, answer)
        right += correct
        print(f"\nQ  {question['question']}")
        print(textwrap.fill(" ".join(answer.split()), 100, initial_indent="A  ", subsequent_indent="   "))
        if not correct:
            print(f"   (wrong: expected {' or '.join(question['answer'])})")
    return right


def main() -> None:
    """Run both passes and print what they gave."""
    questions = load_questions()
    answers, together, stats, waste = asyncio.run(ask_together(questions))
    shutdown()
    answers_in_turn, in_turn = ask_in_turn(questions)
    shutdown()
    right = show(questions, answers)
    same = sum(one == other for one, other in zip(answers, answers_in_turn, strict=True))
    print(f"\nright answers          {right} of {len(questions)} ({right / len(questions):.0%})")
    print(f"same answer both ways  {same} of {len(questions)}")
    print(f"largest batch          {stats.max_batch_size} sequences in one step")
    print(f"KV waste               {waste:.1%} of the used slots held no token, on average")
    print(
        f"one shared batch       {together:.1f} s, one at a time {in_turn:.1f} s: {in_turn / together:.1f} times faster"
    )


if __name__ == "__main__":
    main()
