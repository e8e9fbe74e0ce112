"""One autoencoder over two and four real processes, against the same mathematics in one."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae import FitConfig, KronShape, SaeConfig, load
from sae.drawing import unit_rows
from sae.parallel import ParallelRanks
from sae.parallel.payload import step_payload
from tests.rank_jobs import (
    absent,
    bytes_held,
    kept_of_tied,
    message_of,
    overflowed,
    reconstructed,
    refusal,
    saved_again,
    thresholds_set,
    trained,
)
from tests.rank_processes import RankProcesses
from tests.test_sae_fit import batches

KRON = KronShape(h=8, m=2, n=4)
CONFIGS = {
    "dense topk": {},
    "dense batch": {"selection": "batch_topk", "scaling": "token_standardize"},
    "dense jumprelu": {"selection": "jumprelu"},
    "kron topk": {"encoder": KRON},
    "kron nested batch": {
        "encoder": KRON,
        "selection": "batch_topk",
        # The first ends within the first rank's heads, the second on a border of four ranks.
        "prefixes": (8, 32, 64),
    },
    "dense nested, uneven": {"d_sae": 61, "prefixes": (5, 33, 61)},
    "more k than a rank has latents": {"k": 24, "d_sae": 66},
}
FIT = FitConfig(lr=3e-3, dead_after_tokens=300)


def shape(name="dense topk", **sizes):
    return SaeConfig(**{"d_model": 12, "d_sae": 64, "k": 4, **CONFIGS[name], **sizes})


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Iterator[dict[int, RankProcesses]]:
    folder = tmp_path_factory.mktemp("meeting")
    groups = {n: RankProcesses(n, folder) for n in (2, 4)}
    yield groups
    for group in groups.values():
        group.close()


GRIDS = [(2, 2), (4, 4), (4, 2), (2, 1)]
"""Processes, and how many of them share the latents; the rest share the batch."""


def assert_same_training(ours: list, theirs: tuple, rel: float) -> None:
    """Reports, which are in float32, are near, and the same on all ranks; selections are equal.

    What each rank selects of its own latents makes up what one process does, with nothing twice.
    """
    reports, selections, _ = theirs
    for mine, _, _ in ours[1:]:
        assert mine == ours[0][0]
    for step, expected in enumerate(reports):
        for key, value in expected.items():
            assert ours[0][0][step][key] == pytest.approx(value, rel=rel, abs=rel), (step, key)
        parts = [picked[step] for _, picked, _ in ours]
        assert sum(map(len, parts)) == len(set().union(*parts))
        assert set().union(*parts) == selections[step], step


def assert_same_files(ours: Path, theirs: Path, rel: float) -> None:
    for file in ("sae.safetensors", "fit.safetensors"):
        expected, found = load_file(theirs / file), load_file(ours / file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=rel, atol=rel, msg=key)


@pytest.mark.parametrize(("n", "n_dictionary"), GRIDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_training_by_ranks_equals_training_by_one_process(groups, tmp_path, name, n, n_dictionary):
    data = list(batches(7))
    # These fire no more, so AuxK has work from the third step on.
    silent = range(12) if "dense" in name else range(0)
    jobs = (shape(name), FIT, data)
    one = trained(*jobs, tmp_path / "one", silent=silent)
    ours = groups[n](trained, *jobs, tmp_path / "many", n_dictionary, torch.float64, silent)
    assert_same_training(ours, one, rel=1e-6)
    assert_same_files(tmp_path / "many", tmp_path / "one", rel=1e-7)
    assert one[0][-1]["grad_norm"] > 0
    if "dense" in name and "jumprelu" not in name:
        assert one[0][-1]["auxk_loss"] > 0


def test_gradients_of_a_step_equal_those_of_one_process(groups, tmp_path):
    """Adam's first mean is a tenth of the gradient it was given."""
    fit = FitConfig(grad_clip=float("inf"))
    for name in CONFIGS:
        jobs = (shape(name), fit, list(batches(1)))
        trained(*jobs, tmp_path / "one")
        groups[4](trained, *jobs, tmp_path / "many", 4)
        one, many = (load_file(tmp_path / who / "fit.safetensors") for who in ("one", "many"))
        means = [key for key in one if key.endswith("exp_avg")]
        assert len(means) >= 4
        for key in means:
            assert one[key].abs().max() > 0, (name, key)
            torch.testing.assert_close(many[key], one[key], rtol=1e-9, atol=1e-12, msg=key)


