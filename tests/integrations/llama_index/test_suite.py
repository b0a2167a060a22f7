"""The suite of `suite.py` for `PagedLLM`, and a look at whether the suite finds anything."""

from __future__ import annotations

import pytest
from llama_index.core.llms import LLM, MockLLM
from llama_index.llms.pagedllm import PagedLLM

from tests.integrations.llama_index.suite import LLMSuite


class TestPagedLLM(LLMSuite):
    llm_class = PagedLLM
    llm_params = {
        "model": "tiny",
        "max_tokens": 60,
        "ignore_eos": True,
        "kv_cache_memory": "32MiB",
        "engine_kwargs": {"num_threads": 1},
    }


async def test_the_suite_finds_faults() -> None:
    """LlamaIndex's mock tells of a chat twice, and its streams' deltas are not the text."""

    def make(**more: object) -> LLM:
        return MockLLM(max_tokens=8, **more)

    suite = LLMSuite()
    await suite.test_a_reply_is_a_text(make(), "chat")
    await suite.test_one_callback_event(make, "complete")
    with pytest.raises(ValueError, match="too many values"):
        await suite.test_one_callback_event(make, "chat")
    with pytest.raises(AssertionError):
        await suite.test_one_start_and_one_end(make(), "achat")
    with pytest.raises(AssertionError):
        await suite.test_deltas_add_up_to_the_text(make(), "stream_complete")
