"""All trials of a sweep at a glance: a table that fits the terminal, or one line for a log file."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from actors.trial import Trial, encoder_settings
from orchestrator.labels import encoder_label

State = Literal["running", "waiting", "paused", "done", "given up", "failed"]
"""`waiting`: not begun, or to be tried again; `paused`: at a rung, for others of its kind."""

_ORDER: tuple[State, ...] = ("running", "paused", "done", "given up", "failed", "waiting")
_STYLES = {"running": "bold", "given up": "dim", "waiting": "dim", "failed": "bold red"}
_LINES_BESIDE = 4
"""Of the terminal's height: the table's head, the line of the rest, the bar, and the cursor's own."""


@dataclass(frozen=True, kw_only=True)
class TrialLine:
    """What is known of one trial."""

    trial: Trial
    state: State = "waiting"
    step: int = 0

    fvu: float | None = None
    """Of its newest report; of a trial that has ended, on the validation store. Lower is better."""

    tokens_per_second: float | None = None
    """Of its newest report."""

    changed: int = 0
    """Counts the changes of all lines: the newest has the most."""


class SweepView:
    """The trials of a sweep, in one table."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        """All of these are waiting; others may come."""
        self._clock = count(1)
        self._lines = {trial.id: TrialLine(trial=trial) for trial in trials}

    def update(self, trial: Trial, state: State, **known: Any) -> None:
        """Note a trial's state, and what else is known: `step`, `fvu`, `tokens_per_second`.

        Done and given up are final.
        """
        before = self._lines.get(trial.id, TrialLine(trial=trial))
        if before.state in ("done", "given up") or (state == before.state and not known):
            return
        self._lines[trial.id] = replace(before, state=state, changed=next(self._clock), **known)

    @property
    def running(self) -> list[Trial]:
        """Those that are trained now."""
        return [line.trial for line in self._lines.values() if line.state == "running"]

    def states(self) -> dict[str, int]:
        """How many are in each state, for all the states there are."""
        found = Counter(line.state for line in self._lines.values())
        return {state: found[state] for state in _ORDER}

    def counts(self) -> str:
        """How many are in each state, for instance `2 running, 34 waiting`."""
        return _counts(self._lines.values())

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The running trials, then those that changed last, as many as the height allows."""
        lines = sorted(self._lines.values(), key=_place)
        room = max(1, console.size.height - _LINES_BESIDE)
        if len(lines) == room + 1:
            room += 1  # the line of the rest would take as much
        shown, rest = lines[:room], lines[room:]
        yield _table(shown, names=_names(lines))
        if rest:
            yield Text(f"and {_counts(rest)}", style="dim", no_wrap=True, overflow="ellipsis")


def _place(line: TrialLine) -> tuple[int, int]:
    """Running ones keep their order, others have the newest first; waiting ones come last."""
    rank = {"running": 0, "waiting": 2}.get(line.state, 1)
    return rank, -line.changed if rank == 1 else 0


def _counts(lines: Iterable[TrialLine]) -> str:
    found = Counter(line.state for line in lines)
    order = sorted(found, key=_ORDER.index)
    return ", ".join(f"{found[state]} {state}" for state in order)


def _names(lines: Iterable[TrialLine]) -> Mapping[str, str]:
    """What tells trials apart beside group, k and encoder; empty where nothing does."""
    names = {}
    for line in lines:
        sae, settings = line.trial.sae, encoder_settings(line.trial.sae.encoder)
        encoder = encoder_label(settings).replace(" ", "-")
        names[line.trial.id] = line.trial.id.removeprefix(
            f"g{line.trial.group}-k{sae.k}-{encoder}-"
        )
    return names if len(set(names.values())) > 1 else {}


def _table(lines: Iterable[TrialLine], names: Mapping[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = ("group", "encoder", "k", *(["differs in"] if names else []))
    for column in (*columns, "step", "FVU", "tokens/s", "state"):
        is_text = column in ("encoder", "differs in", "state")
        # The one that may be long is the one that a narrow terminal cuts.
        table.add_column(
            column, justify="left" if is_text else "right", no_wrap=column != "differs in"
        )
    for line in lines:
        trial, rate = line.trial, line.tokens_per_second
        table.add_row(
            str(trial.group),
            encoder_label(encoder_settings(trial.sae.encoder)),
            str(trial.sae.k),
            *([Text(names[trial.id], no_wrap=True, overflow="ellipsis")] if names else []),
            f"{line.step:,}/{trial.n_steps:,}",
            "-" if line.fvu is None else f"{line.fvu:.4f}",
            "-" if rate is None or line.state != "running" else f"{rate:,.0f}",
            line.state,
            style=_STYLES.get(line.state, ""),
        )
    return table
