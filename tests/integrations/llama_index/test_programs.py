"""LlamaIndex's agents, programs, query engines and pipelines on the bundled model.

What the model says is held by grammars, or written out where a program needs one text; the tests say what then has to
hold, whatever the model knows.
"""

import asyncio
import json
import re
from typing import Any, Literal

import pytest
import torch
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, MessageRole, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.extractors import (
    DocumentContextExtractor,
    KeywordExtractor,
    QuestionsAnsweredExtractor,
    SummaryExtractor,
)
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.program import FunctionCallingProgram, LLMTextCompletionProgram
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMMultiSelector, LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.llms.pagedllm import PagedLLM, raise_concurrency
from pydantic import BaseModel, Field

from pagedllm_core import AsyncEngine, EngineConfig, get_engine
from tests.integrations.llama_index.suite import Counted

SETTINGS: dict[str, Any] = {"model": "tiny", "kv_cache_memory": "64MiB", "engine_kwargs": {"num_threads": 1}}
TOGETHER = 60.0
"""Seconds after which calls that should have come together are given up."""


@pytest.fixture
def llm() -> PagedLLM:
    return PagedLLM(**SETTINGS, max_tokens=48)


class Turns(PagedLLM):
    """An LLM whose turns are asked for in different ways: the first by the first arguments, and so on."""

    turns: list[dict[str, Any]] = Field(default_factory=list, exclude=True)

    def _chat_call(self, messages: Any, kwargs: dict[str, Any]) -> Any:
        turn = sum(message.role is MessageRole.ASSISTANT for message in messages)
        return super()._chat_call(messages, {**kwargs, **self.turns[turn]})


def turns(*arguments: dict[str, Any]) -> Turns:
    return Turns(**SETTINGS, max_tokens=64, turns=list(arguments))


def written(text: str) -> dict[str, Any]:
    """Arguments of a call that has the model write this text and end."""
    tokenizer = get_engine(PagedLLM(**SETTINGS).engine_config()).tokenizer
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    def write(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-torch.inf)
        logits[ids[len(output)]] = 0
        return logits

    return {"logits_processors": [write], "max_tokens": len(ids) + 64}  # room for whatever else would close the reply


