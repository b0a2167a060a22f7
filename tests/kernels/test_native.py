"""The native code's linear layers, and the order of its sums. Its attention is tested in `test_attention.py`."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.errors import UnsupportedModelError
from pagedllm_core.model import fuse, loader
from pagedllm_core.model.determinism import shapes_that_differ
from pagedllm_core.model.runner import ModelRunner
from pagedllm_core.native.build import library_path
from pagedllm_core.native.library import PackedLinear, load
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import run_all
from tests.native import LIBRARIES, emulated_bf16

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no native code was compiled for this processor")
DTYPES = [torch.float32, torch.bfloat16]
NOT_EMULATED = "bfloat16 products are emulated where there are AVX-512 and a compiler"


@pytest.fixture(params=[*LIBRARIES, "emulated"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Each tier that runs here, and avx512 with bfloat16 products; models run on it, too."""
    emulated = request.param == "emulated"
    library = emulated_bf16() if emulated else LIBRARIES[request.param]
    if library is None:
        pytest.skip(NOT_EMULATED)
    monkeypatch.setenv("PAGEDLLM_NATIVE", "avx512" if emulated else request.param)
    monkeypatch.setattr("pagedllm_core.model.runner.load", lambda name: library)
    return library


def met(library: ctypes.CDLL, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows that weights of a type meet."""
    return x.to(dtype) if library.uses_bf16_products() else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 51), (96, 64), (200, 333)])
def test_linear_layers(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 50, 97, 200):
        x = torch.randn(rows, shape[1], generator=generator)
        for given in (bias, None):
            packed = PackedLinear(library, weight, given)
            wanted = met(library, x, dtype).double() @ weight.double().T + (0 if given is None else given.double())
            torch.testing.assert_close(packed(x, threads=2).double(), wanted, rtol=1e-4, atol=1e-4)


def test_rows_are_rounded_to_bfloat16_as_torch_does() -> None:
    library = emulated_bf16()
    if library is None:
        pytest.skip(NOT_EMULATED)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator, dtype=torch.int32)
    half, above, below = (bits & ~0xFFFF | low for low in (0x8000, 0x8001, 0x7FFF))  # ties, and what is next to them
    special = torch.tensor(
        [0x7F800001, 0x7FFFFFFF, -1, 0x7F800000, 0x7F7FFFFF, 0x7F7F7FFF, -(2**31), 0], dtype=torch.int32
    )
    numbers = torch.cat([bits, half, above, below, special]).view(torch.float32)
    numbers[numbers.abs() < 2.0**-126] = 0  # the instruction takes them for zeros
    for inputs in (1, 16, 37):  # of which one is not zero
        x = torch.zeros(len(numbers), inputs)
        places = torch.arange(len(numbers)) % inputs
        x[range(len(numbers)), places] = numbers
        found = PackedLinear(library, torch.ones(1, inputs, dtype=torch.bfloat16))(x)[:, 0]
        assert torch.equal(found.nan_to_num(1e-9), numbers.bfloat16().float().nan_to_num(1e-9))


def test_bfloat16_products_are_logged(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pagedllm_core.native.library.open_library", lambda path: library)
    caplog.set_level("INFO", logger="pagedllm.native")
    assert load.__wrapped__(next(iter(LIBRARIES))) is library
    assert ("uses bfloat16 products" in caplog.text) == bool(library.uses_bf16_products())


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as integers up to 127, and what one of them is worth."""
    top = x.float().abs().amax(1, keepdim=True)
    inverse = torch.full_like(top, 127) / top  # a number by a tensor is not divided exactly
    return torch.where(top > 0, x.float() * inverse, 0.0).round().double(), (top / 127).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 51), (96, 64), (200, 333)])
