"""The one spelling of an encoder, for people and for file names."""

from collections.abc import Mapping
from typing import Any


def encoder_label(result: Mapping[str, Any]) -> str:
    """`dense`, or the Kronecker shape as `kron 64x4x4`."""
    if result["encoder"] == "dense":
        return "dense"
    other = "" if result["activation"] == "mand" else f" {result['activation']}"
    return f"kron {result['h']}x{result['m']}x{result['n']}{other}"
