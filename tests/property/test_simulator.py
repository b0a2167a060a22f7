"""The real scheduler and pool under random traffic: everything ends, exactly, in small and large pools."""

from __future__ import annotations

import pytest

from tests.traffic import simulate


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(100))
def test_random_traffic_ends_exactly(seed: int, overlaps: bool) -> None:
    """`python -m tests.soak simulator` goes on from here."""
    assert simulate(seed, overlaps) > 0
