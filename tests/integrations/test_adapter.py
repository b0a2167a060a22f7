"""What the adapters share: one load for all who wait, and requests that end with their reader."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pagedllm_core import EngineConfig, SamplingParams, get_engine, registry
from pagedllm_core.chat.adapter import Call, EngineSource, shared_engine, watched
from pagedllm_core.errors import ModelLoadError

ENDLESS = Call(params=SamplingParams(max_tokens=None, ignore_eos=True), messages=[{"role": "user", "content": "Hi"}])


async def freed(engine) -> bool:
    for _ in range(100):
        await asyncio.sleep(0)
        if not engine.stats().kv_blocks_used:
            return True
    return False


async def test_a_reader_that_is_cancelled_elsewhere_ends_its_request():
    engine = get_engine(model="tiny")
    outputs = watched((await ENDLESS.asubmit(engine, stream=True)).handle)
    read = asyncio.Event()

    async def reader():
        await anext(outputs)
        read.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(reader())
    await read.wait()
    task.cancel()
    assert await freed(engine)
    await outputs.aclose()


async def test_a_task_for_each_output_is_no_sign_of_leaving():
    engine = get_engine(model="tiny")
    call = Call(params=SamplingParams(max_tokens=8, min_tokens=8), prompt="Hi")
    outputs, count = watched((await call.asubmit(engine, stream=True)).handle), 0
    while True:
        try:
            output = await asyncio.create_task(outputs.__anext__())
        except StopAsyncIteration:
            break
        count += len(output.outputs[0].token_ids)
    assert count == 8


async def test_many_waiters_load_once_and_a_failed_load_is_tried_again(monkeypatch):
    engine, started, all_wait = get_engine(model="tiny"), [], threading.Event()

    def load(config):
        started.append(config)
        if len(started) == 1:
            all_wait.wait()
            raise ModelLoadError("not this time")
        return engine

    monkeypatch.setattr(registry, "get_engine", load)
    source = EngineSource(EngineConfig(model="elsewhere"))
    waiting = [asyncio.create_task(source.aget()) for _ in range(8)]
    await asyncio.sleep(0)
    all_wait.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in results} == {ModelLoadError}
    assert set(await asyncio.gather(*(source.aget() for _ in range(8)))) == {engine}
    assert source.get() is engine
    assert len(started) == 2


async def test_the_loop_runs_while_a_model_loads(monkeypatch):
    engine, may_load = get_engine(model="tiny"), threading.Event()
    monkeypatch.setattr(registry, "get_engine", lambda config: may_load.wait() and engine)
    waiting = asyncio.create_task(EngineSource(EngineConfig(model="slow")).aget())
    await asyncio.sleep(0)
    assert not waiting.done()
    may_load.set()
    assert await waiting is engine


def test_equal_configurations_have_one_source():
    assert shared_engine(EngineConfig(model="tiny")) is shared_engine(EngineConfig(model="tiny"))
    assert shared_engine(EngineConfig(model="tiny")) is not shared_engine(EngineConfig(model="tiny", seed=1))


def test_a_prompt_that_has_its_start_token_gets_no_second_one():
    engine = get_engine(model="tiny")
    before = engine.tokenizer.bos_token
    try:
        engine.tokenizer.bos_token = "<|im_start|>"
        call = Call(params=SamplingParams(), prompt="<|im_start|>Hi")
        ids = call.tokenize(engine)["prompt_token_ids"]
    finally:
        engine.tokenizer.bos_token = before
    assert ids == engine.tokenizer("<|im_start|>Hi", add_special_tokens=False)["input_ids"]
    assert "prompt_token_ids" not in Call(params=SamplingParams(), prompt="Hi").tokenize(engine)


@pytest.mark.parametrize("streamed", [False, True])
def test_submitting_what_cannot_be_served_allocates_nothing(streamed):
    engine = get_engine(model="tiny")
    call = Call(params=SamplingParams(), prompt="word " * 5000)
    with pytest.raises(ValueError, match="context limit"):
        call.submit(engine, stream=streamed)
