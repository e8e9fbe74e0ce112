"""Which versions a run is made with; one and the same wherever it computes, and where it was submitted."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from orchestrator.errors import UserError


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of what has to agree: `strata` (absent where only its files are), `ray` and `python`."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"strata": installed("strata-sae"), "ray": installed("ray"), "python": python}
    return {name: there for name, there in found.items() if there}


def check_same(here: Mapping[str, str], there: Mapping[str, str], where: str) -> None:
    """Compare versions, as far as both are known.

    Args:
        here: Those of this process.
        there: Those elsewhere.
        where: Elsewhere, as an error calls it.

    Raises:
        UserError: If they differ.
    """
    known = here.keys() & there.keys()
    different = sorted(name for name in known if here[name] != there[name])
    if different:
        ours, theirs = (
            ", ".join(f"{name} {side[name]}" for name in different) for side in (here, there)
        )
        raise UserError(
            f"here is {ours}, and {where} {theirs}; a run takes one version everywhere: install the "
            "same on both sides"
        )
