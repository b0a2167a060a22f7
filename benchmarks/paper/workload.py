"""Requests with prescribed lengths, and what a step costs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist

MAX_LENGTH = 2048  # tokens of a request, prompt and output together (OPT-13B)
POOL_SLOTS = 15_700  # KV slots of a 13B model on a 40 GB GPU (Table 1)


@dataclass(frozen=True)
class Dataset:
    """Lengths in tokens: their means (Fig. 11), and the spreads of their logarithms, as if they were lognormal.

    The paper prints means only. Of the spreads 0.65, 0.7, .. 1.0 for ShareGPT 0.7 brings Orca's twelve shares of memory
    closest to Fig. 2 (the largest difference is 3.2 points). Alpaca's are those of 214 records of the published data:
    the spread of a lognormal distribution with their coefficient of variation (0.58 and 1.09; 95 % of resamples give
    spreads of 0.47 to 0.60 and 0.81 to 0.94). Nothing else is fitted.
    """

    name: str
    mean_input: float
    mean_output: float
    spread_input: float = 0.7
    spread_output: float = 0.7


SHAREGPT = Dataset("ShareGPT", 161.31, 337.99)
ALPACA = Dataset("Alpaca", 19.31, 58.45, spread_input=0.54, spread_output=0.88)
TRANSLATION = Dataset("WMT16 English-German", 30.0, 33.0)  # a sentence; the paper gives no mean


@dataclass(frozen=True)
class Job:
    """One request: when it comes (seconds), and how many tokens it reads and writes."""

    arrival: float
    prompt: int
    output: int

    @property
    def length(self) -> int:
        """Slots it needs at its end."""
        return self.prompt + self.output


def jobs(dataset: Dataset, count: int, rate: float, seed: int = 0, shared_prefix: int = 0) -> list[Job]:
    """Poisson arrivals with lognormal lengths.

    Args:
        dataset: Where the lengths come from.
        count: Number of requests.
        rate: Requests a second; infinite: all at once.
        seed: Of arrivals and lengths.
        shared_prefix: Tokens put before each prompt.
    """
    generator = random.Random(seed)
    prompts = lengths(dataset.mean_input, dataset.spread_input, count, generator)
    outputs = lengths(dataset.mean_output, dataset.spread_output, count, generator)
    result, now = [], 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        prompt = min(prompt + shared_prefix, MAX_LENGTH - 1)
        result.append(Job(now, prompt, min(output, MAX_LENGTH - prompt)))
        now += generator.expovariate(rate) if math.isfinite(rate) else 0.0
    return result


def lengths(mean: float, spread: float, count: int, generator: random.Random) -> list[int]:
    """Lognormal lengths in random order: the quantiles of the distribution, so that short traces have its moments."""
    normal = NormalDist(math.log(mean) - spread**2 / 2, spread)
    found = [max(1, round(math.exp(normal.inv_cdf((number + 0.5) / count)))) for number in range(count)]
    generator.shuffle(found)
    return found


def step_seconds(prefill_tokens: int, batch: int, kv_tokens: int) -> float:
    """What one forward pass of the 13B model takes, by the cost model that all systems share."""
    return 1e-3 * (27 + 0.077 * prefill_tokens + 0.25 * batch + 0.0006 * kv_tokens)
