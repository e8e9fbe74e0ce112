"""What a person sees while a run works: a live bar per stage, or plain lines in a log file."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

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


@dataclass(kw_only=True)
class Figures:
    """What a stage knows of all its actors together, wherever in the cluster they are."""

    n_bytes: int = 0
    """Written to stores."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of the actors' time, by what it went into."""

    queues: dict[str, int] = field(default_factory=dict)
    """Jobs that are `in_hand` of an actor, and those `waiting` for one."""

    trials: dict[str, int] = field(default_factory=dict)
    """Trials by state."""

    @property
    def limit(self) -> str:
        """What takes most of the cluster's time, as `bottleneck` says it."""
        return bottleneck(self.seconds)


@runtime_checkable
class Watcher(Protocol):
    """Who is told how a stage goes on, beside the person at the terminal."""

    def moved(self, progress: "StageProgress") -> None:
        """The stage has begun, or come further."""

    def ended(self, progress: "StageProgress") -> None:
        """The stage is over, done or not."""


class StageProgress:
    """The progress of one stage, in its own unit."""

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        unit: str,
        live: Progress | None,
        watchers: Sequence[Watcher],
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note, self.figures = 0, "", Figures()
        self._console, self._live, self._watchers = console, live, watchers
        self._task = live.add_task(title, total=total, note="") if live else None
        self._start, self._logged = time.monotonic(), time.monotonic()
        self._tell()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move on by `amount`; `note` is the newest thing worth knowing."""
        self.done += amount
        self.note = note or self.note
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        text = f"{rate} {self.unit}/s, {self.note}"
        if self._live and self._task is not None:
            self._live.update(self._task, advance=amount, note=text)
        elif time.monotonic() - self._logged >= LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            self._console.print(
                f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {text}",
                highlight=False,
                soft_wrap=True,
            )
        self._tell()

    def expect_less(self, amount: int) -> None:
        """So much of the total will not be done."""
        self.total -= amount
        if self._live and self._task is not None:
            self._live.update(self._task, total=self.total)

    def end(self) -> None:
        """Tell the watchers that it is over."""
        for watcher in self._watchers:
            watcher.ended(self)

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher.moved(self)

    @property
    def is_live(self) -> bool:
        """Whether it is drawn over and over, in a terminal."""
        return self._live is not None

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(time.monotonic() - self._start, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Until the stage ends, at its rate so far; None while nothing is done."""
        return (self.total - self.done) / self.rate if self.done else None

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
    console: Console,
    title: str,
    total: int,
    unit: str,
    above: RenderableType | None = None,
    watchers: Sequence[Watcher] = (),
) -> Iterator[StageProgress]:
    """Show a stage of `total` units for the time inside; in a terminal, with `above` over its bar."""
    with _shown(console, title, total, unit, above, watchers) as progress:
        try:
            yield progress
        finally:
            progress.end()


@contextmanager
def _shown(
    console: Console,
    title: str,
    total: int,
    unit: str,
    above: RenderableType | None,
    watchers: Sequence[Watcher],
) -> Iterator[StageProgress]:
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with _Bar(*columns, above=above, console=console) as live:
            yield StageProgress(console, title, total, unit, live, watchers)
    else:
        yield StageProgress(console, title, total, unit, None, watchers)


def bottleneck(seconds: dict[str, float]) -> str:
    """The part that takes most of the actors' time, for instance `limited by the model (83 %)`."""
    total = sum(seconds.values())
    if not total:
        return ""
    part = max(seconds, key=lambda name: seconds[name])
    return f"limited by the {part} ({100 * seconds[part] / total:.0f} %)"
