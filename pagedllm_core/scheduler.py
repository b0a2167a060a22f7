"""Who runs in a step, how many tokens each, in which blocks.

There is no prefill phase and no decode phase: every sequence lets `num_computed` catch up with `num_tokens`. A step's
token budget goes first to sequences that lack one token (decoding), then to running requests with more to compute
(prompts in chunks, resumed requests), then to newly admitted ones. When blocks run short the latest request is
preempted: it gives its blocks back, keeps its age, and is recomputed later, or its blocks wait in host memory where
that costs less (SOSP 2023 "PagedAttention", section 4.5).

Progress: the oldest running request always advances, because everything younger is preempted before it would wait; a
request that is alone and still does not fit is reported as exhausted.

A step that the device's memory does not hold is tried again half as large, and steps grow again later (`shrink`).
"""

from __future__ import annotations

import bisect

from pagedllm_core.batch import ScheduledBatch, ScheduledRow, wants_prompt_logprobs
from pagedllm_core.kv.offload import SwapSpace
from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.queue import POLICIES
from pagedllm_core.request import Request, RequestState, Sequence

GOOD_STEPS = 128  # steps that fit, after which steps may be twice as large again; twice as many where that failed
PROMPT_LOGPROBS_CHUNK = 256  # bounds the logits of a prompt that is being scored: 256 rows of the vocabulary


