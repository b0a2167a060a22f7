"""Decode steps as CUDA graphs: hundreds of launches become one.

A graph replays the same kernels over the same memory, so a step is padded to a *bucket* of sequences and its arrays are
copied to where the graph reads them:

    bucket of 4, three sequences      token_ids     a  b  c  0
                                      positions     7  3  9  0
                                      slots         .  .  . -1     nothing is written for padding
                                      context_lens  8  4 10  0     and nothing read

Only steps in which every sequence computes one token and wants its logits are replayed; everything else runs eagerly.
A bucket is captured when it is first needed: that step runs eagerly, over the same memory, which also warms up whatever
is made on first use (compiled kernels, cuBLAS's workspace), and the graph serves from the next step on. All graphs of
an engine share one memory pool, as only one runs at a time.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.errors import is_out_of_memory
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.cuda import capturing, clear_workspaces
from pagedllm_core.model.staging import Staging, StepTensors, carry

logger = logging.getLogger("pagedllm.model")

Work = Callable[[], None]
"""Queues kernels over memory that stays where it is."""


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> Any:
        """Queue the work again, on the current stream."""


class Recorder(Protocol):
    """Records work on a device."""

    def capture(self, work: Work) -> Recording:
        """Run the work once, then record it.

        Raises:
            CaptureError: The work ran, but cannot be recorded.
        """

    def free_memory(self) -> int:
        """Bytes of the device that nobody uses."""

    def reset(self) -> None:
        """Wait until nothing recorded runs any more. Later recordings share no memory with those so far."""


class CaptureError(Exception):
    """Work that ran could not be recorded."""


class CudaRecorder:
    """Records CUDA graphs that share one memory pool.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> torch.cuda.CUDAGraph:
        """See `Recorder.capture`."""
        outer = torch.cuda.current_stream(self._device)
        with capturing:
            self._stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self._stream):
                    work()
                    return self._record(work)
            finally:
                outer.wait_stream(self._stream)

    def _record(self, work: Work) -> torch.cuda.CUDAGraph:
        """A graph of the work, on the current stream.

        Not by `torch.cuda.graph`: that waits for the device, empties the process's cache of memory, and leaves the
        thread on the capture stream when a capture fails.

        cuBLAS's workspace is made within the capture, in the graphs' own memory pool: the one that the warm-up left may
        be freed by anybody in the process, while a graph would write to it for ever.
        """
        graph = torch.cuda.CUDAGraph()
        clear_workspaces()
        try:
            # Other threads may allocate and synchronise meanwhile; this one may not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except Exception:
                with suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        except Exception as error:
            self._mend()
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            clear_workspaces()  # nobody else may use one that lies in the pool
        return graph

    def _mend(self) -> None:
        """Undo what a failed capture leaves behind in torch: an allocator and a random generator that wait for its end.

        torch 2.12 and older never tell the allocator that the capture is over; a generator is told by the next capture.
        """
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        with suppress(Exception):
            graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device=self._device)
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                number.add_(1)
            finally:
                graph.capture_end()

    def free_memory(self) -> int:
        """See `Recorder.free_memory`."""
        return torch.cuda.mem_get_info(self._device)[0]

    def reset(self) -> None:
        """See `Recorder.reset`."""
        torch.cuda.synchronize(self._device)
        self._pool = torch.cuda.graph_pool_handle()


def bucket_sizes(largest: int) -> list[int]:
    """Numbers of sequences that get a graph: 1, 2, 4, then multiples of 8, and the largest."""
    return [size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest] + [largest]


class Forward(Protocol):
    """A forward pass over tensors on the device."""

    attention: Any

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""

    def compute(self, step: StepTensors) -> torch.Tensor:
        """One step: [L, vocab] in any floating type."""


