"""Waiting requests, in the order in which they are admitted: one class per scheduling policy.

Under every policy a preempted request keeps its age, and nobody waits for ever.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from itertools import chain

from pagedllm_core.request import Request

PRIORITY_SPAN = 1000
"""A request overtakes those of the next lower priority that arrived at most this many requests before it."""

OUTPUT_WEIGHT = 2
"""Cost of a generated token against one of a prompt, in the counters of the fair policy."""


class WaitingQueue:
    """First come, first served.

    A sorted list: moving the tail of a thousand pointers is cheaper than anything cleverer.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Waiting requests, in order."""
        return iter(self._requests)

    def order(self, request: Request) -> int:
        """Place among the others, lower first; running requests are ordered by it, too."""
        return request.arrival

    def push(self, request: Request) -> None:
        """Put a request at its place."""
        bisect.insort(self._requests, request, key=self.order)

    def peek(self) -> Request | None:
        """The next request to admit, or None."""
        return self._requests[0] if self._requests else None

    def remove(self, request: Request) -> None:
        """Take a request out of any place.

        Raises:
            ValueError: It is not waiting.
        """
        order = self.order(request)
        index = bisect.bisect_left(self._requests, order, key=self.order)
        while index < len(self._requests) and self._requests[index] is not request:
            index += 1 if self.order(self._requests[index]) == order else len(self._requests)  # some may be equal
        if index >= len(self._requests):
            raise ValueError(f"request {request.request_id!r} is not waiting")
        del self._requests[index]

    def begin(self, running: Iterable[Request]) -> None:
        """A step is decided now; take note of who runs."""

    def charge(self, request: Request, prompt_tokens: int, output_tokens: int) -> None:
        """Take note of what a request was given in a step."""


class PriorityQueue(WaitingQueue):
    """Lower `priority` first, as in vLLM; among equals, first come, first served.

    Waiting counts as well: each level is worth `PRIORITY_SPAN` arrivals. All age alike, so the order of two requests
    never changes and can be computed once.
    """

    def order(self, request: Request) -> int:
        """See `WaitingQueue.order`."""
        return request.priority * PRIORITY_SPAN + request.arrival


class FairQueue(WaitingQueue):
    """An equal share of tokens for each `share_key` that has requests; within one, first come, first served.

    Each key has a counter of the tokens it was given, and the waiting key with the smallest counter is next (virtual
    token counter, Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A key that was idle starts at
    the level, which rises by everybody's share of what is given, as the virtual time of fair queueing does: so nobody
    saves up, and whoever waits is below all keys that come later and cannot be overtaken for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[str | None, WaitingQueue] = {}
        self._counters: dict[str | None, float] = {}
        self._level = 0.0
        self._sharers = 1  # keys that have requests

    def __len__(self) -> int:
        """Number of waiting requests."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Request]:
        """Waiting requests, key by key."""
        return chain.from_iterable(self._waiting.values())

    def push(self, request: Request) -> None:
        """Put a request at its place among those of its key."""
        key = request.share_key
        if key not in self._waiting:
            self._counters[key] = max(self._counters.get(key, 0.0), self._level)
            self._waiting[key] = WaitingQueue()
        self._waiting[key].push(request)

    def peek(self) -> Request | None:
        """The next request of the key that was given least."""
        if not self._waiting:
            return None
        return self._waiting[min(self._waiting, key=lambda one: self._counters[one])].peek()

    def remove(self, request: Request) -> None:
        """Take a request out of any place."""
        queue = self._waiting[request.share_key]
        queue.remove(request)
        if not len(queue):
            del self._waiting[request.share_key]
            self._forget_idle()

    def begin(self, running: Iterable[Request]) -> None:
        """Count the keys among which a step is shared."""
        self._sharers = max(1, len({*self._waiting, *(request.share_key for request in running)}))

    def charge(self, request: Request, prompt_tokens: int, output_tokens: int) -> None:
        """Add what a request was given to its key's counter."""
        key, cost = request.share_key, prompt_tokens + OUTPUT_WEIGHT * output_tokens
        self._counters[key] = self._counters.get(key, self._level) + cost
        self._level += cost / self._sharers

    def _forget_idle(self) -> None:
        """Counters that are behind the level say nothing any more; without this they would pile up."""
        if len(self._counters) > 2 * len(self._waiting) + 64:
            counters = self._counters.items()
            self._counters = {key: value for key, value in counters if key in self._waiting or value > self._level}


POLICIES: dict[str, type[WaitingQueue]] = {"fcfs": WaitingQueue, "priority": PriorityQueue, "fair": FairQueue}
