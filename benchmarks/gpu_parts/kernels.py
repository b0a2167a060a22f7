"""The kernels beside attention, each against its roof, at the sizes of Llama 8B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from gpu_parts.attention import BLOCK, DIM, HEADS, KV_HEADS, ragged_batch
from gpu_parts.machine import Context, Work, median_seconds, replayable
from pagedllm_core.kernels.beams import select_best
from pagedllm_core.kernels.blocks import copy_blocks
from pagedllm_core.kernels.cache import split_fp8, write_cache
from pagedllm_core.kernels.fused import add_rms_norm, rope_and_cache, silu_mul
from pagedllm_core.kernels.linear import linear
from pagedllm_core.kv.storage import KVStorage, LayerGeometry

COLUMNS = {"kernels": ["kernel", "size", "microseconds", "rate", "roof", "share", "bar"]}
VOCABULARY = 151_936
_BEYOND_CACHE = 256 << 20  # bytes that are read and written in turn, several times an L2 cache
_MOST_LAUNCHES = 256
_GOAL = 80  # per cent, of what is large enough for launches not to matter


class Launch(NamedTuple):
    """One launch, over tensors of its own.

    Attributes:
        amount: Bytes that it has to read and write; operations where the roof is the tensor cores.
        run: Does it.
        is_done: Whether its results are there; asked at the end.
    """

    amount: int
    run: Work
    is_done: Callable[[], bool]


class Case(NamedTuple):
    """A row of the table: a kernel at one size.

    Attributes:
        kernel: Its name.
        size: In words.
        make: Makes a launch.
        roof: "copy" or "bf16", as measured before, "to host" or "from host".
        judged: Whether it has a goal.
    """

    kernel: str
    size: str
    make: Callable[[], Launch]
    roof: str = "copy"
    judged: bool = False


def kernels(context: Context) -> None:
    """The bytes that a kernel has to read and write, over the time of a launch. Beams have to read the scores once.

    Launches go over tensors in turn, more than the L2 cache holds, and are replayed as one graph. The roof of swaps is
    a plain copy to and from pinned memory.
    """
    cases = [*row_cases(context), *block_cases(context), *beam_cases(context), *linear_cases(context)]
    measure_all(context, cases, bus_rates(context))


def measure_all(context: Context, cases: list[Case], bus: dict[str, float]) -> None:
    """A row for each case."""
    for done, case in enumerate(cases):
        with context.case(kernel=case.kernel, size=case.size):
            roof = (context.roofs | bus)[case.roof]
            amount, seconds = seconds_of_launch(context, case.make, context.left() / (len(cases) - done) / 2)
            share = amount / seconds / roof
            unit = "GFLOP/s" if case.roof == "bf16" else "GB/s"
            context.row(
                kernel=case.kernel, size=case.size, microseconds=f"{seconds * 1e6:.1f}",
                rate=f"{amount / seconds / 1e9:,.1f} {unit}", roof=case.roof, share=f"{share:.0%}",
                bar=context.bar(f"{case.kernel}, {case.size}", _GOAL, 100 * share) if case.judged else None,
            )  # fmt: skip


def seconds_of_launch(context: Context, make: Callable[[], Launch], limit: float) -> tuple[int, float]:
    """The amount, and median seconds, of one launch."""
    launches = [make()]
    amount = launches[0].amount
    if not context.smoke:
        launches += [make() for _ in range(min(_MOST_LAUNCHES, -(-_BEYOND_CACHE // amount)) - 1)]

    def work() -> None:
        for launch in launches:
            launch.run()

    seconds = median_seconds(replayable(work, context.device), context.device, limit) / len(launches)
    if not all(launch.is_done() for launch in launches):
        raise RuntimeError("some results were not written, or are not finite")
    return amount, seconds


def bus_rates(context: Context) -> dict[str, float]:
    """Bytes a second of a plain copy, in each direction."""
    rates: dict[str, float] = {}
    with context.case(kernel="plain copy of pinned memory"):
        size = (1 << 16) if context.smoke else (256 << 20)
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=context.device.type == "cuda")
        there = torch.zeros(size, dtype=torch.uint8, device=context.device)
        for roof, target, source in (("to host", host, there), ("from host", there, host)):
            copy = partial(target.copy_, source, non_blocking=True)
            seconds = median_seconds(copy, context.device, context.left() / 20)
            rates[roof] = size / seconds
            context.row(
                kernel="plain copy of pinned memory", size=f"{size >> 20} MiB {roof}",
                microseconds=f"{seconds * 1e6:.1f}", rate=f"{size / seconds / 1e9:,.1f} GB/s",
            )  # fmt: skip
    return rates


def row_cases(context: Context) -> list[Case]:
    """What is done to every token of a step: a decode step, and prompts."""
    found = []
    for sequences, new in ((1, 3),) if context.smoke else ((64, 1), (4, 1024)):
        rows = sequences * new
        size, large = f"{rows:,} rows", rows > 1000
        for cache in ("plain", "fp8"):
            write = partial(cache_launch, context, sequences, new, cache == "fp8")
            found.append(Case(f"cache write, {cache}", size, partial(write, rotated=False), judged=large))
            found.append(Case(f"RoPE + cache write, {cache}", size, partial(write, rotated=True), judged=large))
        found.append(Case("add + RMSNorm", size, partial(norm_launch, context, rows), judged=large))
        found.append(Case("SiLU·mul", size, partial(silu_launch, context, rows), judged=large))
    return found


def cache_launch(context: Context, sequences: int, new: int, fp8: bool, rotated: bool) -> Launch:
    """Keys and values into their slots, with or without the rotation of queries and keys."""
    device, dtype = context.device, context.dtype
    blocks = sequences * -(-(BLOCK - 1 + new) // BLOCK)
    step, rows = ragged_batch([BLOCK - 1] * sequences, new, blocks), sequences * new
    geometry = LayerGeometry(KV_HEADS, DIM, torch.float8_e4m3fn if fp8 else dtype)
    storage = KVStorage([geometry], blocks, BLOCK, device)
    storage._pools[0].fill_(255 if fp8 else float("nan"))  # 255 is a NaN of e4m3, too
    kv = storage.layer(0)
    slots, positions = (torch.from_numpy(one).to(device) for one in (step.slot_mapping, step.positions))
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM, device=device, dtype=dtype)
    q = torch.full((rows if rotated else 0, HEADS, DIM), float("nan"), device=device, dtype=dtype)
    k, v = qkv.view(rows, -1, DIM)[:, HEADS:].transpose(0, 1).chunk(2)
    angles = torch.randn(BLOCK + new, DIM, device=device)
    cosines, sines = angles.cos(), angles.sin()

    def run() -> None:
        if rotated:
            rope_and_cache(qkv, kv, cosines, sines, positions, slots, out=q)
        else:
            write_cache(k, v, kv, slots)

    def is_done() -> bool:
        written = split_fp8(kv)[0].float()[:, :, slots // BLOCK, slots % BLOCK]
        return bool(written.isfinite().all() and q.isfinite().all())

    amount = 2 * q.nbytes + 2 * k.numel() * k.itemsize + rows * geometry.slot_bytes()
    return Launch(amount, run, is_done)


def norm_launch(context: Context, rows: int) -> Launch:
    """The residual stream between two products."""
    x, residual, out = (torch.randn(rows, HEADS * DIM, device=context.device, dtype=context.dtype) for _ in range(3))
    out.fill_(float("nan"))
    weight = torch.ones_like(x[0])
    return Launch(
        4 * x.nbytes + weight.nbytes,
        lambda: add_rms_norm(x, residual, weight, 1e-6, out),
        lambda: bool(out.isfinite().all()),
    )


def silu_launch(context: Context, rows: int) -> Launch:
    """Between the two products of an MLP."""
    columns = 96 if context.smoke else 14_336
    gate_up = torch.randn(rows, 2 * columns, device=context.device, dtype=context.dtype)
    out = torch.full_like(gate_up[:, :columns], float("nan"))
    return Launch(gate_up.nbytes + out.nbytes, lambda: silu_mul(gate_up, out), lambda: bool(out.isfinite().all()))


def block_cases(context: Context) -> list[Case]:
    """Whole blocks in all layers: copy-on-write, and what preemption moves."""
    count = 2 if context.smoke else 64
    size = f"{count} blocks"
    return [
        Case("block copy", size, partial(copy_launch, context, count), judged=True),
        Case("swap out", size, partial(swap_launch, context, count, True), "to host", judged=True),
        Case("swap in", size, partial(swap_launch, context, count, False), "from host", judged=True),
    ]


def random_blocks(context: Context, count: int, host: int = 0) -> KVStorage:
    """All layers' pool of random numbers."""
    geometry = LayerGeometry(KV_HEADS, DIM, context.dtype)
    storage = KVStorage([geometry] * (1 if context.smoke else 32), count, BLOCK, context.device, host)
    storage._pools[0].normal_()
    return storage


