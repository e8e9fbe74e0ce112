"""What the machine does while a run works, under the names that MLflow's pages show as system metrics."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from orchestrator.run_directory import write_atomically
from orchestrator.tracking.journal import now_ms
from storage.files import read_json_lines

SAMPLE_SECONDS, SAMPLES_PER_ROW = 10.0, 3


class SystemMetrics:
    """Samples CPU, memory, disk, network and (with nvidia-ml-py) GPUs of the driver's machine.

    A sample is taken every 10 s, and three make a row of the file, a JSON object per line with `step`,
    `timestamp_ms` and the figures. MLflow's
    own thread for this would lose what it can't tell, and ask the server for the whole run at every
    sample; here only its gauges are used.
    """

    def __init__(self, file: Path, on_row: Callable[[], None]) -> None:
        """Begin to sample, after the rows that are there; `on_row` is called after each new one."""
        self._file, self._on_row = file, on_row
        self._rows = read_json_lines(file)
        self._gauges = _gauges()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write the last row; a second call does nothing."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        self._gauges[0].collect_metrics()  # the CPU's load is counted from here, thread by thread
        self._gauges[0].clear_metrics()
        n_samples, ended = 0, False
        while not ended:
            ended = self._stopped.wait(SAMPLE_SECONDS)
            for gauge in self._gauges:
                gauge.collect_metrics()
            n_samples += 1
            if ended or n_samples % SAMPLES_PER_ROW == 0:
                self._write()

    def _write(self) -> None:
        row: dict[str, Any] = {"step": len(self._rows), "timestamp_ms": now_ms()}
        for gauge in self._gauges:
            row |= {f"system/{name}": value for name, value in gauge.aggregate_metrics().items()}
            gauge.clear_metrics()
        self._rows.append(row)
        write_atomically(self._file, "".join(f"{json.dumps(row)}\n" for row in self._rows))
        self._on_row()


def _gauges() -> list[CPUMonitor | DiskMonitor | NetworkMonitor | GPUMonitor]:
    """Of the CPU first; of GPUs only where NVIDIA's library answers."""
    gauges = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):
        return [*gauges, GPUMonitor()]
    return gauges
