"""What the machine does while a run works, under the names that MLflow's pages show as system metrics."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from orchestrator.journal import now_ms
from orchestrator.run_directory import write_atomically

SAMPLES_PER_ROW = 3


class SystemMetrics:
    """Samples CPU, memory, disk, network and (with nvidia-ml-py) GPUs of the driver's machine.

    A sample is taken every 10 s (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL), and three make a row of the
    file, a JSON object per line. MLflow's own monitor would lose what it can't tell, and ask the
    server for the whole run at every sample; here only its gauges are used.
    """

    def __init__(self, file: Path, on_row: Callable[[], None]) -> None:
        """Begin to sample, after the rows that are there; `on_row` is called after each new one."""
        self._file, self._on_row = file, on_row
        self._rows = system_rows(file)
        self._gauges = SystemMetricsMonitor(run_id="")
        self._gauges.collect_metrics()  # the load of the CPU is counted from here
        self._clear()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write the last row; a second call does nothing."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        n_samples, ended = 0, False
        while not ended:
            ended = self._stopped.wait(self._gauges.sampling_interval)
            self._gauges.collect_metrics()
            n_samples += 1
            if ended or n_samples % SAMPLES_PER_ROW == 0:
                self._write()

    def _write(self) -> None:
        figures = {f"system/{name}": v for name, v in self._gauges.aggregate_metrics().items()}
        self._clear()
        self._rows.append({"step": len(self._rows), "timestamp_ms": now_ms(), **figures})
        write_atomically(self._file, "".join(f"{json.dumps(row)}\n" for row in self._rows))
        self._on_row()

    def _clear(self) -> None:
        for gauge in self._gauges.monitors:
            gauge.clear_metrics()


def system_rows(file: Path) -> list[dict[str, Any]]:
    """What the file holds: `step`, `timestamp_ms` and the figures of each row."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]