class DecodeTensors(NamedTuple):
    """A decode step in the graphs' memory, padded to B sequences.

    Attributes:
        token_ids: int64 [B].
        positions: int64 [B].
        slots: int64 [B], -1 for padding.
        context_lens: int32 [B], 0 for padding.
        block_tables: int32 [B, most blocks].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor


class DecodeInputs:
    """The memory that graphs of all buckets read, and what brings a step there.

    Args:
        device: The device.
        staging: Brings arrays to the device.
        sequences: Most sequences of a step.
        blocks: Most blocks of a sequence.
    """

    def __init__(self, device: torch.device, staging: Staging, sequences: int, blocks: int) -> None:
        self.device, self.sequences, self.blocks = device, sequences, blocks
        self._staging = staging
        size = 64 * (sequences + 1) + 4 * sequences * blocks  # more than `fill` ever packs
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self._tables = torch.zeros(sequences, blocks, dtype=torch.int32, device=device)

    def fill(self, batch: ForwardBatch, bucket: int) -> DecodeTensors:
        """Copy a step to where the graph of its bucket reads it; the copies are queued on the current stream.

        Block tables come last and are spread over the graphs' own, so that only what is used of them is copied.
        """
        carried = batch.carried
        places = (_NONE, _NONE) if carried is None else (carried.rows, carried.sources)
        arrays = [
            _padded(batch.token_ids, bucket, 0),
            _padded(batch.positions, bucket, 0),
            _padded(batch.slot_mapping, bucket, -1),
            _padded(batch.context_lens, bucket, 0),
            *(_padded(one, bucket, 0) for one in places),
            batch.block_tables,
        ]
        token_ids, positions, slots, contexts, rows, sources, tables = self._staging.upload(arrays, self._memory)
        self._tables[: tables.shape[0], : tables.shape[1]].copy_(tables)
        if carried is not None:
            count = len(carried.rows)
            carry(token_ids, carried, (rows[:count], sources[:count]))
        return DecodeTensors(token_ids, positions, slots, contexts, self._tables[:bucket])


class DecodeGraphs:
    """Runs decode steps by replaying graphs.

    Args:
        forward: A model's forward pass, over `TritonAttention`. It must not wait for the device.
        inputs: The memory that graphs read.
        recorder: Records work.
        vocab_size: Width of the logits.
        limit: Bytes of device memory that graphs may take. A bucket is captured only where the dearest one so far would
            still fit.
    """

    def __init__(
        self,
        forward: Forward,
        inputs: DecodeInputs,
        recorder: Recorder,
        vocab_size: int,
        limit: int,
    ) -> None:
        self._forward, self._inputs = forward, inputs
        self._recorder, self._limit = recorder, limit
        self._sizes = bucket_sizes(inputs.sequences)
        self._logits = torch.zeros(inputs.sequences, vocab_size, dtype=torch.float32, device=inputs.device)
        self._recordings: dict[int, Recording] = {}
        self._used = self._dearest = 0
        self._is_off = self._is_full = False

    @property
    def buckets(self) -> list[int]:
        """The buckets that have a graph."""
        return sorted(self._recordings)

    def run(self, batch: ForwardBatch) -> torch.Tensor | None:
        """One step.

        Returns:
            float32 [L, vocab], valid until the next step on the same stream; None where the step has to run eagerly.
        """
        bucket = self._bucket(batch)
        if bucket is None:
            return None
        recording = self._recordings.get(bucket)
        if recording is None and not self._may_capture():
            return None
        tensors = self._inputs.fill(batch, bucket)
        if recording is not None:
            recording.replay()
        else:
            self._capture(bucket, tensors)
        return self._logits[: len(batch.context_lens)]

    def clear(self) -> None:
        """Let go of all graphs; buckets are captured again when they are needed."""
        self._recorder.reset()
        self._recordings.clear()
        self._used = self._dearest = 0
        self._is_full = False

    def close(self) -> None:
        """Let go of all memory. Every step is an eager one from now on."""
        self._is_off = True
        self.clear()
        self._logits = self._logits[:0].clone()

    def _bucket(self, batch: ForwardBatch) -> int | None:
        """The number of sequences that the step is padded to; None where no graph can serve it."""
        count = len(batch.context_lens)
        if self._is_off or len(batch.token_ids) != count or count > self._inputs.sequences:
            return None
        if batch.block_tables.shape[1] > self._inputs.blocks:
            return None
        if not np.array_equal(batch.logits_rows, np.arange(count)):
            return None
        return self._sizes[bisect.bisect_left(self._sizes, count)]

    def _may_capture(self) -> bool:
        if not self._is_full and self._used + self._dearest > self._limit:
            self._is_full = True
            logger.warning(
                "CUDA graphs take %.0f MiB of %.0f MiB: batches of other sizes than %s run without a graph",
                self._used / 2**20, self._limit / 2**20, self.buckets,
            )  # fmt: skip
        return not self._is_full

    def _capture(self, bucket: int, tensors: DecodeTensors) -> None:
        """Run a step over the graphs' memory, and record it for the next time."""

        def work() -> None:
            tables, contexts, slots = tensors.block_tables, tensors.context_lens, tensors.slots
            meta = self._forward.attention.decode_meta(tables, contexts, slots)  # anew: it holds what is computed in it
            step = StepTensors(tensors.token_ids, tensors.positions, None, meta)
            self._logits[:bucket].copy_(self._forward.compute(step))

        before = self._recorder.free_memory()
        try:
            self._recordings[bucket] = self._recorder.capture(work)
        except CaptureError as error:
            fitting = self._used
            self.clear()
            if is_out_of_memory(error.__cause__):
                logger.warning("CUDA graphs take at most %.0f MiB now, as memory is short", fitting / 2**20)
                self._limit = fitting or -1  # not even one
                return
            logger.warning("CUDA graphs are off for this engine, as a step cannot be captured: %s", error)
            self._is_off = True
            return
        cost = max(0, before - self._recorder.free_memory())
        self._used, self._dearest = self._used + cost, max(self._dearest, cost)
        logger.debug("captured a CUDA graph for %d sequences (%.1f MiB)", bucket, cost / 2**20)


_NONE = np.empty(0, dtype=np.int64)


def _padded(array: npt.NDArray[Any], size: int, value: int) -> npt.NDArray[Any]:
    """The array, then `value` up to `size`."""
    out = np.full(size, value, dtype=array.dtype)
    out[: len(array)] = array
    return out
