"""Blocks that are copied before a forward pass, and how long copies to and from host memory take."""

from __future__ import annotations

from collections.abc import Callable

from pagedllm_core.batch import ScheduledBatch
from pagedllm_core.kv.offload import Moves, SwapSpace
from pagedllm_core.model.interface import Runner


class BlockMover:
    """Makes the copies that a step asks for.

    Args:
        runner: Makes them.
        swap: Learns what they cost.
        clock: Monotonic seconds.
    """

    def __init__(self, runner: Runner, swap: SwapSpace, clock: Callable[[], float]) -> None:
        self._runner, self._swap, self._clock = runner, swap, clock

    def move(self, batch: ScheduledBatch, alone: bool = True) -> None:
        """Copy everything, first what leaves, as its place may be taken.

        Args:
            batch: The step that is about to run.
            alone: False where another step is under way, for which a copy would wait: it is not measured then.
        """
        for copy, moves in ((self._runner.swap_out, batch.swap_out), (self._runner.swap_in, batch.swap_in)):
            if moves:
                started = self._clock()
                copy(moves)
                if alone:
                    self._swap.costs.copy.add(len(moves), self._clock() - started)
        if batch.copies:
            self._runner.copy_blocks(batch.copies)

    def measure(self, most: int) -> None:
        """Time a small and a larger copy while the pool is still empty, so that the first preemption can choose."""
        for count in (1, min(most, 32)):
            moves: Moves = [(block, block) for block in range(count)]
            self._runner.swap_out(moves)  # the first copy to a page takes longer
            self.move(ScheduledBatch(swap_out=moves))
            self.move(ScheduledBatch(swap_in=moves))
