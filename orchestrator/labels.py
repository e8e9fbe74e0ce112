"""The one spelling of encoders, bytes and times, for people."""

from collections.abc import Mapping
from typing import Any


def encoder_label(result: Mapping[str, Any]) -> str:
    """`dense`, or the Kronecker shape as `kron 64x4x4`."""
    if result["encoder"] == "dense":
        return "dense"
    other = "" if result["activation"] == "mand" else f" {result['activation']}"
    return f"kron {result['h']}x{result['m']}x{result['n']}{other}"


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
