"""Reconstruction and cross-entropy of autoencoders in a small random model, end to end."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from actors.errors import InputError
from actors.evaluator import Evaluator
from actors.fidelity import reconstruction_quality
from actors.harvester import Harvester
from actors.language_model import LanguageModel
from actors.model_source import ModelSource
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.tokens import TokenSpec, TokenStore, TokenWriter

VOCABULARY, CONTEXT, D_MODEL, N_LAYERS, N_SEQUENCES = 41, 12, 16, 3, 6
BOS, SEPARATOR, FIRST_POSITION = 0, 5, 1
LAYERS = tuple(range(N_LAYERS))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model, its weights large enough that blocks matter."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    cfg = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
    )
    model = AutoModelForCausalLM.from_config(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return ModelSource(name=str(folder))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Text that the model itself would write, so that ablation costs something; and its store."""
    folder = tmp_path_factory.mktemp("run")
    reference = AutoModelForCausalLM.from_pretrained(model.name).eval()
    ids = torch.randint(1, VOCABULARY, (N_SEQUENCES, CONTEXT))
    ids[:, 0] = BOS
    with torch.no_grad():
        for position in range(4, CONTEXT):
            logits = reference(ids[:, :position], use_cache=False).logits[:, -1]
            ids[:, position] = logits.argmax(-1)
    ids[1, 6] = ids[4, 3] = SEPARATOR
    spec = TokenSpec(
        context=CONTEXT,
        first_position=FIRST_POSITION,
        separator_id=SEPARATOR,
        special_ids=(BOS, SEPARATOR),
        tokenizer="none",
    )
    writer = TokenWriter(folder / "tokens.zarr", spec, {"validation": N_SEQUENCES})
    packed = ids.numpy().astype(np.uint32)
    writer.append("validation", packed, np.zeros_like(packed))
    writer.seal()
    harvested(model, folder)
    return folder


def harvested(model, folder):
    spec = StoreSpec(
        d_model=D_MODEL,
        layers=LAYERS,
        split="validation",
        n_population=N_SEQUENCES,
        n_sequences=N_SEQUENCES,
        rows_per_sequence=CONTEXT - FIRST_POSITION,
        first_position=FIRST_POSITION,
        sequences_per_chunk=2,
        chunks_per_shard=1,
        seed=0,
        dtype="float32",
        scales=(1.0,) * N_LAYERS,
    )
    store = ActivationStore.create(folder / "validation.zarr", spec)
    harvester = Harvester(model, folder / "tokens.zarr", batch_tokens=4 * CONTEXT)
    for shard in store.missing():
        harvester.harvest(store.place.folder, shard)


@pytest.fixture(scope="module")
def row_filter(model, run):
    """Drops separators and, by a low ratio, some rows of large norm."""
    store = ActivationStore.open(run / "validation.zarr")
    medians = {
        layer: float(np.median(store.column(f"layers/{layer}/norm", 0, store.spec.n_rows)))
        for layer in LAYERS
    }
    return RowFilter(Hygiene(max_norm_ratio=1.2), (BOS, SEPARATOR), medians)


def evaluator(model, run, row_filter, **changes):
    settings = {
        "model": model,
        "tokens": run / "tokens.zarr",
        "validation": run / "validation.zarr",
        "row_filter": row_filter,
        "n_sequences": N_SEQUENCES,
        "batch_tokens": 4 * CONTEXT,
    }
    return Evaluator(**{**settings, **changes})


def dense_sae(d_sae, k, seed=0):
    cfg = SaeConfig(d_model=D_MODEL, d_sae=d_sae, k=k)
    return SparseAutoencoder(cfg, dict.fromkeys(LAYERS, 0.5), seed=seed)


def saved(sae, folder):
    checkpoint.save(folder, sae)
    return folder


def identity_sae():
    """Latent j is the positive part of coordinate j, latent d_model + j its negative part."""
    sae = dense_sae(2 * D_MODEL, D_MODEL)
    signs = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    with torch.no_grad():
        sae.encoder.w_enc.copy_(signs)
        sae.w_dec.copy_(signs)
    return sae


def zero_sae():
    sae = dense_sae(8, 2)
    nn.init.zeros_(sae.w_dec)
    return sae


def kept(row_filter, ids, residual, layer):
    """Rows that training would use, token by token."""
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    limit = row_filter.median_norms[layer] * row_filter.hygiene.max_norm_ratio
    for sequence, position in np.ndindex(*ids.shape):
        keep[sequence, position] = (
            position >= FIRST_POSITION
            and int(ids[sequence, position]) not in (BOS, SEPARATOR)
            and float(residual[sequence, position].norm()) <= limit
        )
    return keep


