"""Our measures against SAELens's `run_evals`, sparsify's FVU and dictionary_learning's `evaluate`.

One autoencoder, one model, the same tokens. Where a definition is ours, both agree to 1e-4; where it
isn't, the test shows by its own formula what theirs is (the table of docs/evaluation.md).
"""

import argparse
import inspect
import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from actors.evaluator import Evaluator
from actors.fidelity import reconstruction_quality
from actors.harvester import Harvester
from actors.language_model import LanguageModel
from actors.model_source import ModelSource
from benchmarks import peers
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig
from sae.fit import Fit, FitConfig
from sae.metrics import ReconstructionMetrics
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.tokens import TokenSpec, TokenStore, TokenWriter
from tests.runs import ROOT

MODEL = ModelSource(name=str(ROOT / "examples" / "tiny_lm" / "model"))
N_SEQUENCES, CONTEXT, LAYER, SPECIAL = 16, 96, 4, 0
D_MODEL, D_SAE, K, N_STEPS, BATCH = 128, 512, 16, 60, 512
CLOSE = 1e-4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not peers.ready(), reason="needs the peers' environment: python -m benchmarks.peers"
    ),
]


@pytest.fixture(scope="module")
def ids():
    """Code, which the model was trained on; each context begins with a special token and has another."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL.name)
    found = tokenizer(inspect.getsource(argparse))["input_ids"][: N_SEQUENCES * CONTEXT]
    ids = torch.tensor(found).view(N_SEQUENCES, CONTEXT)
    ids[:, 0] = ids[:, 40] = SPECIAL
    return ids


@pytest.fixture(scope="module")
def rows(ids):
    """The layer's activations, all of them."""
    return LanguageModel(MODEL).activations(ids, [LAYER])[LAYER].flatten(0, 1)


@pytest.fixture(scope="module")
def sae(rows):
    """Trained briefly, so that its figures are none of a random one."""
    torch.manual_seed(0)
    cfg = SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=K, selection="batch_topk")
    scale = math.sqrt(D_MODEL) / float(rows.norm(dim=1).mean())
    sae = SparseAutoencoder(cfg, {LAYER: scale})
    fit = Fit(sae, FitConfig(batch_tokens=BATCH, lr=3e-3), n_steps=N_STEPS, seed=0)
    layer = torch.full((BATCH,), LAYER)
    order = torch.randperm(len(rows)).repeat(N_STEPS)
    batches = rows[order[: N_STEPS * BATCH]].split(BATCH)
    fit.initialise(batches[0], layer)
    for batch in batches:
        fit.step(batch, layer)
    return sae.eval()


def harvested(folder, ids, special, first_position):
    spec = TokenSpec(
        context=CONTEXT,
        first_position=first_position,
        separator_id=SPECIAL,
        special_ids=special,
        tokenizer="none",
    )
    packed = ids.numpy().astype(np.uint32)
    writer = TokenWriter(folder / "tokens.zarr", spec, {"validation": N_SEQUENCES})
    writer.append("validation", packed, np.zeros_like(packed))
    writer.seal()
    store = ActivationStore.create(
        folder / "validation.zarr",
        StoreSpec(
            d_model=D_MODEL,
            layers=(LAYER,),
            split="validation",
            n_population=N_SEQUENCES,
            n_sequences=N_SEQUENCES,
            rows_per_sequence=CONTEXT - first_position,
            first_position=first_position,
            sequences_per_chunk=4,
            chunks_per_shard=4,
            seed=0,
            dtype="float32",
            scales=(1.0,),
        ),
    )
    Harvester(MODEL, folder / "tokens.zarr", batch_tokens=4 * CONTEXT).harvest(
        folder / "validation.zarr", 0
    )
    assert not list(store.missing())
    return folder


def nothing_massive(special):
    hygiene = Hygiene(drop_special_tokens=bool(special), max_norm_ratio=1e9)
    return RowFilter(hygiene, special, {LAYER: 1.0})


@pytest.fixture(scope="module")
def ours(ids, sae, tmp_path_factory):
    """Our reports over all tokens, and without the special ones."""
    found = {}
    for case, special, first in [("all", (), 0), ("without_special", (SPECIAL,), 1)]:
        folder = harvested(tmp_path_factory.mktemp(case), ids, special, first)
        checkpoint.save(folder / "sae", sae)
        evaluator = Evaluator(
            *(MODEL, folder / "tokens.zarr", folder / "validation.zarr", nothing_massive(special)),
            n_sequences=N_SEQUENCES,
            batch_tokens=4 * CONTEXT,
        )
        found[case] = evaluator.evaluate(folder / "sae", LAYER), folder
    return found


