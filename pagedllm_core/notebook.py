"""How a notebook shows `EngineStats`: the block map, its legend, and occupancy over time.

One SVG without scripts, style sheets or links, so that every notebook shows it, a saved one too. Text takes the page's
colour, and the palette is told apart by every kind of colour vision, on light pages and on dark ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from pagedllm_core.kv.pool import CACHED, FREE, SHARED, USED
from pagedllm_core.metrics import EngineStats

_WIDTH = 720
_MOST_CELLS = 1600
_COLOURS = {SHARED: "#e69f00", USED: "#0072b2", CACHED: "#8cc5e3", FREE: "currentColor"}
_NAMES = {SHARED: "shared", USED: "used by one", CACHED: "cached", FREE: "free"}
_SWAPPED_COLOUR = "#cc79a7"

Part = tuple[float, str]
"""A height, and the SVG that is drawn in it."""


def stats_html(stats: EngineStats) -> str:
    """The picture of one snapshot, as HTML that is well-formed XML as well."""
    counts = Counter(stats.block_map)
    parts = [_headline(stats)]
    if stats.block_map:
        parts += [_block_map(stats.block_map), _legend(stats, counts)]
    if stats.swap_blocks_total:
        parts.append(_swap_space(stats))
    if stats.occupancy and stats.kv_blocks_total:
        parts.append(_occupancy(stats))
    parts.append(_counters(stats))
    height, body = 4.0, []
    for part_height, svg in parts:
        body.append(f'<g transform="translate(0 {height:g})">{svg}</g>')
        height += part_height
    label = ", ".join(f"{counts[state]:,} {name}" for state, name in _NAMES.items())
    return (
        f'<div style="max-width:{_WIDTH}px"><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" '
        f'width="100%" role="img" aria-label="KV blocks: {label}" fill="currentColor" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(body)}</svg></div>'
    )


def _headline(stats: EngineStats) -> Part:
    waiting = f"{stats.waiting:,} waiting" + (f" ({stats.swapped:,} swapped out)" if stats.swapped else "")
    return 26, (
        f'<text y="14" font-size="13" font-weight="600">{stats.kv_blocks_total:,} KV blocks after step '
        f"{stats.steps:,}</text>"
        f'<text x="{_WIDTH}" y="14" text-anchor="end">{stats.running:,} running, {waiting}</text>'
    )


def _block_map(states: bytes) -> Part:
    """A cell for each block, or for some consecutive ones, filled in proportion to what they are.

    Free blocks at the end of a large pool are only counted.
    """
    shown = states if len(states) <= _MOST_CELLS else states.rstrip(bytes([FREE])).ljust(_MOST_CELLS, bytes([FREE]))
    bin_size = math.ceil(len(shown) / _MOST_CELLS)
    cells = math.ceil(len(shown) / bin_size)
    columns = _WIDTH // max(9, min(24, math.isqrt(_WIDTH * 180 // cells)))
    cell = _WIDTH / columns
    paths: dict[int, list[str]] = {state: [] for state in _NAMES}
    for index in range(cells):
        x, y = round(index % columns * cell, 1), index // columns * cell
        counts = Counter(shown[index * bin_size : (index + 1) * bin_size])
        scale, filled = (cell - 1) / counts.total(), 0
        for state in _NAMES:  # from the cell's top to its bottom
            if counts[state]:
                top, height = y + scale * filled, scale * counts[state]
                paths[state].append(f"M{x:g} {top:.4g}h{cell - 1:.3g}v{height:.3g}h{1 - cell:.3g}z")
                filled += counts[state]
    drawn = [
        f'<path d="{"".join(path)}" fill="{_COLOURS[state]}"{_opacity(state)}/>'
        for state, path in paths.items()
        if path
    ]
    notes = [f"one cell is {bin_size:,} blocks"] if bin_size > 1 else []
    if len(shown) < len(states):
        notes.append(f"{len(states) - len(shown):,} more blocks are free")
    height = math.ceil(cells / columns) * cell
    drawn.append(f'<text y="{height + 12:g}" font-size="11" opacity="0.7">{"; ".join(notes)}</text>' if notes else "")
    return height + (20 if notes else 6), "".join(drawn)


def _opacity(state: int) -> str:
    return ' fill-opacity="0.12"' if state == FREE else ""


def _legend(stats: EngineStats, counts: Counter[int]) -> Part:
    entries = [(_COLOURS[state], _opacity(state), f"{name} {counts[state]:,}") for state, name in _NAMES.items()]
    if stats.swap_blocks_total:
        entries.append((_SWAPPED_COLOUR, "", f"swapped {stats.swap_blocks_used:,}"))
    svg = [
        f'<rect x="{x}" y="4" width="12" height="12" fill="{colour}"{opacity}/><text x="{x + 17}" y="14">{text}</text>'
        for x, (colour, opacity, text) in zip((0, 125, 300, 440, 580), entries, strict=False)
    ]
    return 28, "".join(svg)


def _swap_space(stats: EngineStats) -> Part:
    filled = _WIDTH * stats.swap_blocks_used / stats.swap_blocks_total
    return 34, (
        f'<text y="12">host memory: {stats.swap_blocks_used:,} of {stats.swap_blocks_total:,} blocks</text>'
        f'<rect y="18" width="{_WIDTH}" height="8" fill-opacity="0.12"/>'
        f'<rect y="18" width="{filled:.1f}" height="8" fill="{_SWAPPED_COLOUR}"/>'
    )


def _occupancy(stats: EngineStats) -> Part:
    """Used blocks, and cached ones on top of them, over the latest steps."""
    top, bottom, total = 20, 76, stats.kv_blocks_total
    first, last = stats.occupancy[0][0], stats.occupancy[-1][0]
    most = max(1, *(used + cached for _, used, cached in stats.occupancy))

    def area(heights: Iterable[int]) -> str:
        points = [
            f"{_WIDTH * (step - first) / max(1, last - first):.4g} {bottom - (bottom - top) * height / most:.3g}"
            for (step, _, _), height in zip(stats.occupancy, heights, strict=True)
        ]
        return f"M0 {bottom}L{' '.join(points)}V{bottom}z"

    peak = max(used for _, used, _ in stats.occupancy)
    return bottom + 22, (
        f'<text y="12">occupancy: {stats.kv_blocks_used / total:.0%} used now, at most {peak / total:.0%}</text>'
        f'<text x="{_WIDTH}" y="12" font-size="11" opacity="0.7" text-anchor="end">up to {most:,} blocks</text>'
        f'<rect y="{top}" width="{_WIDTH}" height="{bottom - top}" fill-opacity="0.12"/>'
        f'<path d="{area(used + cached for _, used, cached in stats.occupancy)}" fill="{_COLOURS[CACHED]}"/>'
        f'<path d="{area(used for _, used, _ in stats.occupancy)}" fill="{_COLOURS[USED]}"/>'
        f'<g font-size="11" opacity="0.7"><text y="{bottom + 13}">step {first:,}</text>'
        f'<text x="{_WIDTH}" y="{bottom + 13}" text-anchor="end">step {last:,}</text></g>'
    )


def _counters(stats: EngineStats) -> Part:
    lines = [
        f"{stats.tokens_prefilled:,} prompt tokens computed, {stats.tokens_generated:,} tokens generated, "
        f"largest batch {stats.max_batch_size:,}, {stats.preemptions:,} preemptions",
        f"{stats.prefix_cache_hits:,} of {stats.prefix_cache_queries:,} prompt tokens were in the prefix cache, "
        f"{stats.kv_waste:.1%} of the used slots hold no token",
    ]
    svg = [f'<text y="{13 + 16 * number}">{line}</text>' for number, line in enumerate(lines)]
    return 16 * len(lines) + 6, f'<g opacity="0.8">{"".join(svg)}</g>'
