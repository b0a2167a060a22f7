"""Steps that overlap: launched one ahead of what the host has read, with the same answers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.decode.advance import advance
from pagedllm_core.decode.device import DeviceSampler, Pending
from pagedllm_core.engine import Engine
from pagedllm_core.errors import RequestFailedError
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import GuidedParams, SamplingParams
from pagedllm_core.streams import merge_outputs
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=12)


class Diary:
    """Writes down when a step is launched, and when its tokens are read."""

    def __init__(self, engine: Engine, runner: FakeRunner) -> None:
        self.events: list[str] = []
        self.read = lambda number: None
        sampler = runner.sampler
        assert sampler is not None
        launch = sampler.launch
        runner.before_run = self.note_run
        diary = self

        class Noted:
            def __init__(self, pending: Pending, number: int) -> None:
                self.pending, self.tokens, self.number = pending, pending.tokens, number

            def result(self) -> Any:
                diary.events.append(f"read {self.number}")
                diary.read(self.number)
                return self.pending.result()

        sampler.launch = lambda *arguments: Noted(launch(*arguments), self.runs)  # type: ignore[method-assign]

    @property
    def runs(self) -> int:
        return sum(event.startswith("run") for event in self.events)

    def note_run(self, batch: ForwardBatch) -> None:
        self.events.append(f"run {self.runs + 1}")


def overlapping(**fields: Any) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(overlaps=True, **fields)
    return fake_engine(runner), runner


def tokens(output: RequestOutput) -> list[list[int]]:
    return [part.token_ids for part in output.outputs]


def test_the_next_step_is_launched_before_the_last_is_read() -> None:
    engine, runner = overlapping()
    diary = Diary(engine, runner)
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=4), request_id="a")
    assert tokens(run_all(engine)["a"]) == [expected_greedy([1, 2, 3], 4, 61)]
    assert diary.events == ["run 1", "run 2", "read 1", "run 3", "read 2", "run 4", "read 3", "read 4"]
    assert runner.batches[1].carried is not None


def test_the_step_after_an_end_token_is_dropped() -> None:
    """One step more is computed than a plain loop would, and nothing of it is seen."""
    answer = expected_greedy([4, 5], 40, 61)
    engine, runner = overlapping(eos_token_ids=(answer[6],))
    assert answer.index(answer[6]) == 6
    engine.add([4, 5], SamplingParams(temperature=0, max_tokens=40), request_id="a")
    result = run_all(engine)["a"]
    assert (tokens(result), result.outputs[0].finish_reason) == ([answer[:7]], "stop")
    assert len(runner.batches) == 8
    assert engine.stats().tokens_generated == 7


def test_the_last_step_is_not_followed_by_another() -> None:
    engine, runner = overlapping()
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=5))
    run_all(engine)
    assert len(runner.batches) == 5


def test_the_time_of_a_step_is_counted_once() -> None:
    """Each reading takes a second of the device's time; steps that overlap must not both be charged with it."""
    engine, runner = overlapping()
    seconds = [0.0]
    engine._clock = lambda: seconds[0]
    charged: list[float] = []
    engine.scheduler.swap.costs.step.add = lambda tokens, cost: charged.append(cost)  # type: ignore[method-assign]

    def read(number: int) -> None:
        seconds[0] += 1.0

    Diary(engine, runner).read = read
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=6))
    run_all(engine)
    assert charged == [1.0] * 6


PARAMS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=1.3, seed=3, top_p=0.9, max_tokens=12),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.7, presence_penalty=0.4, max_tokens=12),
    "parallel": SamplingParams(temperature=0.8, seed=5, n=3, max_tokens=9),
    "best of": SamplingParams(temperature=0.8, seed=6, n=1, best_of=2, max_tokens=9),
    "logprobs": SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=6),
    "beams": SamplingParams(use_beam_search=True, n=2, best_of=3, max_tokens=9),
    "minimum": SamplingParams(temperature=0, min_tokens=8, stop_token_ids=list(range(0, 61, 2)), max_tokens=12),
    "allowed": SamplingParams(temperature=0, logit_bias={7: 3.0}, allowed_token_ids=list(range(30)), max_tokens=12),
}


