"""The chart: how near kernels and steps come to their roofs, and how PagedLLM compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[str, float, float]]]


def draw(path: Path, title: str, points: Points) -> None:
    """Four panels as SVG.

    Args:
        path: Of the file.
        title: Above all.
        points: Series, x and y, by part.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5))
    lines(axes[0, 0], points.get("decode", []), "Decode attention", "sequences", "of the copy roof", 0.8)
    lines(axes[0, 1], points.get("prefill", []), "Prefill attention", "tokens of a prompt", "of the bf16 roof", 0.55)
    shapes = [point for name, part in points.items() if name.startswith("steps") for point in part]
    lines(axes[1, 0], shapes, "Decode step", "sequences", "of the read limit", 0.85)
    bars(axes[1, 1], points.get("serving", []))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def series(points: list[tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Points by their series, in order."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        found.setdefault(name, []).append((x, y))
    return {name: sorted(values) for name, values in found.items()}


def lines(axes: Any, points: list[tuple[str, float, float]], title: str, x: str, y: str, goal: float) -> None:
    """Shares of a roof over sizes."""
    for name, values in series(points).items():
        axes.plot(
            *zip(*values, strict=True), marker="o", markersize=3, label=name, linestyle="--" if "eager" in name else "-"
        )
    axes.axhline(goal, color="black", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", ylim=(0, 1.1), xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.set_title(title, fontsize=10)
    if points:
        axes.legend(fontsize=6, frameon=False)


def bars(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Times faster than each system, by workload."""
    found = series(points)
    width = 0.8 / max(1, len(found))
    for place, (name, values) in enumerate(found.items()):
        at = [x + (place - (len(found) - 1) / 2) * width for x, _ in values]
        drawn = axes.bar(at, [y for _, y in values], width, label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(1, 6), [f"W{number}" for number in range(1, 6)])
    axes.set_ylabel("PagedLLM is faster by")
    axes.set_title("Workloads", fontsize=10)
    if found:
        axes.legend(fontsize=6, frameon=False)
