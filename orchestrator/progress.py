"""What a person sees while a run works: a live bar per stage, or plain lines in a log file."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LOG_EVERY_SECONDS = 10.0

WAIT_LIMIT = 0.03
"""Of a trial's time that it waits for data; less is not worth a change."""


class StageProgress:
    """The progress of one stage, in its own unit."""

    def __init__(
        self, console: Console, title: str, total: int, unit: str, live: Progress | None
    ) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._live = live
        self._task = live.add_task(title, total=total, note="") if live else None
        self._done, self._start, self._logged = 0, time.monotonic(), time.monotonic()
        self._note = ""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move on by `amount`; `note` is the newest thing worth knowing."""
        self._done += amount
        self._note = note or self._note
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        text = f"{rate} {self._unit}/s, {self._note}"
        if self._live and self._task is not None:
            self._live.update(self._task, advance=amount, note=text)
        elif time.monotonic() - self._logged >= LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            self._console.print(
                f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, {text}",
                highlight=False,
            )

    def expect_less(self, amount: int) -> None:
        """So much of the total will not be done."""
        self._total -= amount
        if self._live and self._task is not None:
            self._live.update(self._task, total=self._total)

    @property
    def is_live(self) -> bool:
        """Whether it is drawn over and over, in a terminal."""
        return self._live is not None

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self._done / max(time.monotonic() - self._start, 1e-3)

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._start


class _Bar(Progress):
    """A progress bar, maybe with something above it."""

    def __init__(
        self, *columns: ProgressColumn, above: RenderableType | None, console: Console
    ) -> None:
        self._above = above
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn, from top to bottom."""
        if self._above is not None:
            yield self._above
        yield from super().get_renderables()


@contextmanager
def stage(
    console: Console, title: str, total: int, unit: str, above: RenderableType | None = None
) -> Iterator[StageProgress]:
    """Show a stage of `total` units for the time inside; in a terminal, with `above` over its bar."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with _Bar(*columns, above=above, console=console) as live:
            progress = StageProgress(console, title, total, unit, live)
            yield progress
    else:
        progress = StageProgress(console, title, total, unit, None)
        yield progress


def bottleneck(seconds: dict[str, float]) -> str:
    """The part that takes most of the actors' time, for instance `limited by the model (83 %)`."""
    total = sum(seconds.values())
    if not total:
        return ""
    part = max(seconds, key=lambda name: seconds[name])
    return f"limited by the {part} ({100 * seconds[part] / total:.0f} %)"
