"""A buddy allocator: contiguous slots in powers of two, as the baselines of the paper use."""

from __future__ import annotations


class BuddyAllocator:
    """Hands out ranges of 2^k slots.

    A total that is not a power of two is the sum of several trees, the largest first.

    Args:
        total: Slots.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free: dict[int, set[int]] = {order: set() for order in range(total.bit_length())}
        self._order: dict[int, int] = {}  # of the ranges handed out, by their first slot
        start = 0
        for order in reversed(range(total.bit_length())):
            if total >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    @property
    def free(self) -> int:
        """Slots that are in no range."""
        return sum(len(starts) << order for order, starts in self._free.items())

    def allocate(self, size: int) -> int | None:
        """The first slot of a range of at least `size` slots, or None."""
        wanted = max(0, size - 1).bit_length()
        order = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if order is None:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:  # split, and keep the lower half
            order -= 1
            self._free[order].add(start + (1 << order))
        self._order[start] = order
        return start

    def release(self, start: int) -> None:
        """Give a range back; it joins its buddy where that is free."""
        order = self._order.pop(start)
        while start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)
