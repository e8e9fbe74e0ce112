"""A trial as Ray Tune runs it."""

import math
from typing import Any

from ray import tune

from actors.trainer import Trainer, Trial

REPORTS_PER_TRIAL = 20


class TuneTrial(tune.Trainable):
    """A `Trainer` as Ray Tune wants it; the process is kept from one trial to the next."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride] (tune.with_parameters)
        self, config: dict[str, Any], device: str, n_threads: int
    ) -> None:
        """Begin or continue the trial that the configuration holds."""
        trial: Trial = config["trial"]
        self._stride = math.ceil(trial.n_steps / REPORTS_PER_TRIAL)
        self._trainer = Trainer(trial, device, n_threads)
        self._continues = self._trainer.step > 0

    def step(self) -> dict[str, Any]:
        """Train up to the next report; after the last one the result is there.

        A trial that is continued first says where it stands: it may have to wait there, or end.
        """
        left = self._stride - self._trainer.step % self._stride
        metrics: dict[str, Any] = self._trainer.advance(0 if self._continues else left)
        self._continues = False
        if self._trainer.finished:
            metrics = {**metrics, "result": self._trainer.finish(), "done": True}
        return metrics

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the trial's own checkpoint; Tune's, which it asks for before a pause, is empty."""
        self._trainer.pause()

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trainer began where its own checkpoint was."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another trial in the same process."""
        self.setup(new_config)  # pyright: ignore[reportCallIssue] (tune.with_parameters)
        return True
