"""A process that trains one autoencoder and does a step each time it is asked.

Contenders live in processes of their own, in their own environment, and take turns: whatever else
the machine does falls on all of them. Both sides speak JSON lines over a pipe. Memory is read from
/proc, so Linux alone.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """The asking side."""

    def __init__(
        self,
        python: Path,
        module: str,
        arguments: Mapping[str, Any],
        threads: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        count = str(threads)
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(dict(arguments))],
            cwd=ROOT,
            env={
                **os.environ,
                **(variables or {}),
                "OMP_NUM_THREADS": count,
                "MKL_NUM_THREADS": count,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions: dict[str, str] = self._read()["versions"]

    def step(self) -> dict[str, float]:
        """Have it do a step: `seconds`, `loss`, and `bytes` and `gradient_bytes` of the peak.

        Raises:
            RuntimeError: If the process is gone; it has said why on stderr.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self._process.args} ended with status {self._process.wait()} instead of "
                "training; see what it printed above"
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


Step = Callable[[Tensor], float]
Held = Callable[[], dict[str, int]]
Make = Callable[[dict[str, Any], Tensor], tuple[Step, Held]]


def serve(
    make: Make, packages: list[str], smallest: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """The answering side: build from the JSON argument, then a step per line of stdin.

    Args:
        make: From the arguments and the first batch, the step (batch -> loss) and a function that
            says how many bytes the weights and the optimizer, and the gradients, hold.
        packages: Whose versions to report.
        smallest: The arguments of a tiny contender of the same kind. One step of it brings in the
            libraries' code, so that memory counted from there is the contender's own.
    """
    answers = open_answers()
    arguments = json.loads(sys.argv[1])
    torch.manual_seed(0)
    batches = load_file(arguments["data"])["x"].clone()
    make(smallest(arguments), batches[0][:8])[0](batches[0][:8])
    before = _memory("VmRSS")
    step, held = make(arguments, batches[0])
    versions = {name: version(name) for name in ("torch", *packages)}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for turn, _ in enumerate(sys.stdin):
        x = batches[turn % len(batches)]
        _forget_peak()
        start = time.perf_counter()
        loss = step(x)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss, "above_start": _memory("VmHWM") - before}
        print(json.dumps({**answer, **held()}), file=answers, flush=True)


def open_answers() -> TextIO:
    """The pipe to the asking side; what libraries print from now on goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def bytes_held(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights and optimizer state (`held`), and of a gradient for every weight."""
    weights = sum(p.nbytes for p in module.parameters())
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return {"held": weights + state, "gradients": weights}


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux alone")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
