"""Preempted requests in host memory, and when that is worth it.

A request that is preempted either gives its blocks back and is recomputed, or its blocks are copied to host memory
first and copied back when it is admitted again (SOSP 2023 "PagedAttention", section 4.5). Host blocks are kept by a
block pool like the device's, so that what forks shared on the device they share in host memory, too.

    device  7 8 | 3        host  0 1 | 2         two sequences, of which the second shares the first two blocks
            7 8 | 5              0 1 | 3
"""

from __future__ import annotations

from collections import deque

from pagedllm_core.kv.pool import BlockPool
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.request import Request

Moves = list[tuple[int, int]]


class Line:
    """A straight line through (amount, seconds) samples, in which old samples count less and less.

    Least squares with exponential forgetting. `slope` and `offset` are never negative, and zero before any sample.
    """

    def __init__(self, memory: float = 0.98) -> None:
        self._memory = memory
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Take one sample into account."""
        self._n, self._x, self._y, self._xx, self._xy = (
            old * self._memory + new
            for old, new in zip(
                (self._n, self._x, self._y, self._xx, self._xy),
                (1.0, amount, seconds, amount * amount, amount * seconds),
                strict=True,
            )
        )

    def slope(self) -> float:
        """Seconds for one more; where all samples had one size, their mean divided by it."""
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-9 * self._n * self._xx:
            return max(0.0, (self._n * self._xy - self._x * self._y) / spread)
        return self._y / self._x if self._x else 0.0

    def offset(self) -> float:
        """Seconds that it takes whatever the amount."""
        return max(0.0, (self._y - self.slope() * self._x) / self._n) if self._n else 0.0


class PreemptionCosts:
    """What recomputing and swapping cost here, measured while the engine runs.

    Attributes:
        step: Seconds of a step over its tokens.
        copy: Seconds of a copy to or from host memory over its blocks.
    """

    def __init__(self) -> None:
        self.step = Line()
        self.copy = Line()

    def swapping_pays(self, blocks: int, tokens: int) -> bool:
        """True where two copies of `blocks` blocks cost less than `tokens` more tokens in steps that run anyway."""
        return 2 * (self.copy.offset() + self.copy.slope() * blocks) < self.step.slope() * tokens


class SwapSpace:
    """The host blocks and who has them. Not thread-safe: only the engine's thread touches it.

    A swap-out is *pending* until the step that copies it has succeeded. If the step fails, what was to be copied is
    lost, and those requests are recomputed.

    Args:
        total: Host blocks.
        block_size: Tokens in a block.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.pool = BlockPool(total, retain=False)
        self.costs = PreemptionCosts()
        self._block_size = block_size
        self._pending: deque[list[Request]] = deque([[]])  # of each step under way, the oldest first

    def swap_out(self, request: Request) -> Moves | None:
        """Exchange the request's device blocks for host blocks, where there is room and it is worth it.

        Returns:
            (device, host) blocks to copy before anything is written in this step; None where the request has to be
            recomputed, and nothing was changed.
        """
        blocks = list(dict.fromkeys(block for one in request.sequences for block in one.table.ids.tolist()))
        enough = 0 < len(blocks) <= self.pool.num_available
        if not enough or not self.costs.swapping_pays(len(blocks), len(blocks) * self._block_size):
            return None
        self._pending[-1].append(request)  # from here on, so that a failure is undone by `withdraw`
        host: dict[int, int] = {}
        for sequence in request.sequences:
            sequence.swapped = BlockTable(self.pool, self._block_size)
            for block in sequence.table.ids.tolist():
                if block in host:
                    self.pool.share(host[block])
                else:
                    host[block] = self.pool.allocate()
                sequence.swapped.append(host[block])
            sequence.table.release()
        return list(host.items())

    def swap_in(self, request: Request, pool: BlockPool) -> Moves:
        """Exchange the request's host blocks for device blocks; the caller made sure that there are enough.

        A full block that the device still has under its hash is not copied. The host blocks are free at once: no step
        both admits and preempts, so nothing is copied over them before they are read.

        Returns:
            (host, device) blocks to copy before the forward pass.
        """
        moves: Moves = []
        device: dict[int, int] = {}
        for sequence in request.sequences:
            swapped = sequence.swapped
            if swapped is None:
                continue
            for index, block in enumerate(swapped.ids.tolist()):
                full = (index + 1) * self._block_size <= sequence.num_computed
                if block in device:
                    pool.share(device[block])
                    sequence.table.append(device[block])
                elif not full or not sequence.table.append_cached(sequence.block_hash(index)):
                    sequence.table.append(pool.allocate())
                    moves.append((block, int(sequence.table.ids[index])))
                    if full:
                        sequence.table.seal(index, sequence.block_hash(index))
                device[block] = int(sequence.table.ids[index])
            swapped.release()
            sequence.swapped = None
        return moves

    def begin(self) -> None:
        """Another step is scheduled while one is under way."""
        self._pending.append([])

    def commit(self) -> None:
        """The oldest step under way succeeded: what it copied to host memory is there."""
        self._pending.popleft()
        if not self._pending:
            self._pending.append([])

    def withdraw(self) -> None:
        """A step failed: requests that it or the other one should have copied to host memory are recomputed."""
        for request in (request for step in self._pending for request in step):
            for sequence in request.sequences:
                sequence.rewind()
        self._pending = deque([[]])
