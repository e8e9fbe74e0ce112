"""What every stage of a run is given."""

from dataclasses import dataclass

from rich.console import Console

from actors.language_model import ModelShape
from orchestrator.config import RunConfig
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

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return self.cfg.harvest.context or self.shape.context

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self.console.print(text, highlight=False, soft_wrap=True)