def test_float32_selects_the_same_and_loses_the_same(groups, tmp_path):
    for name in ("dense topk", "kron nested batch"):
        jobs = (shape(name), FIT, list(batches(3)))
        one = trained(*jobs, tmp_path / "one", dtype=torch.float32)
        ours = groups[4](trained, *jobs, tmp_path / "many", 4, torch.float32)
        assert_same_training(ours, one, rel=2e-5)


@pytest.mark.parametrize("name", ["dense topk", "kron nested batch", "dense jumprelu"])
def test_a_batch_that_cannot_be_divided_is_the_same_step(groups, tmp_path, name):
    (x, layer), *rest = batches(4)
    jobs = (shape(name), FitConfig(lr=3e-3), [(x, layer), (x[:37], layer[:37]), *rest])
    one = trained(*jobs, tmp_path / "one")
    ours = groups[4](trained, *jobs, tmp_path / "many", 2)
    for step, expected in enumerate(one[0]):
        for key, value in expected.items():
            assert ours[0][0][step][key] == pytest.approx(value, rel=1e-6, abs=1e-6), (step, key)
    expected, found = (load_file(tmp_path / who / "fit.safetensors") for who in ("one", "many"))
    # All but how long a latent was not in use, which counts such a batch as often as it was given.
    for key in expected.keys() - {"firing.tokens_since"}:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize("silent", [range(16), range(48, 64)])
def test_auxk_trains_dead_latents_that_only_one_rank_holds(groups, tmp_path, silent):
    jobs = (shape(k=12), FIT, list(batches(5)))
    one = trained(*jobs, tmp_path / "one", silent=silent)
    ours = groups[4](trained, *jobs, tmp_path / "many", 4, torch.float64, silent)
    assert one[0][-1]["dead_fraction"] == 16 / 64
    assert one[0][-1]["auxk_loss"] > 0
    assert_same_training(ours, one, rel=1e-6)
    assert_same_files(tmp_path / "many", tmp_path / "one", rel=1e-7)


@pytest.mark.parametrize("name", ["dense topk", "kron nested batch", "dense jumprelu"])
def test_a_training_goes_on_with_another_number_of_ranks(groups, tmp_path, name):
    data, cfg = list(batches(6)), shape(name)
    one = trained(cfg, FIT, data, tmp_path / "one")
    trained(cfg, FIT, data[:2], tmp_path / "first")
    groups[4](
        trained, cfg, FIT, data[2:4], tmp_path / "then", 4, torch.float64, (), tmp_path / "first"
    )
    last = groups[2](
        trained, cfg, FIT, data[4:], tmp_path / "last", 2, torch.float64, (), tmp_path / "then"
    )
    assert_same_training(last, (one[0][4:], one[1][4:], []), rel=1e-6)
    assert_same_files(tmp_path / "last", tmp_path / "one", rel=1e-7)


def test_ranks_write_the_very_file_that_one_process_writes(groups, tmp_path):
    for name in CONFIGS:
        cfg = shape(name)
        trained(cfg, FIT, list(batches(2)), tmp_path / "one")
        groups[4](saved_again, cfg, FIT, tmp_path / "one", tmp_path / "again")
        for file in ("sae.safetensors", "fit.safetensors", "sae.json"):
            ours, theirs = ((tmp_path / who / file).read_bytes() for who in ("again", "one"))
            assert ours == theirs, (name, file)
        assert not list((tmp_path / "again").glob("*.partial"))


