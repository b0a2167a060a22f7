"""The native code's linear layers, and the order of its sums. Its attention is tested in `test_attention.py`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.errors import UnsupportedModelError
from pagedllm_core.model.determinism import shapes_that_differ
from pagedllm_core.model.runner import ModelRunner
from pagedllm_core.native.library import PackedLinear
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import run_all
from tests.native import LIBRARIES

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no native code was compiled for this processor")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=list(LIBRARIES))
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PAGEDLLM_NATIVE", request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 51), (96, 64), (200, 333)])
def test_linear_layers(tier: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 50, 97, 200):
        x = torch.randn(rows, shape[1], generator=generator)
        for given in (bias, None):
            packed = PackedLinear(LIBRARIES[tier], weight, given)
            wanted = x.double() @ weight.double().T + (0 if given is None else given.double())
            torch.testing.assert_close(packed(x, threads=2).double(), wanted, rtol=1e-4, atol=1e-4)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as integers up to 127, and what one of them is worth."""
    top = x.float().abs().amax(1, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # a number by a tensor is not divided exactly
    return torch.where(top > 0, x.float() * inverse, 0.0).round().double(), (top / 127).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 51), (96, 64), (200, 333)])
def test_linear_layers_in_int8(tier: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[0] = 0
    bias = torch.randn(shape[0], generator=generator)
    packed = PackedLinear(LIBRARIES[tier], weight, bias, int8=True)
    integers, worth = rounded(weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 50, 97, 200):
        x = torch.randn(rows, shape[1], generator=generator)
        x[-1] = 0
        inputs, scale = rounded(x)
        wanted = (inputs @ integers.T) * scale * worth.T + bias
        torch.testing.assert_close(packed(x, threads=2).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bit_equal_alone_and_in_company(tier: str, dtype: torch.dtype, int8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = PackedLinear(LIBRARIES[tier], torch.randn(130, 77, generator=generator).to(dtype), int8=int8)
    x = torch.randn(150, 77, generator=generator)
    together = packed(x, threads=2)
    for rows in (1, 2, 5, 12, 13, 100):
        assert torch.equal(packed(x[:rows].contiguous(), threads=1), together[:rows])


@pytest.mark.parametrize("callers", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(callers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = PackedLinear(next(iter(LIBRARIES.values())), torch.randn(300, 64, generator=generator))
    x = torch.randn(120, 64, generator=generator)
    wanted = packed(x, threads=1)

    def call(number: int) -> bool:
        return all(torch.equal(packed(x, threads=1 + (number + turn) % 9), wanted) for turn in range(100))

    with ThreadPoolExecutor(callers) as pool:
        assert all(pool.map(call, range(callers)))


def test_a_forked_process_has_no_helpers_and_needs_none() -> None:
    packed = PackedLinear(next(iter(LIBRARIES.values())), torch.eye(200))
    x = torch.randn(120, 200)
    assert torch.equal(packed(x, threads=4), x)  # from here on there are helpers
    child = os.fork()
    if not child:
        out = torch.empty(120, 200)
        packed._library.matmul(packed.matrix, x.data_ptr(), 120, out.data_ptr(), 4)
        os._exit(not torch.equal(out, x))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def answers(together: bool, again: bool = False, **fields: Any) -> list[Any]:
    """Tokens and log-probs of greedy, sampled and n > 1 requests, one at a time or together."""
    prompts = [[(7 * number + 3 * place) % 900 + 5 for place in range(9 + 23 * number)] for number in range(6)]
    engine = Engine(EngineConfig(model="tiny", **{"kv_cache_memory": "64MiB", "deterministic": True, **fields}))
    found: dict[str, RequestOutput] = {}
    for _ in range(2 if again else 1):
        for number, prompt in enumerate(prompts):
            sampling: dict[str, Any] = {"n": 2, "temperature": 0.9, "seed": 5} if number % 2 else {"temperature": 0}
            params = SamplingParams(**sampling, max_tokens=12, logprobs=2, ignore_eos=True)
            engine.add(prompt, params, request_id=str(number), stream=False)
            if not together:
                found |= run_all(engine)
        found |= run_all(engine)
    stats = engine.stats()
    engine.close()
    assert bool(stats.preemptions) == ("kv_cache_memory" in fields)
    assert bool(stats.prefix_cache_hits) >= again
    return [[(part.token_ids, part.logprobs) for part in found[str(n)].outputs] for n in range(len(prompts))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_bit_equal_alone_in_company_in_chunks_cached_and_preempted(tier: str, dtype: str) -> None:
    alone = answers(False, dtype=dtype, enable_prefix_caching=False)
    assert answers(True, dtype=dtype) == alone
    assert answers(True, again=True, dtype=dtype) == alone
    assert answers(True, dtype=dtype, max_num_batched_tokens=16, max_num_seqs=16) == alone
    small = "1400KiB" if dtype == "float32" else "700KiB"
    assert answers(True, dtype=dtype, kv_cache_memory=small, num_threads=1) == alone


def test_int8_is_bit_equal_alone_and_in_company(tier: str) -> None:
    alone = answers(False, quantization="int8", enable_prefix_caching=False)
    assert answers(True, again=True, quantization="int8") == alone
    assert alone != answers(False, enable_prefix_caching=False), "nothing was rounded"


def test_int8_is_refused_where_torch_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDLLM_NATIVE", "none")
    with pytest.raises(UnsupportedModelError, match="quantization='int8': 'tiny' runs on torch here; use a model"):
        ModelRunner(EngineConfig(model="tiny", quantization="int8"))


def test_deterministic_is_refused_where_it_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDLLM_NATIVE", "none")
    with pytest.raises(UnsupportedModelError, match="deterministic=True: 'tiny' runs on torch"):
        ModelRunner(EngineConfig(model="tiny", deterministic=True))
    runner = ModelRunner(EngineConfig(model="tiny", dtype="float32", kv_cache_memory="8MiB"))
    different = shapes_that_differ(runner.run, runner.vocab_size, runner.num_blocks, runner.block_size)
    assert different, "the self-test sees no difference where there is one"


def test_without_the_mode_a_prompt_adds_up_in_another_order_than_a_lone_token() -> None:
    """The mode is worth its price: chunks share transposed keys where it is off."""
    runner = ModelRunner(EngineConfig(model="tiny", dtype="float32", kv_cache_memory="8MiB"))
    different = shapes_that_differ(runner.run, runner.vocab_size, runner.num_blocks, runner.block_size)
    assert any(shape.startswith("chunks of") for shape in different)
