"""The one spelling of models, encoders, figures, bytes and times, for people."""

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any


def encoder_label(result: Mapping[str, Any]) -> str:
    """`dense`, or the Kronecker shape as `kron 64x4x4`."""
    if result["encoder"] == "dense":
        return "dense"
    other = "" if result["activation"] == "mand" else f" {result['activation']}"
    return f"kron {result['h']}x{result['m']}x{result['n']}{other}"


def model_label(name: str) -> str:
    """A model's name; of a folder its last part that says something."""
    path = PurePosixPath(name)
    if not path.is_absolute() and len(path.parts) <= 2:  # of the Hub
        return str(path)
    return path.parent.name if path.name in ("model", "checkpoint") else path.name


def figure(value: float | None, form: str) -> str:
    """A figure in the form its column has; what would be too wide for that, as a power of ten."""
    if value is None:
        return "-"
    return format(value, form) if abs(value) < 1e6 else f"{value:.2e}"


def span(values: Collection[float], form: str) -> str:
    """The least and the most, or the one figure that both are."""
    low, high = figure(min(values), form), figure(max(values), form)
    return low if low == high else f"{low} to {high}"


def size(n_bytes: int) -> str:
    """Bytes for people: three figures, in decimal units."""
    left, unit = n_bytes * 1.0, "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if left < 1000 or unit == "TB":
            break
        left /= 1000
    return f"{left:,.3g} {unit}" if left < 1000 else f"{left:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
