"""The real scheduler and pool under random traffic: everything ends, exactly, in small and large pools."""

from __future__ import annotations

import pytest

from tests.traffic import simulate


@pytest.mark.parametrize("seed", range(150))
def test_random_traffic_ends_exactly(seed: int) -> None:
    """`python -m tests.soak simulator` goes on from here."""
    assert simulate(seed, overlaps=False) > 0


@pytest.mark.parametrize("seed", range(100))
def test_random_traffic_with_overlapping_steps_ends_exactly(seed: int) -> None:
    assert simulate(seed, overlaps=True) > 0