@pytest.fixture(scope="module")
def theirs(ids, rows, sae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    scale = sae.layer_scale[LAYER]
    given = {
        "ids": ids,
        "x": rows,
        "w_enc": sae.encoder.w_enc * scale,
        "b_enc": sae.encoder.b_enc,
        "w_dec": sae.w_dec / scale,
        "b_dec": sae.b_dec / scale,
        "threshold": sae.threshold,
        "k": torch.tensor(K),
        "layer": torch.tensor(LAYER),
        "special": torch.tensor([SPECIAL]),
    }
    save_file({k: v.detach().contiguous() for k, v in given.items()}, folder / "in.safetensors")
    arguments = [MODEL.name, folder / "in.safetensors", folder / "out.json"]
    done = subprocess.run(
        [peers.PYTHON, "-m", "benchmarks.peer_metrics", *arguments],
        check=False,
        cwd=peers.ROOT,
        env={**os.environ, **peers.VARIABLES},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


def reconstructed(sae, rows):
    return sae.reconstruct(rows, torch.full((len(rows),), LAYER)).x_hat


OF_ROWS = {
    "explained_variance": "explained_variance",
    "cosine": "cossim",
    "norm_ratio": "l2_ratio",
    "relative_bias": "relative_reconstruction_bias",
    "l0": "l0",
}
OF_PREDICTIONS = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "ce_recovered": "ce_loss_score",
    "kl": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
}


@pytest.mark.parametrize("ours_is", [*OF_ROWS, *OF_PREDICTIONS])
def test_run_evals_finds_what_we_find_over_all_tokens(ours, theirs, ours_is):
    name = {**OF_ROWS, **OF_PREDICTIONS}[ours_is]
    assert getattr(ours["all"][0], ours_is) == pytest.approx(
        theirs["sae_lens"]["all"][name], rel=CLOSE
    )


@pytest.mark.parametrize("ours_is", OF_ROWS)
def test_run_evals_finds_what_we_find_without_special_tokens(ours, theirs, ours_is):
    found = theirs["sae_lens"]["without_special"][OF_ROWS[ours_is]]
    assert getattr(ours["without_special"][0], ours_is) == pytest.approx(found, rel=CLOSE)


def test_run_evals_ablates_special_tokens_and_leaves_out_what_they_predict(ours, theirs, ids):
    # We leave special tokens as they are, and count every prediction: what a splice does to one
    # token shows in what all later ones predict.
    model, counted = LanguageModel(MODEL, head=True), (ids != SPECIAL)[:, :-1]
    found = theirs["sae_lens"]["without_special"]
    clean, zeros = model.token_losses(ids), model.token_losses(ids, {LAYER: torch.zeros_like})
    assert found["ce_loss_without_sae"] == pytest.approx(float(clean[counted].mean()), rel=CLOSE)
    assert found["ce_loss_with_ablation"] == pytest.approx(float(zeros[counted].mean()), rel=CLOSE)
    report, _ = ours["without_special"]
    assert report.ce_clean == pytest.approx(float(clean.mean()), rel=CLOSE)
    assert report.ce_zero != pytest.approx(found["ce_loss_with_ablation"], rel=CLOSE)


def test_the_legacy_variance_of_run_evals_is_a_mean_of_ratios(ours, theirs, sae, rows):
    error = (rows - reconstructed(sae, rows)).square().sum(1)
    ratios = 1 - error / (rows - rows.mean(0)).square().sum(1)
    found = theirs["sae_lens"]["all"]["explained_variance_legacy"]
    assert found == pytest.approx(float(ratios.mean()), rel=1e-3)
    assert found != pytest.approx(ours["all"][0].explained_variance, rel=CLOSE)


def bias(sae, rows):
    metrics = ReconstructionMetrics()
    metrics.update(rows, reconstructed(sae, rows))
    return metrics.relative_bias


def test_run_evals_averages_the_bias_over_batches_and_we_divide_sums(theirs, sae, rows):
    found = theirs["sae_lens"]["two_batches"]["relative_reconstruction_bias"]
    halves = [bias(sae, half) for half in rows.chunk(2)]
    assert found == pytest.approx(sum(halves) / 2, rel=CLOSE)


def test_sparsify_has_our_fvu_of_one_batch_and_another_of_several(theirs, ours, sae, rows):
    topk = SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=K), sae.layer_scale)
    weights = {name: value for name, value in sae.state_dict().items() if name != "threshold"}
    topk.load_state_dict(weights, strict=False)
    store = ours["all"][1] / "validation.zarr"
    fvu = reconstruction_quality(topk, store, [LAYER], nothing_massive(())).layers[LAYER].fvu
    assert theirs["sparsify"]["all"]["fvu"] == pytest.approx(fvu, rel=CLOSE)
    assert theirs["sparsify"]["two_batches"]["fvu"] != pytest.approx(fvu, rel=CLOSE)


@pytest.mark.parametrize("ours_is", ["cosine", "norm_ratio", "relative_bias", "l0"])
def test_dictionary_learning_finds_what_we_find(ours, theirs, ours_is):
    found = theirs["dictionary_learning"]["all"][OF_ROWS[ours_is]]
    assert getattr(ours["all"][0], ours_is) == pytest.approx(found, rel=CLOSE)
    alive = theirs["dictionary_learning"]["all"]["frac_alive"]
    assert 1 - ours["all"][0].dead_fraction == pytest.approx(alive, rel=CLOSE)


def test_dictionary_learning_forgives_a_constant_error(ours, theirs, sae, rows):
    residual = rows - reconstructed(sae, rows)
    forgiven = 1 - residual.var(0).sum() / rows.var(0).sum()
    found = theirs["dictionary_learning"]["all"]["frac_variance_explained"]
    assert found == pytest.approx(float(forgiven), rel=CLOSE)
    assert found > ours["all"][0].explained_variance + CLOSE


def test_the_tokens_are_those_of_the_store(ours, ids):
    store = TokenStore.open(ours["all"][1] / "tokens.zarr")
    assert torch.from_numpy(store.ids("validation", np.arange(N_SEQUENCES))).equal(ids)
