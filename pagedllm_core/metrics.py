"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of one engine.

    Attributes:
        running: Requests that hold blocks.
        waiting: Requests that wait for a seat or for blocks.
        swapped: Of the waiting requests, those whose blocks are in host memory.
        steps: Forward passes so far.
        kv_blocks_total: Blocks of the pool.
        kv_blocks_used: Blocks some sequence reads.
        kv_blocks_cached: Blocks nobody reads, kept for a later hit.
        kv_blocks_free: The rest.
        kv_waste: Fraction of the used blocks' slots that hold no token.
        max_batch_size: Most sequences in one step so far.
        prefix_cache_queries: Prompt tokens looked up in the prefix cache.
        prefix_cache_hits: Prompt tokens found there.
        preemptions: Requests preempted so far.
        tokens_prefilled: Prompt tokens computed so far.
        tokens_generated: Tokens generated so far.
        swap_blocks_total: Blocks of host memory for preempted requests.
        swap_blocks_used: Of those, the ones that hold something.
        block_map: A byte for each block: 0 free, 1 cached, 2 used, 3 used by several sequences.
        occupancy: (step, blocks used, blocks cached) of each of the latest steps.
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    steps: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_free: int = 0
    kv_waste: float = 0.0
    max_batch_size: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    tokens_prefilled: int = 0
    tokens_generated: int = 0
    swap_blocks_total: int = 0
    swap_blocks_used: int = 0
    block_map: bytes = field(default=b"", repr=False)
    occupancy: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        """How a notebook shows it: the block map, and occupancy over time."""
        from pagedllm_core.notebook import stats_html

        return stats_html(self)
