"""Which model answers, what it says of itself, and what it says of arguments that it cannot take."""

from __future__ import annotations

import asyncio
import datetime
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.pagedllm import PagedLLM
from pydantic import BaseModel, ConfigDict

from pagedllm_core import AsyncEngine, shutdown
from pagedllm_core.errors import InvalidRequestError

TINY = Path(__file__).parents[3] / "pagedllm_core" / "bundled" / "tiny"
CHAT = [ChatMessage("Hello")]
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model under another name."""
    place = tmp_path_factory.mktemp("models") / "another"
    place.symlink_to(TINY)
    return str(place)


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[AsyncEngine]:
    with AsyncEngine(model=folder, max_model_len=128, kv_cache_memory="8MiB") as engine:
        yield engine


def test_a_given_engine_names_the_model(engine: AsyncEngine, folder: str) -> None:
    llm = PagedLLM(engine=engine, max_tokens=4)
    assert llm.model == llm.metadata.model_name == llm.to_payload()["model"] == folder
    assert llm.chat(CHAT).raw["model"] == folder
    for copied in (PagedLLM.from_dict(llm.to_dict()), pickle.loads(pickle.dumps(llm))):
        config = copied.engine_config()
        assert (config.model, config.max_model_len) == (folder, 128)
    assert PagedLLM(engine=engine).to_dict() != PagedLLM().to_dict()


def test_dumps_name_the_class() -> None:
    llm = PagedLLM(model="tiny")
    assert llm.model_dump()["class_name"] == llm.to_dict()["class_name"] == "PagedLLM"


def test_what_a_template_in_a_file_can_do(tmp_path: Path) -> None:
    (tmp_path / "named_tools.jinja").write_text(PLAIN)
    for template in (PLAIN, str(tmp_path / "named_tools.jinja")):
        metadata = PagedLLM(chat_template=template).metadata
        assert metadata.is_chat_model
        assert metadata.is_function_calling_model  # the system message shows the tools
    with pytest.raises(InvalidRequestError, match="chat_template="):
        _ = PagedLLM(chat_template=str(tmp_path / "nowhere.jinja")).metadata
    assert not PagedLLM(messages_to_prompt=str).metadata.is_function_calling_model


def test_tools_where_the_template_shows_none() -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    llm = PagedLLM(chat_template=PLAIN, max_tokens=60, temperature=0)
    response = llm.predict_and_call([FunctionTool.from_defaults(add)], "Add 1 and 2", tool_required=True)
    assert response.sources[0].tool_name == "add"


def test_another_model_per_call(folder: str) -> None:
    class Answer(BaseModel):
        sure: bool

    llm = PagedLLM(model=str(TINY / "nowhere"), max_tokens=8)
    for name in ("model", "model_name"):
        assert llm.chat(CHAT, **{name: folder}).raw["model"] == folder
        assert llm.complete("Hello", **{name: folder}).raw["model"] == folder
        assert isinstance(llm.structured_predict(Answer, PromptTemplate("?"), llm_kwargs={name: folder}), Answer)
        later = llm.astructured_predict(Answer, PromptTemplate("?"), llm_kwargs={name: folder})
        assert isinstance(asyncio.run(later), Answer)


async def test_predicting_loads_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    shutdown()
    llm = PagedLLM(model="tiny", max_tokens=4)
    loaded: list[bool] = []
    source = type(llm._source())
    get = source.get

    def watched(self: object) -> object:
        loaded.append(self.current() is not None)  # type: ignore[attr-defined]
        return get(self)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "get", watched)
    assert await llm.apredict(PromptTemplate("Hello"))
    assert [part async for part in await llm.astream(PromptTemplate("Hello"))]
    assert all(loaded)


def test_arguments_that_are_not_served_are_told() -> None:
    llm = PagedLLM(model="tiny", max_tokens=4)
    with pytest.warns(UserWarning, match="extra_body"):
        llm.chat(CHAT, extra_body={"guided": {}})
    assert llm.chat(CHAT, n=None).message.content is not None
    call = ChatMessage(
        role=MessageRole.ASSISTANT, additional_kwargs={"tool_calls": [{"function": {"arguments": "{}"}}]}
    )
    with pytest.raises(InvalidRequestError, match=r"messages: the tool call .* has no name"):
        llm.chat([*CHAT, call])


@pytest.mark.parametrize("mode", [PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION])
def test_strict_classes(mode: PydanticProgramMode) -> None:
    class Visit(BaseModel):
        model_config = ConfigDict(strict=True)
        day: datetime.date

    llm = PagedLLM(model="tiny", max_tokens=60, pydantic_program_mode=mode)
    assert isinstance(llm.structured_predict(Visit, PromptTemplate("When?")).day, datetime.date)
    *_, last = llm.stream_structured_predict(Visit, PromptTemplate("When?"))
    assert isinstance(last, Visit)