def calls(*named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Arguments of a call that has the model call these tools in one reply."""
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in named]
    return written("\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts))


def weather(city: Literal["Rome", "Oslo", "Lima"]) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def add(first: int, second: int) -> int:
    """Add two numbers."""
    return first + second


TOOLS = {"weather": FunctionTool.from_defaults(weather), "add": FunctionTool.from_defaults(add)}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


# Agents.


def answered(events: list[Any]) -> list[ToolCallResult]:
    """The tool calls of a run; each has the tool's own answer."""
    results = [event for event in events if isinstance(event, ToolCallResult)]
    for result in results:
        assert not result.tool_output.is_error
        function = {"weather": weather, "add": add}.get(result.tool_name)
        assert function is None or result.tool_output.raw_output == function(**result.tool_kwargs)
    return results


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("choice", ["required", "add", "weather"])
async def test_a_function_agent(streaming: bool, choice: str) -> None:
    demand = {"tool_choice": choice, "parallel_tool_calls": False}
    llm = turns(demand, demand, {"tool_choice": "none"})
    agent = FunctionAgent(llm=llm, tools=list(TOOLS.values()), system_prompt="Use the tools.", streaming=streaming)
    handler = agent.run("How warm is Oslo?")
    events = [event async for event in handler.stream_events()]
    output = await handler
    results = answered(events)
    assert len(results) == len({result.tool_id for result in results}) == 2
    assert choice == "required" or {result.tool_name for result in results} == {choice}
    assert not any(isinstance(block, ToolCallBlock) for block in output.response.blocks)
    assert output.raw["usage"]["completion_tokens"] > 0


async def test_the_first_tool_of_an_agent_can_be_named(llm: PagedLLM) -> None:
    agent = FunctionAgent(
        llm=llm, tools=list(TOOLS.values()), initial_tool_choice="add", allow_parallel_tool_calls=False
    )
    handler = agent.run("Hello", max_iterations=2, early_stopping_method="generate")
    events = [event async for event in handler.stream_events()]
    assert (await handler).response is not None  # a system message comes late there
    assert [result.tool_name for result in answered(events)][:1] == ["add"]


async def test_tools_of_one_turn_run_at_once() -> None:
    barrier = asyncio.Barrier(3)

    async def meet(place: str) -> str:
        """Wait for the others."""
        await asyncio.wait_for(barrier.wait(), TOGETHER)
        return place

    first = calls(*(("meet", {"place": place}) for place in ("here", "there", "elsewhere")))
    agent = FunctionAgent(llm=turns(first, {"tool_choice": "none"}), tools=[FunctionTool.from_defaults(meet)])
    handler = AgentWorkflow(agents=[agent]).run("Meet.")
    results = answered([event async for event in handler.stream_events()])
    assert sorted(result.tool_output.content for result in results) == ["elsewhere", "here", "there"]
    await handler


async def test_an_agent_hands_over_to_another() -> None:
    handing = turns(calls(("handoff", {"to_agent": "adder", "reason": "It is a sum."})))
    # Whoever takes over sees the turn that handed over.
    adding = turns({}, calls(("add", {"first": 2, "second": 3})), {"tool_choice": "none"})
    agents = [
        FunctionAgent(name="door", description="Hands over.", llm=handing, can_handoff_to=["adder"]),
        FunctionAgent(name="adder", description="Adds.", llm=adding, tools=[TOOLS["add"]]),
    ]
    handler = AgentWorkflow(agents=agents, root_agent="door").run("What is 2 + 3?")
    events = [event async for event in handler.stream_events()]
    output = await handler
    assert [result.tool_name for result in answered(events)] == ["handoff", "add"]
    assert output.current_agent_name == "adder"


async def test_many_agents_are_one_batch() -> None:
    with AsyncEngine(EngineConfig(model="tiny", num_threads=1)) as engine:
        llm = PagedLLM(engine=engine, max_tokens=40, min_tokens=40, ignore_eos=True)
        agents = [FunctionAgent(llm=llm, tools=[]) for _ in range(8)]
        outputs = await asyncio.gather(*(agent.run("Hello") for agent in agents))
        assert all(output.response.content for output in outputs)
        assert engine.stats().max_batch_size == 8


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_react_agent(streaming: bool) -> None:
    acting = r'Thought: [a-z]{3,12}\nAction: add\nAction Input: \{"first": [0-9], "second": [0-9]\}'
    answering = r"Thought: [a-z]{3,12}\nAnswer: [a-z]{3,12}"
    llm = turns({"guided": {"regex": acting}}, {"guided": {"regex": acting}}, {"guided": {"regex": answering}})
    handler = ReActAgent(llm=llm, tools=[TOOLS["add"]], streaming=streaming).run("What is 2 + 3?")
    results = answered([event async for event in handler.stream_events()])
    assert [result.tool_name for result in results] == ["add", "add"]
    assert re.fullmatch("[a-z]{3,12}", (await handler).response.content)


async def test_an_agent_with_an_output_class(llm: PagedLLM) -> None:
    agent = FunctionAgent(llm=llm, tools=[], output_cls=Person)
    output = await agent.run("Anna is 7.")
    assert isinstance(output.get_pydantic_model(Person), Person)


# Programs.


@pytest.mark.usefixtures("every_output")
async def test_a_function_calling_program(llm: PagedLLM) -> None:
    program = FunctionCallingProgram.from_defaults(Person, "{who} is 7.", llm=llm)
    assert isinstance(program(who="Anna"), Person)
    assert isinstance(await program.acall(who="Anna"), Person)
    both = FunctionCallingProgram.from_defaults(Person, "{who} is 7.", llm=llm, allow_parallel_tool_calls=True)
    assert {type(one) for one in both(who="Anna", llm_kwargs={"max_tokens": 120})} == {Person}
    named = FunctionCallingProgram.from_defaults(Person, "{who} is 7.", llm=llm, tool_choice="Person")
    (*parts, whole) = named.stream_call(who="Anna")
    assert parts
    assert isinstance(whole, Person)


async def test_a_text_completion_program(llm: PagedLLM) -> None:
    program = LLMTextCompletionProgram.from_defaults(
        output_cls=Person, prompt_template_str="{who} is 7.", llm=PagedLLM(**SETTINGS, max_tokens=48)
    )
    given = {"response_format": Person}
    assert isinstance(program(llm_kwargs=given, who="Anna"), Person)
    assert isinstance(await program.acall(llm_kwargs=given, who="Anna"), Person)


# Query engines.

PAGES = [f"Page {number} tells of ward {number}, which opens at {number + 6} in the morning." for number in range(6)]


def index() -> VectorStoreIndex:
    return VectorStoreIndex([TextNode(text=page) for page in PAGES], embed_model=MockEmbedding(4))


async def test_a_query_over_many_nodes(llm: PagedLLM) -> None:
    engine = index().as_query_engine(
        llm=llm, response_mode="tree_summarize", use_async=True, similarity_top_k=len(PAGES)
    )
    answer = await engine.aquery("When does ward 3 open?")
    assert str(answer) == str(await asyncio.to_thread(engine.query, "When does ward 3 open?"))
    assert {node.text for node in answer.source_nodes} == set(PAGES)
    streaming = index().as_query_engine(llm=llm, streaming=True)
    assert "".join([text async for text in (await streaming.aquery("Ward 3?")).response_gen])


async def test_a_query_with_a_form(llm: PagedLLM) -> None:
    for mode in ("compact", "tree_summarize", "refine"):
        engine = index().as_query_engine(llm=llm, output_cls=Person, response_mode=mode)
        assert isinstance((await engine.aquery("Who?")).response, Person)


def tools_of(llm: PagedLLM) -> list[QueryEngineTool]:
    engine = index().as_query_engine(llm=llm)
    return [QueryEngineTool.from_defaults(engine, name=name, description=f"The {name}.") for name in ("wards", "hours")]


async def test_sub_questions(llm: PagedLLM) -> None:
    item = {
        "type": "object",
        "properties": {"sub_question": {"type": "string", "maxLength": 20}, "tool_name": {"enum": ["wards", "hours"]}},
        "required": ["sub_question", "tool_name"],
    }
    schema = {
        "type": "object",
        "properties": {"items": {"type": "array", "items": item, "minItems": 2, "maxItems": 3}},
        "required": ["items"],
    }
    asking = PagedLLM(**SETTINGS, max_tokens=200, guided={"json": schema})
    engine = SubQuestionQueryEngine.from_defaults(
        tools_of(llm), llm=llm, question_gen=LLMQuestionGenerator.from_defaults(llm=asking), verbose=False
    )
    for answer in (await engine.aquery("Compare."), await asyncio.to_thread(engine.query, "Compare.")):
        asked = [node for node in answer.source_nodes if node.text.startswith("Sub question: ")]
        assert len(asked) in (2, 3)
        assert str(answer)


async def test_routes(llm: PagedLLM) -> None:
    choice = {"choice": {"enum": [1, 2]}, "reason": {"type": "string", "maxLength": 20}}
    item = {"type": "object", "properties": choice, "required": list(choice)}
    for selector, count in ((LLMSingleSelector, 1), (LLMMultiSelector, 2)):
        schema = {"type": "array", "items": item, "minItems": count, "maxItems": count}
        choosing = PagedLLM(**SETTINGS, max_tokens=120, guided={"json": schema})
        engine = RouterQueryEngine.from_defaults(tools_of(llm), llm=llm, selector=selector.from_defaults(llm=choosing))
        answer = await engine.aquery("When?")
        selections = answer.metadata["selector_result"].selections
        assert len(selections) == count
        assert {selection.index for selection in selections} <= {0, 1}


class Asked(BaseRetriever):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[str] = []

    def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
        self.queries.append(query_bundle.query_str)
        return [NodeWithScore(node=TextNode(text=query_bundle.query_str), score=1.0)]


async def test_fused_queries() -> None:
    asking = PagedLLM(**SETTINGS, max_tokens=80, guided={"regex": "[a-z]{4,9}\n[a-z]{4,9}\n[a-z]{4,9}"})
    retriever = Asked()
    fusion = QueryFusionRetriever([retriever], llm=asking, num_queries=4, similarity_top_k=9)
    await fusion.aretrieve("When?")
    assert retriever.queries[0] == "When?"
    assert [bool(re.fullmatch("[a-z]{4,9}", query)) for query in retriever.queries[1:]] == [True] * 3
    engine = RetrieverQueryEngine.from_args(fusion, llm=PagedLLM(**SETTINGS, max_tokens=8))
    assert (await engine.aquery("When?")).source_nodes


async def test_evaluations() -> None:
    judge = PagedLLM(**SETTINGS, max_tokens=16, guided={"choice": ["YES", "NO"]})
    evaluators = {"relevancy": RelevancyEvaluator(llm=judge), "faithfulness": FaithfulnessEvaluator(llm=judge)}
    runner = raise_concurrency(BatchEvalRunner(evaluators), judge)
    results = await runner.aevaluate_response_strs(PAGES, PAGES, [[page] for page in PAGES])
    assert {name: len(found) for name, found in results.items()} == {"relevancy": 6, "faithfulness": 6}
    assert all(one.passing is ("yes" in one.feedback.lower()) for found in results.values() for one in found)


# Pipelines, and what they cost.


def test_a_pipeline_of_extractors(llm: PagedLLM) -> None:
    with AsyncEngine(EngineConfig(model="tiny", num_threads=1)) as engine:
        counter, events = TokenCountingHandler(), Counted()
        counted = PagedLLM(engine=engine, max_tokens=12, callback_manager=CallbackManager([counter]))
        extractors = [
            SummaryExtractor(llm=counted, summaries=["self", "prev"]),
            KeywordExtractor(llm=counted),
            QuestionsAnsweredExtractor(llm=counted, questions=1),
        ]
        pipeline = raise_concurrency(IngestionPipeline(transformations=extractors), counted)
        get_dispatcher().add_event_handler(events)
        try:
            nodes = pipeline.run(nodes=[TextNode(text=page) for page in PAGES])
        finally:
            get_dispatcher().event_handlers.remove(events)
        wanted = {"section_summary", "excerpt_keywords", "questions_this_excerpt_can_answer"}
        assert all(wanted <= set(node.metadata) for node in nodes)
        stats = engine.stats()
        requests = 3 * len(PAGES)
        assert len(counter.llm_token_counts) == requests
        ends = [name for name in events.seen if name in ("LLMChatEndEvent", "LLMCompletionEndEvent")]
        assert len(ends) == requests
        assert counter.completion_llm_token_count == stats.tokens_generated
        assert counter.prompt_llm_token_count == stats.tokens_prefilled + stats.prefix_cache_hits
        assert stats.max_batch_size > 4


async def test_the_document_is_computed_once_for_all_its_chunks() -> None:
    text = " ".join(PAGES)
    with AsyncEngine(EngineConfig(model="tiny", num_threads=1)) as engine:
        llm = PagedLLM(engine=engine, max_tokens=12)
        document = Document(text=text, id_="book")
        store = SimpleDocumentStore()
        store.add_documents([document])
        chunks = SentenceSplitter(chunk_size=48, chunk_overlap=0).get_nodes_from_documents([document])
        assert len(chunks) > 2
        extractor = raise_concurrency(DocumentContextExtractor(store, llm=llm, max_output_tokens=8), llm)
        found = await extractor.aextract(chunks)
        assert all("context" in one for one in found)
        whole = len(llm.tokenizer(text)) - engine.config.block_size
        assert engine.stats().prefix_cache_hits >= whole * (len(chunks) - 1)


async def test_a_conversation_of_a_chat_engine(llm: PagedLLM) -> None:
    engine = index().as_chat_engine(llm=llm, chat_mode="condense_plus_context", system_prompt="Be brief.")
    assert str(await engine.achat("When does ward 3 open?"))
    streamed = await engine.astream_chat("And ward 4?")
    assert "".join([text async for text in streamed.async_response_gen()])
    assert len(engine.chat_history) == 4
    assert all(isinstance(message, ChatMessage) for message in engine.chat_history)
