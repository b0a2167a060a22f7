"""What a simulation of any system yields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Memory:
    """Slots, summed over the steps in which some request had to wait for memory.

    Attributes:
        tokens: Hold a token.
        reserved: Will hold a token of their request later.
        internal: Belong to a request and will never hold a token.
        external: Belong to nobody, and yet whoever waited got none; or lost to the rounding of the allocator.
    """

    tokens: int = 0
    reserved: int = 0
    internal: int = 0
    external: int = 0

    def shares(self) -> tuple[float, float, float, float]:
        """The four in percent of all slots."""
        total = max(1, self.tokens + self.reserved + self.internal + self.external)
        tokens, reserved, internal, external = (
            100 * part / total for part in (self.tokens, self.reserved, self.internal, self.external)
        )
        return tokens, reserved, internal, external


@dataclass
class Result:
    """A simulation.

    Attributes:
        latencies: Seconds from arrival to end divided by the output's tokens, of each request.
        seconds: Virtual time from the first arrival to the last end.
        batches: Requests in each step, weighted below by its seconds.
        durations: Seconds of each step.
        memory: Where the slots were while somebody waited.
    """

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def mean_batch(self) -> float:
        """Requests in a step, averaged over time."""
        weighted = sum(batch * duration for batch, duration in zip(self.batches, self.durations, strict=True))
        return weighted / max(1e-9, sum(self.durations))

    @property
    def latency(self) -> float:
        """Mean normalized latency, seconds a token."""
        return sum(self.latencies) / max(1, len(self.latencies))
