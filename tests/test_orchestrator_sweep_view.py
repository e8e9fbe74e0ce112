"""The one view of all trials: it fits the terminal, and says of each trial where it stands."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from actors.trial import Trial
from orchestrator import progress
from orchestrator.progress import stage
from orchestrator.sweeps.sweep_view import SweepView
from sae.config import KronShape, SaeConfig
from sae.fit import FitConfig
from storage.hygiene import Hygiene, RowFilter

STATES = ["running", "paused", "done", "given up", "failed"]


def trials(n: int, name: str = "batch_topk") -> list[Trial]:
    shape = KronShape(h=4, m=2, n=2)
    return [
        Trial(
            id=f"g{number}-k4-kron-4x2x2-{name}{number if name != 'batch_topk' else ''}",
            group=number,
            layers=(0,),
            sae=SaeConfig(d_model=4, d_sae=16, k=4, encoder=shape, selection="batch_topk"),
            fit=FitConfig(),
            n_steps=586,
            seed=0,
            layer_scale={},
            window_chunks=1,
            checkpoint_seconds=1.0,
            train_store=Path("nowhere"),
            validation_store=Path("nowhere"),
            row_filter=RowFilter(Hygiene(), (), {}),
            folder=Path("nowhere"),
        )
        for number in range(n)
    ]


def drawn(view: SweepView, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    with console.capture() as capture:
        console.print(view, no_wrap=True, crop=False)
    return [_plain(line) for line in capture.get().splitlines()]


def _plain(line: str) -> str:
    """A line without its colours."""
    return Text.from_ansi(line).plain.rstrip()


def rows(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines if " kron " in line]


@settings(max_examples=30)
@given(
    states=st.lists(st.sampled_from(["waiting", *STATES]), max_size=60),
    height=st.integers(6, 50),
    name=st.sampled_from(["batch_topk", "batch_topk-lr0.00012345-auxk_coefficient0.03125-"]),
)
def test_it_never_exceeds_the_terminal_and_counts_what_it_leaves_out(
    states: list[Any], height: int, name: str
):
    of = trials(len(states), name)
    view = SweepView(of)
    for trial, state in zip(of, states, strict=True):
        view.update(trial, state)
    lines = drawn(view, width=80, height=height)
    assert len(lines) <= height - 2  # the bar, and the cursor
    assert max(map(len, lines)) <= 80
    rest = lines[-1].removeprefix("and ").split(", ") if lines[-1].startswith("and ") else []
    left_out = [int(part.split()[0]) for part in rest]
    assert len(rows(lines)) + sum(left_out) == len(states)


def test_running_trials_stand_first_then_those_that_changed_last():
    of = trials(6)
    view = SweepView(of)
    for number, state in ((4, "running"), (1, "done"), (3, "paused"), (2, "running"), (0, "done")):
        view.update(of[number], state)  # pyright: ignore[reportArgumentType]
    view.update(of[4], "running", step=30, fvu=0.25, tokens_per_second=31_234.5)
    order = [int(row[0]) for row in rows(drawn(view))]
    assert order == [2, 4, 0, 3, 1, 5]
    assert rows(drawn(view))[1] == [
        *("4", "kron", "4x2x2", "4", "30/586", "0.2500", "31,234", "running")
    ]
    assert rows(drawn(view, height=7)) == rows(drawn(view))[:3]
    assert drawn(view, height=7)[-1] == "and 1 paused, 1 done, 1 waiting"


def test_what_has_ended_stays_so_and_what_failed_may_be_tried_again():
    [done, failed] = trials(2)
    view = SweepView([done, failed])
    view.update(done, "given up", step=60, fvu=0.3)
    view.update(done, "running")
    view.update(failed, "failed")
    assert view.counts() == "1 given up, 1 failed"
    view.update(failed, "waiting")
    assert view.counts() == "1 given up, 1 waiting"


def test_settings_that_trials_differ_in_have_a_column_where_there_are_any():
    assert "differs in" not in drawn(SweepView(trials(2)))[0]
    lines = drawn(SweepView(trials(2, "batch_topk-lr0.0")), width=120)
    assert "differs in" in lines[0]
    assert "batch_topk-lr0.01" in lines[2]
    assert lines[1].endswith("waiting")


def test_in_a_terminal_the_view_stands_over_the_bar_and_goes_when_it_is_done():
    of = trials(2)
    view = SweepView(of)
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True)
    with stage(console, "sweep 2 trials", 2000, "tokens", view) as bar:
        assert bar.is_live
        view.update(of[0], "given up", step=60, fvu=0.125)
        bar.expect_less(900)
        bar.advance(550, "1 to go")
    frame = [_plain(line) for line in out.getvalue().split("\n")]
    [head] = [number for number, line in enumerate(frame) if "encoder" in line][-1:]
    assert "given up" in frame[head + 1]
    assert "waiting" in frame[head + 2]
    assert "50%" in frame[head + 3]
    assert "1 to go" in frame[head + 3]


def test_in_a_log_file_there_are_lines_and_few(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    console = Console(file=out, width=140)
    with stage(console, "sweep 2 trials", 2000, "tokens", SweepView(trials(2))) as bar:
        assert not bar.is_live
        for _ in range(10):
            bar.advance(10, "2 waiting")
        assert out.getvalue() == ""
        monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
        bar.advance(10, "1 running; g0 fvu 0.5")
    [line] = out.getvalue().splitlines()
    assert line.startswith("sweep 2 trials: 110 of 2,000 tokens, ")
    assert line.endswith("tokens/s, 1 running; g0 fvu 0.5")
