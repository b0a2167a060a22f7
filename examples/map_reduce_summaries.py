"""Twelve leaflets, one graph: a key sentence of each, all at once, and an overview of what they say.

    python examples/map_reduce_summaries.py

LangGraph sends every leaflet to an asynchronous node of its own, so the engine runs all twelve in one batch; a second
round reduces what they found. The bundled model is too small to write summaries, so it picks sentences instead:
`guided` holds each reply to one of them. Everything runs in this process, offline.
"""

from __future__ import annotations

import asyncio
import operator
import re
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_pagedllm import ChatPagedLLM
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from tqdm.auto import tqdm

from pagedllm_core import GuidedParams, list_engines, shutdown

LEAFLETS = Path(__file__).parent / "clinic" / "leaflets"
KEY = "What should a patient know before the visit?"
OVERVIEW = ["When is the clinic closed?", "What must be stopped before the visit?", "Who must call before the visit?"]


class Leaflet(TypedDict):
    """What a node of the first round gets."""

    title: str
    text: str


class State(TypedDict, total=False):
    """What the graph carries."""

    leaflets: list[Leaflet]
    key_sentences: Annotated[list[tuple[str, str]], operator.add]
    overview: list[tuple[str, str]]


class Progress(BaseCallbackHandler):
    """One step of a progress bar for each reply."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, desc="replies", unit="reply")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def load_leaflets() -> list[Leaflet]:
    """Every leaflet: its first line and the rest."""
    leaflets = []
    for path in sorted(LEAFLETS.glob("*.txt")):
        title, _, text = path.read_text(encoding="utf-8").strip().partition("\n")
        leaflets.append(Leaflet(title=title, text=text.strip()))
    return leaflets


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


async def choose(chat: ChatPagedLLM, question: str, text: str) -> str:
    """The sentence of the text that the model takes for the answer."""
    messages = [
        SystemMessage("Quote the sentence of the text that answers."),
        HumanMessage(f"Text:\n{text}\n\nQuestion: {question}"),
    ]
    return (await chat.ainvoke(messages, guided=GuidedParams(choice=sentences(text)))).text


def make_graph(chat: ChatPagedLLM) -> Any:
    """The graph: one node for each leaflet, then one for them all."""

    def send(state: State) -> list[Send]:
        return [Send("map", leaflet) for leaflet in state["leaflets"]]

    async def map_leaflet(leaflet: Leaflet) -> State:
        return {"key_sentences": [(leaflet["title"], await choose(chat, KEY, leaflet["text"]))]}

    async def reduce(state: State) -> State:
        text = " ".join(sentence for _, sentence in state["key_sentences"])
        answers = await asyncio.gather(*(choose(chat, question, text) for question in OVERVIEW))
        return {"overview": list(zip(OVERVIEW, answers, strict=True))}

    graph = StateGraph(State)
    graph.add_node("map", map_leaflet)
    graph.add_node("reduce", reduce)
    graph.add_conditional_edges(START, send, ["map"])
    graph.add_edge("map", "reduce")
    graph.add_edge("reduce", END)
    return graph.compile()


def show(pairs: list[tuple[str, str]]) -> None:
    """Print each title and what belongs to it."""
    for title, text in pairs:
        print(f"\n{title}")
        print(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))


def main() -> None:
    """Run the graph and print what it gave."""
    chat = ChatPagedLLM(model="tiny", temperature=0, max_tokens=120)
    chat.invoke("Hello!", max_tokens=1)  # loads the model outside the measured time
    leaflets = load_leaflets()
    progress = Progress(len(leaflets) + len(OVERVIEW))
    started = time.perf_counter()
    state = asyncio.run(make_graph(chat).ainvoke({"leaflets": leaflets}, {"callbacks": [progress]}))
    seconds = time.perf_counter() - started
    progress.bar.close()
    print("\nOne sentence of each leaflet")
    show(state["key_sentences"])
    print("\n\nOverview")
    show(state["overview"])
    print(f"\nleaflets       {len(state['key_sentences'])}")
    print(f"largest batch  {list_engines()[0].stats().max_batch_size} sequences in one step")
    print(f"time           {seconds:.1f} s")
    shutdown()


if __name__ == "__main__":
    main()
