"""Waiting requests, in the order in which they are admitted."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from pagedllm_core.request import Request


def _order(request: Request) -> int:
    return request.arrival


class WaitingQueue:
    """First come, first served; a preempted request keeps its arrival, so it comes back at its old place.

    A sorted list: moving the tail of a thousand pointers is cheaper than anything cleverer.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Waiting requests, the next one first."""
        return iter(self._requests)

    def push(self, request: Request) -> None:
        """Put a request at its place."""
        bisect.insort(self._requests, request, key=_order)

    def peek(self) -> Request | None:
        """The next request to admit, or None."""
        return self._requests[0] if self._requests else None

    def remove(self, request: Request) -> None:
        """Take a request out of any place."""
        index = bisect.bisect_left(self._requests, _order(request), key=_order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.request_id!r} is not waiting")
        del self._requests[index]
