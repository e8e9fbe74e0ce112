"""One autoencoder at many sizes, on the stores of a finished run, against the definitions."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig

from actors.errors import InputError
from actors.model_source import ModelSource
from actors.progressive_coder import RSA_ROWS, ProgressiveCoder, latent_orders, sizes
from actors.progressive_report import ImportanceLaw
from orchestrator import config_file
from orchestrator.run_directory import RunDirectory
from orchestrator.stages.group import load_groups
from sae import KronShape, LatentCounts, SaeConfig, SparseAutoencoder, checkpoint
from storage.activations import ActivationStore
from storage.tokens import TokenStore

D_SAE, D_MODEL, LAYERS, LAYER, N_SEQUENCES = 96, 128, (2, 3), 3, 2


@pytest.fixture(scope="module")
def run(finished: tuple[Path, str]) -> RunDirectory:
    return RunDirectory.of(config_file.load(finished[0]))


@pytest.fixture(scope="module")
def coder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> ProgressiveCoder:
    """Of an encoder-only model as wide as the run's, so that it measures everything but cross-entropy."""
    folder = tmp_path_factory.mktemp("encoder")
    BertConfig(hidden_size=D_MODEL, num_attention_heads=2).save_pretrained(folder)
    return made(run, ModelSource(name=str(folder)))


def made(run: RunDirectory, model: ModelSource | None = None) -> ProgressiveCoder:
    cfg = config_file.load(run.path)
    filter_ = load_groups(run).row_filter
    stores = (run.tokens, run.pilot, run.validation)
    return ProgressiveCoder(model or cfg.model, *stores, filter_, N_SEQUENCES, 4096)


def saved(folder: Path, **changes: object) -> Path:
    """An autoencoder of random weights that reconstructs a little: decoder and encoder are tied."""
    settings = {"d_model": D_MODEL, "d_sae": D_SAE, "k": 12, **changes}
    sae = SparseAutoencoder(SaeConfig(**settings), dict.fromkeys(LAYERS, 0.5), seed=3)
    if sae.cfg.selection == "batch_topk":
        sae.set_threshold(1.0)
    checkpoint.save(folder, sae)
    return folder


KINDS = {
    "matryoshka batch_topk": {"selection": "batch_topk", "prefixes": (10, 48, D_SAE)},
    "batch_topk": {"selection": "batch_topk", "scaling": "token_standardize"},
    "kron topk": {"encoder": KronShape(h=12, m=2, n=4)},
}


def kept_rows(run: RunDirectory, store_name: str, layer: int) -> torch.Tensor:
    store = ActivationStore.open(getattr(run, store_name))
    n = store.spec.n_rows
    keep = load_groups(run).row_filter.keep(
        store.column("token_id", 0, n),
        store.column("position", 0, n),
        np.full(n, layer),
        store.column(f"layers/{layer}/norm", 0, n),
    )
    return torch.from_numpy(store.read(f"layers/{layer}", 0, n)[keep]).double()


