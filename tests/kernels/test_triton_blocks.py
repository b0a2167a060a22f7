"""Copies of whole KV blocks, interpreted: inside a pool, and to and from another."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import tests.kernels.interpreter  # noqa: F401
from pagedllm_core.kernels.blocks import copy_blocks
from pagedllm_core.kv.storage import KVStorage, LayerGeometry


def pool(blocks: int, dtype: torch.dtype = torch.float32, block_size: int = 4, dim: int = 16) -> torch.Tensor:
    """Random bytes, [2, 3 layers, 2 kv_heads, blocks, block_size, dim]."""
    shape = (2, 3, 2, blocks, block_size, dim * dtype.itemsize)
    generator = torch.Generator().manual_seed(blocks)
    return torch.randint(0, 120, shape, generator=generator, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize(
    ("dtype", "block_size", "dim"),
    [
        (torch.float32, 4, 16),
        (torch.float16, 16, 128),
        (torch.bfloat16, 1, 2),
        (torch.float16, 3, 1),
        (torch.uint8, 4, 16 + 4),
        (torch.uint8, 1, 7),
        (torch.float32, 37, 64),
    ],
    ids=str,
)
def test_blocks_are_copied_in_all_layers_and_nothing_else(dtype: torch.dtype, block_size: int, dim: int) -> None:
    blocks = pool(9, dtype, block_size, dim)
    wanted = blocks.clone()
    pairs = [(0, 8), (3, 1), (3, 2), (7, 5)]
    for source, destination in pairs:
        wanted[:, :, :, destination] = blocks[:, :, :, source]
    copy_blocks(blocks, blocks, torch.tensor(pairs))
    assert torch.equal(blocks, wanted)


def test_blocks_move_between_pools_of_other_sizes() -> None:
    device, host = pool(9), pool(5)
    wanted = host.clone()
    wanted[:, :, :, [4, 0]] = device[:, :, :, [8, 2]]
    copy_blocks(device, host, torch.tensor([(8, 4), (2, 0)]))
    assert torch.equal(host, wanted)
    back = device.clone()
    back[:, :, :, [1, 7]] = host[:, :, :, [4, 3]]
    copy_blocks(host, device, torch.tensor([(4, 1), (3, 7)]))
    assert torch.equal(device, back)


def test_no_copies() -> None:
    blocks = pool(3)
    before = blocks.clone()
    copy_blocks(blocks, blocks, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(blocks, before)


def test_pools_that_do_not_belong_together_are_refused() -> None:
    pairs = torch.tensor([(0, 1)])
    with pytest.raises(ValueError, match="differ in more"):
        copy_blocks(pool(3), pool(3, block_size=8), pairs)
    with pytest.raises(ValueError, match="one type"):
        copy_blocks(pool(3), pool(3, torch.int32), pairs)
    with pytest.raises(ValueError, match="contiguous"):
        copy_blocks(pool(3)[:, ::2], pool(3)[:, ::2], pairs)


@pytest.mark.parametrize("copies", [[(0, 1), (1, 2)], [(0, 1), (1, 0)], [(2, 0), (1, 2)]])
def test_a_storage_reads_every_source_before_it_writes(copies: list[tuple[int, int]]) -> None:
    storage = KVStorage([LayerGeometry(2, 16, torch.float32)] * 2, 3, 4, torch.device("cpu"))
    for block in range(3):
        for layer in range(2):
            storage.layer(layer)[:, :, block] = block + 1
    storage.copy_blocks(copies)
    wanted = [1.0, 2.0, 3.0]
    for source, destination in copies:
        wanted[destination] = source + 1.0
    assert [storage.layer(1)[0, 0, block].unique().tolist() for block in range(3)] == [[one] for one in wanted]