def test_linear_layers_in_int8(library: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[0] = 0
    bias = torch.randn(shape[0], generator=generator)
    packed = PackedLinear(library, weight, bias, int8=True)
    integers, worth = rounded(weight)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 50, 97, 200):
        x = torch.randn(rows, shape[1], generator=generator)
        x[-1] = 0
        inputs, scale = rounded(x)
        wanted = (inputs @ integers.T) * scale * worth.T + bias
        torch.testing.assert_close(packed(x, threads=2).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bit_equal_alone_and_in_company(library: ctypes.CDLL, dtype: torch.dtype, int8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = PackedLinear(library, torch.randn(130, 77, generator=generator).to(dtype), int8=int8)
    x = torch.randn(150, 77, generator=generator)
    together = packed(x, threads=2)
    for rows in (1, 2, 5, 12, 13, 100):
        assert torch.equal(packed(x[:rows].contiguous(), threads=1), together[:rows])


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_rows_before(library: ctypes.CDLL, dtype: torch.dtype, int8: bool) -> None:
    """Zeros of a weight's padding do not hide what lies beside a row's last number: NaN times zero is NaN."""
    wide, odd = (PackedLinear(library, torch.ones(40, inputs, dtype=dtype), int8=int8) for inputs in (64, 37))
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    wanted = odd(x)
    wide(torch.full((5, 64), 1.0 if int8 else torch.nan))
    assert wanted.isfinite().all()
    assert torch.equal(odd(x), wanted)


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
def test_results_are_bit_equal_alone_in_company_in_chunks_cached_and_preempted(
    library: ctypes.CDLL, dtype: str
) -> None:
    alone = answers(False, dtype=dtype, enable_prefix_caching=False)
    assert answers(True, dtype=dtype) == alone
    assert answers(True, again=True, dtype=dtype) == alone
    assert answers(True, dtype=dtype, max_num_batched_tokens=16, max_num_seqs=16) == alone
    small = "1400KiB" if dtype == "float32" else "700KiB"
    assert answers(True, dtype=dtype, kv_cache_memory=small, num_threads=1) == alone


@functools.cache
def steps(library: ctypes.CDLL | None, dtype: str) -> torch.Tensor:
    """Logits of a prompt, of a step that decodes for 13 sequences which share most of it, and of a lone token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagedllm_core.model.runner.load", lambda name: library)
        runner = ModelRunner(EngineConfig(model="tiny", dtype=dtype, block_size=16, kv_cache_memory="8MiB"))

    def run(sequences: int, position: int, tokens: int) -> torch.Tensor:
        first, count = np.arange(sequences), sequences * tokens
        step = ForwardBatch(
            token_ids=5 + 7 * np.arange(count),
            positions=np.tile(position + np.arange(tokens), sequences),
            slot_mapping=position + (16 * first[:, None] + np.arange(tokens)).ravel(),
            query_starts=np.arange(0, count + 1, tokens, dtype=np.int32),
            context_lens=np.full(sequences, position + tokens, dtype=np.int32),
            block_tables=np.stack([0 * first, 0 * first + 1, 2 + first], axis=1).astype(np.int32),
            logits_rows=np.arange(count),
        )
        return runner.run(step).float()

    found = torch.cat([run(1, 0, 45), run(13, 32, 1), run(1, 33, 1)])
    runner.close()
    return found


def test_steps_in_bfloat16_are_as_near_as_those_of_torch(library: ctypes.CDLL) -> None:
    exact = steps(None, "float32")
    found, wanted = (
        (logits - exact).norm(dim=1) / (exact - exact.mean(1, keepdim=True)).norm(dim=1)
        for logits in (steps(library, "bfloat16"), steps(None, "bfloat16"))
    )
    assert 1e-4 < float(found.median()) <= float(wanted.median())
    assert float(found.max()) < 2 * float(wanted.max())


def test_int8_is_bit_equal_alone_and_in_company(library: ctypes.CDLL) -> None:
    alone = answers(False, quantization="int8", enable_prefix_caching=False)
    assert answers(True, again=True, quantization="int8") == alone
    assert alone != answers(False, enable_prefix_caching=False), "nothing was rounded"


def test_int8_that_changes_the_logits_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "plain_config", lambda folder: None)  # a checkpoint that transformers has to read
    monkeypatch.setattr(fuse, "is_near", lambda distance, exact: False)
    message = r"^quantization='int8': changes this model's logits too much \(by 0"
    with pytest.raises(UnsupportedModelError, match=message):
        ModelRunner(EngineConfig(model="tiny", quantization="int8"))


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


def test_bfloat16_products_stay_in_registers() -> None:
    if shutil.which("objdump") is None or not library_path("avx512").exists() or "CXXFLAGS" in os.environ:
        pytest.skip("objdump and a library that was compiled with no other flags are needed")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library_path("avx512"))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = "\n".join(line.partition("\t")[2] for line in listing.splitlines())
    most = 0
    for block in re.split(r"^(?:j|ret|$).*", code, flags=re.MULTILINE):
        products = re.findall(r"^vdpbf16ps .*", block, re.MULTILINE)
        if not products:
            continue
        loop = block[block.index(products[0]) : block.index(products[-1])]
        assert not re.search(r"^v\w+ +%zmm\d+,[^%\n]*\(", loop, re.MULTILINE), f"a sum leaves its register: {loop}"
        assert len({product.rpartition(",")[2] for product in products}) == len(products)
        loads = re.findall(r"^vpbroadcastd .*\(", block, re.MULTILINE)
        assert 0 < len(loads) <= len(products) / 2, "an input is loaded once for the two products it takes part in"
        most = max(most, len(products))
    assert most == 24, "two for each of 12 rows"
