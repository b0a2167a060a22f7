"""Decode graphs and the staging of steps, on a CPU with a recorder that remembers the work and calls it again."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pagedllm_core.attention.base import CarriedTokens, ForwardBatch
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.graphs import CaptureError, DecodeGraphs, DecodeInputs, Work, bucket_sizes
from pagedllm_core.model.staging import Staging, StepTensors, stage_token_ids
from pagedllm_core.model.steps import GpuSteps

CPU = torch.device("cpu")
VOCAB = 6


class Recorder:
    """Captures by remembering; every capture takes `cost` of 1000 bytes."""

    def __init__(self, cost: int = 0, refuses: bool = False) -> None:
        self.cost, self.refuses = cost, refuses
        self.reason = RuntimeError("operation not permitted when stream is capturing")
        self.captures = self.replays = self.resets = 0

    def capture(self, work: Work) -> Any:
        work()
        if self.refuses:
            raise CaptureError("it looks at data on the host") from self.reason
        self.captures += 1
        return SimpleNamespace(replay=lambda: self._replay(work))

    def _replay(self, work: Work) -> None:
        self.replays += 1
        work()

    def free_memory(self) -> int:
        return 1000 - self.cost * self.captures

    def reset(self) -> None:
        self.resets += 1


class Attention:
    """Gives what a step was told as its meta."""

    def decode_meta(self, tables: torch.Tensor, contexts: torch.Tensor, slots: torch.Tensor) -> Any:
        return SimpleNamespace(tables=tables, contexts=contexts, slots=slots)

    def prepare(self, batch: ForwardBatch) -> Any:
        tables, contexts, slots = (
            torch.from_numpy(one) for one in (batch.block_tables, batch.context_lens, batch.slot_mapping)
        )
        return SimpleNamespace(tables=tables, contexts=contexts, slots=slots)


class Forward:
    """Logits that tell everything a row was computed from, and a list of the slots written."""

    def __init__(self) -> None:
        self.attention = Attention()
        self.written: list[int] = []
        self.error: Exception | None = None

    def bind(self, storage: KVStorage) -> None:
        pass

    def compute(self, step: StepTensors) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        meta = step.meta
        self.written += [slot for slot in meta.slots.tolist() if slot >= 0]
        tables = zip(meta.tables.tolist(), meta.contexts.tolist(), strict=True)
        blocks = [sum(table[: -(-context // 4)]) for table, context in tables]
        columns = [step.token_ids, step.positions, meta.contexts, torch.tensor(blocks), meta.slots, meta.slots]
        logits = torch.stack([column.double() for column in columns], dim=1)
        return logits if step.rows is None else logits[step.rows]


def decode_batch(count: int, seed: int = 0, blocks: int = 5) -> ForwardBatch:
    """`count` sequences of one token each."""
    random = np.random.default_rng(seed)
    contexts = random.integers(1, 4 * blocks, count).astype(np.int32)
    return ForwardBatch(
        token_ids=random.integers(1, 100, count),
        positions=contexts.astype(np.int64) - 1,
        slot_mapping=random.integers(1, 400, count),
        query_starts=np.arange(count + 1, dtype=np.int32),
        context_lens=contexts,
        block_tables=random.integers(1, 100, (count, blocks)).astype(np.int32),
        logits_rows=np.arange(count),
    )


def wanted(batch: ForwardBatch) -> list[list[float]]:
    rows = zip(
        batch.token_ids, batch.positions, batch.context_lens, batch.block_tables, batch.slot_mapping, strict=True
    )
    return [
        [float(one) for one in (token, position, context, table[: -(-context // 4)].sum(), slot, slot)]
        for token, position, context, table, slot in rows
    ]


def make_graphs(recorder: Recorder, limit: int = 1000, sequences: int = 20) -> tuple[DecodeGraphs, Forward]:
    forward = Forward()
    inputs = DecodeInputs(CPU, Staging(CPU), sequences, blocks=7)
    return DecodeGraphs(forward, inputs, recorder, VOCAB, limit), forward


def run(graphs: DecodeGraphs, batch: ForwardBatch) -> list[list[float]]:
    logits = graphs.run(batch)
    assert logits is not None
    assert logits.dtype == torch.float32
    return logits.tolist()


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_buckets(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


def test_a_bucket_is_captured_once_and_replayed_for_every_size_in_it() -> None:
    recorder = Recorder()
    graphs, _ = make_graphs(recorder)
    for seed, count in enumerate([5, 6, 7, 8, 5, 1, 1, 2, 20, 17]):
        batch = decode_batch(count, seed)
        assert run(graphs, batch) == wanted(batch)
    assert graphs.buckets == [1, 2, 8, 20]
    assert (recorder.captures, recorder.replays) == (4, 6)


def test_what_a_larger_step_left_behind_reaches_no_smaller_one() -> None:
    graphs, forward = make_graphs(Recorder())
    run(graphs, decode_batch(8, 1, blocks=7))
    forward.written.clear()
    small = decode_batch(5, 2, blocks=2)
    assert run(graphs, small) == wanted(small)
    assert forward.written == small.slot_mapping.tolist()


def test_a_captured_step_writes_what_it_computes_once_each_time() -> None:
    graphs, forward = make_graphs(Recorder())
    batches = [decode_batch(3, seed) for seed in range(3)]
    for batch in batches:
        run(graphs, batch)
    assert forward.written == [slot for batch in batches for slot in batch.slot_mapping.tolist()]


def test_steps_of_other_kinds_are_left_to_the_eager_path() -> None:
    recorder = Recorder()
    graphs, forward = make_graphs(recorder, sequences=4)
    chunk = decode_batch(3)
    chunk.context_lens = chunk.context_lens[:2]
    without_logits = decode_batch(3)
    without_logits.logits_rows = np.array([0, 2])
    other_order = decode_batch(2)
    other_order.logits_rows = np.array([1, 0])
    for batch in (chunk, without_logits, other_order, decode_batch(5), decode_batch(2, blocks=8)):
        assert graphs.run(batch) is None
    assert recorder.captures == 0
    assert not forward.written


@pytest.mark.parametrize("replayed", [False, True])
def test_carried_tokens_take_the_place_of_input_ids(replayed: bool) -> None:
    graphs, _ = make_graphs(Recorder())
    if replayed:
        run(graphs, decode_batch(3, 7))
    batch = decode_batch(3)
    batch.carried = CarriedTokens(np.array([2, 0]), np.array([0, 3]), torch.tensor([70, 71, 72, 73]))
    found = run(graphs, batch)
    assert [row[0] for row in found] == [73, batch.token_ids[1], 70]
    assert [row[1:] for row in found] == [row[1:] for row in wanted(batch)]
    again = decode_batch(3, 9)
    assert run(graphs, again) == wanted(again)


def test_graphs_stop_at_their_memory(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(cost=100)
    graphs, _ = make_graphs(recorder, limit=250)
    with caplog.at_level(logging.WARNING, "pagedllm"):
        for count in (1, 2, 4, 8, 4, 20):
            batch = decode_batch(count)
            found = graphs.run(batch)
            assert (found is None) == (count > 2)
    assert graphs.buckets == [1, 2]
    assert run(graphs, decode_batch(2, 5)) == wanted(decode_batch(2, 5))
    assert [record.message.count("without a graph") for record in caplog.records] == [1]


def test_what_cannot_be_captured_turns_graphs_off(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    graphs, forward = make_graphs(recorder)
    run(graphs, decode_batch(1))
    recorder.refuses = True
    batch = decode_batch(3, 1)
    forward.written.clear()
    with caplog.at_level(logging.WARNING, "pagedllm"):
        assert run(graphs, batch) == wanted(batch)
        assert graphs.run(batch) is None
        assert graphs.run(decode_batch(1)) is None
    assert graphs.buckets == []
    assert forward.written == batch.slot_mapping.tolist()
    assert len(caplog.records) == 1
    assert "looks at data on the host" in caplog.records[0].message


def test_graphs_that_find_no_memory_stay_as_many_as_fitted(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(cost=100)
    graphs, _ = make_graphs(recorder)
    run(graphs, decode_batch(1))
    run(graphs, decode_batch(2))
    recorder.refuses, recorder.reason = True, RuntimeError("CUDA error: out of memory")
    with caplog.at_level(logging.WARNING, "pagedllm"):
        assert run(graphs, decode_batch(3, 1)) == wanted(decode_batch(3, 1))
        recorder.refuses = False
        for count in (1, 2):
            assert run(graphs, decode_batch(count)) == wanted(decode_batch(count))
        assert graphs.run(decode_batch(4)) is None
    assert graphs.buckets == [1, 2]
    assert "memory is short" in caplog.records[0].message


def test_an_error_in_a_step_is_that_steps_own() -> None:
    recorder = Recorder()
    graphs, forward = make_graphs(recorder)
    forward.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(decode_batch(2))
    assert graphs.buckets == []
    forward.error = None
    assert run(graphs, decode_batch(2)) == wanted(decode_batch(2))
    assert graphs.buckets == [2]


def test_cleared_graphs_are_captured_again() -> None:
    recorder = Recorder(cost=100)
    graphs, _ = make_graphs(recorder, limit=100)
    run(graphs, decode_batch(2))
    assert graphs.run(decode_batch(1)) is None
    graphs.clear()
    assert (graphs.buckets, recorder.resets) == ([], 1)
    run(graphs, decode_batch(1))
    assert graphs.buckets == [1]
    graphs.close()
    assert graphs.run(decode_batch(1)) is None


def test_steps_go_through_graphs_where_they_can() -> None:
    steps, recorder = GpuSteps(Forward(), CPU), Recorder()
    batch = decode_batch(3)
    assert steps.logits(batch).tolist() == wanted(batch)  # no graphs yet
    steps.use_graphs(recorder, 4, 7, VOCAB, 1000)
    assert steps.logits(batch).tolist() == wanted(batch)
    assert recorder.captures == 1
    steps.bind(KVStorage([], 1, 4, CPU))  # graphs read the storage they were captured over
    assert steps.graphs is not None
    assert steps.graphs.buckets == []
    steps.close()
    assert steps.logits(batch).tolist() == wanted(batch)
    assert recorder.captures == 1


class Event:
    """A mark that remembers whether it was waited for."""

    made: list[Event] = []

    def __init__(self) -> None:
        self.log: list[str] = []
        Event.made.append(self)

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")


def test_a_buffer_is_written_again_only_after_its_copy() -> None:
    Event.made = []
    staging = Staging(CPU, Event)
    uploads = [staging.upload([np.full(3, number)])[0] for number in range(5)]
    assert [event.log for event in Event.made] == [
        ["record", "wait", "record"],
        ["record", "wait", "record", "wait", "record"],
    ]
    assert [one.tolist() for one in uploads] == [[number] * 3 for number in range(5)]


def test_arrays_of_all_kinds_arrive_and_the_buffer_grows() -> None:
    staging = Staging(CPU)
    for size in (1, 3, 1000, 2):
        arrays = [
            np.arange(size),
            np.arange(size, dtype=np.int32),
            np.empty(0, dtype=np.int64),
            np.arange(6 * size, dtype=np.float32).reshape(size, 6)[:, ::2],
        ]
        for found, array in zip(staging.upload(arrays), arrays, strict=True):
            assert found.data_ptr() % 16 == 0 or array.size == 0
            assert np.array_equal(found.numpy(), array)
            assert found.numpy().dtype == array.dtype


def test_equal_sizes_take_equal_places() -> None:
    staging, memory = Staging(CPU), torch.zeros(1000, dtype=torch.uint8)
    first, second = (
        staging.upload([np.zeros(5), np.zeros(7, dtype=np.int32), np.zeros(number)], memory) for number in (3, 9)
    )
    assert [one.data_ptr() for one in first] == [one.data_ptr() for one in second]


@pytest.mark.parametrize("staged", [False, True])
def test_a_batch_keeps_its_own_input_ids(staged: bool) -> None:
    batch = decode_batch(3)
    before = batch.token_ids.copy()
    batch.carried = CarriedTokens(np.array([1]), np.array([0]), torch.tensor([99]))
    token_ids = Staging(CPU).stage(batch, None).token_ids if staged else stage_token_ids(batch, CPU)
    assert token_ids.tolist() == [before[0], 99, before[2]]
    assert np.array_equal(batch.token_ids, before)


def test_rows_are_named_only_where_some_are_not_wanted() -> None:
    batch = decode_batch(3)
    assert Staging(CPU).stage(batch, None).rows is None
    batch.logits_rows = np.array([2])
    rows = Staging(CPU).stage(batch, None).rows
    assert rows is not None
    assert rows.tolist() == [2]
