"""What `deterministic=True` stands on where Triton runs: no bit of a row depends on the other rows. In the interpreter.

Products are summed up in one order here (`sums_in_order`), as on a GPU. That instructions are the same whatever else is
in a tile cannot be seen in the interpreter; tests/gpu looks at it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.kernels import decode_attention
from pagedllm_core.kernels.cache import write_cache
from pagedllm_core.kernels.linear import linear
from pagedllm_core.kernels.prefill_attention import list_decode_tiles, list_tiles
from pagedllm_core.model.determinism import shapes_that_differ
from tests.kernels import interpreter
from tests.kernels.test_attention import CPU, Step, make_step

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SIZES = pytest.mark.parametrize(("inner", "columns"), [(1, 1), (100, 33), (128, 64), (300, 131)])
PLAIN, WINDOW = LayerSpec(scale=0.3), LayerSpec(scale=0.3, window=21)
FEATURES = LayerSpec(scale=0.3, window=21, softcap=4.0, sinks=torch.linspace(-2, 2, 6))
LENGTHS = (45, 20, 1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in one order, and decoding that splits even the few keys here."""
    monkeypatch.setattr(interpreter, "sums_in_order", True)
    monkeypatch.setattr(decode_attention, "_LEAST_PART", 16)


def make_backend(deterministic: bool = True) -> TritonAttention:
    backend = TritonAttention(CPU, 4, deterministic)
    backend._multiprocessors = 8
    return backend


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x with rows further apart than their length, and numbers that are not x's behind them; weight; bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows + 1, inner + 3, generator=generator).to(dtype)
    x[rows:], x[:, inner:] = torch.nan, torch.nan
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((columns, inner), (columns,)))
    return x[:rows, :inner], weight, bias


@DTYPES
@SIZES
@pytest.mark.parametrize("rows", [1, 70])
def test_a_product_is_torchs(dtype: torch.dtype, rows: int, inner: int, columns: int) -> None:
    x, weight, bias = operands(rows, inner, columns, dtype)
    exact = x.double() @ weight.double().T
    tolerance = TOLERANCES[dtype] * inner**0.5
    for found, wanted in ((linear(x, weight), exact), (linear(x, weight, bias), exact + bias.double())):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@DTYPES
@SIZES
def test_a_products_rows_are_the_same_alone_and_in_company(dtype: torch.dtype, inner: int, columns: int) -> None:
    """Sums that cancel, so that what is left is their rounding: any other order shows."""
    x, weight, _ = operands(70, inner, columns, dtype)
    half = inner // 2
    x[:, half : 2 * half], weight[:, half : 2 * half] = x[:, :half], -weight[:, :half]
    together = linear(x, weight)
    for rows in ([0], [5], [31], [32], [69], [69, 3, 3], list(range(69, 0, -1))):
        assert torch.equal(linear(x[rows], weight), together[rows])


def test_a_product_of_no_rows() -> None:
    assert linear(torch.empty(0, 8), torch.empty(5, 8)).shape == (0, 5)


def test_operands_that_do_not_belong_together_are_refused() -> None:
    x, weight = torch.empty(2, 8), torch.empty(5, 8)
    for wrong in (weight[:, :7], weight.half()):
        with pytest.raises(ValueError, match="do not fit"):
            linear(x, wrong)
    with pytest.raises(ValueError, match="do not fit"):
        linear(x, weight, torch.empty(4))
    with pytest.raises(ValueError, match="contiguous"):
        linear(torch.empty(8, 2).T, weight)


@pytest.mark.parametrize(("group", "rows"), [(1, 16), (3, 16), (16, 16), (40, 16), (8, 128)])
def test_tiles_of_decode_steps_need_no_host(group: int, rows: int) -> None:
    ones = np.ones(7, dtype=np.int32)
    found = list_decode_tiles(7, group, rows, CPU)
    assert found.dtype == torch.int32
    assert sorted(found.tolist()) == sorted(list_tiles(ones, ones, group, rows).tolist())


