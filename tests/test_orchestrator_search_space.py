"""The space of a sweep: what the door refuses, and which trials come of what it lets through."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import config_file
from orchestrator.config import RunConfig
from orchestrator.sweeps.axes import FloatRange, IntRange
from orchestrator.sweeps.candidates import Candidate, candidates, corners, n_candidates
from orchestrator.sweeps.sweep_config import VaryTraining
from sae.config import KronShape
from sae.fit import FitConfig
from tests.test_orchestrator_config_file import ROOT, changed, complaint, load

D_MODEL = 16
RANDOM = {"method": "random", "trials": 8}


def sweep(tmp_path: Path, **settings: object) -> RunConfig:
    return load(tmp_path, changed(sweep={"d_sae": 64, "k": [4], **settings}))


def of(cfg: RunConfig, group: int = 0) -> list[Candidate]:
    found = list(candidates(cfg, group, D_MODEL))
    assert len({candidate.id for candidate in found}) == len(found)
    return found


def ids(cfg: RunConfig, group: int = 0) -> list[str]:
    return [candidate.id for candidate in of(cfg, group)]


def test_the_example_of_the_docs_loads(tmp_path: Path):
    text = (ROOT / "docs" / "sweeps.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    without_sweep = changed().partition("sweep:")[0]
    cfg = load(tmp_path, f"{without_sweep}\n{example}")
    assert len(ids(cfg, 0)) == 8
    assert len(ids(cfg, 1)) == 16


def test_any_setting_of_training_can_vary_but_those_of_jumprelu():
    settings = [f.name for f in dataclasses.fields(FitConfig)]
    varied = [f.name for f in dataclasses.fields(VaryTraining)]
    assert varied == [name for name in settings if not name.startswith("sparsity")]


def test_the_grid_is_every_combination_and_names_tell_what_varies(tmp_path: Path):
    cfg = sweep(
        tmp_path,
        k=[4, 8],
        encoders=["dense", {"h": 8, "m": 2, "n": 4}],
        selection=["batch_topk"],
        vary={"train": {"lr": [1e-3, None]}, "prefixes": [[16, 64]]},
    )
    assert ids(cfg) == [
        f"g0-k{k}-{encoder}-batch_topk-lr{lr}"
        for k in (4, 8)
        for encoder in ("dense", "kron-8x2x4")
        for lr in ("0.001", "none")
    ]
    assert n_candidates(cfg, 0) == 8
    assert {found.sae.prefixes for found in of(cfg)} == {(16, 64)}
    assert {found.fit.lr for found in of(cfg)} == {1e-3, None}


def test_without_new_settings_trials_have_the_names_they_had(tmp_path: Path):
    cfg = sweep(
        tmp_path, encoders=["dense", {"h": 4, "m": 4, "n": 4, "activation": "relu_product"}]
    )
    assert ids(cfg) == ["g0-k4-dense-topk", "g0-k4-kron-4x4x4-relu_product-topk"]


def test_a_rule_gives_every_shape_at_every_width(tmp_path: Path):
    cfg = sweep(
        tmp_path,
        encoders=[{"kron": {"m": [2, 4], "n": [4]}}],
        vary={"d_sae": [64, 128]},
    )
    assert {found.sae.encoder for found in of(cfg)} == {
        *(KronShape(h=8, m=2, n=4), KronShape(h=4, m=4, n=4)),
        *(KronShape(h=16, m=2, n=4), KronShape(h=8, m=4, n=4)),
    }
    assert "g0-k4-kron-16x2x4-topk-d_sae128" in ids(cfg)


def test_a_group_has_its_own_lists_and_what_it_does_not_name_from_all(tmp_path: Path):
    cfg = sweep(
        tmp_path,
        vary={"train": {"lr": [1e-3, 1e-2], "auxk_coefficient": [0, 0.1]}},
        groups={1: {"k": [2, 3], "vary": {"train": {"lr": [5e-3]}}}},
    )
    assert len(ids(cfg, 0)) == 4
    assert ids(cfg, 1) == [
        f"g1-k{k}-dense-topk-auxk_coefficient{a}" for k in (2, 3) for a in ("0.0", "0.1")
    ]
    assert {found.fit.lr for found in of(cfg, 1)} == {5e-3}
    assert [name.replace("g0", "g2") for name in ids(cfg, 0)] == ids(cfg, 2)


def test_random_draws_are_of_the_seed_in_range_and_never_twice(tmp_path: Path):
    settings: Mapping[str, Any] = {
        "k": [4, 8],
        "search": RANDOM,
        "vary": {
            "d_sae": {"min": 16, "max": 256, "log": True},
            "train": {"lr": {"min": 1e-4, "max": 1e-2, "log": True}, "grad_clip": [0.5, 1.0]},
        },
    }
    cfg = sweep(tmp_path, **settings)
    assert ids(cfg) == ids(sweep(tmp_path, **settings))
    assert len(ids(cfg)) == n_candidates(cfg, 0) == 16
    assert ids(cfg) != ids(dataclasses.replace(cfg, seed=1))
    assert {name.split("-", 1)[1] for name in ids(cfg, 1)} != {
        name.split("-", 1)[1] for name in ids(cfg, 0)
    }
    for found in of(cfg):
        assert 16 <= found.sae.d_sae <= 256
        assert isinstance(found.sae.d_sae, int)
        assert found.fit.lr is not None
        assert 1e-4 <= found.fit.lr <= 1e-2
    assert {sae.d_sae for sae in corners(cfg, D_MODEL)} == {16, 256}


def test_random_can_take_a_whole_finite_space(tmp_path: Path):
    vary = {"d_sae": {"min": 61, "max": 64}, "train": {"grad_clip": [0.5, 1.0]}}
    assert len(ids(sweep(tmp_path, search=RANDOM, vary=vary))) == 8


@given(
    low=st.integers(1, 10**6), width=st.integers(1, 10**6), log=st.booleans(), seed=st.integers()
)
def test_ranges_of_whole_numbers_hold_all_they_draw(low: int, width: int, log: bool, seed: int):
    drawn = IntRange(min=low, max=low + width, log=log).draw(Random(seed))
    assert isinstance(drawn, int)
    assert low <= drawn <= low + width


@given(
    low=st.floats(1e-9, 1e6), factor=st.floats(1.001, 1e6), log=st.booleans(), seed=st.integers()
)
def test_ranges_of_numbers_hold_all_they_draw(low: float, factor: float, log: bool, seed: int):
    drawn = FloatRange(min=low, max=low * factor, log=log).draw(Random(seed))
    assert low <= drawn <= low * factor


def test_a_log_range_gives_every_decade_its_share_and_a_range_every_unit():
    rng, n = Random(0), 4000
    logs = [FloatRange(min=1e-4, max=1e-1, log=True).draw(rng) for _ in range(n)]
    for decade in (1e-4, 1e-3, 1e-2):
        share = sum(decade <= value < 10 * decade for value in logs) / n
        assert share == pytest.approx(1 / 3, abs=0.03)
    ints = [IntRange(min=1, max=8, log=True).draw(rng) for _ in range(n)]
    for value in (1, 2, 8):  # evenly in the logarithm of value - 1/2 to value + 1/2
        share = math.log((value + 0.5) / (value - 0.5)) / math.log(8.5 / 0.5)
        assert ints.count(value) / n == pytest.approx(share, abs=0.03)
    evens = [IntRange(min=1, max=4).draw(rng) for _ in range(n)]
    for value in (1, 2, 3, 4):
        assert evens.count(value) / n == pytest.approx(0.25, abs=0.03)


@given(
    d_sae=st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    k=st.lists(st.integers(1, 80), min_size=1, max_size=3, unique=True),
    m=st.integers(1, 4),
    n=st.integers(1, 4),
)
def test_what_the_door_lets_through_can_be_built(
    tmp_path_factory: pytest.TempPathFactory, d_sae: list[int], k: list[int], m: int, n: int
):
    settings = {"k": k, "vary": {"d_sae": d_sae}, "encoders": [{"kron": {"m": [m], "n": [n]}}]}
    possible = max(k) <= min(d_sae) and all(width % (m * n) == 0 for width in d_sae)
    folder = tmp_path_factory.mktemp("space")
    if possible:
        assert len(ids(sweep(folder, **settings))) == len(k) * len(d_sae)
    else:
        text = complaint(folder, changed(sweep={"d_sae": 64, **settings}))
        assert text.count("\n") == sum(number > min(d_sae) for number in k) + sum(
            width % (m * n) > 0 for width in d_sae
        )


@pytest.mark.parametrize(
    ("settings", "expected", "count"),
    [
        (
            {"k": []},
            "sweep.k: is an empty list, so there is nothing to train; list at least one",
            1,
        ),
        ({"vary": {"train": {"lr": []}}}, "sweep.vary.train.lr: is an empty list", 1),
        ({"encoders": []}, "sweep.encoders: is an empty list", 1),
        ({"encoders": [{"kron": {"m": [], "n": [4]}}]}, "sweep.encoders[0].kron.m: is an empty", 1),
        (
            {"k": [4, 40], "vary": {"d_sae": [64, 32]}},
            "sweep.k[1]: 40 exceeds d_sae = 32 (vary.d_sae[1]); lower k or widen the dictionary",
            1,
        ),
        (
            {"k": [40], "vary": {"d_sae": {"min": 32, "max": 64}}, "search": RANDOM},
            "sweep.k[0]: 40 exceeds d_sae = 32 (vary.d_sae)",
            1,
        ),
        (
            {"groups": {0: {"k": [4, 65]}}},
            "sweep.groups[0].k[1]: 65 exceeds d_sae = 64; lower k or widen the dictionary",
            1,
        ),
        (
            {"encoders": [{"kron": {"m": [2, 3], "n": [4, 48]}}]},
            "sweep.encoders[0].kron: m*n = 3*4 = 12 does not divide d_sae = 64, so no h fits; choose",
            3,
        ),
        (
            {"encoders": [{"h": 8, "m": 2, "n": 4}], "vary": {"d_sae": [64, 128]}},
            "sweep.encoders[0]: h*m*n = 8*2*4 = 64 is not d_sae = 128; with this m and n, h must be 16",
            1,
        ),
        (
            {"encoders": ["dense", {"h": 8, "m": 2, "n": 4}, {"kron": {"m": [2], "n": [4]}}]},
            "sweep.encoders[2].kron: 8x2x4 is listed twice; name each once",
            1,
        ),
        ({"k": [4, 8, 4]}, "sweep.k[2]: 4 is listed twice; name each once", 1),
        (
            {"encoders": [{"kron": {"m": [2], "n": [4]}}], "vary": {"d_sae": {"min": 8, "max": 64}}}
            | {"search": RANDOM},
            "sweep.encoders[0].kron: h*m*n = d_sae does not hold for every number of vary.d_sae; list",
            1,
        ),
        (
            {"vary": {"d_sae": [64, 128], "prefixes": [[], [16, 64]]}},
            "sweep.vary.prefixes[1]: prefixes=(16, 64) end at 64, but d_sae=128",
            1,
        ),
        (
            {"vary": {"prefixes": [16, 64]}},
            "sweep.vary.prefixes[0]: 16 is not a list, and each value here is one",
            2,
        ),
        ({"vary": {"k": [4]}}, "sweep.vary.k: has a list of its own; move it up, to sweep.k", 1),
        ({"vary": {"d_sea": [4]}}, "sweep.vary.d_sea: is not a setting; did you mean d_sae?", 1),
        (
            {"vary": {"train": {"lrr": [1]}}},
            "sweep.vary.train.lrr: is not a setting; did you mean lr",
            1,
        ),
        (
            {"vary": {"train": {"lr": 0.1}}},
            "sweep.vary.train.lr: 0.1 is not a list; write [0.1]",
            1,
        ),
        (
            {"vary": {"train": {"lr": [float("nan"), 1e-3], "batch_tokens": [256, 512]}}},
            "sweep.vary.train.lr[0]: nan can't be; it is positive",
            1,
        ),
        (
            {"vary": {"train": {"lr": [1e-3, -1]}}},
            "sweep.vary.train.lr[1]: -1.0 can't be; it is positive",
            1,
        ),
        (
            {"vary": {"train": {"warmup_fraction": [0.1, 0.6], "decay_fraction": [0.2, 0.5]}}},
            "sweep.vary.train.warmup_fraction[1]: 0.6 can't be; it and decay_fraction=0.5",
            1,
        ),
        (
            {"vary": {"train": {"lr": {"min": 1e-4, "max": 1e-2}}}},
            "sweep.vary.train.lr: a range has no grid; list its values, or choose some: sweep.search:",
            1,
        ),
        (
            {"vary": {"train": {"lr": {"min": 1e-2, "max": 1e-4, "log": True}}}, "search": RANDOM},
            "sweep.vary.train.lr.max: 0.0001 is not above min = 0.01",
            1,
        ),
        (
            {"vary": {"train": {"lr": {"min": 0, "max": 1, "log": True}}}, "search": RANDOM},
            "sweep.vary.train.lr.min: 0.0 has no logarithm",
            1,
        ),
        (
            {"vary": {"train": {"lr": {"from": 1, "max": 2}}}},
            "sweep.vary.train.lr.from: is not a setting; known here: log, max, min",
            2,
        ),
        (
            {"search": {"method": "random"}},
            "sweep.search.method: random needs a number of trials",
            1,
        ),
        (
            {"search": {"trials": 5}},
            "sweep.search.trials: 5, but a grid has as many as there are",
            1,
        ),
        (
            {"search": {"method": "optuna", "trials": 3}, "selection": ["topk", "batch_topk"]},
            "sweep.search.trials: 3 is more than the 2 combinations that there are; lower it, or",
            1,
        ),
        ({"search": {"method": "bayes"}}, "sweep.search.method: 'bayes'", 1),
        ({"stop": {"method": "asha", "grace": 1}}, "sweep.stop.grace: 1", 1),
        ({"stop": {"method": "asha", "grace": 1e-10}}, "sweep.stop.grace: 1e-10", 1),
        ({"stop": {"method": "asha", "reduction": 1}}, "sweep.stop.reduction: 1", 1),
        ({"groups": [{"k": [4]}]}, "sweep.groups: [{'k': [4]}] is no mapping of group numbers", 1),
        ({"groups": {0: {"kk": [4]}}}, "sweep.groups[0].kk: is not a setting; did you mean k?", 1),
        ({"groups": {"0": {"lr": 1}}}, "sweep.groups[0].lr: is not a setting; known here: enc", 1),
        ({"groups": {"0": {"k": ["4"]}}}, "sweep.groups[0].k[0]: '4' is not a number; write", 1),
        ({"groups": {"0": {"k": [65]}}}, "sweep.groups[0].k[0]: 65 exceeds d_sae = 64", 1),
        ({"groups": {True: {"k": [4]}}}, "sweep.groups[True]: True is no number of a group", 1),
        ({"groups": {-1: {"k": [4]}}}, "sweep.groups[-1]: there is no such group (from 0)", 1),
        (
            {"groups": {"0": {"k": [4]}, 0: {"k": [8]}}},
            "sweep.groups.0: '0' and 0 are the same number; keep one",
            1,
        ),
        ({"k": {"min": 4, "max": 8}}, "is a range or a section, and this takes a list; write", 1),
        ({"encoders": ["sparse"]}, "sweep.encoders[0]: 'sparse' is no encoder; give dense, {h", 1),
        (
            {"vary": {"train": {"sparsity_penalty": ["step", "tanh"]}}},
            "sweep.vary.train.sparsity_penalty: is not a setting",
            1,
        ),
        (
            {"vary": {"train": {"prefix_weights": ["equal", "size"]}}},
            "sweep.vary.train.prefix_weights: no trial of this sweep uses it; add vary.prefixes, or",
            1,
        ),
        (
            {"vary": {"train": {"threshold_momentum": {"min": 0.9, "max": 0.99}}}}
            | {"search": RANDOM},
            "sweep.vary.train.threshold_momentum: no trial of this sweep uses it; add batch_topk, or",
            1,
        ),
    ],
)
def test_a_fault_of_the_space_is_told_with_its_place_and_a_remedy(
    tmp_path: Path, settings: dict[str, Any], expected: str, count: int
):
    text = complaint(tmp_path, changed(sweep={"d_sae": 64, "k": [4], **settings}))
    assert expected in text, text
    assert text.count("\n") == count, text


def test_settings_that_some_trial_uses_may_vary(tmp_path: Path):
    train = {"prefix_weights": ["equal", "size"], "threshold_momentum": [0.9, 0.99]}
    settings = {"prefixes": [[], [16, 64]], "train": train}
    sweep(tmp_path, selection=["topk", "batch_topk"], vary=settings)


def test_a_name_that_no_file_could_have_is_cut_and_still_the_trials_own(tmp_path: Path):
    names = ("lr", "weight_decay", "warmup_fraction", "decay_fraction", "auxk_coefficient")
    names = (*names, "grad_clip", "dead_after_tokens", "batch_tokens")
    values = {name: [1, 2] if "tokens" in name else [0.123456789, 0.123456788] for name in names}
    cfg = sweep(tmp_path, vary={"d_sae": [64, 128], "train": values})
    ids = [candidate.id for candidate in candidates(cfg, 0, d_model=8)]
    assert len(set(ids)) == len(ids) == 2 ** (len(names) + 1)
    assert max(map(len, ids)) <= 200


def test_a_group_that_cannot_be_is_refused_where_their_number_is_known(tmp_path: Path):
    settings = {"d_sae": 64, "k": [4], "groups": {2: {"k": [8]}}}
    text = complaint(tmp_path, changed(sweep=settings, group={"n_groups": 2}))
    assert "sweep.groups[2]: there is no such group (group.n_groups = 2); correct" in text
    load(tmp_path, changed(sweep=settings, group={"n_groups": 3}))


def test_faults_of_space_and_training_are_told_at_once(tmp_path: Path):
    settings = {"k": [4, 65], "vary": {"train": {"lr": [-1], "grad_clip": ["tight"]}}}
    text = complaint(tmp_path, changed(sweep={"d_sae": 64, **settings}, harvest={"tokens": "x"}))
    for expected in ("sweep.k[1]: 65", "sweep.vary.train.grad_clip[0]: 'tight'", "harvest.tokens"):
        assert expected in text, text


def test_a_space_can_be_dumped_loaded_and_overridden(tmp_path: Path):
    cfg = sweep(
        tmp_path,
        encoders=["dense", {"kron": {"m": [2], "n": [4]}}],
        vary={"d_sae": [64, 128], "prefixes": [[]], "train": {"lr": [None, 1e-3]}},
        groups={1: {"k": [2], "vary": {"scaling": ["token_standardize"]}}},
        stop={"method": "median"},
    )
    text = config_file.dump(cfg)
    assert load(tmp_path, text) == cfg
    assert "weight_decay: null" not in text
    more = load(tmp_path, text, "sweep.vary.train.lr=[1e-2]", "sweep.stop.method=asha")
    assert more.sweep.vary.train.lr == (1e-2,)
    assert more.sweep.stop.method == "asha"
