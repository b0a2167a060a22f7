"""The seeded bugs of `tests/mutations.py` can still be seeded."""

from __future__ import annotations

from tests.mutations import MUTATIONS, ROOT


def test_each_changes_one_place() -> None:
    places = {mutation.name: (ROOT / mutation.path).read_text("utf-8").count(mutation.old) for mutation in MUTATIONS}
    assert len(places) == len(MUTATIONS)
    assert {name: count for name, count in places.items() if count != 1} == {}