def copy_launch(context: Context, count: int) -> Launch:
    """Copies inside the pool."""
    storage = random_blocks(context, 2 * count)
    pool, pairs = storage._pools[0], torch.randperm(2 * count, device=context.device).view(-1, 2)

    def is_done() -> bool:
        sources, targets = (pool.index_select(3, one) for one in pairs.unbind(1))
        return torch.equal(sources, targets)

    return Launch(pool.nbytes, lambda: copy_blocks(pool, pool, pairs), is_done)


def swap_launch(context: Context, count: int, out: bool) -> Launch:
    """Copies between the pool and locked host memory."""
    storage = random_blocks(context, count, host=count)
    pairs = torch.stack([torch.randperm(count), torch.randperm(count)], dim=1)
    wanted = torch.empty_like(storage._host[0])
    wanted[:, :, :, pairs[:, 1]] = storage._pools[0].cpu()[:, :, :, pairs[:, 0]]
    if not out:
        storage._host[0].copy_(storage._pools[0])
        storage._pools[0].zero_()
    pairs = pairs.to(context.device)

    def ends() -> tuple[torch.Tensor, torch.Tensor]:  # of the storage, which unlocks its memory when it goes
        ends = (storage._pools[0], storage._host[0])
        return ends if out else ends[::-1]

    return Launch(storage.nbytes, lambda: copy_blocks(*ends(), pairs), lambda: torch.equal(ends()[1].cpu(), wanted))