class Reference:
    """The same by dense matrices in float64."""

    def __init__(self, folder: Path) -> None:
        sae, _ = checkpoint.load(folder)
        self.sae, self.cfg = sae.double(), sae.cfg

    def code(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            acts = self.sae.encoder.reference(self._inside(x), self.sae.b_dec)
        if self.cfg.selection == "batch_topk":
            return torch.where(acts > 1.0, acts, 0.0)
        best = acts.topk(self.cfg.k, dim=1)
        return torch.zeros_like(acts).scatter(1, best.indices, best.values)

    def decoded(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        x_hat = code @ self.sae.w_dec.detach() + self.sae.b_dec.detach()
        if self.cfg.scaling == "layer_scale":
            return x_hat / 0.5
        return x_hat * (x.std(1, keepdim=True) + 1e-5) + x.mean(1, keepdim=True)

    def _inside(self, x: torch.Tensor) -> torch.Tensor:
        if self.cfg.scaling == "layer_scale":
            return x * 0.5
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_is_pruning_by_its_definition(run, coder, tmp_path, kind):
    folder = saved(tmp_path / "sae", **KINDS[kind])
    report = coder.read(folder, LAYERS, LAYER)

    reference = Reference(folder)
    pilot = torch.cat([reference.code(kept_rows(run, "pilot", layer)) for layer in LAYERS])
    x = kept_rows(run, "validation", LAYER)
    code = reference.code(x)
    rows = F.normalize(reference.sae.w_dec.detach(), dim=1)
    centred = rows - rows.mean(0)
    importances = {
        "energy": pilot.square().mean(0),
        "frequency": (pilot > 0).double().mean(0),
        "decoder": (rows @ centred.T).square().sum(1),
        "nested": -torch.arange(D_SAE).double(),
    }
    assert report.n_rows == len(x)
    assert report.n_importance_rows == len(pilot)
    assert ("nested" in report.curves) == bool(reference.cfg.prefixes)
    for name, points in report.curves.items():
        if name == "random":
            continue
        expected_sizes = [3, 6, 12, 24, 48, 96]
        if reference.cfg.prefixes:
            expected_sizes = [10, 48, 96] if name == "nested" else [3, 6, 10, 12, 24, 48, 96]
        assert [point.size for point in points] == expected_sizes
        order = importances[name].argsort(descending=True, stable=True)
        for point in points:
            left = torch.zeros(D_SAE, dtype=torch.bool)
            left[order[: point.size]] = True
            x_hat = reference.decoded(x, code * left)
            fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
            assert point.fvu == pytest.approx(float(fvu), rel=1e-4), (name, point.size)
            assert point.l0 == pytest.approx(
                float((code * left > 0).sum(1).double().mean()), rel=1e-3
            )
    whole = reference.decoded(x, code)
    n_stored = ActivationStore.open(run.validation).spec.n_rows
    sample = slice(None, None, -(-n_stored // RSA_ROWS))
    assert report.n_rsa_rows == len(x[sample]) <= RSA_ROWS
    cosines = [(s := F.normalize(side[sample], dim=1)) @ s.T for side in (x, whole)]
    pairs = np.triu_indices(len(cosines[0]), 1)
    expected = np.corrcoef(*(c.numpy()[pairs] for c in cosines))[0, 1]
    assert report.curves["energy"][-1].rsa == pytest.approx(expected, rel=1e-4)


def test_cross_entropy_is_that_of_a_model_with_the_pruned_reconstruction_in_it(run, tmp_path):
    folder = saved(tmp_path / "sae", **KINDS["matryoshka batch_topk"])
    report = made(run).read(folder, LAYERS, LAYER)

    reference = Reference(folder)
    store = TokenStore.open(run.tokens)
    available = store.n_sequences("validation")
    chosen = np.arange(N_SEQUENCES) * available // N_SEQUENCES
    ids = torch.from_numpy(store.ids("validation", chosen))
    name = config_file.load(run.path).model.name
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
    row_filter = load_groups(run).row_filter
    prefix = torch.arange(D_SAE) < 10

    def pruned(x):
        return reference.decoded(x, reference.code(x) * prefix)

    def cross_entropy(change):
        def hook(_module, _inputs, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            norms = hidden.norm(dim=-1).numpy()
            keep = row_filter.keep(ids.numpy(), position, np.full(ids.shape, LAYER), norms)
            rows = torch.from_numpy(keep & (position >= store.first_position))
            hidden[rows] = change(hidden[rows].double()).float()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.base_model.layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        handle.remove()
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    clean, zero, ce = (cross_entropy(f) for f in (lambda x: x, torch.zeros_like, pruned))
    [point] = [point for point in report.curves["nested"] if point.size == 10]
    assert report.n_tokens == N_SEQUENCES * (ids.shape[1] - 1)
    assert report.ce_clean == pytest.approx(clean, rel=1e-5)
    assert report.ce_zero == pytest.approx(zero, rel=1e-5)
    assert point.ce == pytest.approx(ce, rel=1e-4)
    assert point.ce_recovered == pytest.approx((zero - ce) / (zero - clean), abs=1e-3)


def test_a_whole_winner_is_what_the_evaluation_measured(run, coder):
    folders = sorted(run.evaluations.iterdir())
    assert folders
    for folder in folders:
        files = sorted(folder.glob("layer-*.json"))
        layers = tuple(int(file.stem.split("-")[1]) for file in files)
        evaluated = json.loads(files[0].read_text())
        report = coder.read(run.trials / folder.name / "sae", layers, layers[0])
        assert report.n_rows == evaluated["n_rows"]
        ends = {points[-1] for points in report.curves.values()}
        assert len(ends) == 1, "all orders are the same there"
        [end] = ends
        assert end.size == report.d_sae
        assert end.fvu == pytest.approx(evaluated["fvu"], rel=1e-9)
        assert end.l0 == pytest.approx(evaluated["l0"], rel=1e-9)
        for points in report.curves.values():
            for smaller, larger in pairwise(points):
                assert smaller.size < larger.size
                assert smaller.l0 <= larger.l0
        for at_energy, at_random in zip(
            report.curves["energy"][1:-1], report.curves["random"][1:-1], strict=True
        ):
            assert at_energy.fvu < at_random.fvu
            assert at_energy.rsa is not None


def test_an_autoencoder_is_ranked_anew_when_another_was_read_between(coder, tmp_path):
    first = saved(tmp_path / "first", **KINDS["batch_topk"])
    second = saved(tmp_path / "second", **KINDS["kron topk"])
    once = coder.read(first, LAYERS, 2)
    coder.read(second, LAYERS, 2)
    assert coder.read(first, LAYERS, 2) == once
    assert coder.read(first, (2,), 2).n_importance_rows < once.n_importance_rows


def test_an_encoder_only_model_has_no_cross_entropy(coder, tmp_path):
    report = coder.read(saved(tmp_path / "sae", **KINDS["kron topk"]), LAYERS, LAYER)
    assert report.ce_clean is report.ce_zero is report.n_tokens is report.n_sequences is None
    points = [point for points in report.curves.values() for point in points]
    assert all(point.ce is point.ce_recovered is None and point.fvu > 0 for point in points)


def test_what_is_no_autoencoder_of_this_model_is_refused(coder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        coder.read(tmp_path / "nothing", LAYERS, LAYER)
    with pytest.raises(InputError, match="width 16, and those of the run's model have 128"):
        coder.read(saved(tmp_path / "narrow", d_model=16), LAYERS, LAYER)


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=24, max_size=24),
    st.lists(st.integers(0, 50), min_size=24, max_size=24),
    st.booleans(),
)
def test_an_order_is_a_permutation_with_what_matters_more_first(energies, uses, nested):
    prefixes = (3, 24) if nested else ()
    sae = SparseAutoencoder(SaeConfig(d_model=6, d_sae=24, k=2, prefixes=prefixes), {0: 1.0})
    counts = LatentCounts(24)
    counts.n_tokens = 50
    counts.energy += torch.tensor(energies, dtype=torch.float64)
    counts.counts += torch.tensor(uses)
    orders = latent_orders(sae, counts)
    assert set(orders) == {
        *("energy", "frequency", "decoder", "random"),
        *(["nested"] if nested else []),
    }
    for order in orders.values():
        assert order.sort().values.tolist() == list(range(24))
    for name, values in (("energy", counts.energy), ("frequency", counts.counts)):
        assert bool((values[orders[name]].diff() <= 0).all())


@given(st.integers(1, 5000), st.data())
def test_sizes_rise_to_the_whole_and_hold_every_prefix(d_sae, data):
    inner = data.draw(st.sets(st.integers(1, max(1, d_sae - 1)), max_size=4)) - {d_sae}
    prefixes = (*sorted(inner), d_sae) if inner else ()
    cfg = SaeConfig(d_model=4, d_sae=d_sae, k=1, prefixes=prefixes)
    found = sizes(cfg, "energy")
    assert all(a < b for a, b in pairwise(found))
    assert (found[0] >= 1, found[-1]) == (True, d_sae)
    assert set(prefixes) <= set(found)
    assert sizes(cfg, "nested") == prefixes


def test_a_law_of_few_latents_is_none_and_its_curve_lies_on_the_importances():
    assert ImportanceLaw.of(torch.tensor([1.0, 2.0, 0.0, 0.0])) is None
    importances = 5 * torch.arange(1, 1001).double() ** -0.5
    law = ImportanceLaw.of(importances[torch.randperm(1000)])
    assert law is not None
    assert (law.factor, law.exponent, law.r_squared) == pytest.approx((5, 0.5, 1))
    assert law.exponential_r_squared < 0.9
    assert (law.ranks[0], law.ranks[-1]) == (1, 1000)
    assert law.values == pytest.approx([5 * rank**-0.5 for rank in law.ranks])
    assert json.loads(json.dumps(dataclasses.asdict(law)))["ranks"] == list(law.ranks)
