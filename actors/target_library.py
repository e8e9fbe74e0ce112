"""What an exported folder computes in its own library, in a process of that library's environment."""

import os
import subprocess
import sys
import tempfile
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
    return given


def by_library(
    python: Path, kind: str, folder: Path, x: Float[Tensor, "rows d_model"]
) -> tuple[Codes, str]:
    """Latents and reconstructions that the library computes, and its name with its version.

    Raises:
        InputError: If the library can't be imported there, or can't load the folder; its own words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows, out = Path(scratch, "rows.safetensors"), Path(scratch, "out.safetensors")
        save_file({"x": x.contiguous()}, rows)
        command = [python, PROGRAM, kind, folder.resolve(), rows, out]
        try:
            done = subprocess.run(
                list(map(str, command)),
                env={**os.environ, **_VARIABLES},
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{kind} in {python} did not answer in {_SECONDS} s; check that environment"
            ) from error
        if done.returncode or not out.is_file():
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(
                f"{kind} in {python} could not load what was written ({said}); nothing was kept: give a "
                f"Python that has {kind} and safetensors, or export without --python"
            )
        found = load_file(out)
        with safe_open(out, framework="pt") as file:
            library = file.metadata()["library"]
    return (found["acts"], found["x_hat"]), library
