"""The clinic assistant: leaflets in Qdrant, dense and word search joined, answers with citations, all asynchronous.

    async with ClinicAssistant() as assistant:
        reply = await assistant.ask("Where is the night entrance?")

Everything runs in this process: the embedding model comes from a package, Qdrant is embedded (or a server, with `url`),
and the answers come from PagedLLM, in which all questions that are open share one batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from material import (
    LEAFLETS,
    MAX_TOKENS,
    READ,
    SYSTEM,
    USER,
    Leaflet,
    Passage,
    Reply,
    cite,
    leaflets_of,
    read_leaflets,
)

if TYPE_CHECKING:
    from index import OfflineEmbedding
    from llama_index.core.prompts import ChatPromptTemplate
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.llms.pagedllm import PagedLLM
    from qdrant_client import AsyncQdrantClient


def make_prompt() -> ChatPromptTemplate:
    """What the model reads: an instruction, the leaflets, and the question last, so that equal leaflets are shared."""
    from llama_index.core.prompts import ChatPromptTemplate

    return ChatPromptTemplate.from_messages([("system", SYSTEM), ("user", USER)])


class ClinicAssistant:
    """Answers questions about a folder of leaflets.

    Args:
        folder: The leaflets, `.txt` and `.pdf`.
        url: A Qdrant server; None keeps the vectors in this process.
        llm: The language model; by default the bundled one.
        read: How many of the passages found the model reads.
        embedding: A sentence-transformer of the Hugging Face hub or of a folder; None: one from a package.

    Attributes:
        embedding: The embedding model, once the assistant is started.
    """

    embedding: OfflineEmbedding

    def __init__(
        self,
        folder: Path = LEAFLETS,
        url: str | None = None,
        llm: PagedLLM | None = None,
        read: int = READ,
        embedding: str | None = None,
    ) -> None:
        self.read = read
        self._embedding_name = embedding
        self._folder = folder
        self._url = url
        self._llm = llm
        self._leaflets: dict[str, Leaflet] = {}
        self._client: AsyncQdrantClient | None = None
        self._searches: list[BaseRetriever] = []

    async def __aenter__(self) -> ClinicAssistant:
        """Read and index the leaflets."""
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        """Let go of Qdrant."""
        await self.close()

    async def start(self) -> None:
        """Read and index the leaflets."""
        from index import ingest, make_embedding
        from qdrant_client import AsyncQdrantClient

        leaflets = await asyncio.to_thread(read_leaflets, self._folder)
        self._leaflets = {leaflet.name: leaflet for leaflet in leaflets}
        self._client = AsyncQdrantClient(url=self._url) if self._url else AsyncQdrantClient(":memory:")
        self.embedding = await asyncio.to_thread(make_embedding, self._embedding_name)
        self._searches = await ingest(leaflets, self._client, self.embedding)

    async def close(self) -> None:
        """Let go of Qdrant."""
        client, self._client, self._searches = self._client, None, []
        if client is not None:
            await client.close()

    @property
    def llm(self) -> PagedLLM:
        """The language model. Making it loads nothing; the engine starts at the first question."""
        if self._llm is None:
            from llama_index.llms.pagedllm import PagedLLM

            self._llm = PagedLLM(model="tiny", temperature=0, max_tokens=MAX_TOKENS)
        return self._llm

    def retriever(self, top_k: int) -> BaseRetriever:
        """The search for passages, as LlamaIndex knows it."""
        from index import join

        if not self._searches:
            raise RuntimeError("the assistant is not started: use `async with`, or await `start()`")
        return join(self._searches, self.llm, top_k)

    async def retrieve(self, question: str) -> list[Passage]:
        """The passages that fit a question, the best first."""
        from index import CANDIDATES

        found = await self.retriever(CANDIDATES).aretrieve(question)
        return [Passage(self._leaflets[node.metadata["leaflet"]], node.text) for node in found]

    async def stream(self, question: str) -> AsyncGenerator[str | Reply, None]:
        """Answer a question bit by bit: pieces of text, and at the end the reply with its sources."""
        found = await self.retrieve(question)
        read = found[: self.read]
        context = "\n\n".join(map(str, read))
        messages = make_prompt().format_messages(context_str=context, query_str=question)
        answer = ""
        usage: dict[str, Any] = {}
        chunks: Any = await self.llm.astream_chat(messages)
        try:
            async for chunk in chunks:
                answer = chunk.message.content or ""
                usage = chunk.raw.get("usage") or usage  # the last chunk has it
                if chunk.delta:
                    yield chunk.delta
        finally:
            await chunks.aclose()  # a reader who leaves early ends the request
        yield Reply(
            question,
            answer,
            tuple(found),
            cite(answer, leaflets_of(read)),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        )

    async def ask(self, question: str) -> Reply:
        """Answer a question."""
        *_, reply = [part async for part in self.stream(question)]
        return cast(Reply, reply)

    def query_engine(self) -> RetrieverQueryEngine:
        """The same as a query engine, for LlamaIndex's evaluators and agents: `await engine.aquery(...)` streams."""
        from llama_index.core import PromptHelper, get_response_synthesizer
        from llama_index.core.query_engine import RetrieverQueryEngine
        from llama_index.core.response_synthesizers import ResponseMode

        synthesizer = get_response_synthesizer(
            self.llm,
            prompt_helper=PromptHelper.from_llm_metadata(self.llm.metadata, tokenizer=self.llm.tokenizer),
            text_qa_template=make_prompt(),
            response_mode=ResponseMode.COMPACT,  # SIMPLE_SUMMARIZE shows the model a Python list of its texts
            use_async=True,
            streaming=True,
        )
        return RetrieverQueryEngine(self.retriever(self.read), synthesizer)
