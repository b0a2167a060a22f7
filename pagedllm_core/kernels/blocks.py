"""Copies of whole KV blocks: inside the pool, and between the pool and pinned host memory.

A block is scattered: in each layer, its keys and values of each head lie in one run of block_size * head_dim numbers (4
KiB for 16 tokens of 128 bfloat16 numbers). One kernel serves all three directions, with a program for each run.

Why a kernel for host memory, too: `cudaMemcpyAsync` takes a call for each run, about a microsecond or two on the host
for 4 KiB, which is some 3 GB/s; and gathering into one run first needs a second buffer and, on the host, a CPU to take
it apart again. Pinned host memory has an address on the device (unified virtual addressing), so a program loads or
stores it directly, 16 bytes a thread, and enough programs are under way to fill the bus. Roof: the memory's bandwidth
inside the pool (each byte is read and written once), the bus's to the host (64 GB/s a direction for PCIe 5).

Source: many copies in one launch, and swapping whole blocks, as in Kwon et al., "PagedAttention" (SOSP 2023), whose
implementation is vLLM's `copy_blocks` and `swap_blocks`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # runs are copied in the widest that divides them


@triton.jit
def _copy_runs(
    source, destination, pairs, outer, source_blocks, destination_blocks, WORDS: tl.constexpr, TILE: tl.constexpr
):
    number, run = tl.program_id(0) // outer, (tl.program_id(0) % outer).to(tl.int64)
    first = source + (run * source_blocks + tl.load(pairs + 2 * number)) * WORDS
    target = destination + (run * destination_blocks + tl.load(pairs + 2 * number + 1)) * WORDS
    for start in tl.static_range(0, WORDS, TILE):
        word = start + tl.arange(0, TILE)
        tl.store(target + word, tl.load(first + word, mask=word < WORDS), mask=word < WORDS)


def copy_blocks(source: torch.Tensor, destination: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks in all layers.

    Programs run in any order. Where no block is both read and written (and none written twice), that is as if all
    sources were read before any destination is written; otherwise the result is undefined.

    Args:
        source: [2, layers, kv_heads, blocks, block_size, row], contiguous, on the device or in pinned host memory.
        destination: The same but for the number of blocks; may be `source`.
        pairs: int64 [N, 2], contiguous, (source, destination) block of each copy, on the device.

    Raises:
        ValueError: The pools do not belong together.
    """
    outer, run_bytes = source.shape[:3].numel(), source.shape[4:].numel() * source.itemsize
    if source.shape[:3] + source.shape[4:] != destination.shape[:3] + destination.shape[4:]:
        raise ValueError(f"pools {tuple(source.shape)} and {tuple(destination.shape)} differ in more than their blocks")
    if source.dtype != destination.dtype or not (source.is_contiguous() and destination.is_contiguous()):
        raise ValueError("pools must be contiguous and of one type")
    word = next(dtype for dtype in _WORDS if run_bytes % dtype.itemsize == 0)
    words = run_bytes // word.itemsize
    if len(pairs):
        _copy_runs[(len(pairs) * outer,)](
            source.view(-1).view(word), destination.view(-1).view(word), pairs, outer, source.shape[3],
            destination.shape[3], WORDS=words, TILE=min(1024, triton.next_power_of_2(words)),
        )  # fmt: skip
