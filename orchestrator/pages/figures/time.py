"""Where the time went, and what the machine did meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from orchestrator.pages.figures.style import COLOURS, LINES, new

_LOAD = {
    "system/cpu_utilization_percentage": "CPU",
    "system/system_memory_usage_percentage": "memory",
    "system/gpu_0_utilization_percentage": "GPU",
    "system/gpu_0_memory_usage_percentage": "GPU memory",
}


def stages(seconds: Mapping[str, float]) -> Figure:
    """Seconds of each stage, in order."""
    figure, axes = new(0.6 + 0.33 * len(seconds))
    names = [name.replace("_", " ") for name in seconds]
    bars = axes.barh(names, list(seconds.values()), color=COLOURS[0], height=0.7)
    total = sum(seconds.values()) or 1.0
    labels = [f"{value:,.0f} s ({value / total:.0%})" for value in seconds.values()]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", xlim=(0, 1.28 * max(seconds.values(), default=1)))
    return figure


def load(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Load of the driver's machine over time, in percent; `rows` as in `system_metrics.jsonl`."""
    figure, axes = new(2.8)
    minutes = [(row["timestamp_ms"] - rows[0]["timestamp_ms"]) / 60_000 for row in rows]
    known = [key for key in _LOAD if all(key in row for row in rows)]
    for i, key in enumerate(known):
        axes.plot(
            *(minutes, [row[key] for row in rows]),
            color=COLOURS[i],
            linestyle=LINES[i],
            marker="." if len(rows) < 20 else None,
            label=_LOAD[key],
        )
    axes.set(xlabel="minutes", ylabel="% of the machine", ylim=(0, 104))
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return figure
