"""The engine's thread, and everybody who may wait for it: threads, event loops, closed loops, nobody."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedllm_core import registry
from pagedllm_core.async_engine import AsyncEngine
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import (
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    RequestFailedError,
    RequestTimeoutError,
)
from pagedllm_core.params import SamplingParams
from pagedllm_core.registry import get_engine, list_engines, shutdown
from pagedllm_core.streams import merge_outputs
from tests.fakes import FakeRunner, expected_greedy

VOCAB = 61
ROOT = Path(__file__).resolve().parents[2]


class Gate:
    """Lets the engine take exactly as many forward passes as the test allows."""

    def __init__(self, runner: FakeRunner) -> None:
        self._allowed = threading.Semaphore(0)
        self._waiting = threading.Semaphore(0)
        self.open = False
        runner.before_run = self._wait

    def _wait(self, batch: object) -> None:
        self._waiting.release()
        if not self.open:
            self._allowed.acquire()

    def step(self, count: int = 1) -> None:
        """Let `count` forward passes finish: returns when the one after them has begun."""
        for _ in range(count):
            self._waiting.acquire()
            self._allowed.release()

    def release(self) -> None:
        self.open = True
        self._allowed.release()


def make(runner: FakeRunner | None = None, **fields: Any) -> AsyncEngine:
    runner = runner or FakeRunner()
    config = EngineConfig(model="fake", block_size=4, **{"max_num_seqs": 64, "max_num_batched_tokens": 256, **fields})
    return AsyncEngine(config, runner=runner)


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    with make(FakeRunner(num_blocks=512)) as engine:
        yield engine
        stats = engine.stats()
        assert stats.kv_blocks_used == 0
        assert stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total


async def test_generate_and_stream_agree(engine: AsyncEngine) -> None:
    wanted = expected_greedy([1, 2, 3], 20, VOCAB)
    params = SamplingParams(max_tokens=20)
    assert (await engine.generate([1, 2, 3], params)).outputs[0].token_ids == wanted
    deltas = [delta async for delta in engine.stream([1, 2, 3], params)]
    assert [delta.finished for delta in deltas[:-1]] == [False] * (len(deltas) - 1)
    assert deltas[-1].finished
    assert merge_outputs(deltas).outputs[0].token_ids == wanted


async def test_abort_while_the_prompt_is_tokenized(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    prepare = engine.prepare

    def slow(*args: Any, **options: Any) -> Any:
        started.set()
        go_on.wait()
        return prepare(*args, **options)

    monkeypatch.setattr(engine, "prepare", slow)
    task = asyncio.ensure_future(engine.generate([1, 2, 3], SamplingParams(max_tokens=200), request_id="mine"))
    await asyncio.to_thread(started.wait)
    engine.abort("mine")
    go_on.set()
    output = await task
    assert output.outputs[0].finish_reason == "abort"
    monkeypatch.undo()
    again = await engine.generate([1, 2, 3], SamplingParams(max_tokens=5), request_id="mine")
    assert again.outputs[0].token_ids == expected_greedy([1, 2, 3], 5, VOCAB)


def test_handle_result_iteration_and_wait_timeout(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=20)
    wanted = expected_greedy([4, 5], 20, VOCAB)
    assert engine.submit([4, 5], params).result().outputs[0].token_ids == wanted
    handle = engine.submit([4, 5], params)
    assert [token for delta in handle for token in delta.outputs[0].token_ids] == wanted
    assert handle.result().outputs[0].token_ids == wanted
    runner = FakeRunner()
    gate = Gate(runner)
    with make(runner) as gated:
        handle = gated.submit([4, 5], params)
        with pytest.raises(RequestTimeoutError, match="timeout=0"):
            handle.result(timeout=0)
        gate.release()
        assert handle.result().outputs[0].token_ids == wanted


def test_threads_share_one_batch() -> None:
    runner = FakeRunner(num_blocks=1024)
    gate = Gate(runner)
    results: dict[int, list[int]] = {}
    with make(runner) as engine:
        barrier = threading.Barrier(33)

        def work(number: int) -> None:
            barrier.wait()
            handle = engine.submit([number], SamplingParams(max_tokens=30))
            submitted.release()
            results[number] = handle.result().outputs[0].token_ids

        submitted = threading.Semaphore(0)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        barrier.wait()
        for _ in threads:
            submitted.acquire()
        gate.release()
        for thread in threads:
            thread.join()
        assert engine.stats().max_batch_size >= 31  # all but what the first, gated step took
    assert results == {number: expected_greedy([number], 30, VOCAB) for number in range(32)}


def test_event_loops_share_one_batch_and_one_closed_loop_hurts_nobody() -> None:
    runner = FakeRunner(num_blocks=1024)
    gate = Gate(runner)
    with make(runner) as engine:

        async def leave_behind() -> None:
            task = asyncio.ensure_future(engine.generate([7], SamplingParams(max_tokens=30)))
            while not engine._worker._mailboxes:
                await asyncio.sleep(0)
            del task

        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave_behind())
        loop.close()  # without cancelling its task

        async def many() -> list[list[int]]:
            outputs = await asyncio.gather(
                *(engine.generate([number], SamplingParams(max_tokens=30)) for number in range(16))
            )
            return [output.outputs[0].token_ids for output in outputs]

        answers: list[list[list[int]]] = []
        threads = [threading.Thread(target=lambda: answers.append(asyncio.run(many()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        gate.release()
        for thread in threads:
            thread.join()
        wanted = [expected_greedy([number], 30, VOCAB) for number in range(16)]
        assert answers == [wanted] * 3
        assert engine.health()
        gc.collect()


def test_asyncio_run_twice(engine: AsyncEngine) -> None:
    for _ in range(2):
        output = asyncio.run(engine.generate([1, 2], SamplingParams(max_tokens=5)))
        assert output.outputs[0].token_ids == expected_greedy([1, 2], 5, VOCAB)


@pytest.mark.parametrize("way", ["task", "wait_for", "aclose", "break", "abort", "drop"])
async def test_every_way_to_stop_frees_the_blocks_within_a_step(way: str) -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine = make(runner, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=200)
    stepping = asyncio.get_running_loop().run_in_executor
    try:
        if way in ("task", "wait_for", "abort"):
            call = engine.generate([1, 2, 3], params, request_id="x")
            task = asyncio.ensure_future(asyncio.wait_for(call, None) if way == "wait_for" else call)
            await stepping(None, gate.step, 5)
            if way == "abort":
                engine.abort("x")
            else:
                task.cancel()
        elif way == "drop":
            handle = engine.submit([1, 2, 3], params)
            await stepping(None, gate.step, 5)
            del handle
            gc.collect()
        else:
            stream = engine.stream([1, 2, 3], params)
            first = asyncio.ensure_future(anext(stream))
            await stepping(None, gate.step, 5)
            assert (await first).outputs[0].token_ids
            await stream.aclose()  # what leaving an `async for` does, once the loop gets to it
        if way in ("task", "wait_for"):
            with pytest.raises(asyncio.CancelledError):
                await task
        passes = len(runner.batches)
        gate.release()
        stats = await stepping(None, engine.stats)
        assert stats.kv_blocks_used == 0
        assert len(runner.batches) <= passes + 1
        if way == "abort":
            assert (await task).outputs[0].finish_reason == "abort"
    finally:
        gate.release()
        await engine.aclose()


def test_breaking_out_of_a_sync_stream_frees_the_blocks(engine: AsyncEngine) -> None:
    for delta in engine.submit([1, 2, 3], SamplingParams(max_tokens=200)):
        assert not delta.finished
        break
    gc.collect()
    assert engine.stats().kv_blocks_used == 0


async def test_a_slow_reader_finds_one_output_not_many() -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    async with make(runner) as engine:
        handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=10))
        gate.release()
        await asyncio.get_running_loop().run_in_executor(None, handle.result)
        deltas = [delta async for delta in handle]
        assert len(deltas) == 1
        assert deltas[0].outputs[0].token_ids == expected_greedy([1, 2, 3], 10, VOCAB)


async def test_close_ends_what_runs_with_an_error() -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    engine = make(runner)
    tasks = [asyncio.ensure_future(engine.generate([number], SamplingParams(max_tokens=50))) for number in range(3)]
    handle = engine.submit([9], SamplingParams(max_tokens=50))
    await asyncio.get_running_loop().run_in_executor(None, gate.step, 2)
    gate.release()
    await engine.aclose()
    for task in tasks:
        with pytest.raises(EngineClosedError):
            await task
    with pytest.raises(EngineClosedError):
        handle.result()
    with pytest.raises(EngineClosedError, match="make a new one"):
        engine.submit([1])
    with pytest.raises(EngineClosedError, match="make a new one"):
        await engine.generate([1])
    assert runner.closed
    assert engine.closed
    assert not engine.health()
    engine.close()


async def test_a_bad_request_is_refused_and_the_running_one_unchanged(engine: AsyncEngine) -> None:
    running = asyncio.ensure_future(engine.generate([1, 2, 3], SamplingParams(max_tokens=40)))
    with pytest.raises(InvalidRequestError, match="token id 61"):
        await engine.generate([61])
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.submit([])
    engine.submit([1], request_id="twice", stream=False)
    first = engine.submit([1, 2], request_id="same")
    with pytest.raises(InvalidRequestError, match="request_id='same'"):
        engine.submit([1, 2], request_id="same")
    assert (await running).outputs[0].token_ids == expected_greedy([1, 2, 3], 40, VOCAB)
    assert first.result().outputs[0].token_ids == expected_greedy([1, 2], 16, VOCAB)


async def test_a_failing_request_raises_for_its_owner_alone(engine: AsyncEngine) -> None:
    def broken(output: list[int], logits: object) -> object:
        raise ValueError("oops")

    bad = engine.generate([1], SamplingParams(logits_processors=[broken]))
    good = engine.generate([2], SamplingParams(max_tokens=20))
    results = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(results[0], RequestFailedError)
    assert "oops" in str(results[0])
    assert not isinstance(results[1], BaseException)
    assert results[1].outputs[0].token_ids == expected_greedy([2], 20, VOCAB)


async def test_a_dead_engine_answers_everybody() -> None:
    runner = FakeRunner()
    engine = make(runner)

    def die(batch: object) -> None:
        raise SystemExit("the thread is killed")

    runner.before_run = die
    with pytest.raises(EngineClosedError):
        await engine.generate([1])
    with pytest.raises(EngineClosedError, match="died"):
        await engine.generate([1])
    assert not engine.health()
    engine.close()


def test_a_late_cancel_or_a_dropped_handle_spares_the_next_request_of_the_same_id(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=8)
    handle = engine.submit([1, 2], params, request_id="a")
    handle.result()
    old, handle = handle, engine.submit([1, 2], params, request_id="a")
    old.cancel()
    del old
    gc.collect()
    assert handle.result().outputs[0].token_ids == expected_greedy([1, 2], 8, VOCAB)


@pytest.mark.parametrize("error", [ValueError("oops"), SystemExit(3)])
def test_a_done_callback_that_raises_hurts_nobody(engine: AsyncEngine, error: BaseException) -> None:
    def broken() -> None:
        raise error

    handles = [engine.submit([number], SamplingParams(max_tokens=8)) for number in range(2)]
    handles[0].add_done_callback(broken)
    assert all(handle.result().finished for handle in handles)
    handles[1].add_done_callback(broken)  # at once, as it has ended
    assert engine.health()


def test_a_processor_that_exits_fails_its_own_request(engine: AsyncEngine) -> None:
    def leave(output: list[int], logits: object) -> object:
        raise SystemExit

    good = engine.submit([2], SamplingParams(max_tokens=8))
    with pytest.raises(RequestFailedError, match="SystemExit"):
        engine.submit([1], SamplingParams(logits_processors=[leave])).result()
    assert good.result().finished
    assert engine.health()


def test_a_loop_that_peeked_and_ended_properly_leaves_the_request_alone() -> None:
    runner = FakeRunner()
    gate = Gate(runner)
    with make(runner) as engine:
        handle = engine.submit([3], SamplingParams(max_tokens=8))

        async def peek() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(handle.aresult()), 0.001)

        asyncio.run(peek())
        gate.release()
        assert handle.result().outputs[0].token_ids == expected_greedy([3], 8, VOCAB)


def test_a_dropped_engine_does_not_crash_the_exit() -> None:
    program = """
