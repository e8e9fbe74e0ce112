"""The Pareto front, against its definition; and how it is shown."""

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.pages.figures import interactive
from orchestrator.pages.figures.parallel import FOLLOW, parallel
from orchestrator.pages.figures.pareto import pareto
from orchestrator.pages.summary_page import FRONT_ROWS, front_table
from orchestrator.sweeps.front import AIMS, front, fronts, to_json


def result(
    trial: str,
    costs: tuple[float | int, ...],
    group: int = 0,
    k: int = 8,
    stopped_at: int | None = None,
) -> dict[str, Any]:
    return {
        "trial": trial,
        "group": group,
        "encoder": "kron",
        "h": 4,
        "m": 2,
        "n": 2,
        "activation": "mand",
        "k": k,
        "selection": "topk",
        "d_sae": 16,
        "scaling": "layer_scale",
        "lr": 1e-3,
        "n_parameters": 9,
        "stopped_at": stopped_at,
        **dict(zip(AIMS, costs, strict=True)),
    }


def names(results: list[dict[str, Any]]) -> list[str]:
    return [r["trial"] for r in results]


@given(st.lists(st.tuples(*[st.integers(0, 3)] * len(AIMS)), max_size=30))
def test_the_front_is_what_no_other_beats(costs: list[tuple[int, ...]]):
    trials = [result(str(i), tuple(map(float, cost))) for i, cost in enumerate(costs)]

    def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
        no_worse = all(one[aim] <= other[aim] for aim in AIMS)
        return no_worse and any(one[aim] < other[aim] for aim in AIMS)

    expected = [t for t in trials if not any(beats(other, t) for other in trials)]
    assert front(trials) == expected


def test_twins_stand_on_the_front_both():
    twins = [result("a", (0.1, 8.0, 10, 20)), result("b", (0.1, 8.0, 10, 20))]
    assert names(list(front(twins))) == ["a", "b"]


TRIALS = [
    result("beaten", (0.2, 8.0, 10, 20)),
    result("good", (0.1, 8.0, 10, 20)),
    result("cheap", (0.3, 8.0, 10, 5)),
    result("early", (0.01, 1.0, 1, 1), stopped_at=5),
    result("elsewhere", (0.9, 9.0, 90, 90), group=1),
    result("never ended", (0.1, 1.0, 1, 1), group=2, stopped_at=5),
]


def test_every_group_has_a_front_of_its_own_without_trials_given_up():
    found = fronts(TRIALS)
    assert {group: names(points) for group, points in found.items()} == {
        0: ["good", "cheap"],
        1: ["elsewhere"],
        2: [],
    }
    data = json.loads(json.dumps(to_json(found)))
    assert data["minimised"] == ["fvu", "l0", "encoder_parameters", "encoder_flops_per_token"]
    assert [point["encoder_flops_per_token"] for point in data["groups"][0]["front"]] == [20, 5]


@pytest.mark.parametrize("width", [80, 140])
def test_a_long_front_is_cut_in_the_terminal_and_says_so(width: int):
    n_more = 3
    costs = [(1 / i, float(i), i, i) for i in range(1, FRONT_ROWS + n_more + 1)]
    trials = [result(str(i), cost) for i, cost in enumerate(costs)]
    console = Console(file=io.StringIO(), width=width)
    console.print(front_table(to_json(fronts(trials))))
    output = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert output.count("kron 4x2x2") == FRONT_ROWS
    assert f"and {n_more} more" in output
    assert max(map(len, output.splitlines())) <= width


def test_the_figure_shows_every_trial_once_and_fills_only_the_front():
    figure = pareto(TRIALS)
    filled, all_shown = set(), []
    for trace in figure.data:
        for point, details in enumerate(trace.customdata or ()):
            all_shown.append((details[0], details[3]))
            if "open" not in trace.marker.symbol[point]:
                filled.add((details[0], details[3]))
    assert sorted(all_shown) == sorted((t["group"], t["fvu"]) for t in TRIALS)
    assert filled == {
        (t["group"], t["fvu"]) for points in (TRIALS[1:3], TRIALS[4:5]) for t in points
    }


def test_a_button_moves_every_point_to_what_it_names():
    figure = pareto(TRIALS)
    for button, aim in zip(figure.layout.updatemenus[0].buttons, list(AIMS)[1:], strict=True):
        x = button.args[0]["x"]
        assert len(x) == len(figure.data)
        for values, trace in zip(x, figure.data, strict=True):
            of = [details[list(AIMS).index(aim) + 3] for details in trace.customdata or ()]
            assert list(values) == (of or [None] * len(trace.x))


def test_a_figure_needs_no_network_and_is_the_same_each_time():
    page = interactive.page(pareto(TRIALS), "pareto", "Fronts of <x>")
    assert page == interactive.page(pareto(TRIALS), "pareto", "Fronts of <x>")
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=", page)
    assert len(page) < 6e6
    part = interactive.part(parallel(TRIALS), "parallel", FOLLOW)
    assert part == interactive.part(parallel(TRIALS), "parallel", FOLLOW)
    assert len(part) < 1e5, "the script is not in it"


def test_parallel_coordinates_have_a_line_per_trial_and_only_fronts_are_bold():
    figure = parallel(TRIALS)
    lines, bold = [], set()
    for trace in figure.data[:-1]:
        width = trace.meta
        names = list(trace.text)[::width]
        assert len(trace.x) == len(trace.y) == width * len(names)
        for i, name in enumerate(names):
            y = trace.y[i * width : (i + 1) * width]
            assert y[-1] is None, "a gap ends each line"
            assert all(-0.05 <= value <= 1.05 for value in y[:-1])
            lines.append(name)
            if trace.line.width > 1:
                bold.add(name)
    assert sorted(lines) == sorted(t["trial"] for t in TRIALS)
    assert bold == {t["trial"] for t in (*TRIALS[1:3], TRIALS[4])}


def test_the_best_fvu_is_lowest_on_its_axis():
    figure = parallel(TRIALS)
    place = {}
    for trace in figure.data[:-1]:
        for i, name in enumerate(list(trace.text)[:: trace.meta]):
            place[name] = trace.y[(i + 1) * trace.meta - 2]
    by_fvu = sorted(TRIALS, key=lambda t: t["fvu"])
    assert place[by_fvu[0]["trial"]] == 0
    assert place[by_fvu[-1]["trial"]] == 1
    assert sorted(place, key=lambda name: place[name]) == [t["trial"] for t in by_fvu]