def test_the_self_test_compares_no_memory_with_itself() -> None:
    """Logits are valid until the next step only."""
    memory = torch.zeros(8, 1)

    def logits(batch: ForwardBatch) -> torch.Tensor:
        count = len(batch.context_lens)
        memory[:count] = float(batch.context_lens.sum() == 3)  # of the steps tried below one alone: 1 + 2
        return memory[:count]

    assert shapes_that_differ(logits, 10, num_blocks=9, block_size=16, longest=2) == [
        "2 sequences together", "decoding beside 1 others",
    ]  # fmt: skip


def filled_step(dtype: torch.dtype, block_size: int = 4) -> Step:
    """Sequences of `LENGTHS` tokens, two kv heads with three query heads each; all keys are in the cache."""
    step = make_step(3, [(0, length) for length in LENGTHS], block_size, (6, 2), 16, dtype)
    write_cache(step.k, step.v, step.kv, torch.from_numpy(step.batch.slot_mapping))
    return step


def attend(backend: TritonAttention, step: Step, spec: LayerSpec, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """Attention of tokens `start` .. `end` - 1 of each (sequence, start, end), one after the other."""
    sequences = [sequence for sequence, _, _ in spans]
    counts = np.array([end - start for _, start, end in spans])
    rows = np.concatenate([step.batch.query_starts[one] + np.arange(start, end) for one, start, end in spans])
    batch = ForwardBatch(
        token_ids=np.zeros(len(rows), dtype=np.int64),
        positions=step.batch.positions[rows],
        slot_mapping=step.batch.slot_mapping[rows],
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lens=np.array([end for _, _, end in spans], dtype=np.int32),
        block_tables=step.batch.block_tables[sequences],
        logits_rows=np.arange(len(rows)),
    )
    return backend.attend(step.q[:, rows], step.kv, spec, backend.prepare(batch))


def cuts(chunk: int) -> list[tuple[int, int, int]]:
    """The first sequence in chunks."""
    return [(0, *span) for span in pairwise([*range(0, LENGTHS[0], chunk), LENGTHS[0]])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [PLAIN, WINDOW, FEATURES], ids=["plain", "window", "features"])
def test_attention_of_a_token_is_the_same_in_any_step(spec: LayerSpec, dtype: torch.dtype) -> None:
    step, backend = filled_step(dtype), make_backend()
    alone = attend(backend, step, spec, [(0, 0, LENGTHS[0])])
    company = attend(backend, step, spec, [(number, 0, length) for number, length in enumerate(LENGTHS)][::-1])
    assert torch.equal(company[-LENGTHS[0] :], alone)
    for chunk in (1, 2, 7, 44):
        found = torch.cat([attend(backend, step, spec, [cut]) for cut in cuts(chunk)])
        assert torch.equal(found, alone), f"chunks of {chunk}"
    decoding = attend(backend, step, spec, [(number, length - 1, length) for number, length in enumerate(LENGTHS)])
    assert torch.equal(decoding[0], alone[-1])


def test_without_the_mode_a_decoding_token_differs_from_one_in_a_chunk() -> None:
    step, backend = filled_step(torch.float32), make_backend(deterministic=False)
    chunk, decoding = (attend(backend, step, PLAIN, [(0, start, LENGTHS[0])]) for start in (0, LENGTHS[0] - 1))
    torch.testing.assert_close(decoding[0], chunk[-1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(decoding[0], chunk[-1])


@pytest.mark.parametrize("spec", [PLAIN, FEATURES], ids=["plain", "features"])
def test_static_tensors_give_the_same_bits_and_padding_zeros(spec: LayerSpec) -> None:
    step, backend = filled_step(torch.float32), make_backend()
    wanted = attend(backend, step, spec, [(number, length - 1, length) for number, length in enumerate(LENGTHS)])
    tables, contexts = torch.full((5, 15), 1 << 30, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    tables[:3, : step.batch.block_tables.shape[1]] = torch.from_numpy(step.batch.block_tables)
    contexts[:3] = torch.tensor(LENGTHS)
    q = torch.full((6, 5, 16), torch.nan)
    q[:, :3] = step.q[:, np.cumsum(LENGTHS) - 1]
    found = backend.attend(q, step.kv, spec, backend.decode_meta(tables, contexts, torch.full((5,), -1)))
    assert torch.equal(found[:3], wanted)
    assert (found[3:] == 0).all()
