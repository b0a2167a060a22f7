"""The clinic assistant as a web page: answers stream, sources open, and a panel shows the batch that visitors share.

    pip install -r examples/clinic_assistant/requirements.txt
    streamlit run examples/clinic_assistant/page.py

A larger model, or a Qdrant server: `streamlit run examples/clinic_assistant/page.py -- --model NAME --qdrant URL`.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import drawing
import streamlit as st
from assistant import ClinicAssistant
from material import MAX_TOKENS, READ, Passage, Reply, is_unknown
from shared import SharedAssistant

from pagedllm_core.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    ModelLoadError,
    RequestTimeoutError,
)

REFRESH = 2.0  # seconds between two looks at the batch while this visitor waits for nothing
LONGEST = 400  # characters of a question
EXAMPLES = (
    "Where is the night entrance?",
    "How much water should I drink before I donate blood?",
    "What does a red wristband mean?",
    "How tall is the highest mountain of the country?",
)
NOT_SEARCHABLE = "The leaflets cannot be searched at the moment. Please try again later."
NEVER_ANSWERED = "The leaflets do not say. Please ask a member of the staff."

logger = logging.getLogger("clinic")


@dataclass
class Turn:
    """One question of a visitor, and what has become of it."""

    question: str
    answer: str = ""
    reply: Reply | None = None
    error: str | None = None
    over: bool = False

    @property
    def source(self) -> str:
        """Where the answer came from, in a few words."""
        if not self.over:
            return "…"
        if self.error:
            return "not answered"
        if self.reply is None:
            return "stopped"
        if self.reply.citation:
            return self.reply.citation.leaflet.title
        return "not in the leaflets" if is_unknown(self.reply.answer) else "no source"


@st.cache_resource(show_spinner="Reading the leaflets and loading the model …")
def open_assistant(model: str, qdrant: str | None, read: int, embedding: str | None = None) -> SharedAssistant:
    """The one assistant of all visitors; the first of them waits for it."""
    from llama_index.llms.pagedllm import PagedLLM

    # A small pool, so that the map of its blocks shows something: 512 blocks of the bundled model.
    engine_kwargs = {"kv_cache_memory": "20MiB"} if model == "tiny" else {}
    llm = PagedLLM(model=model, temperature=0, max_tokens=MAX_TOKENS, engine_kwargs=engine_kwargs)
    return SharedAssistant(ClinicAssistant(url=qdrant, llm=llm, read=read, embedding=embedding))


def in_plain_words(error: BaseException) -> str:
    """What a visitor is told when something fails; the log has the rest."""
    if isinstance(error, ModelLoadError):
        return f"The language model could not be loaded. {error}"
    if isinstance(error, ContextLengthError | CapacityError):
        return "Your question is too long for the assistant. Please ask it in fewer words."
    if isinstance(error, RequestTimeoutError):
        return "The answer took too long. Please ask again in a moment."
    if isinstance(error, EngineClosedError):
        return "The assistant has just been switched off. Please come back later."
    if type(error).__module__.startswith(("qdrant_client", "httpx", "grpc")):
        return NOT_SEARCHABLE
    return "Something went wrong. Please try again, or ask a member of the staff."


def plain(text: str) -> str:
    """A text as it is: signs that Markdown would read as formatting are escaped."""
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]()#+-.!|$<>~:" else sign for sign in text)


def show_sources(reply: Reply) -> None:
    """The leaflet that was quoted with the sentence marked, and the others that were found."""
    cited = reply.citation
    quoted = [passage for passage in reply.passages if cited and passage.leaflet == cited.leaflet]
    if cited:
        passage = next((passage for passage in quoted if cited.sentence in passage.text), quoted[0])
        with st.expander(f"Source: **{plain(cited.leaflet.title)}** · {plain(cited.leaflet.name)}"):
            st.html(drawing.leaflet(passage, cited.sentence))
    elif not is_unknown(reply.answer):
        st.caption("This answer quotes no sentence of a leaflet, so it has no source. Please check it.")
    first: dict[str, Passage] = {}
    for passage in reply.passages:
        first.setdefault(passage.leaflet.name, passage)
    others = [first[leaflet.name] for leaflet in reply.found if not cited or leaflet != cited.leaflet]
    if others:
        with st.expander("Also found" if cited else "The leaflets that come closest"):
            for passage in others:
                st.markdown(f"**{plain(passage.leaflet.title)}** · {plain(passage.leaflet.name)}")
                st.html(drawing.leaflet(passage))


def show_answer(turn: Turn) -> None:
    """What has become of a question."""
    if turn.error:
        st.warning(turn.error, icon=":material/error:")
    elif turn.reply is None:
        st.markdown(plain(turn.answer))
        st.caption("Stopped before its end.")
    else:
        if is_unknown(turn.reply.answer):
            st.info(NEVER_ANSWERED, icon=":material/help:")
        st.markdown(plain(turn.reply.answer))
        show_sources(turn.reply)
        cached, prompt = turn.reply.cached_tokens, turn.reply.prompt_tokens
        st.caption(f"Prefix cache: {cached} of {prompt} prompt tokens")


def answer(shared: SharedAssistant, turn: Turn, place: Any, refresh: Callable[[], None]) -> None:
    """Stream an answer into its place. Where the visitor leaves or stops it, the request ends with this function."""
    try:
        with closing(shared.stream(turn.question)) as parts:
            for part in parts:
                if isinstance(part, Reply):
                    turn.reply = part
                elif part:
                    turn.answer += part
                    place.markdown(f"{plain(turn.answer)} ▌")
                refresh()
    except Exception as error:
        logger.exception("a question was not answered")
        turn.error = in_plain_words(error)
    finally:
        turn.over = True
    with place.container():
        show_answer(turn)


def refresher(shared: SharedAssistant, place: Any, every: float = 0.25) -> Callable[[], None]:
    """Draws the panel while an answer streams, at most so often."""
    drawn = 0.0

    def refresh() -> None:
        nonlocal drawn
        if time.monotonic() - drawn >= every:
            place.html(drawing.panel(shared.stats()))
            drawn = time.monotonic()

    return refresh


def ask(question: str) -> None:
    """Note a question; the page answers it when it is drawn next."""
    st.session_state.turns.append(Turn(question))
    st.session_state.asked = True


def conversation(shared: SharedAssistant, refresh: Callable[[], None]) -> None:
    """The left side: what was asked and answered, and what is being answered now."""
    turns: list[Turn] = st.session_state.turns
    if not turns:
        st.caption("For example:")
        for question in EXAMPLES:
            st.button(question, on_click=ask, args=(question,))
    for number, turn in enumerate(turns, 1):
        st.html(drawing.anchor(number))
        with st.chat_message("user", avatar=":material/person:"):
            st.markdown(plain(turn.question))
        with st.chat_message("assistant", avatar=":material/local_library:"):
            if number == len(turns) and st.session_state.pop("asked", False):
                answer(shared, turn, st.empty(), refresh)
            else:
                show_answer(turn)


def history() -> Callable[[], None]:
    """The right side's lower part: a visitor's own questions, which belong to this tab and are gone with it.

    Returns:
        What draws them anew when an answer is there.
    """
    turns: list[Turn] = st.session_state.turns
    st.html(drawing.heading("Your questions"))
    if not turns:
        st.caption("They stay in this tab and are gone when it is closed.")
        return lambda: None
    place = st.empty()

    def draw() -> None:
        place.html(drawing.history([(turn.question, turn.source) for turn in turns]))

    draw()
    st.button("Forget them", icon=":material/delete:", type="tertiary", on_click=turns.clear)
    return draw


def main(arguments: argparse.Namespace) -> None:
    """Draw the page for one visitor; Streamlit calls this anew whenever something was asked or clicked."""
    st.set_page_config("Brackwater Clinic", page_icon=":material/local_library:", layout="wide")
    st.html(drawing.STYLE)
    st.session_state.setdefault("turns", [])
    try:
        shared = open_assistant(arguments.model, arguments.qdrant, arguments.read, arguments.embedding)
    except Exception as error:
        logger.exception("the assistant did not start")
        st.error(in_plain_words(error), icon=":material/error:")
        return
    question = st.chat_input("Ask the leaflets", max_chars=LONGEST, submit_mode="stop")
    if question:
        ask(question)
    left, right = st.columns([6, 5], gap="large")
    with right, st.container(border=True):
        st.html(drawing.heading("One batch for all visitors"))
        place = st.empty()
        place.html(drawing.panel(shared.stats()))
    with right, st.container(border=True):
        draw_history = history()

    @st.fragment(run_every=REFRESH)
    def watch() -> None:
        place.html(drawing.panel(shared.stats()))

    with left:
        st.html(drawing.HEADER)
        conversation(shared, refresher(shared, place))
    draw_history()
    watch()


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What stands after `--` on the command line, or what is given."""
    parser = argparse.ArgumentParser(description="The clinic assistant as a web page.")
    parser.add_argument("--model", default="tiny", help="any causal language model (default: the bundled one)")
    parser.add_argument("--embedding", metavar="NAME", help="any sentence-transformer (default: one from a package)")
    parser.add_argument("--qdrant", metavar="URL", help="a Qdrant server instead of the embedded one")
    parser.add_argument("--read", type=int, default=READ, help="passages that the model reads (default %(default)s)")
    return parser.parse_args(given)


if __name__ == "__main__":
    main(read_arguments())
