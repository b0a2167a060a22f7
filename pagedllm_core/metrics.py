"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


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
