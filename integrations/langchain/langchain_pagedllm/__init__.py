"""LangChain models over PagedLLM: many calls, one shared batch, in your own process."""

from langchain_pagedllm.chat_models import ChatPagedLLM
from langchain_pagedllm.llms import PagedLLM

__all__ = ["ChatPagedLLM", "PagedLLM"]