@pytest.mark.parametrize(
    "kinds", [[kind] for kind in PARAMS] + [list(PARAMS), ["greedy", "beams"], ["seeded", "logprobs"]]
)
@pytest.mark.parametrize("num_blocks", [12, 80])
def test_answers_are_those_of_the_plain_loop(kinds: list[str], num_blocks: int) -> None:
    """Alone and in company, also where the pool is so short that requests are preempted."""

    def answers(overlaps: bool) -> dict[str, Any]:
        engine = fake_engine(FakeRunner(num_blocks=num_blocks, overlaps=overlaps, generation_defaults={}))
        for number, kind in enumerate(kinds):
            prompt = list(range(number, number + 5))
            engine.add(prompt, PARAMS[kind], request_id=kind, stream=number % 2 == 0)
        results = run_all(engine)
        return {
            key: [(one.token_ids, one.finish_reason, one.logprobs) for one in out.outputs]
            for key, out in results.items()
        }

    assert answers(True) == answers(False)


def test_a_guided_request_makes_every_step_wait() -> None:
    pytest.importorskip("llguidance")
    from pagedllm_core import EngineConfig
    from pagedllm_core.model.runner import ModelRunner

    plain = ModelRunner(EngineConfig(model="tiny", kv_cache_memory="16MiB"))
    results = []
    for overlaps in (False, True):
        runner: Any = Overlapping(plain) if overlaps else plain
        engine = Engine(EngineConfig(model="tiny"), runner=runner)
        engine.add("One, two,", SamplingParams(temperature=0, max_tokens=20), request_id="free")
        guided = GuidedParams(choice=["Monday", "Sunday"])
        engine.add("Which day?", SamplingParams(temperature=0, max_tokens=9, guided=guided), request_id="guided")
        results.append({key: out.outputs[0].text for key, out in run_all(engine).items()})
    assert results[0] == results[1]
    assert results[0]["guided"] in ("Monday", "Sunday")


