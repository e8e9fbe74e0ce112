"""What every stage of a run is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType

from actors.language_model import ModelShape
from orchestrator import progress
from orchestrator.config import RunConfig
from orchestrator.progress import StageProgress, Watcher
from orchestrator.run_directory import RunDirectory
from orchestrator.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of `strata run`: the configuration, where its files lie, and who is told."""

    cfg: RunConfig
    run: RunDirectory
    shape: ModelShape
    tracker: Tracker
    console: Console

    watchers: tuple[Watcher, ...]
    """Told how stages go on."""

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return self.cfg.harvest.context or self.shape.context

    @contextmanager
    def stage(
        self, name: str, total: int, unit: str, above: RenderableType | None = None
    ) -> Iterator[StageProgress]:
        """Time a stage of `total` units, show it, and tell the watchers, for the time inside.

        Args:
            name: Of the stage, such as `harvest_train`.
            total: Units to do.
            unit: Of what there is to do, such as `tokens`.
            above: What stands over its bar in a terminal.
        """
        title = name.replace("_", " ")
        with (
            self.run.timed(name),
            progress.stage(self.console, title, total, unit, above, self.watchers) as bar,
        ):
            yield bar

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, highlight=False, soft_wrap=True)
