"""A LlamaIndex LLM over PagedLLM: many calls, one shared batch, in your own process."""

from llama_index.llms.pagedllm.base import PagedLLM
from llama_index.llms.pagedllm.concurrency import raise_concurrency

__all__ = ["PagedLLM", "raise_concurrency"]
