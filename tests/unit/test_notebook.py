"""The picture of `engine.stats()`: what the block map says is so, and any notebook can show it."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import fields
from xml.etree import ElementTree

import pytest

from pagedllm_core import LLM, AsyncEngine, EngineConfig, SamplingParams
from pagedllm_core.engine import Engine
from pagedllm_core.kv.pool import CACHED, FREE, SHARED, USED
from pagedllm_core.metrics import EngineStats
from tests.fakes import FakeRunner, fake_engine, run_all

COLOURS = {SHARED: "#e69f00", USED: "#0072b2", CACHED: "#8cc5e3", FREE: "currentColor"}
LABELS = {SHARED: "shared", USED: "used by one", CACHED: "cached", FREE: "free"}
PREFIX = list(range(1, 21))


def parsed(stats: EngineStats) -> ElementTree.Element:
    return ElementTree.fromstring(stats._repr_html_())


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if element.tag.endswith("text")]


def cells(root: ElementTree.Element) -> dict[int, list[tuple[float, float, float, float]]]:
    """x, y, width and height of every cell (or part of one) that is drawn for each state."""
    shape = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-([\d.]+)z")
    found: dict[int, list[tuple[float, float, float, float]]] = {state: [] for state in COLOURS}
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for state, colour in COLOURS.items():
            if path.get("fill") == colour and (drawn := shape.findall(path.get("d", ""))):
                found[state] += [(float(x), float(y), float(w), float(h)) for x, y, w, h, _ in drawn]
    return found


def busy_engine() -> Engine:
    """Four requests on a common prefix, one of them with two samples; a finished one has left cached blocks."""
    engine = fake_engine(FakeRunner(num_blocks=64), max_num_batched_tokens=64)
    engine.add([7] * 13, SamplingParams(max_tokens=2))
    run_all(engine)
    for number in range(3):
        engine.add([*PREFIX, 30 + number], SamplingParams(max_tokens=30))
    engine.add([*PREFIX, *range(50, 57)], SamplingParams(max_tokens=30, n=2, temperature=1.0, seed=1))
    for _ in range(8):
        engine.step()
    return engine


def snapshot(states: bytes, **counters: int) -> EngineStats:
    counts = Counter(states)
    return EngineStats(
        kv_blocks_total=len(states), kv_blocks_used=counts[USED] + counts[SHARED], kv_blocks_cached=counts[CACHED],
        kv_blocks_free=counts[FREE], block_map=states, **counters,
    )  # fmt: skip


def test_the_map_says_what_each_block_is() -> None:
    engine = busy_engine()
    stats = engine.stats()
    readers = Counter(
        block
        for request in engine.scheduler.running
        for sequence in request.sequences
        for block in sequence.table.ids.tolist()
    )
    assert len(stats.block_map) == 64
    assert set(readers.values()) == {1, 2, 5}
    for block, state in enumerate(stats.block_map):
        assert (state == SHARED) == (readers[block] > 1)
        assert (state == USED) == (readers[block] == 1)
        assert state in (FREE, CACHED) or readers[block]
    counts = Counter(stats.block_map)
    assert counts[USED] + counts[SHARED] == stats.kv_blocks_used
    assert (counts[CACHED], counts[FREE]) == (stats.kv_blocks_cached, stats.kv_blocks_free)
    assert all(counts[state] for state in COLOURS), "the scene shows every state"
    again = engine.step()
    assert again is not None
    assert engine.stats().block_map != stats.block_map, "a snapshot"
    run_all(engine)


def test_a_cached_block_is_told_from_a_free_one() -> None:
    engine = fake_engine(FakeRunner(num_blocks=8))
    engine.add([1] * 9, SamplingParams(max_tokens=1))
    run_all(engine)
    (again,) = [engine.add([1] * 9, SamplingParams(max_tokens=3))]
    engine.step()
    engine.abort(again)
    engine.step()
    stats = engine.stats()
    cached = {block for block, state in enumerate(stats.block_map) if state == CACHED}
    assert cached == set(engine.pool._cached)
    assert len(cached) == 2
    assert Counter(stats.block_map)[FREE] == 6


def test_the_picture_shows_the_counts() -> None:
    stats = busy_engine().stats()
    root, counts = parsed(stats), Counter(stats.block_map)
    assert {state: len(drawn) for state, drawn in cells(root).items()} == counts
    assert [text for text in texts(root) if text.startswith(tuple(LABELS.values()))] == [
        f"{label} {counts[state]}" for state, label in LABELS.items()
    ]
    corners = [(x, y) for drawn in cells(root).values() for x, y, _, _ in drawn]
    assert len(set(corners)) == 64, "no cell covers another"
    where = sorted((y, x, state) for state, drawn in cells(root).items() for x, y, _, _ in drawn)
    assert bytes(state for _, _, state in where) == stats.block_map, "in the order of the blocks"


def test_it_is_one_svg_that_asks_for_nothing() -> None:
    html = busy_engine().stats()._repr_html_()
    root = ElementTree.fromstring(html)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags == {"div", "svg", "g", "path", "rect", "text"}
    for element in root.iter():
        assert not {"href", "src", "id", "class", "onclick"} & set(element.attrib)
    assert "url(" not in html
    (svg,) = root
    assert svg.get("role") == "img"
    assert re.fullmatch(r"KV blocks: \d+ shared, \d+ used by one, \d+ cached, \d+ free", svg.get("aria-label", ""))


@pytest.mark.parametrize("total", [1, 2, 29, 1600, 1601, 100_000])
def test_every_size_fits_the_page(total: int) -> None:
    rng = random.Random(total)
    states = b"".join(bytes([rng.choice([FREE, CACHED, USED, SHARED])]) * rng.randint(1, 40) for _ in range(total))
    stats = snapshot(states[: total - 1] + bytes([USED]))
    html, root = stats._repr_html_(), parsed(stats)
    per_cell = math.ceil(total / 1600)
    drawn = cells(root)
    width = {w for parts in drawn.values() for _, _, w, _ in parts}.pop()
    assert len(html) < 150_000
    filled = sum(h for parts in drawn.values() for _, _, _, h in parts) / width
    assert filled == pytest.approx(math.ceil(total / per_cell), rel=0.01)
    assert all(x + w <= 720 for parts in drawn.values() for x, _, w, _ in parts)
    assert (f"one cell is {per_cell} blocks" in texts(root)) == (per_cell > 1)
    for state, parts in drawn.items():  # the drawn area is that of the blocks
        blocks = sum(h for _, _, _, h in parts) / width * per_cell
        assert blocks == pytest.approx(Counter(stats.block_map)[state], rel=0.02, abs=per_cell)


def test_a_cell_of_several_blocks_is_filled_in_proportion() -> None:
    (part,) = {tuple(parts[-1:]) for parts in cells(parsed(snapshot(bytes([USED]) * 3200))).values() if parts}
    assert part[0][2:] == (8, 8)
    drawn = cells(parsed(snapshot(bytes([FREE, CACHED, FREE, SHARED]) * 1600)))
    assert drawn[SHARED][:2] == [(0, 0, 8, 2), (9, 0, 8, 2)]
    assert drawn[CACHED][80] == (0, 11, 8, 2)
    assert drawn[FREE][0] == (0, 4, 8, 4)
    assert not drawn[USED]


def test_free_blocks_at_the_end_of_a_large_pool_are_counted() -> None:
    root = parsed(snapshot(bytes([USED] * 300 + [FREE] * 32_468)))
    assert {state: len(drawn) for state, drawn in cells(root).items() if drawn} == {USED: 300, FREE: 1300}
    assert {"31,168 more blocks are free", "free 32,468"} <= set(texts(root))
    root = parsed(snapshot(bytes([USED] * 6400 + [FREE] * 640)))
    assert len(cells(root)[USED]) == 1600
    assert "one cell is 4 blocks; 640 more blocks are free" in texts(root)
    assert not [text for text in texts(parsed(snapshot(bytes(1600)))) if "more" in text]


def test_an_engine_that_has_done_nothing() -> None:
    assert parsed(EngineStats()) is not None
    engine = fake_engine(FakeRunner(num_blocks=5))
    root = parsed(engine.stats())
    assert "free 5" in texts(root)
    assert not [text for text in texts(root) if text.startswith("occupancy")]


def test_swapped_blocks() -> None:
    root = parsed(snapshot(bytes([USED] * 4), swap_blocks_total=40, swap_blocks_used=10, waiting=3, swapped=2))
    assert "swapped 10" in texts(root)
    assert "host memory: 10 of 40 blocks" in texts(root)
    assert "0 running, 3 waiting (2 swapped out)" in texts(root)
    bars = [element for element in root.iter() if element.get("fill") == "#cc79a7"]
    assert "180.0" in {bar.get("width") for bar in bars}
    assert not [text for text in texts(parsed(snapshot(bytes(4)))) if "swapped" in text or "host" in text]


def test_the_swap_space_is_counted() -> None:
    engine = fake_engine(FakeRunner(num_blocks=12, num_host_blocks=30))
    engine.scheduler.swap.costs.swapping_pays = lambda blocks, tokens: True  # type: ignore[method-assign]
    for number in range(4):
        engine.add([number + 1] * 6, SamplingParams(max_tokens=20))
    seen = []
    while engine.has_unfinished:
        engine.step()
        stats = engine.stats()
        assert (stats.swap_blocks_used > 0) == (stats.swapped > 0)
        seen.append(stats.swap_blocks_used)
    assert max(seen) > 0
    assert (stats.swap_blocks_total, stats.swap_blocks_used) == (30, 0)


def test_occupancy_is_that_of_the_steps_and_bounded() -> None:
    engine = busy_engine()
    before = len(engine.stats().occupancy)
    for _ in range(5):
        engine.step()
        stats = engine.stats()
        assert stats.occupancy[-1] == (stats.steps, stats.kv_blocks_used, stats.kv_blocks_cached)
    assert len(stats.occupancy) == before + 5
    run_all(engine)
    for _ in range(600):
        engine.add([1], SamplingParams(max_tokens=1))
        engine.step()
    samples = engine.stats().occupancy
    assert len(samples) == 512
    assert [step for step, _, _ in samples] == list(range(engine.stats().steps - 511, engine.stats().steps + 1))


def test_the_chart() -> None:
    stats = snapshot(bytes([USED] * 30 + [CACHED] * 20 + [FREE] * 50))
    stats = EngineStats(**{
        **{field.name: getattr(stats, field.name) for field in fields(stats)},
        "occupancy": ((11, 0, 0), (12, 80, 0), (13, 40, 20), (15, 30, 20)), "steps": 15,
    })  # fmt: skip
    root = parsed(stats)
    charts = [path.get("d", "") for path in root.iter() if "L" in path.get("d", "")]
    points = [[tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", one)] for one in charts]
    cached, used = points
    assert used == [(0, 76), (0, 76), (180, 20), (360, 48), (720, 55)]
    assert cached == [(0, 76), (0, 76), (180, 20), (360, 34), (720, 41)]
    assert {"step 11", "step 15", "occupancy: 30% used now, at most 80%", "up to 80 blocks"} <= set(texts(root))


def test_every_route_gives_the_same_thing() -> None:
    core = fake_engine(FakeRunner(num_blocks=9))
    with AsyncEngine(EngineConfig(model="fake", block_size=4), runner=FakeRunner(num_blocks=9)) as engine:
        assert engine.stats() == core.stats()
        assert engine.stats()._repr_html_() == core.stats()._repr_html_()
    with LLM(model="tiny", kv_cache_memory="1MiB") as llm:
        llm.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        stats = llm.stats()
        assert len(stats.block_map) == stats.kv_blocks_total
        assert f"{stats.kv_blocks_total} KV blocks after step 4" in texts(parsed(stats))
        assert llm.engine.stats() == stats


def test_text_output_stays_short() -> None:
    text = repr(busy_engine().stats())
    assert "block_map" not in text
    assert "occupancy" not in text
