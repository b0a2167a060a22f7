"""Memory: steps that do not fit get smaller, and what is closed gives everything back. And a long mixed run."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import run_all
from tests.gpu.helpers import DEVICE, gpu_runner
from tests.parity.families import make_config
from tests.parity.test_engine import Limited
from tests.traffic import VOCAB, random_params

Folder = Callable[[str], Path]
REQUESTS = 3000
MEBIBYTE = 1 << 20


def memory() -> tuple[int, int]:
    """Bytes that torch has given out, and bytes that the device has free."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(DEVICE), torch.cuda.mem_get_info(DEVICE)[0]


def serve(engine: Engine, lengths: list[int], tokens: int = 12) -> list[RequestOutput]:
    """Greedy requests of these prompt lengths, the outputs in order."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ids = [engine.add([(3 * place + length) % 97 for place in range(length)], params) for length in lengths]
    results = run_all(engine)
    return [results[one] for one in ids]


def wide_model(folder: Path) -> Path:
    """A small model whose steps of many tokens take much memory: half a MiB for each."""
    return make_config("llama", folder, intermediate_size=1 << 16, max_position_embeddings=4096)


def test_a_prompt_that_does_not_fit_is_computed_in_smaller_steps(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(wide_model(tmp_path / "wide")), load_format="dummy", dtype="float32", device=str(DEVICE),
        kv_cache_memory="64MiB", max_num_batched_tokens=2048, max_num_seqs=16, swap_space=0,
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(config)
    before = [output.outputs[0].token_ids for output in serve(engine, [2000, 9, 30])]
    _, free = memory()
    hog = torch.empty(free - 256 * MEBIBYTE, dtype=torch.uint8, device=DEVICE)
    squeezed = serve(engine, [2000, 9, 30])
    assert [output.error for output in squeezed] == [None] * 3
    assert [output.outputs[0].token_ids for output in squeezed] == before
    assert engine.scheduler.max_num_batched_tokens <= 1000
    del hog
    torch.cuda.empty_cache()
    after = serve(engine, [2000, 9, 30])
    assert [output.error for output in after] == [None] * 3
    assert [output.outputs[0].token_ids for output in after] == before
    engine.close()


def test_an_engine_sizes_its_own_pool(tmp_path: Path) -> None:
    """By a profile run, within what `gpu_memory_utilization` leaves; then it serves in that."""
    _, free = memory()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    config = EngineConfig(
        model=str(wide_model(tmp_path / "wide")), load_format="dummy", dtype="float32", device=str(DEVICE),
        gpu_memory_utilization=0.5, max_num_seqs=16, swap_space=0, max_model_len=4096,
    )  # fmt: skip
    engine = Engine(config)
    assert free - memory()[1] <= 0.5 * total
    assert all(output.error is None for output in serve(engine, [2000, 1500, 9]))
    assert free - torch.cuda.mem_get_info(DEVICE)[0] <= 0.5 * total + 256 * MEBIBYTE
    engine.close()


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_closing_gives_the_memory_back(eager: bool, model_folder: Folder) -> None:
    """To within 8 MiB of what torch has given out, and 64 MiB of what the device has free.

    The first engine of a process is not counted: the CUDA context, cuBLAS and compiled kernels stay.
    """

    def live() -> None:
        runner = gpu_runner(model_folder("llama"), kv_cache_memory="256MiB", swap_space=0.1, enforce_eager=eager)
        config = EngineConfig(model="any", block_size=4, max_num_seqs=16)
        engine = Engine(config, runner=runner)
        assert all(output.error is None for output in serve(engine, [30, 4, 70, 9, 9]))
        held, _ = memory()
        assert held > 256 * MEBIBYTE
        engine.close()

    live()
    allocated, free = memory()
    for _ in range(3):
        live()
    allocated_now, free_now = memory()
    assert allocated_now - allocated <= 8 * MEBIBYTE
    assert free - free_now <= 64 * MEBIBYTE


class Unlucky:
    """A runner on the GPU of which one step in fifty fails, or does not fit if it is large."""

    def __init__(self, runner: Any, num_blocks: int, seed: int) -> None:
        self._runner = Limited(runner, num_blocks)
        self._random = random.Random(seed)
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: Any) -> torch.Tensor:
        if self._random.random() < 0.02:
            self.failures += 1
            is_large = len(batch.token_ids) > 32
            raise MemoryError("does not fit") if is_large else RuntimeError("bad luck")
        logits: torch.Tensor = self._runner.run(batch)
        return logits


def prompts_and_params(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests of every kind, of which many share a beginning."""
    generator = random.Random(0)
    shared = [generator.randrange(3, VOCAB) for _ in range(12)]
    made = []
    for _ in range(count):
        own = [generator.randrange(3, VOCAB) for _ in range(generator.randint(1, 30))]
        made.append((shared[: generator.choice([0, 0, 6, 12])] + own, random_params(generator, 16)))
    return made


def test_thousands_of_requests_with_cancellations_and_failures(model_folder: Folder) -> None:
    """The pool is whole after every step, memory stays flat, and greedy answers are those of an undisturbed engine."""
    logging.disable(logging.WARNING)  # requests that fail are part of it
    asked = prompts_and_params(REQUESTS)
    runner = gpu_runner(model_folder("llama"), swap_space=0.01)
    unlucky = Unlucky(runner, 150, seed=1)
    fields: dict[str, Any] = {"block_size": 4, "max_num_seqs": 16, "max_num_batched_tokens": 128}
    engine = Engine(EngineConfig(model="any", **fields), runner=unlucky)
    generator, held, ended = random.Random(2), 0, dict[str, RequestOutput]()
    tokens: dict[str, list[int]] = {}
    left = list(enumerate(asked))[::-1]
    while left or engine.has_unfinished:
        while left and engine.stats().waiting < 20:
            number, (prompt, params) = left.pop()
            engine.add(prompt, params, request_id=str(number), priority=number % 3)
            if number == REQUESTS // 2:
                held, _ = memory()
        if generator.random() < 0.1 and engine._requests:
            engine.abort(generator.choice(list(engine._requests)))
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids if output.outputs else [])
            if output.finished:
                assert output.request_id not in ended
                ended[output.request_id] = output
        engine.check()
    logging.disable(logging.NOTSET)
    assert len(ended) == REQUESTS
    assert unlucky.failures > 10
    assert engine.pool.num_used == engine.scheduler.swap.pool.num_used == 0
    assert memory()[0] - held <= 64 * MEBIBYTE
    compare(runner, fields, asked, ended, tokens)
    runner.close()


def compare(
    runner: Any,
    fields: dict[str, Any],
    asked: list[tuple[list[int], SamplingParams]],
    ended: dict[str, RequestOutput],
    tokens: dict[str, list[int]],
) -> None:
    """What greedy requests got is how an undisturbed engine's answer begins; all of it where nothing cut it short."""
    engine = Engine(EngineConfig(model="any", **fields, enable_prefix_caching=False), runner=runner)
    greedy = [number for number, (_, params) in enumerate(asked) if params.temperature == 0 and params.width == 1]
    for number in greedy:
        engine.add(asked[number][0], asked[number][1], request_id=str(number), stream=False)
    answers = run_all(engine, check=False, most_steps=100_000)
    whole = 0
    for number in greedy:
        wanted, found = answers[str(number)].outputs[0].token_ids, tokens[str(number)]
        assert found == wanted[: len(found)]
        output = ended[str(number)]
        if output.error is None and output.outputs[0].finish_reason == answers[str(number)].outputs[0].finish_reason:
            assert len(found) == len(wanted)
            whole += 1
    assert whole > len(greedy) / 2
