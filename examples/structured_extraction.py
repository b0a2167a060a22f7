"""Thirty-two messages to a restaurant into thirty-two bookings, all at once.

    python examples/structured_extraction.py

Every reply is held to the schema while it is generated, so each is a valid `Booking`. Whether it is the right one is
up to the model; what is wrong stands in parentheses. Everything runs in this process, offline, on the bundled model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_pagedllm import ChatPagedLLM
from pydantic import BaseModel, Field
from tqdm.auto import tqdm

from pagedllm_core import list_engines, shutdown

MESSAGES = Path(__file__).parent / "bookings.json"
PROMPT = ChatPromptTemplate.from_messages([("human", "{text}\n\nExtract name, day, time and guests as JSON.")])


class Booking(BaseModel):
    """A table that somebody asked for."""

    name: str = Field(pattern="^[A-Z][a-z]{1,11} [A-Z][a-z]{1,11}$")
    day: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    time: str = Field(pattern="^[0-2][0-9]:[0-5][0-9]$")
    guests: int = Field(ge=1, le=20)


FIELDS = tuple(Booking.model_fields)


class Progress(BaseCallbackHandler):
    """One step of a progress bar for each reply."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, desc="messages", unit="message")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def load_messages() -> tuple[list[str], list[Booking]]:
    """The messages, and what is right for each."""
    items = json.loads(MESSAGES.read_text(encoding="utf-8"))
    return [item["text"] for item in items], [Booking(**item["booking"]) for item in items]


def make_chain() -> Runnable[dict[str, str], Booking]:
    """From a text to a booking."""
    chat = ChatPagedLLM(model="tiny", temperature=0, max_tokens=80)
    return PROMPT | chat.with_structured_output(Booking)


def show(found: list[Booking], wanted: list[Booking]) -> dict[str, int]:
    """Print a row for each booking, what is wrong in parentheses; returns how often each field is right."""
    right = dict.fromkeys(FIELDS, 0)
    print(f"\n{'':5}" + "".join(f"{name:24}" for name in FIELDS).rstrip())
    for number, (booking, expected) in enumerate(zip(found, wanted, strict=True), 1):
        cells = []
        for name in FIELDS:
            value, correct = getattr(booking, name), getattr(booking, name) == getattr(expected, name)
            right[name] += correct
            cells.append(str(value) if correct else f"({value})")
        print(f"{number:3}  " + "".join(f"{cell:24}" for cell in cells).rstrip())
    return right


def main() -> None:
    """Extract, and count what is right."""
    texts, wanted = load_messages()
    chain = make_chain()
    chain.invoke({"text": "Anna comes on Monday."})  # loads the model outside the measured time
    progress = Progress(len(texts))
    started = time.perf_counter()
    found = chain.batch([{"text": text} for text in texts], config={"callbacks": [progress]})
    seconds = time.perf_counter() - started
    progress.bar.close()
    right = show(found, wanted)
    whole = sum(one == other for one, other in zip(found, wanted, strict=True))
    print(f"\nvalid bookings   {len(found)} of {len(texts)}")
    for name in FIELDS:
        print(f"right {name:10} {right[name]} of {len(texts)}")
    print(f"all four right   {whole} of {len(texts)}")
    print(f"largest batch    {list_engines()[0].stats().max_batch_size} sequences in one step")
    print(f"time             {seconds:.1f} s")
    shutdown()


if __name__ == "__main__":
    main()