@pytest.mark.parametrize("name", CONFIGS)
def test_reconstructions_at_inference_are_those_of_one_process(groups, tmp_path, name):
    x, layer = next(batches(1))
    trained(shape(name), FIT, list(batches(3)), tmp_path)
    expected = reconstructed(tmp_path, x, layer, None)
    for part in groups[4](reconstructed, tmp_path, x, layer, 4):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)
    parts = groups[4](reconstructed, tmp_path, x, layer, 2)
    torch.testing.assert_close(torch.cat([parts[0], parts[2]]), expected, rtol=1e-6, atol=1e-6)


def test_a_threshold_for_each_latent_is_shared_too(groups, tmp_path):
    x, layer = next(batches(1))
    trained(shape("kron topk"), FIT, list(batches(2)), tmp_path / "one")
    thresholds = torch.linspace(0.1, 2.0, 64, dtype=torch.float64)
    groups[4](thresholds_set, tmp_path / "one", tmp_path / "many", thresholds)
    whole, _ = load(tmp_path / "one")
    whole.set_threshold(thresholds)
    expected = whole.reconstruct(x, layer).x_hat
    assert torch.equal(load(tmp_path / "many")[0].reconstruct(x, layer).x_hat, expected)
    for part in groups[4](reconstructed, tmp_path / "many", x, layer, 4):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


