"""The figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.paper.figures import OURS, SUSTAINED

COLORS = {
    "FasterTransformer": "#999999",
    "Orca (Max)": "#d55e00",
    "Orca (Pow2)": "#e69f00",
    "Orca (Oracle)": "#56b4e9",
    OURS: "#0072b2",
}
PARTS = {"tokens": "#0072b2", "reserved": "#88ccee", "internal": "#e69f00", "external": "#bbbbbb"}
SHARED = ["#0072b2", "#cc79a7"]
Data = dict[str, list[float]]


def figure_2(axes: Any, data: Data) -> None:
    """Stacked shares of the KV memory."""
    names, left = list(data), [0.0] * len(data)
    for number, (part, color) in enumerate(PARTS.items()):
        widths = [data[name][number] for name in names]
        axes.barh(names, widths, left=left, color=color, label=part)
        for y, (width, start) in enumerate(zip(widths, left, strict=True)):
            if width > 4:
                axes.text(start + width / 2, y, f"{width:.1f}", ha="center", va="center", fontsize=8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="KV memory while requests wait, %", title="Where the memory goes (Fig. 2)")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def figure_12(axes: Any, data: Data) -> None:
    """Normalized latency against the rate."""
    for name, color in COLORS.items():
        axes.plot(data["rates"], data[name], marker="o", markersize=3, color=color, label=name)
    axes.axhline(SUSTAINED, color="black", linewidth=0.6, linestyle=":")
    axes.set(ylim=(0, 1), xlabel="requests a second", ylabel="normalized latency, s/token")
    axes.set_title("Latency against load, ShareGPT (Fig. 12)")
    axes.legend(frameon=False)


def figure_13(axes: Any, data: Data) -> None:
    """Mean batch of each system on two datasets."""
    for number, (name, batches) in enumerate(data.items()):
        places = [group + 0.2 * number for group in range(len(batches))]
        bars = axes.bar(places, batches, 0.18, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks([0.3, 1.3], ["ShareGPT, 2/s", "Alpaca, 30/s"])
    axes.set(ylabel="requests in a batch", title="Mean batch (Fig. 13)")
    axes.legend(frameon=False)


def figure_15(axes: Any, data: Data) -> None:
    """Memory saved by sharing."""
    for number, (name, saved) in enumerate(data.items()):
        places = [group + 0.4 * number for group in range(len(saved))]
        bars = axes.bar(places, saved, 0.36, color=SHARED[number], label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks([0.2, 1.2, 2.2], ["2", "4", "6"])
    axes.set(xlabel="sequences of a request", ylabel="blocks saved, %", title="Saved by sharing, Alpaca (Fig. 15)")
    axes.legend(frameon=False)


def figure_16(axes: Any, data: Data) -> None:
    """Throughput with a shared prefix."""
    bars = axes.bar(list(data), [values[0] for values in data.values()], 0.5, color=COLORS[OURS])
    axes.bar_label(bars, fmt="%.2f×")
    axes.axhline(1, color=COLORS["Orca (Oracle)"], label="Orca (Oracle)")
    axes.set(xlabel="shared prefix", ylabel="throughput, times Orca (Oracle)", title="Shared prefix (Fig. 16)")
    axes.legend(frameon=False)


def figure_18b(axes: Any, data: Data) -> None:
    """Latency against the block size."""
    for name, color in (("ShareGPT", SHARED[0]), ("Alpaca", SHARED[1])):
        axes.plot(data["sizes"], data[name], marker="o", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(data["sizes"], [f"{size:g}" for size in data["sizes"]])
    axes.set(ylim=(0, None), xlabel="block size, tokens", ylabel="normalized latency, s/token")
    axes.set_title("Block size (Fig. 18b)")
    axes.legend(frameon=False)


DRAW: dict[str, Callable[[Any, Data], None]] = {
    "2": figure_2,
    "12": figure_12,
    "13": figure_13,
    "15": figure_15,
    "16": figure_16,
    "18b": figure_18b,
}


def draw(data: dict[str, Data], folder: Path) -> None:
    """Write `figure_N.png` and `.svg` of every figure into the folder."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in data.items():
        figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
        DRAW[name](axes, values)
        figure.savefig(folder / f"figure_{name}.png", dpi=160)
        figure.savefig(folder / f"figure_{name}.svg", metadata={"Date": None})
        pyplot.close(figure)
