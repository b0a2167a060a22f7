"""A LlamaIndex LLM over PagedLLM: many calls, one shared batch, in your own process."""

from llama_index.llms.pagedllm.base import PagedLLM

__all__ = ["PagedLLM"]