class Scheduler:
    """Continuous batching over one block pool. Not thread-safe: only the engine's thread touches it.

    Args:
        pool: The block pool.
        block_size: Tokens in a block.
        max_num_seqs: Most sequences in a step.
        max_num_batched_tokens: Most tokens in a step; at least `max_num_seqs`.
        policy: Order of the waiting requests: "fcfs", "priority" or "fair".
        num_host_blocks: Blocks of host memory for preempted requests; 0 recomputes them always.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: str = "fcfs",
        num_host_blocks: int = 0,
    ) -> None:
        self.pool = pool
        self.swap = SwapSpace(num_host_blocks, block_size)
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._configured = (max_num_seqs, max_num_batched_tokens)  # both are lower while memory is short
        self._good_steps, self._patience = 0, GOOD_STEPS
        self._grew = False  # since the last step that did not fit
        self.waiting = POLICIES[policy]()
        self.running: list[Request] = []  # in the order of `waiting.order`: who is last is preempted first
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # prompt tokens looked up, and found below
        self.prefix_cache_hits = 0

    @property
    def has_work(self) -> bool:
        """True while any request is unfinished."""
        return bool(self.running) or len(self.waiting) > 0

    def empty_slots(self) -> int:
        """Slots of used blocks without a token: a sequence's last block has some; forks that share it count it once."""
        tails = {
            int(sequence.table.ids[-1]): sequence.table.room() - sequence.num_computed
            for request in self.running
            for sequence in request.sequences
            if len(sequence.table)
        }
        return sum(tails.values())

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.push(request)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its blocks back. Harmless if it is out already."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.state = RequestState.FINISHED
        for sequence in request.sequences:
            sequence.rewind()

    def commit(self) -> None:
        """The step succeeded: what it sealed and what it swapped out can be relied on."""
        self.pool.commit()
        self.swap.commit()
        if (self.max_num_seqs, self.max_num_batched_tokens) != self._configured:
            self._good_steps += 1
            if self._good_steps >= self._patience:
                self._limit(2 * self.max_num_batched_tokens)
                self._grew = True

    def shrink(self, batch: ScheduledBatch) -> bool:
        """A step does not fit into the device's memory: no step is more than half as large for a while.

        Its requests must be preempted; they are admitted again as far as the limit allows, the others wait.

        Returns:
            False where the step cannot be smaller: one request, of whose sequences each computes one token.
        """
        if len({row.request for row in batch.rows}) <= 1 and all(row.end - row.start == 1 for row in batch.rows):
            return False
        if self._grew:  # too early. Whoever is recomputed from its start must not be kept from its end for ever
            self._patience, self._grew = 2 * self._patience, False
        self._limit(min(self.max_num_batched_tokens, batch.num_tokens // 2))
        return True

    def _limit(self, tokens: int) -> None:
        """Steps of at most this many tokens, and sequences, from now on, and no more than is configured."""
        sequences, most = self._configured
        self.max_num_batched_tokens, self.max_num_seqs = min(most, tokens), min(sequences, tokens)
        self._good_steps = 0

    def withdraw(self) -> None:
        """The step failed: nobody finds what it sealed or swapped out. Running requests must be preempted, too."""
        self.pool.withdraw()
        self.swap.withdraw()

    def preempt(self, request: Request, batch: ScheduledBatch | None = None) -> None:
        """Send a running request back to wait; its tokens stay, its blocks are given back.

        Args:
            request: A running request.
            batch: The step that may copy the blocks to host memory; without one they are recomputed.
        """
        moves = None if batch is None else self.swap.swap_out(request)
        self.running.remove(request)
        if batch is None or moves is None:
            for sequence in request.sequences:
                sequence.rewind()
        else:
            batch.swap_out += moves
        request.state = RequestState.WAITING
        request.metrics.preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    def schedule_ahead(self) -> ScheduledBatch | None:
        """Decide the next step while one is under way, without the tokens that it chooses.

        Requests whose last token is under way are left out. Nobody is preempted: what finishes now may make the room.

        Returns:
            None where the pool is too short for that.
        """
        candidates = [request for request in self.running if not request.ending]
        decoding = [one.active for one in candidates if all(sequence.remaining == 1 for sequence in one.active)]
        if sum(map(self._decode_blocks, decoding)) > self.pool.num_available:
            return None
        self.pool.begin()
        self.swap.begin()
        self.waiting.begin(self.running)
        batch = ScheduledBatch()
        if not self._schedule_chunks(batch, self._schedule_decodes(batch, candidates)):
            self._admit(batch, None)
        return batch

    def schedule(self, only: Request | None = None) -> ScheduledBatch:
        """Decide one step and assign its slots. Marks the scheduled tokens as computed.

        Args:
            only: Schedule nothing but this request (used to find the culprit of a failed step).
        """
        self.waiting.begin(self.running)
        batch = ScheduledBatch()
        preemptions = self.num_preemptions
        candidates = [request for request in self.running if only is None or request is only]
        catching_up = self._schedule_decodes(batch, candidates)
        starved = self._schedule_chunks(batch, catching_up)
        if not starved and self.num_preemptions == preemptions:
            self._admit(batch, only)
        if not batch.rows and not batch.exhausted and self.running:
            self._make_room_for_oldest(batch, only or self.running[0])
        return batch

    def _schedule_decodes(self, batch: ScheduledBatch, candidates: list[Request]) -> list[Request]:
        """Give each request whose sequences all lack one token its step; returns those that lack more.

        Oldest first, and victims are the youngest, so nobody who is already in the batch is ever preempted.
        """
        catching_up = []
        for request in candidates:
            if request.state is not RequestState.RUNNING:
                continue
            active = request.active
            if any(sequence.remaining != 1 for sequence in active):
                catching_up.append(request)
                continue
            needed = self._decode_blocks(active)
            while needed > self.pool.num_available and self.running[-1] is not request:
                self.preempt(self.running[-1], batch)
            if needed <= self.pool.num_available:
                for sequence in active:
                    self._assign(batch, request, sequence, 1)
            elif len(self.running) == 1:
                batch.exhausted.append(request)
            else:
                self.preempt(request, batch)
        return catching_up

    def _decode_blocks(self, active: list[Sequence]) -> int:
        """Blocks needed to write one more token in each sequence; forks of one block copy it all but once."""
        needed = 0
        writers: dict[int, int] = {}
        for sequence in active:
            if sequence.num_computed == sequence.table.room():
                needed += 1
                continue
            shared = sequence.table.shared_tail(sequence.num_computed)
            if shared is not None:
                writers[shared] = writers.get(shared, 0) + 1
        return needed + sum(min(count, self.pool.ref(block) - 1) for block, count in writers.items())

    def _schedule_chunks(self, batch: ScheduledBatch, requests: list[Request]) -> bool:
        """Let requests that lack more than one token catch up; True where one of them found no block."""
        starved = False
        for request in requests:
            if request.state is RequestState.RUNNING:
                starved |= not self._catch_up(batch, request)
        return starved

    def _catch_up(self, batch: ScheduledBatch, request: Request) -> bool:
        """Schedule as many of the request's missing tokens as budget and pool allow; False where the pool did not.

        A group keeps each sequence's last token back, so that all of them take the next step together.
        """
        active = request.active
        held_back = 1 if len(active) > 1 else 0
        budget = self.max_num_batched_tokens - batch.num_tokens
        for sequence in active:
            target = sequence.num_tokens - held_back
            self._reuse(request, sequence, target)
            missing = target - sequence.num_computed
            if missing <= 0:
                continue
            wanted = min(missing, budget, PROMPT_LOGPROBS_CHUNK if wants_prompt_logprobs(request) else missing)
            fits = sequence.table.room() + self.pool.num_available * self.block_size - sequence.num_computed
            count = min(wanted, fits)
            if count > 0:
                self._assign(batch, request, sequence, count)
                budget -= count
            if count < wanted:
                return False
        return True

    def _reuse(self, request: Request, sequence: Sequence, target: int) -> None:
        """Take over sealed blocks that hold the sequence's next tokens; never the last token, whose logits are due."""
        if wants_prompt_logprobs(request):
            return
        size = self.block_size
        last = (min(target, sequence.num_tokens - 1)) // size
        while sequence.num_computed % size == 0 and sequence.num_computed // size < last:
            if not sequence.table.append_cached(sequence.block_hash(sequence.num_computed // size)):
                return
            sequence.num_computed += size
            if request.metrics.preemptions == 0 and sequence.num_generated == 0:
                request.metrics.cached_tokens += size
                self.prefix_cache_hits += size

    def _assign(self, batch: ScheduledBatch, request: Request, sequence: Sequence, count: int) -> None:
        """Assign slots to the next `count` tokens, seal the blocks they fill, and add the row."""
        start, end = sequence.num_computed, sequence.num_computed + count
        copy = sequence.table.reserve(start, end)
        if copy is not None:
            batch.copies.append(copy)
        for index in range(start // self.block_size, min(end, len(sequence.token_ids)) // self.block_size):
            sequence.table.seal(index, sequence.block_hash(index))
        sequence.num_computed = end
        first = max(start, sequence.num_charged)  # what is recomputed was charged already
        if first < end:
            prompt_tokens = max(0, min(end, sequence.prompt_length) - first)
            self.waiting.charge(request, prompt_tokens, end - first - prompt_tokens)
            sequence.num_charged = end
        batch.rows.append(ScheduledRow(request, sequence, start, end, samples=end == sequence.num_tokens))

    def _admit(self, batch: ScheduledBatch, only: Request | None) -> None:
        """Take waiting requests in order while seats, budget and blocks last."""
        seats = self.max_num_seqs - sum(request.seats for request in self.running)
        while (request := self.waiting.peek()) is not None and batch.num_tokens < self.max_num_batched_tokens:
            if only is not None and request is not only:
                if only.state is not RequestState.WAITING:
                    return
                request = only
            # A group that is larger than a shrunk step takes its steps alone.
            if (request.seats > seats and self.running) or not self._fits(batch, request):
                return
            seats -= request.seats
            self.waiting.remove(request)
            self._start(request)
            catching_up = [request]
            if request.swapped:
                batch.swap_in += self.swap.swap_in(request, self.pool)
                catching_up = self._schedule_decodes(batch, [request])
            if self._schedule_chunks(batch, catching_up):
                return

    def _fits(self, batch: ScheduledBatch, request: Request) -> bool:
        """True where the request can be admitted now. One that is alone always can, and shows then what it lacks.

        What was swapped out comes back whole. It had its blocks on the device before, so alone it has room for them.
        """
        if not request.swapped:
            return not self.running or self._blocks_to_catch_up(request) <= self.pool.num_available
        tables = [one.swapped.ids.tolist() for one in request.sequences if one.swapped is not None]
        blocks = len({block for table in tables for block in table})
        # All of its sequences take the next step together, and each may need a new block for it.
        rows, needed = len(request.active), blocks + len(request.active)
        if needed <= self.pool.num_available:
            return not self.running or batch.num_tokens + rows <= self.max_num_batched_tokens
        return not self.running

    def _start(self, request: Request) -> None:
        if request.metrics.preemptions == 0 and not wants_prompt_logprobs(request):
            self.prefix_cache_queries += len(request.prompt_token_ids)
        request.state = RequestState.RUNNING
        bisect.insort(self.running, request, key=self.waiting.order)

    def _blocks_to_catch_up(self, request: Request) -> int:
        """Blocks it takes until its known tokens are computed and a group has forked; shared ones count once."""
        size = self.block_size
        needed = 0
        seen: set[bytes] = set()
        for sequence in request.active:
            full = (sequence.num_tokens - 1) // size
            needed += -(-sequence.num_tokens // size) - full
            for index in range(full):
                block_hash = sequence.block_hash(index)
                if block_hash in seen:
                    continue
                seen.add(block_hash)
                block = self.pool.lookup(block_hash)
                if block is None or self.pool.ref(block) == 0:
                    needed += 1
        if request.width > 1 and not request.forked and request.max_tokens > 1:
            # Its sequences write behind the prompt next: all but one copy its last block, or each begins a new one.
            needed += request.width - (1 if request.sequences[0].num_tokens % size else 0)
        return needed

    def _make_room_for_oldest(self, batch: ScheduledBatch, request: Request) -> None:
        """Nothing could be scheduled: preempt the youngest until the oldest advances, or prove that it cannot."""
        while request.state is RequestState.RUNNING:
            if not self._schedule_decodes(batch, [request]):
                return
            self._catch_up(batch, request)
            if batch.rows:
                return
            if all(sequence.remaining == 1 for sequence in request.active):
                continue  # the cache held all that was missing
            others = [other for other in self.running if other is not request]
            if not others:
                batch.exhausted.append(request)
                return
            self.preempt(others[-1], batch)
