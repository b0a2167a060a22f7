"""A model without weights whose answer depends on what really is in the KV slots.

Each slot holds the token that was written to it. The logits of a position are a hash of the tokens found through the
block table, so one wrong slot, a missing copy-on-write or a stale block changes what is generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.decode.device import DeviceSampler
from pagedllm_core.engine import Engine
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.streams import merge_outputs


def fake_logits(history: list[int], vocab_size: int) -> torch.Tensor:
    """Logits after a history of tokens: float32 [vocab_size], far from flat."""
    seed = hashlib.sha256(np.asarray(history, dtype=np.int64).tobytes()).digest()
    generator = np.random.default_rng(list(seed))
    return torch.from_numpy(generator.normal(scale=2.0, size=vocab_size).astype(np.float32))


def expected_greedy(prompt: list[int], count: int, vocab_size: int, eos: tuple[int, ...] = ()) -> list[int]:
    """What greedy decoding of the fake model generates for a prompt on its own."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(fake_logits(tokens, vocab_size).argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Satisfies `pagedllm_core.model.interface.Runner`. `before_run` may raise, to test failing steps."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 61,
        max_model_len: int = 256,
        eos_token_ids: tuple[int, ...] = (),
        generation_defaults: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        num_host_blocks: int = 0,
        overlaps: bool = False,
    ) -> None:
        self.sampler = DeviceSampler(torch.device("cpu"), vocab_size, 1024) if overlaps else None
        self.num_host_blocks = num_host_blocks
        self.host = np.full((num_host_blocks, block_size), -1, dtype=np.int64)
        self.swapped_blocks = 0
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocab_size
        self.max_model_len, self.eos_token_ids = max_model_len, eos_token_ids
        self.generation_defaults = {"do_sample": False} if generation_defaults is None else generation_defaults
        self.tokenizer, self.model_name = tokenizer, "fake"
        self.slots = np.full(num_blocks * block_size, -1, dtype=np.int64)
        self.batches: list[ForwardBatch] = []
        self.before_run: Callable[[ForwardBatch], None] = lambda batch: None
        self.closed = False

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        self.before_run(batch)
        self.batches.append(batch)
        if batch.carried is not None:
            batch.token_ids[batch.carried.rows] = batch.carried.tokens.numpy()[batch.carried.sources]
        if len(set(batch.slot_mapping.tolist())) != len(batch.slot_mapping):
            raise RuntimeError("a slot is written twice in one step")
        self.slots[batch.slot_mapping] = batch.token_ids
        wanted = set(batch.logits_rows.tolist())
        rows = []
        for number in range(len(batch.context_lens)):
            table = batch.block_tables[number].astype(np.int64)
            slots = (table[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)
            history = self.slots[slots[: batch.context_lens[number]]].tolist()
            for row in range(batch.query_starts[number], batch.query_starts[number + 1]):
                if row in wanted:
                    rows.append(fake_logits(history[: int(batch.positions[row]) + 1], self.vocab_size))
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        blocks = self.slots.reshape(self.num_blocks, self.block_size)
        sources, destinations = zip(*copies, strict=True)
        blocks[list(destinations)] = blocks[list(sources)]

    def swap_out(self, moves: list[tuple[int, int]]) -> None:
        for device, host in moves:
            self.host[host] = self.slots.reshape(self.num_blocks, self.block_size)[device]
        self.swapped_blocks += len(moves)

    def check_device(self) -> None:
        pass

    def swap_in(self, moves: list[tuple[int, int]]) -> None:
        for host, device in moves:
            self.slots.reshape(self.num_blocks, self.block_size)[device] = self.host[host]

    def close(self) -> None:
        self.closed = True


def fake_engine(runner: FakeRunner | None = None, **fields: Any) -> Engine:
    """A synchronous engine over a fake model."""
    runner = runner or FakeRunner()
    fields = {"max_num_seqs": 16, "max_num_batched_tokens": 32, **fields}
    return Engine(EngineConfig(model="fake", block_size=runner.block_size, **fields), runner=runner)


def run_all(engine: Engine, check: bool = True, most_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Step until nothing is left; every request's whole output, with the pool checked after each step."""
    deltas: dict[str, list[RequestOutput]] = {}
    for _ in range(most_steps):
        if not engine.has_unfinished:
            break
        for output in engine.step():
            deltas.setdefault(output.request_id, []).append(output)
        if check:
            engine.check()
    else:
        raise RuntimeError(f"requests left after {most_steps} steps")
    stats = engine.stats()
    if stats.kv_blocks_used or stats.kv_blocks_free + stats.kv_blocks_cached != stats.kv_blocks_total:
        raise RuntimeError(f"the pool is not whole when idle: {stats}")
    return {
        request_id: next((one for one in outputs if one.error), None) or merge_outputs(outputs)
        for request_id, outputs in deltas.items()
    }
