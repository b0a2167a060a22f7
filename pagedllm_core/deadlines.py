"""Requests that have to end by a certain time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from pagedllm_core.request import Request, RequestState


class Deadlines:
    """A heap of (engine clock, request). Requests that finish in time stay in it until they come up or it is tidied."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._tidy_at = 64  # entries

    def watch(self, request: Request, deadline: float) -> None:
        """Report the request once `deadline` has passed."""
        if len(self._heap) >= self._tidy_at:
            self._heap = [entry for entry in self._heap if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._heap)
            self._tidy_at = 2 * len(self._heap) + 64
        heapq.heappush(self._heap, (deadline, request.arrival, request))

    def passed(self, now: float) -> Iterator[Request]:
        """The unfinished requests whose time is up, each once."""
        while self._heap and (self._heap[0][2].state is RequestState.FINISHED or self._heap[0][0] <= now):
            _, _, request = heapq.heappop(self._heap)
            if request.state is not RequestState.FINISHED:
                yield request