def test_an_exact_autoencoder_recovers_all_cross_entropy(model, run, row_filter, tmp_path):
    folder = saved(identity_sae(), tmp_path / "sae")
    for layer in LAYERS:
        report = evaluator(model, run, row_filter).evaluate(folder, layer)
        assert report.ce_zero - report.ce_clean > 0.1, "ablation costs something"
        assert report.ce_sae == pytest.approx(report.ce_clean, rel=1e-6)
        assert report.ce_recovered == pytest.approx(1, abs=1e-6)
        assert report.fvu == pytest.approx(0, abs=1e-12)
        assert report.explained_variance == pytest.approx(1, abs=1e-12)
        assert report.cosine == pytest.approx(1, abs=1e-6)
        assert report.norm_ratio == pytest.approx(1, abs=1e-6)
        assert report.l0 == D_MODEL
        assert report.relative_bias == pytest.approx(1, abs=1e-6)
        assert report.kl == pytest.approx(0, abs=1e-6)
        assert report.kl_zero > 0.01


def test_an_autoencoder_that_gives_zeros_recovers_nothing(model, run, row_filter, tmp_path):
    folder = saved(zero_sae(), tmp_path / "sae")
    report = evaluator(model, run, row_filter).evaluate(folder, 1)
    assert report.ce_sae == report.ce_zero
    assert report.ce_recovered == 0
    assert report.norm_ratio == 0
    assert report.relative_bias is None
    assert report.kl == report.kl_zero