from pagedllm_core import AsyncEngine, SamplingParams
def run():
    engine = AsyncEngine(model="tiny", kv_cache_memory="8MiB")
    handle = engine.submit("Hello", SamplingParams(max_tokens=1000, ignore_eos=True))
    next(iter(handle))
run()
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_an_engine_that_nobody_names_closes_itself() -> None:
    runner = FakeRunner()
    engine = make(runner)
    thread = engine._worker._thread
    assert engine in list_engines()
    del engine
    gc.collect()
    thread.join()
    assert runner.closed


def test_the_registry_makes_one_engine_per_configuration(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    found: list[AsyncEngine] = []

    def ask() -> None:
        barrier.wait()
        found.append(get_engine(model="tiny", max_num_seqs=4, kv_cache_memory="8MiB"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(engine) for engine in found}) == 1
    other = get_engine(model="tiny", max_num_seqs=5, kv_cache_memory="8MiB")
    assert other is not found[0]
    assert {found[0], other} <= set(list_engines())
    shutdown()
    assert list_engines() == []
    again = get_engine(model="tiny", max_num_seqs=4, kv_cache_memory="8MiB")
    assert again is not found[0]
    assert again.submit("Hello", SamplingParams(max_tokens=3)).result().finished
    shutdown()


def _in_child(engine: AsyncEngine, answer: Any) -> None:
    try:
        engine.submit([1])
        answer.put("submitted")
    except EngineClosedError as error:
        answer.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_may_load_its_own() -> None:
    """Of torch's threads, for which its next product would wait, a child has none."""
    code = """
import multiprocessing, torch
torch.set_num_threads(2)
from pagedllm_core import LLM, SamplingParams
def run():
    with LLM(model="tiny", kv_cache_memory="8MiB") as llm:
        return llm.generate("Hi", SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)[0].outputs[0].token_ids
def child(answer):
    torch.ones(512, 512) @ torch.ones(512, 512)
    answer.put(run())
if __name__ == "__main__":
    mine = run()
    torch.ones(512, 512) @ torch.ones(512, 512)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=child, args=(answer,), daemon=True)
    process.start()
    assert answer.get(timeout=60) == mine
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_a_clear_error(engine: AsyncEngine) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_in_child, args=(engine, answer))
    child.start()
    assert "fork" in answer.get()
    child.join()
    assert engine.submit([1], SamplingParams(max_tokens=2)).result().finished


@pytest.mark.parametrize("ending", ["pass", "engine.close(); engine.close()", "sys.exit(3)", "1 / 0"])
def test_the_process_ends_while_streaming(ending: str) -> None:
    program = f"""
import sys
from pagedllm_core import AsyncEngine, SamplingParams
engine = AsyncEngine(model="tiny", kv_cache_memory="8MiB")
handle = engine.submit("Hello", SamplingParams(max_tokens=1000, ignore_eos=True))
next(iter(handle))
{ending}
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == {"sys.exit(3)": 3, "1 / 0": 1}.get(ending, 0), run.stderr
    assert "Fatal" not in run.stderr


def test_an_idle_engine_leaves_after_its_time_and_not_before() -> None:
    engine = make()
    engine.stay(60.0)
    handle = engine.submit([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(handle.result().outputs[0].token_ids) == 3
    assert not engine.closed
    assert engine.idle_since is not None
    assert engine.touch()
    with engine.held():
        engine.stay(0.01)
        engine._worker._thread.join(timeout=0.2)
        assert not engine.closed
    engine._worker._thread.join(timeout=30)
    assert engine.closed
    assert not engine.touch()
    with pytest.raises(EngineClosedError):
        engine.submit([1, 2])


def test_an_engine_with_work_does_not_leave() -> None:
    runner, release, entered = FakeRunner(), threading.Event(), threading.Event()

    def hold(batch: Any) -> None:
        entered.set()
        release.wait(30)

    runner.before_run = hold
    engine = make(runner)
    handle = engine.submit([1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
    assert entered.wait(30)
    assert engine.idle_since is None
    engine.stay(1e-6)
    release.set()
    assert len(handle.result().outputs[0].token_ids) == 20
    engine._worker._thread.join(timeout=30)
    assert engine.closed


def test_idle_engines_make_room_the_least_recently_used_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_engines", {})
    closed: list[str] = []

    def load(config: EngineConfig) -> AsyncEngine:
        if len(closed) < 2 and config.model == "large":
            try:
                raise MemoryError("no room")
            except MemoryError as error:
                raise ModelLoadError("does not fit into memory") from error
        engine = AsyncEngine(config, runner=FakeRunner())
        close = engine.close
        monkeypatch.setattr(engine, "close", lambda: (closed.append(config.model), close()))
        return engine

    monkeypatch.setattr(registry, "AsyncEngine", load)
    first, second, third = (get_engine(EngineConfig(model=name, block_size=4)) for name in ("a", "b", "c"))
    first.submit([1], SamplingParams(max_tokens=1)).result()
    large = get_engine(EngineConfig(model="large", block_size=4))
    assert closed == ["b", "c"]
    assert second.closed and third.closed  # noqa: PT018
    assert not first.closed
    closed.clear()
    monkeypatch.setattr(registry, "_evict_idle", lambda: False)
    with pytest.raises(ModelLoadError):
        get_engine(EngineConfig(model="large", block_size=4, seed=1))
    for engine in (first, large):
        engine.close()


async def test_wrong_ids_of_requests(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequestError, match="request_id"):
        await engine.generate([1], SamplingParams(max_tokens=2), request_id=[1])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="request_id"):
        engine.abort([1])  # type: ignore[arg-type]
    assert (await engine.generate([1], SamplingParams(max_tokens=2))).finished


def test_an_engine_that_is_held_makes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as engine:
        monkeypatch.setattr(registry, "_engines", {engine.config: engine})
        with engine.held():
            assert not registry._evict_idle()
        assert registry._evict_idle()
        assert engine.closed


@pytest.mark.parametrize("read", [list, lambda handle: asyncio.run(_all(handle))])
def test_a_reader_that_comes_second_ends_nothing(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two readers of one handle, both wake up, and one finds nothing."""
    runner = FakeRunner(num_blocks=512)
    gate = Gate(runner)
    with make(runner) as engine:
        handle = engine.submit([1, 2], SamplingParams(max_tokens=30))
        take = handle.mailbox.take

        def first_look() -> None:
            monkeypatch.setattr(handle.mailbox, "take", take)
            gate.release()

        monkeypatch.setattr(handle.mailbox, "take", first_look)
        gate.step(3)
        found = [token for output in read(handle) for token in output.outputs[0].token_ids]
        assert found == expected_greedy([1, 2], 30, VOCAB)


async def _all(handle: Any) -> list[Any]:
    return [output async for output in handle]


def test_a_loop_that_was_closed_leaves_the_other_reader() -> None:
    runner = FakeRunner(num_blocks=512)
    gate = Gate(runner)
    with make(runner) as engine:
        handle = engine.submit([1, 2], SamplingParams(max_tokens=9), stream=False)
        outputs: list[Any] = []
        reader = threading.Thread(target=lambda: outputs.append(asyncio.run(handle.aresult())))
        reader.start()
        closed = asyncio.new_event_loop()
        task = closed.create_task(handle.aresult())
        while not handle.mailbox._waiters:
            gate.step()
        closed.call_soon(closed.stop)
        closed.run_forever()
        closed.close()
        gate.release()
        reader.join()
        assert outputs[0].outputs[0].finish_reason == "length"
        task._log_destroy_pending = False  # type: ignore[attr-defined]
