"""How many calls LlamaIndex's components keep in flight, with and without `raise_concurrency`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_pagedllm import ChatPagedLLM
from llama_index.core import PromptHelper, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import BatchEvalRunner, RelevancyEvaluator
from llama_index.core.extractors import SummaryExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import Accumulate, TreeSummarize
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index.llms.pagedllm import PagedLLM, raise_concurrency

from pagedllm_core import AsyncEngine, EngineConfig

COUNT = 12
NODES = [TextNode(text=f"Page {number} of the book.") for number in range(COUNT)]
PAGES = ["word " * 120 for _ in range(COUNT)]
# Counts characters: no two pages fit into one prompt, but their summaries do.
SMALL = PromptHelper(context_window=860, num_output=32, chunk_overlap_ratio=0, tokenizer=list)


def extract(llm: PagedLLM, change: Callable[[Any], Any]) -> None:
    pipeline = change(IngestionPipeline(transformations=[SummaryExtractor(llm=llm, summaries=["self"])]))
    assert len(pipeline.run(nodes=NODES)) == COUNT


def evaluate(llm: PagedLLM, change: Callable[[Any], Any]) -> None:
    runner = change(BatchEvalRunner({"relevancy": RelevancyEvaluator(llm=llm)}))
    texts = [node.text for node in NODES]
    results = asyncio.run(runner.aevaluate_response_strs(texts, texts, [[text] for text in texts]))
    assert len(results["relevancy"]) == COUNT


def summarize(llm: PagedLLM, change: Callable[[Any], Any]) -> None:
    synthesizer = change(TreeSummarize(llm=llm, prompt_helper=SMALL))
    assert synthesizer.get_response("What?", PAGES)


def accumulate(llm: PagedLLM, change: Callable[[Any], Any]) -> None:
    synthesizer = change(Accumulate(llm=llm, prompt_helper=SMALL))
    assert synthesizer.get_response("What?", PAGES).count("Response") >= COUNT


@pytest.mark.parametrize(("work", "unraised"), [(extract, 4), (evaluate, 2), (summarize, 1), (accumulate, 1)])
def test_the_largest_batch(work, unraised):
    largest = []
    for raised in (False, True):
        with AsyncEngine(EngineConfig(model="tiny", kv_cache_memory="32MiB", num_threads=1)) as engine:
            llm = PagedLLM(engine=engine, max_tokens=32, min_tokens=32)
            work(llm, (lambda one, llm=llm: raise_concurrency(one, llm)) if raised else (lambda one: one))
            largest.append(engine.stats().max_batch_size)
    assert largest[0] <= unraised
    assert largest[1] > unraised


@pytest.mark.usefixtures("fresh_engines")
async def test_one_call_of_each_framework_run_in_one_step():
    length = {"max_tokens": 200, "min_tokens": 200, "ignore_eos": True}
    llm, chat = PagedLLM(model="tiny", **length), ChatPagedLLM(model="tiny", **length)
    engine = llm._source().get()
    assert engine is chat._source().get()
    await asyncio.gather(llm.achat([ChatMessage("Hi")]), chat.ainvoke("Hi"))
    stats = engine.stats()
    assert stats.max_batch_size == 2
    assert stats.tokens_generated == 400
    assert stats.steps < 400


def test_the_recommendation_is_the_engine_s_width():
    assert PagedLLM(max_num_seqs=7).recommended_concurrency == 7
    assert PagedLLM().recommended_concurrency == EngineConfig(model="tiny").max_num_seqs
    with AsyncEngine(EngineConfig(model="tiny", max_num_seqs=3)) as engine:
        assert PagedLLM(engine=engine).recommended_concurrency == 3


def test_what_it_changes_and_what_it_leaves():
    llm = PagedLLM(max_num_seqs=32)
    embedding = MockEmbedding(4, num_workers=2)
    extractors = [SummaryExtractor(llm=llm), SummaryExtractor(llm=llm, num_workers=64)]
    pipeline = IngestionPipeline(transformations=[*extractors, embedding])
    assert raise_concurrency(pipeline, llm) is pipeline
    assert [one.num_workers for one in pipeline.transformations] == [32, 64, 2]
    runner = raise_concurrency(BatchEvalRunner({}), 9)
    assert (runner.workers, runner.semaphore._value) == (9, 9)


def test_it_reaches_into_query_engines():
    llm = PagedLLM(model="tiny", max_tokens=1)
    index = VectorStoreIndex(NODES, embed_model=MockEmbedding(4))
    engines = [RetrieverQueryEngine(index.as_retriever(), TreeSummarize(llm=llm)) for _ in range(2)]
    tools = [QueryEngineTool.from_defaults(one, name=f"t{n}", description="x") for n, one in enumerate(engines)]
    questions = SubQuestionQueryEngine(
        LLMQuestionGenerator.from_defaults(llm=llm), TreeSummarize(llm=llm), tools, use_async=False
    )
    router = RouterQueryEngine.from_defaults(
        [QueryEngineTool.from_defaults(questions, name="all", description="x")], llm=llm
    )
    raise_concurrency(router, llm)
    reached = [router._summarizer, questions, questions._response_synthesizer]
    reached += [engine._response_synthesizer for engine in engines]
    assert all(one._use_async for one in reached)
    assert not index._use_async