@pytest.mark.parametrize("layer", LAYERS)
def test_a_report_equals_a_splice_made_by_hand(model, run, row_filter, tmp_path, layer):
    sae = dense_sae(24, 3, seed=1)
    report = evaluator(model, run, row_filter).evaluate(saved(sae, tmp_path / "sae"), layer)

    reference = AutoModelForCausalLM.from_pretrained(model.name).eval()
    ids = torch.from_numpy(
        TokenStore.open(run / "tokens.zarr").ids("validation", np.arange(N_SEQUENCES))
    )
    residual = LanguageModel(model).activations(ids, [layer])[layer].clone()
    keep = kept(row_filter, ids, residual, layer)
    assert 0 < keep.sum() < (ids != BOS).sum() - (ids == SEPARATOR).sum(), "some are massive"
    x = residual[keep]
    x_hat, latents = sae.reconstruct(x, torch.full((len(x),), layer))

    def predicted(rows):
        def hook(_module, _inputs, output):
            edited = (output[0] if isinstance(output, tuple) else output).clone()
            edited[keep] = rows
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = reference.gpt_neox.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = reference(ids, use_cache=False).logits
        handle.remove()
        return logits.log_softmax(-1).double()

    def cross_entropy(log_q):
        return float(F.nll_loss(log_q[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    def divergence(log_q):
        log_p = before
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    before, after, zeroed, averaged = map(predicted, (x, x_hat, 0 * x, x.mean(0)))
    clean, spliced, zeros, means = map(cross_entropy, (before, after, zeroed, averaged))
    assert report.ce_mean == pytest.approx(means, rel=1e-5)
    recovered = (means - spliced) / (means - clean) if means > clean else None
    assert report.ce_recovered_mean == pytest.approx(recovered, rel=1e-3)
    assert report.kl == pytest.approx(divergence(after), rel=1e-4)
    assert report.kl_zero == pytest.approx(divergence(zeroed), rel=1e-4)
    assert report.ce_clean == pytest.approx(clean, rel=1e-5)
    assert report.ce_sae == pytest.approx(spliced, rel=1e-5)
    assert report.ce_zero == pytest.approx(zeros, rel=1e-5)
    assert report.ce_recovered == pytest.approx((zeros - spliced) / (zeros - clean), rel=1e-4)
    assert report.n_tokens == N_SEQUENCES * (CONTEXT - 1)

    residual_error = (x - x_hat).double().square().sum()
    variance = (x - x.mean(0)).double().square().sum()
    assert report.fvu == pytest.approx(float(residual_error / variance), rel=1e-5)
    assert report.l0 == pytest.approx(float(latents.l0().double().mean()))
    alive = len(latents.indices[latents.values > 0].unique())
    assert report.dead_fraction == pytest.approx((24 - alive) / 24)
    assert report.n_rows == len(x)
    frequency = (latents.dense() > 0).double().mean(0)
    assert report.dense_fraction == pytest.approx(float((frequency > 0.1).double().mean()))
    logs = frequency[frequency > 0].log10().numpy()
    histogram = report.frequency_histogram
    assert list(histogram.n_latents) == np.histogram(logs, histogram.log10_edges)[0].tolist()
    assert report.relative_bias == pytest.approx(
        float(x_hat.square().sum() / (x * x_hat).sum()), rel=1e-4
    )


def test_what_one_evaluator_keeps_changes_no_report(model, run, row_filter, tmp_path):
    first = saved(dense_sae(24, 3, seed=1), tmp_path / "first")
    second = saved(dense_sae(24, 5, seed=2), tmp_path / "second")
    shared = evaluator(model, run, row_filter)
    for folder, layer in [(first, 0), (second, 2), (second, 0), (first, 2), (first, 0)]:
        fresh = evaluator(model, run, row_filter)
        assert shared.evaluate(folder, layer) == fresh.evaluate(folder, layer)


def test_the_size_of_a_forward_pass_changes_nothing(model, run, row_filter, tmp_path):
    folder = saved(dense_sae(24, 3), tmp_path / "sae")
    reports = [
        evaluator(model, run, row_filter, batch_tokens=n).evaluate(folder, 1)
        for n in (1, 10 * CONTEXT)
    ]
    assert reports[0].ce_sae == pytest.approx(reports[1].ce_sae, rel=1e-6)
    assert reports[0].ce_clean == pytest.approx(reports[1].ce_clean, rel=1e-6)


def test_fewer_sequences_are_spread_over_the_split_and_more_are_all(
    model, run, row_filter, tmp_path
):
    folder = saved(dense_sae(24, 3), tmp_path / "sae")
    ids = TokenStore.open(run / "tokens.zarr").ids("validation", np.array([0, 3]))
    losses = LanguageModel(model, head=True).token_losses(torch.from_numpy(ids))

    two = evaluator(model, run, row_filter, n_sequences=2).evaluate(folder, 1)
    assert two.n_tokens == 2 * (CONTEXT - 1)
    assert two.ce_clean == pytest.approx(float(losses.mean()), rel=1e-6)
    many = evaluator(model, run, row_filter, n_sequences=999).evaluate(folder, 1)
    assert many.n_tokens == N_SEQUENCES * (CONTEXT - 1)


def test_fidelity_of_a_group_joins_its_layers(run, row_filter):
    sae = dense_sae(64, 2)
    group = reconstruction_quality(sae, run / "validation.zarr", LAYERS, row_filter)
    alone = [
        reconstruction_quality(sae, run / "validation.zarr", [layer], row_filter)
        for layer in LAYERS
    ]
    assert [group.layers[layer] for layer in LAYERS] == [
        one.layers[layer] for one, layer in zip(alone, LAYERS, strict=True)
    ]
    assert group.mean_fvu == pytest.approx(np.mean([one.mean_fvu for one in alone]))
    rows = [one.layers[layer].n_rows for one, layer in zip(alone, LAYERS, strict=True)]
    assert group.l0 == pytest.approx(np.average([one.l0 for one in alone], weights=rows))
    assert group.dead_fraction < min(one.dead_fraction for one in alone)


def test_an_autoencoder_of_another_width_is_refused(model, run, row_filter, tmp_path):
    sae = SparseAutoencoder(SaeConfig(d_model=D_MODEL + 1, d_sae=8, k=2), {1: 1.0})
    with pytest.raises(InputError, match="width 17, and those of the run's model have 16"):
        evaluator(model, run, row_filter).evaluate(saved(sae, tmp_path / "sae"), 1)
    with pytest.raises(InputError, match="does not exist"):
        evaluator(model, run, row_filter).evaluate(tmp_path / "nothing", 1)


def test_a_layer_that_costs_nothing_to_ablate_is_reported(model, run, row_filter, tmp_path):
    nothing_kept_but_one = RowFilter(
        Hygiene(drop_first_positions=CONTEXT - 1), (SEPARATOR,), row_filter.median_norms
    )
    # The last position predicts nothing, so replacing it alone can't be felt.
    folder = saved(dense_sae(24, 3), tmp_path / "sae")
    with pytest.raises(InputError, match=r"layer 1: cross-entropy is .* ablation must cost"):
        evaluator(model, run, nothing_kept_but_one).evaluate(folder, 1)


def test_a_filter_that_keeps_no_row_is_reported(model, run, row_filter, tmp_path):
    drops_all = RowFilter(Hygiene(), range(VOCABULARY), row_filter.median_norms)
    folder = saved(dense_sae(24, 3), tmp_path / "sae")
    with pytest.raises(InputError, match="keeps none of the 66 rows of layer 1"):
        evaluator(model, run, drops_all).evaluate(folder, 1)