def test_a_file_that_one_rank_does_not_find_is_missed_by_all(groups, tmp_path):
    trained(shape(), FIT, list(batches(1)), tmp_path)
    first, *others = groups[4](absent, tmp_path)
    assert "nothing/sae.safetensors does not exist" in first
    assert all("another rank has refused this" in said for said in others)


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
@pytest.mark.parametrize("n", [2, 4])
def test_among_equal_scores_exactly_k_stay_and_the_lower_rank_goes_first(groups, kind, n):
    generator = torch.Generator().manual_seed(n)
    for k in (1, 3, 7):
        # Three tokens for four ranks: one has none to judge. Three values, so nearly all are tied.
        scores = torch.randint(1, 4, (3, 17), generator=generator).float()
        counts = torch.stack(
            [(kept > 0).sum(1) for kept in groups[n](kept_of_tied, kind, scores, k)]
        )
        pieces = [scores[:, 17 * r // n : 17 * (r + 1) // n] for r in range(n)]
        owners = torch.cat([torch.full_like(piece, r) for r, piece in enumerate(pieces)], 1)
        if kind == "topk":
            first = owners.gather(
                1, scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            )
            expected = torch.stack([(first == r).sum(1) for r in range(n)])
            assert torch.equal(counts, expected)
        else:
            by_rank = torch.cat([piece.flatten() for piece in pieces])
            owners = torch.cat(
                [torch.full_like(piece, r).flatten() for r, piece in enumerate(pieces)]
            )
            first = owners[by_rank.sort(descending=True, stable=True).indices[: 3 * k]]
            assert counts.sum(1).tolist() == first.long().bincount(minlength=n).tolist()


def test_a_budget_larger_than_what_is_on_keeps_all(groups):
    scores = torch.zeros(5, 8)
    scores[2, 6], scores[0, 1] = 2.0, 1e-30
    kept = torch.cat(groups[4](kept_of_tied, "batch_topk", scores, 3), 1)
    assert torch.equal(kept, scores)
    assert not torch.cat(groups[4](kept_of_tied, "batch_topk", torch.zeros(5, 8), 3), 1).any()


def test_bytes_handed_over_are_those_of_the_formula(groups, tmp_path):
    """All but a dozen of single numbers, the same whatever the sizes are."""
    rest = set()
    for name, n, n_dictionary, sizes in [
        ("dense topk", 2, 2, {}),
        ("dense topk", 4, 4, {"k": 9, "d_model": 20}),
        ("dense batch", 4, 4, {}),
        ("kron nested batch", 4, 2, {}),
        ("dense jumprelu", 2, 1, {}),
    ]:
        cfg, n_batch = shape(name, **sizes), n // n_dictionary
        fit = FitConfig(dead_after_tokens=300)
        data = list(batches(5, d_model=cfg.d_model))
        jobs = (cfg, fit, data, tmp_path, n_dictionary, torch.float32, range(12))
        for reports, _, payloads in groups[n](trained, *jobs):
            for report, found in zip(reports, payloads, strict=True):
                n_dead = round(report["dead_fraction"] * cfg.d_sae)
                expected = step_payload(
                    cfg, 100 // n_batch, n_dictionary=n_dictionary, n_batch=n_batch, n_dead=n_dead
                )
                assert found["all_to_all"] == expected["all_to_all"]
                rest.add(found["all_reduce"] - expected["all_reduce"])
    assert max(rest) <= 200
    assert min(rest) >= 0


@pytest.mark.parametrize("name", ["dense topk", "kron topk", "dense jumprelu"])
def test_weights_and_moments_of_a_rank_are_its_share_to_the_byte(groups, name):
    cfg, (x, layer) = shape(name), next(batches(1))
    whole = bytes_held(cfg, None, x, layer)
    shared = 4 * cfg.d_model
    assert whole == {"weights": 4 * cfg.n_parameters, "moments": 8 * cfg.n_parameters}
    for n in (2, 4):
        for held in groups[n](bytes_held, cfg, n, x, layer):
            assert held["weights"] == (whole["weights"] - shared) // n + shared
            assert held["moments"] == 2 * held["weights"]


def test_weights_are_drawn_alike_whoever_holds_them():
    for n_rows, d_model in ((5, 3), (100, 7), (4097, 3), (9000, 5), (4096 * 2 + 15, 3)):
        drawn = torch.randn(n_rows, d_model, generator=torch.Generator().manual_seed(0))
        whole = torch.nn.functional.normalize(drawn, dim=1)
        for held in ([range(n_rows)], [range(1, n_rows // 2), range(n_rows // 2 + 1, n_rows)]):
            part = unit_rows(torch.Generator().manual_seed(0), n_rows, d_model, held)
            assert torch.equal(part, torch.cat([whole[r.start : r.stop] for r in held]))


def test_a_batch_that_one_rank_refuses_is_refused_by_all(groups):
    cfg, (x, layer) = shape("dense batch"), next(batches(1))
    bad = x[50:].clone()
    bad[3, 2] = float("nan")
    answers = groups[4](message_of, cfg, x, layer, {2: (bad, layer[50:]), 3: (bad, layer[50:])})
    assert all(unchanged for _, unchanged in answers)
    assert all("1 of 50 rows of x hold NaN" in said for said, _ in answers[2:])
    assert all("another rank has refused this" in said for said, _ in answers[:2])


def test_ranks_that_see_other_tokens_or_fewer_are_told(groups):
    cfg, (x, layer) = shape(), next(batches(1))
    answers = groups[4](message_of, cfg, x, layer, {1: (x[50:], layer[50:])})
    assert all("were given different tokens" in said for said, _ in answers)
    answers = groups[4](message_of, cfg, x, layer, dict.fromkeys((0, 1), (x[:30], layer[:30])))
    assert all("were given 30 to 50 tokens" in said and same for said, same in answers)


def test_an_overflowing_loss_is_refused_by_all_ranks(groups):
    assert groups[4](overflowed, shape(), *next(batches(1))) == [True] * 4


def test_what_cannot_be_shared_is_refused_in_words(groups, tmp_path):
    few = shape("kron topk", d_sae=24, encoder=KronShape(h=3, m=2, n=4))
    assert all("3 heads, or latents" in said for said in groups[4](refusal, few, 4))
    assert all("4 ranks can't be divided" in said for said in groups[4](refusal, few, 3))
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group first"):
        ParallelRanks()
    trained(shape(), FIT, list(batches(1)), tmp_path)
    assert load(tmp_path)[0].held == range(64)


def test_the_example_runs_as_it_says(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "examples.parallel", tmp_path / "out"),
        ],
        check=False,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"rank 0 holds latents 0 to 255 of 512; fvu (0\.\d+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 0.5
    sae, _ = load(tmp_path / "out")
    assert sae.w_dec.shape == (512, 64)
    torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(512))