def beam_cases(context: Context) -> list[Case]:
    """A beam search's candidates: twice as many as beams, of all continuations."""
    vocabulary = 331 if context.smoke else VOCABULARY
    return [
        Case("beam selection", f"{width} x {vocabulary:,}", partial(beam_launch, context, width, vocabulary))
        for width in ((2,) if context.smoke else (4, 64))
    ]


def beam_launch(context: Context, width: int, vocabulary: int) -> Launch:
    """One request's beams."""
    scores = torch.randn(width, vocabulary, device=context.device).log_softmax(-1)
    running = torch.zeros(width, device=context.device)
    starts = torch.tensor([0, width], dtype=torch.int32, device=context.device)
    best: list[torch.Tensor] = []

    def run() -> None:
        best[:] = select_best(scores, 2 * width, starts, width, add=running)

    def is_done() -> bool:
        return torch.equal(best[0][0], scores.flatten().topk(2 * width).values)

    return Launch(scores.nbytes, run, is_done)


def linear_cases(context: Context) -> list[Case]:
    """The product of the deterministic mode: few rows are bound by the weights' bytes, many by the tensor cores."""
    inner, columns = (64, 96) if context.smoke else (HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM)
    return [
        Case(
            "deterministic product", f"{rows:,} rows", partial(linear_launch, context, rows, inner, columns, roof), roof
        )
        for rows, roof in ((2 if context.smoke else 64, "copy"), (3 if context.smoke else 4096, "bf16"))
    ]


def linear_launch(context: Context, rows: int, inner: int, columns: int, roof: str) -> Launch:
    """Queries, keys and values of one layer."""
    x, weight = (torch.randn(one, inner, device=context.device, dtype=context.dtype) for one in (rows, columns))
    amount = weight.nbytes if roof == "copy" else 2 * rows * inner * columns
    found: list[torch.Tensor] = []

    def run() -> None:
        found[:] = [linear(x, weight)]

    return Launch(amount, run, lambda: bool(found[0].isfinite().all()))
