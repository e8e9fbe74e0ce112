"""What an exported folder computes in its own library, in a process of that library's environment."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.errors import InputError
from actors.target_formula import Codes

PROGRAM = Path(__file__).with_name("peer_program.py")
LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning")
"""Formats that are a library's of the same import name."""

_SECONDS = 600
# sparsify decodes with Triton wherever Triton can be imported, also where there is no GPU.
_VARIABLES = {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}


def interpreter_of(kind: str, given: Path | None) -> Path | None:
    """A Python that has a format's library: the one given, else this one if it has it.

    Raises:
        InputError: If the one given can't be run.
    """
    if kind not in LIBRARIES:
        return None
    if given is None:
        return Path(sys.executable) if find_spec(kind) else None
    if not os.access(given, os.X_OK) or given.is_dir():
        raise InputError(
            f"--python {given} can't be run; give the interpreter of an environment that has {kind}, such as "
            "ENVIRONMENT/bin/python"
        )
    return Path(os.path.abspath(given))  # not resolved: that of an environment is a link


@contextmanager
def by_library(
    python: Path, kind: str, jobs: Sequence[tuple[Path, Float[Tensor, "rows d_model"]]]
) -> Iterator[Iterator[tuple[Codes, str]]]:
    """For each folder and its rows, what the library computes, and the library's name with its version.

    Raises:
        InputError: If the library can't be imported there, or can't load a folder; its own words.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for i, (_, x) in enumerate(jobs):
            save_file({"x": x.contiguous()}, scratch / f"in-{i}.safetensors")
        command = [python, PROGRAM, kind, scratch, *(folder.resolve() for folder, _ in jobs)]
        try:
            done = subprocess.run(
                list(map(str, command)),
                env={**os.environ, **_VARIABLES},
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=_SECONDS * (1 + len(jobs)),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{kind} in {python} did not answer in {error.timeout} s; check that environment"
            ) from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(
                f"{kind} in {python} could not load what was written ({said}); nothing was kept: give a "
                f"Python that has {kind} and safetensors, or export without --python"
            )
        if not all((scratch / f"out-{i}.safetensors").is_file() for i in range(len(jobs))):
            raise InputError(
                f"{python} ended without an answer, so it is no Python that has {kind}; nothing was kept: give the "
                "interpreter of an environment that has it"
            )
        yield (_answer(scratch / f"out-{i}.safetensors") for i in range(len(jobs)))


def _answer(file: Path) -> tuple[Codes, str]:
    found = load_file(file)
    with safe_open(file, framework="pt") as opened:
        library = opened.metadata()["library"]
    return (found["acts"], found["x_hat"]), library
