"""How many blocks the KV pool gets, on the device and in host memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import CapacityError, InvalidRequestError
from pagedllm_core.model.cuda import empty_cache
from pagedllm_core.model.memory import available_memory

_DEFAULT_POOL = 4 << 30
_DEFAULT_SHARE = 0.4
_DEFAULT_SWAP = 4 << 30
_GRAPHS = 1 << 30


def pool_blocks(
    config: EngineConfig, size: int, max_model_len: int, device: torch.device, profile: Callable[[], None]
) -> int:
    """Blocks that the pool holds.

    Args:
        config: What the user asked for.
        size: Bytes of one block in all layers.
        max_model_len: Context limit in tokens.
        device: Where the pool lies.
        profile: Runs the largest step once; called on a CUDA device, where the user gave no size.

    Raises:
        CapacityError: Not even one block fits.
    """
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < size:
            raise CapacityError(
                f"kv_cache_memory={config.kv_cache_memory}: one block of {config.block_size} tokens takes {size} bytes "
                "in this model; give at least that, or leave kv_cache_memory out"
            )
        return config.kv_cache_memory // size
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    if device.type == "cuda":
        memory = _free_cuda_memory(config, device, profile)
    else:
        memory = min(_DEFAULT_POOL, int(_DEFAULT_SHARE * available_memory()))
    if memory < size:
        raise CapacityError(
            f"kv_cache_memory: {memory} bytes are left on {device}, and one block of {config.block_size} tokens takes "
            f"{size}; free memory, set kv_cache_memory, or choose a smaller model or block_size"
        ) from MemoryError(f"{memory} bytes left")  # so idle engines make room
    return min(memory // size, usable)


def host_blocks(config: EngineConfig, size: int, device: torch.device) -> int:
    """Blocks of host memory that `swap_space` allows; by default 4 GiB beside a GPU, and none elsewhere.

    Raises:
        InvalidRequestError: The machine has less memory than asked for.
    """
    available = available_memory()
    if config.swap_space is None:
        return min(_DEFAULT_SWAP, available // 4) // size if device.type == "cuda" else 0
    wanted = int(config.swap_space * 2**30)
    if wanted > available:
        raise InvalidRequestError(
            f"swap_space={config.swap_space}: only {available / 2**30:.1f} GiB of host memory are available; give "
            "less, or 0 to recompute what is preempted"
        )
    return wanted // size


def graph_memory(config: EngineConfig, device: torch.device) -> int:
    """Bytes of device memory that CUDA graphs may take: 1 GiB, or a twentieth of a small device."""
    if config.enforce_eager:
        return 0
    if device.type != "cuda":
        return _GRAPHS
    return min(_GRAPHS, torch.cuda.get_device_properties(device).total_memory // 20)


def _free_cuda_memory(config: EngineConfig, device: torch.device, profile: Callable[[], None]) -> int:
    """Bytes that `gpu_memory_utilization` leaves after the weights, the largest forward pass and the graphs."""
    empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    profile()
    activations = torch.cuda.max_memory_allocated(device) - before
    empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = int((1 - config.gpu_memory_utilization) * total)
    return free - taken - activations - graph_memory(config, device)


def largest_step(config: EngineConfig, max_model_len: int) -> ForwardBatch:
    """A step of as many tokens and logits as one can have, over a pool of just its size: one prompt."""
    tokens = min(config.max_num_batched_tokens, max_model_len)
    rows = min(config.max_num_seqs, tokens)
    return ForwardBatch(
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=np.arange(tokens, dtype=np.int64),
        slot_mapping=np.arange(tokens, dtype=np.int64),
        query_starts=np.array([0, tokens], dtype=np.int32),
        context_lens=np.array([tokens], dtype=np.int32),
        block_tables=np.arange(-(-tokens // config.block_size), dtype=np.int32)[None],
        logits_rows=np.arange(tokens - rows, tokens, dtype=np.int64),
    )
