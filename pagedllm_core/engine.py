"""The synchronous core: add, abort, step. Owns all state; one thread drives it."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pagedllm_core.batch import ScheduledBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.deadlines import Deadlines
from pagedllm_core.decode.advance import finish_early
from pagedllm_core.delivery import build_output
from pagedllm_core.errors import (
    EngineClosedError,
    InvalidRequestError,
    PagedLLMError,
    RequestTimeoutError,
    as_failure,
    is_out_of_memory,
)
from pagedllm_core.intake import Intake, Prompt
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.metrics import EngineStats
from pagedllm_core.model.interface import Runner
from pagedllm_core.moves import BlockMover
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.overlap import Flight, forget, land, launch, read, seal
from pagedllm_core.params import SamplingParams
from pagedllm_core.request import Request, RequestState, Sequence
from pagedllm_core.scheduler import Scheduler

logger = logging.getLogger("pagedllm")


class Engine:
    """A paged engine that is stepped by hand.

    `AsyncEngine` drives one on its own thread; tests drive one directly:

        engine = Engine(EngineConfig(model="tiny"))
        engine.add("Hello", SamplingParams(max_tokens=8))
        while engine.has_unfinished:
            for output in engine.step():
                ...

    Args:
        config: What the engine is.
        runner: A loaded model; by default the one that `config` names is loaded.
        clock: Monotonic seconds; tests bring their own.
    """

    def __init__(
        self, config: EngineConfig, *, runner: Runner | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.runner = _load(config) if runner is None else runner
        self.pool = BlockPool(self.runner.num_blocks, retain=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.scheduling_policy,
            self.runner.num_host_blocks,
        )
        self.intake = Intake(config, self.runner, clock)
        self._clock = clock
        self._arrivals = itertools.count()
        self._requests: dict[str, Request] = {}
        self._deadlines = Deadlines()
        self._suspects: deque[Request] = deque()
        self._outbox: list[RequestOutput] = []
        self._steps = self._max_batch_size = self._prefilled = self._generated = 0
        self._occupancy: deque[tuple[int, int, int]] = deque(maxlen=512)  # (step, blocks used, blocks cached)
        self._closed = False
        self._flight: Flight | None = None  # the step that the device computes while the host goes on
        self._landed = 0.0  # when the last step was read, by the engine's clock
        self._mover = BlockMover(self.runner, self.scheduler.swap, clock)
        if self.runner.num_host_blocks:
            self._mover.measure(min(self.pool.total, self.runner.num_host_blocks))

    def add(self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any) -> str:
        """Validate and queue one request; returns its id.

        Args:
            prompt: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: vLLM's defaults if None.
            **options: `request_id, priority, share_key, timeout, stream`, as in `Intake.prepare`.

        Raises:
            InvalidRequestError: A field cannot be served; nothing was allocated.
            CapacityError: The request can never fit the pool.
            EngineClosedError: The engine was closed.
        """
        return self.enqueue(self.intake.prepare(prompt, sampling_params, **options))

    def enqueue(self, request: Request) -> str:
        """Queue a prepared request; returns its id."""
        if self._closed:
            raise EngineClosedError("the engine was closed; make a new one")
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request_id={request.request_id!r}: is running already; choose another id")
        request.arrival = next(self._arrivals)
        request.metrics.prompt_tokens = len(request.prompt_token_ids)
        table = BlockTable(self.pool, self.config.block_size)
        tokens = request.prompt_token_ids.copy()
        sequence = Sequence(0, tokens, len(tokens), table, request.root_hash)
        if request.grammar is not None:
            sequence.guide = request.grammar.start(may_end=not request.params.ignore_eos)
        request.sequences = [sequence]
        self.scheduler.add(request)
        self._requests[request.request_id] = request
        if request.deadline is not None:
            self._deadlines.watch(request, request.deadline)
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request now; its blocks are free at once, and the next `step` returns what it has as "abort".

        Returns:
            False where no such request is unfinished, which is not an error.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        try:
            finish_early(request, "abort")
        except Exception as error:  # a tokenizer that fails on the text must not keep the blocks
            return self._fail(request, as_failure(request.request_id, error))
        self._retire(request)
        self._outbox.append(build_output(request))
        return True

    @property
    def has_unfinished(self) -> bool:
        """True while a request is unfinished, a step is under way or an output is undelivered."""
        return bool(self._requests) or bool(self._outbox) or self._flight is not None

    def step(self) -> list[RequestOutput]:
        """Schedule, run one forward pass, choose tokens; returns what is new of every request that has news.

        Where the device samples, this launches a step and reads the one before. Never raises for a request's sake: a
        request that failed is returned once, finished, with `error` set.

        Raises:
            EngineClosedError: The device has failed for the whole process.
        """
        self._expire()
        if self._flight is not None:
            self._continue(self._flight)
        else:
            self._begin()
        outputs, self._outbox = self._outbox, []
        return outputs

    def _begin(self) -> None:
        """A step of which nothing is under way: launch it, and read it where the next one cannot be launched first."""
        suspect = self._next_suspect()
        batch = ScheduledBatch()
        try:
            batch = self.scheduler.schedule(only=suspect)
            self._finish_exhausted(batch)
            self._mover.move(batch)
            if batch.rows:
                flight = launch(batch, self.runner, self.runner.sampler, self._start_clocks(batch))
                if flight.allows_another and suspect is None:
                    self._flight = flight
                else:
                    self._land(flight)
                return self._clear(batch, suspect)
            self.scheduler.commit()
            if self.scheduler.has_work and not batch.exhausted and not self._outbox:
                raise RuntimeError("no request could be scheduled although some wait")
        except BaseException as error:
            self._recover(batch, error, suspect)

    def _continue(self, flight: Flight) -> None:
        """Launch the step after the one under way, then read that one."""
        self._flight = self._launch_ahead(flight) if flight.allows_another else None
        try:
            self._land(flight)
        except BaseException as error:
            if self._flight is not None:
                forget(self._flight)
            self._flight = None
            self._recover(flight.batch, error, None)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        batch: ScheduledBatch | None = ScheduledBatch()
        try:
            batch = self.scheduler.schedule_ahead()
            if batch is None:
                return None
            self._mover.move(batch, alone=False)
            if not batch.rows:
                return None
            return launch(batch, self.runner, self.runner.sampler, self._start_clocks(batch), before=flight)
        except BaseException as error:
            self._recover(batch or ScheduledBatch(), error, None)
            return None

    def _land(self, flight: Flight) -> None:
        """Read a step: sequences take their tokens, what finished is freed, what is new goes out."""
        batch = flight.batch
        try:
            sampled = read(flight)
            self.scheduler.commit()
        except Exception:
            forget(flight)
            raise
        failures, chosen = land(flight, sampled)
        now = self._clock()
        # A step that was launched while another was under way began when that one was done.
        self.scheduler.swap.costs.step.add(batch.num_tokens, now - max(flight.started, self._landed))
        self._landed = now
        self._generated += chosen
        self._count(batch)
        for request, error in failures.items():
            self._fail(request, error)
        for request in dict.fromkeys(row.request for row in batch.rows if row.samples):
            if request.state is not RequestState.FINISHED:
                try:
                    self._settle(request)
                except Exception as error:
                    self._fail(request, as_failure(request.request_id, error))
        seal(flight)
        self._occupancy.append((self._steps, self.pool.num_used, self.pool.num_cached))

    def _count(self, batch: ScheduledBatch) -> None:
        self._steps += 1
        self._max_batch_size = max(self._max_batch_size, len(batch.rows))
        for row in batch.rows:
            self._prefilled += max(0, min(row.end, row.sequence.prompt_length) - row.start)

    def _start_clocks(self, batch: ScheduledBatch) -> float:
        """Note who takes part in a step for the first time; returns the time."""
        now = self._clock()
        for row in batch.rows:
            if not row.request.started:
                row.request.started = True
                row.request.metrics.queued_s = now - row.request.arrival_time
        return now

    def _settle(self, request: Request) -> None:
        """After a step that chose tokens: free what finished, and hand out what is new."""
        if request.metrics.time_to_first_token_s is None:
            request.metrics.time_to_first_token_s = self._clock() - request.arrival_time
        finished = not request.active
        if finished:
            self._retire(request)
        for sequence in request.sequences:
            if sequence.finished:
                sequence.rewind()
        if request.stream or finished:
            self._outbox.append(build_output(request))

    def _retire(self, request: Request) -> None:
        self.scheduler.finish(request)
        self._requests.pop(request.request_id, None)
        request.metrics.total_s = self._clock() - request.arrival_time

    def _fail(self, request: Request, error: PagedLLMError) -> bool:
        """End one request with an error; everybody else goes on."""
        for sequence in request.active:
            sequence.finish_reason = "abort"
        self._retire(request)
        output = RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, finished=True)
        output.metrics, output.error = request.metrics, error
        self._outbox.append(output)
        return True

    def _finish_exhausted(self, batch: ScheduledBatch) -> None:
        for request in batch.exhausted:
            logger.warning(
                "request %r has the whole KV pool and needs more; it ends with finish_reason='length'. "
                "Raise kv_cache_memory or lower max_model_len",
                request.request_id,
            )
            finish_early(request, "length")
            self._retire(request)
            self._outbox.append(build_output(request))

    def _expire(self) -> None:
        now = self._clock()
        for request in self._deadlines.passed(now):
            elapsed = now - request.arrival_time
            message = f"request {request.request_id!r} did not finish within its timeout ({elapsed:.3g} s passed)"
            self._fail(request, RequestTimeoutError(message + "; raise timeout, or lower max_tokens"))

    def _next_suspect(self) -> Request | None:
        while self._suspects and self._suspects[0].state is RequestState.FINISHED:
            self._suspects.popleft()
        return self._suspects[0] if self._suspects else None

    def _recover(self, batch: ScheduledBatch, error: BaseException, suspect: Request | None) -> None:
        """A step failed: everybody is rewound, and the requests of the step are then tried one at a time.

        Where it was interrupted (Ctrl-C), nobody is to blame: all go on in the next step, if there is one. Where memory
        was short, neither: all go on in smaller steps. Where the device is lost, EngineClosedError is raised.

        Rewinding costs little, as blocks sealed in earlier steps are found again in the prefix cache.
        """
        self.scheduler.withdraw()
        running = list(self.scheduler.running)
        culprits = list(dict.fromkeys(row.request for row in batch.rows)) or running
        for request in running:
            self.scheduler.preempt(request)
        if not isinstance(error, Exception):
            self._flight = None
            for request in list(self._requests.values()):
                request.undo_step()
                if not request.active:
                    self._settle(request)
            raise error
        if is_out_of_memory(error) and self.scheduler.shrink(batch):
            logger.warning("%s; steps hold at most %d tokens now", error, self.scheduler.max_num_batched_tokens)
            return
        self.runner.check_device()
        if suspect is not None:
            logger.warning("request %r failed alone: %s: %s", suspect.request_id, type(error).__name__, error)
            self._fail(suspect, as_failure(suspect.request_id, error))
            return
        if not culprits and (head := self.scheduler.waiting.peek()) is not None:
            culprits = [head]
        logger.warning(
            "a step failed (%s: %s); trying its %d requests alone", type(error).__name__, error, len(culprits)
        )
        self._suspects.extend(request for request in culprits if request.state is not RequestState.FINISHED)

    def _clear(self, batch: ScheduledBatch, suspect: Request | None) -> None:
        """A suspect that took its step alone is none any more; it makes way for the next."""
        if suspect is None or not any(row.samples for row in batch.rows):
            return
        self._suspects.popleft()
        if self._suspects and suspect.state is RequestState.RUNNING:
            self.scheduler.preempt(suspect)

    def stats(self) -> EngineStats:
        """A snapshot of counters and of the pool."""
        running = self.scheduler.running
        used_slots = self.pool.num_used * self.config.block_size
        return EngineStats(
            running=len(running),
            waiting=len(self.scheduler.waiting),
            swapped=sum(request.swapped for request in self.scheduler.waiting),
            steps=self._steps,
            kv_blocks_total=self.pool.total,
            kv_blocks_used=self.pool.num_used,
            kv_blocks_cached=self.pool.num_cached,
            kv_blocks_free=self.pool.num_free,
            kv_waste=self.scheduler.empty_slots() / used_slots if used_slots else 0.0,
            max_batch_size=self._max_batch_size,
            prefix_cache_queries=self.scheduler.prefix_cache_queries,
            prefix_cache_hits=self.scheduler.prefix_cache_hits,
            preemptions=self.scheduler.num_preemptions,
            tokens_prefilled=self._prefilled,
            tokens_generated=self._generated,
            swap_blocks_total=self.scheduler.swap.pool.total,
            swap_blocks_used=self.scheduler.swap.pool.num_used,
            block_map=self.pool.block_map(),
            occupancy=tuple(self._occupancy),
        )

    def check(self) -> None:
        """Prove the pool's invariants against every live block table (for tests).

        Raises:
            RuntimeError: An invariant does not hold.
        """
        sequences = [sequence for request in self._requests.values() for sequence in request.sequences]
        self.pool.check(sequence.table.ids.tolist() for sequence in sequences)
        swapped = [sequence.swapped for sequence in sequences if sequence.swapped is not None]
        self.scheduler.swap.pool.check(table.ids.tolist() for table in swapped)

    def close(self) -> None:
        """End every request with `EngineClosedError` (in `take_outputs`) and free the model. May be called twice."""
        if self._closed:
            return
        self._closed, self._flight = True, None
        for request in list(self._requests.values()):
            self._fail(request, EngineClosedError(f"request {request.request_id!r}: the engine was closed"))
        self.runner.close()

    def take_outputs(self) -> list[RequestOutput]:
        """Outputs that no `step` has returned yet; after `close`, the errors of the requests it ended."""
        outputs, self._outbox = self._outbox, []
        return outputs


def _load(config: EngineConfig) -> Runner:
    from pagedllm_core.model.runner import ModelRunner

    return ModelRunner(config)
