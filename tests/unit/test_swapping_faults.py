"""A fault at any call that swapping makes loses no request, no token and no block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pagedllm_core.engine import Engine
from pagedllm_core.kv.offload import PreemptionCosts
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, fake_engine, run_all


class Always(PreemptionCosts):
    def swapping_pays(self, blocks: int, tokens: int) -> bool:
        return True


HOOKS: dict[str, Callable[[Engine], Any]] = {
    "swap_out": lambda engine: engine.runner,
    "swap_in": lambda engine: engine.runner,
    "copy_blocks": lambda engine: engine.runner,
    "run": lambda engine: engine.runner,
    "allocate": lambda engine: engine.pool,
    "acquire": lambda engine: engine.pool,
    "seal": lambda engine: engine.pool,
    "host allocate": lambda engine: engine.scheduler.swap.pool,
    "host share": lambda engine: engine.scheduler.swap.pool,
}


def swapping_engine(overlaps: bool) -> Engine:
    runner = FakeRunner(num_blocks=9, generation_defaults={}, num_host_blocks=40, overlaps=overlaps)
    engine = fake_engine(runner)
    engine.scheduler.swap.costs = Always()
    for number in range(3):
        greedy = SamplingParams(temperature=0, max_tokens=9)
        pair = SamplingParams(n=2, seed=number, max_tokens=7)
        engine.add([number, 1, 2, 3, 4, 5], pair if number else greedy, request_id=str(number))
    return engine


def answers(engine: Engine) -> dict[str, list[list[int]]]:
    outputs = run_all(engine, most_steps=500)
    assert engine.scheduler.swap.pool.num_used == 0
    return {request_id: [part.token_ids for part in output.outputs] for request_id, output in outputs.items()}


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_fault_at_each_call_of_each_hook(hook: str, overlaps: bool) -> None:
    clean = answers(swapping_engine(overlaps))
    for wanted in range(1, 400):
        engine = swapping_engine(overlaps)
        owner, name, calls = HOOKS[hook](engine), hook.split()[-1], 0
        original = getattr(owner, name)

        def faulty(*arguments: Any, original: Any = original, wanted: int = wanted, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == wanted:
                raise OSError("fault")
            return original(*arguments, **named)

        setattr(owner, name, faulty)
        assert answers(engine) == clean, f"fault at call {wanted} of {hook}"
        if calls < wanted:
            assert wanted > 1, "the hook was never called"
            return
    pytest.fail("the hook was called more often than expected")
