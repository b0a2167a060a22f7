"""The clinic's page for its test: what would hang on the machine's speed waits for something to happen instead.

    streamlit run gated_page.py -- FOLDER

While FOLDER/together holds a number, answers begin when so many visitors have asked, so all of them run at once. The
answer to `HELD` stops after some words until something is written into FOLDER/pipe. The answer to `FAILING` fails.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import streamlit as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "clinic_assistant"))

import page
from assistant import ClinicAssistant

HELD = "How long does a full hearing test take?"
FAILING = "What breaks the page?"
WORDS = 4


@st.cache_resource
def close_gates(folder: Path) -> None:
    """Once for the process, since Streamlit runs this file again and again."""
    retrieve, stream = ClinicAssistant.retrieve, ClinicAssistant.stream
    gates: dict[int, tuple[asyncio.Event, list[str]]] = {}

    async def retrieve_together(self, question):
        found = await retrieve(self, question)
        if (folder / "together").exists():
            visitors = int((folder / "together").read_text())
            all_there, arrived = gates.setdefault(visitors, (asyncio.Event(), []))
            arrived.append(question)
            if len(arrived) == visitors:
                all_there.set()
            await all_there.wait()
        return found

    async def stream_held(self, question):
        if question == FAILING:
            raise RuntimeError("a secret of the machine room")
        words = 0
        async for part in stream(self, question):
            # Word by word: where the machine is slow, all of an answer may come in one part.
            for word in re.findall(r"\s*\S+\s*|\s+", part) if question == HELD and isinstance(part, str) else [part]:
                yield word
                words += 1
                if question == HELD and words == WORDS:
                    await asyncio.to_thread((folder / "pipe").read_text)

    ClinicAssistant.retrieve, ClinicAssistant.stream = retrieve_together, stream_held


if __name__ == "__main__":
    close_gates(Path(sys.argv[1]))
    page.main(page.read_arguments([]))