class Overlapping:
    """A model on the host whose steps overlap, to try the loop."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.sampler = DeviceSampler(torch.device("cpu"), runner.vocab_size, 64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        if batch.carried is not None:
            batch.token_ids[batch.carried.rows] = batch.carried.tokens.numpy()[batch.carried.sources]
        return self._runner.run(batch)  # type: ignore[no-any-return]


@pytest.mark.parametrize("failing", range(1, 8))
@pytest.mark.parametrize("where", ["run", "read"])
def test_a_step_that_fails_once_loses_nothing(where: str, failing: int) -> None:
    """Whether it fails when it is launched or when it is read, with another step under way or not."""
    engine, runner = overlapping()
    diary = Diary(engine, runner)
    failed: list[int] = []

    def fail(number: int) -> None:
        if number == failing and not failed:
            failed.append(number)
            raise RuntimeError("bad luck")

    if where == "read":
        diary.read = fail  # type: ignore[assignment]
    else:
        runner.before_run = lambda batch: (diary.note_run(batch), fail(diary.runs))[0]
    for number in range(3):
        engine.add([number, 7, 9], SamplingParams(temperature=0, max_tokens=5 + number), request_id=str(number))
    results = run_all(engine)
    assert failed
    for number in range(3):
        assert results[str(number)].error is None
        assert tokens(results[str(number)]) == [expected_greedy([number, 7, 9], 5 + number, 61)]


def test_a_request_that_always_fails_fails_alone() -> None:
    engine, runner = overlapping()

    def poison(batch: ForwardBatch) -> None:
        if 60 in batch.token_ids:
            raise RuntimeError("bad luck")

    runner.before_run = poison
    allowed = {"allowed_token_ids": list(range(60)), "temperature": 0}
    engine.add([1, 2], SamplingParams(max_tokens=9, **allowed), request_id="good", stream=False)
    for _ in range(3):
        engine.step()
    engine.add([60, 1], SamplingParams(max_tokens=9, **allowed), request_id="poison")
    results = run_all(engine)
    assert isinstance(results["poison"].error, RequestFailedError)
    assert results["good"].error is None
    assert len(results["good"].outputs[0].token_ids) == 9


def test_aborting_with_a_step_under_way_frees_the_blocks_at_once() -> None:
    for steps in range(1, 20):
        engine, _ = overlapping()
        engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=20), request_id="victim")
        other = engine.add([5, 6, 7], SamplingParams(temperature=0, max_tokens=20), request_id="other")
        received: dict[str, list[int]] = {"victim": [], "other": []}
        for _ in range(steps):
            for output in engine.step():
                received[output.request_id] += output.outputs[0].token_ids
        engine.abort("victim")
        engine.check()
        used = sum(len(sequence.table) for sequence in engine._requests[other].sequences)
        assert engine.stats().kv_blocks_used == used
        results = run_all(engine)
        assert (
            received["victim"] + results["victim"].outputs[0].token_ids
            == expected_greedy([1, 2, 3], 20, 61)[: steps - 1]
        )
        assert received["other"] + results["other"].outputs[0].token_ids == expected_greedy([5, 6, 7], 20, 61)


def test_a_prefix_that_is_filled_ahead_is_found_later() -> None:
    """A block whose last token was chosen on the device is sealed once that token is known."""
    engine, _ = overlapping(block_size=4)
    answer = expected_greedy([1, 2, 3], 13, 61)
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=13), request_id="first")
    run_all(engine)
    engine.add([1, 2, 3, *answer], SamplingParams(temperature=0, max_tokens=1), request_id="second")
    assert run_all(engine)["second"].metrics.cached_tokens == 12


@pytest.mark.parametrize("kind", ["beams", "logprobs"])
def test_aborting_what_the_host_has_yet_to_choose_for(kind: str) -> None:
    """A step with a beam search was launched ahead; the search ends before its logits are read."""
    engine, _ = overlapping()
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=9), request_id="other", stream=False)
    for _ in range(2):
        engine.step()
    engine.add([5, 6], PARAMS[kind], request_id="victim")
    engine.step()
    assert engine._flight is not None
    assert {row.request.request_id for row in engine._flight.batch.rows} == {"other", "victim"}
    engine.abort("victim")
    results: list[RequestOutput] = []
    while engine.has_unfinished:
        results += engine.step()
        engine.check()
    ends = [output.request_id for output in results if output.finished]
    assert sorted(ends) == ["other", "victim"]
    assert not any(output.error for output in results)
    assert tokens(results[-1]) == [expected_greedy([1, 2, 3], 9, 61)]


HOOKS = {
    "run": "runner",
    "launch": "sampler",
    "result": "sampler",
    "schedule": "scheduler",
    "commit": "scheduler",
    "share": "pool",  # between two forks
}


@pytest.mark.parametrize(
    ("hook", "overlaps"),
    [*((hook, True) for hook in HOOKS), *((hook, False) for hook, owner in HOOKS.items() if owner != "sampler")],
)
def test_an_interrupted_step_loses_nothing(hook: str, overlaps: bool) -> None:
    interrupted = 0
    for wanted in range(1, 200):
        engine = fake_engine(FakeRunner(overlaps=overlaps, num_blocks=12, generation_defaults={}))
        calls = interrupt(engine, hook, wanted)
        for number in range(3):
            engine.add([number, 1, 2], SamplingParams(n=3, seed=number, max_tokens=9), request_id=f"group {number}")
            engine.add([number, 3, 2, 4, 5], GREEDY, request_id=f"greedy {number}")
        pieces: dict[str, list[RequestOutput]] = {}
        while engine.has_unfinished:
            try:
                for output in engine.step():
                    assert output.error is None
                    pieces.setdefault(output.request_id, []).append(output)
            except KeyboardInterrupt:
                interrupted += 1
            engine.check()
        found = {name: tokens(merge_outputs(outputs)) for name, outputs in pieces.items()}
        assert found == undisturbed(), f"interrupted at call {wanted} of {hook}"
        assert engine.stats().kv_blocks_used == 0
        if calls[0] < wanted:
            break
    assert interrupted > 5


def interrupt(engine: Engine, hook: str, wanted: int) -> list[int]:
    """Raise KeyboardInterrupt at one call; how many there were."""
    calls, sampler = [0], engine.runner.sampler

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == wanted:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return call

    if hook == "result":
        assert sampler is not None
        launch = sampler.launch

        class Interrupted:
            def __init__(self, pending: Pending) -> None:
                self.tokens, self.result = pending.tokens, counted(pending.result)

        sampler.launch = lambda *arguments: Interrupted(launch(*arguments))  # type: ignore[method-assign]
        return calls
    owners = {"runner": engine.runner, "sampler": sampler, "scheduler": engine.scheduler, "pool": engine.pool}
    owner = owners[HOOKS[hook]]
    setattr(owner, hook, counted(getattr(owner, hook)))
    return calls


@functools.cache
def undisturbed() -> dict[str, list[list[int]]]:
    engine = fake_engine(FakeRunner(generation_defaults={}))
    for number in range(3):
        engine.add([number, 1, 2], SamplingParams(n=3, seed=number, max_tokens=9), request_id=f"group {number}")
        engine.add([number, 3, 2, 4, 5], GREEDY, request_id=f"greedy {number}")
    return {name: tokens(output) for name, output in run_all(engine).items()}


def test_a_copy_that_waits_for_a_step_is_not_measured() -> None:
    engine, runner = overlapping(num_blocks=9, num_host_blocks=40)
    under_way, samples = [], 0
    costs = engine.scheduler.swap.costs
    costs.swapping_pays = lambda blocks, tokens: True  # type: ignore[method-assign]

    def add(amount: float, seconds: float) -> None:
        nonlocal samples
        samples += 1

    costs.copy.add = add  # type: ignore[method-assign]

    def noted(original: Any) -> Any:
        def copy(moves: list[tuple[int, int]]) -> None:
            under_way.append(engine._flight is not None)
            original(moves)

        return copy

    runner.swap_out, runner.swap_in = noted(runner.swap_out), noted(runner.swap_in)  # type: ignore[method-assign]
    for number in range(4):
        engine.add([number, 1, 2, 3, 4, 5], GREEDY, request_id=str(number))
    run_all(engine)
    assert any(under_way)
    assert samples == under_way.count(False) > 0


def test_closing_lets_the_step_under_way_go() -> None:
    engine, _ = overlapping()
    engine.add([1, 2, 3], GREEDY)
    engine.step()
    engine.step()
    logits = weakref.ref(engine._flight.logits) if engine._flight else None
    engine.close()
    assert logits is not None
    assert logits() is None
    engine.take_outputs()
    assert not engine.has_unfinished


def test_whatever_touches_the_device_outside_the_runner_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen = [0], []

    @contextmanager
    def device_of(logits: torch.Tensor) -> Iterator[None]:
        inside[0] += 1
        yield
        inside[0] -= 1

    monkeypatch.setattr("pagedllm_core.overlap._device_of", device_of)
    monkeypatch.setattr("pagedllm_core.overlap.advance", lambda *some: seen.append(inside[0]) or advance(*some))
    engine, runner = overlapping()
    assert runner.sampler is not None
    launch = runner.sampler.launch

    class Noted:
        def __init__(self, pending: Pending) -> None:
            self.pending, self.tokens = pending, pending.tokens

        def result(self) -> Any:
            seen.append(inside[0])
            return self.pending.result()

    def note(*arguments: Any) -> Pending:
        seen.append(inside[0])
        return Noted(launch(*arguments))

    runner.sampler.launch = note  # type: ignore[method-assign]
    engine.add([1, 2, 3], GREEDY)
    engine.add([1, 2, 3], SamplingParams(n=2, use_beam_search=True, temperature=0, max_tokens=4))
    run_all(engine)
    assert all(seen)
    assert len(seen) > 10
