"""Letting LlamaIndex's components send as many calls at once as the engine takes into one step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.evaluation import BatchEvalRunner
from llama_index.core.indices.base import BaseIndex
from llama_index.core.llms import LLM

Component = TypeVar("Component")

_LIMITS = ("num_workers", "workers")
_SWITCHES = ("use_async", "_use_async")
_PARTS = (
    "transformations", "_transformations", "_kg_extractors", "_response_synthesizer", "_synthesizer", "_summarizer",
    "_query_engine", "_query_engines", "_retriever", "_retrievers",
)  # fmt: skip


class HasRecommendation(Protocol):
    """What knows how many calls at once do it good."""

    @property
    def recommended_concurrency(self) -> int:
        """The number of calls."""


def raise_concurrency(component: Component, limit: int | HasRecommendation) -> Component:
    """Let a component, and what it is made of, keep this many calls in flight.

    By itself LlamaIndex keeps 2 to 4, or 1, which is then all that a step can take together. This raises `num_workers`
    and `workers` where they are lower, and turns on `use_async`, in pipelines and extractors, `BatchEvalRunner`,
    response synthesizers, query engines and retrievers. Embeddings are left alone. Numbers that are arguments of a call
    (`IngestionPipeline.run(num_workers=)`, which starts processes) are not touched.

    Args:
        component: What to change, in place.
        limit: The number of calls, or an LLM that recommends one.

    Returns:
        The component.
    """
    _raise(component, limit if isinstance(limit, int) else limit.recommended_concurrency, set())
    return component


def _raise(component: Any, limit: int, seen: set[int]) -> None:
    if id(component) in seen or isinstance(component, BaseEmbedding | LLM | str):
        return
    seen.add(id(component))
    if not isinstance(component, BaseIndex):  # there it is about the vector store
        for name in _LIMITS:
            now = getattr(component, name, None)
            if isinstance(now, int) and now < limit:
                setattr(component, name, limit)
        for name in _SWITCHES:
            if getattr(component, name, None) is False:
                setattr(component, name, True)
    if isinstance(component, BatchEvalRunner):
        component.semaphore = asyncio.Semaphore(component.workers)
    for part in _parts(component):
        _raise(part, limit, seen)


def _parts(component: Any) -> Iterator[Any]:
    for name in _PARTS:
        part = getattr(component, name, None)
        if isinstance(part, Mapping):
            yield from part.values()
        elif isinstance(part, list | tuple):
            yield from part
        elif part is not None:
            yield part
