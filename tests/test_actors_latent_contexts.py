"""Everything said of the latents of small autoencoders against loops over what the model computes."""

import numpy as np
import pytest
import torch

from actors.errors import InputError
from actors.harvester import Harvester
from actors.language_model import LanguageModel
from actors.latent_contexts import AFTER, BEFORE, N_CONTEXTS, LatentContexts, stored_sequences
from actors.model_source import ModelSource
from sae import SaeConfig, SparseAutoencoder, checkpoint
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.tokens import TokenStore
from tests.models import BOS, CONTEXT, D_MODEL, VOCABULARY, random_model, random_tokens

LAYERS, N_POPULATION, N_STORED, D_SAE = (0, 2), 23, 17, 48
SPECIAL = (BOS, 7)


@pytest.fixture(scope="module", params=["gpt_neox", "bert"])
def run(request, tmp_path_factory):
    """A model, its tokens, and a store of some of its sequences in several shards."""
    folder = tmp_path_factory.mktemp(request.param)
    model = ModelSource(name=str(random_model(folder / "model", request.param)))
    random_tokens(folder / "tokens.zarr", N_POPULATION, split="validation")
    spec = StoreSpec(
        d_model=D_MODEL,
        layers=(0, 1, 2),
        split="validation",
        n_population=N_POPULATION,
        n_sequences=N_STORED,
        rows_per_sequence=CONTEXT - 1,
        first_position=1,
        sequences_per_chunk=2,
        chunks_per_shard=3,
        seed=5,
        dtype="float32",
        scales=(1.0, 2.0, 0.5),
    )
    store = ActivationStore.create(folder / "validation.zarr", spec)
    harvester = Harvester(model, folder / "tokens.zarr", batch_tokens=4 * CONTEXT)
    for shard in store.missing():
        harvester.harvest(store.place, shard)
    return model, folder


@pytest.fixture(scope="module")
def row_filter(run):
    """Drops special tokens and, by a low ratio, some rows of large norm."""
    store = ActivationStore.open(run[1] / "validation.zarr")
    norms = {
        layer: store.column(f"layers/{layer}/norm", 0, store.spec.n_rows) for layer in (0, 1, 2)
    }
    medians = {layer: float(np.median(norm)) for layer, norm in norms.items()}
    return RowFilter(Hygiene(max_norm_ratio=1.2), SPECIAL, medians)


def saved(folder, **changes):
    settings = {"d_model": D_MODEL, "d_sae": D_SAE, "k": 5, **changes}
    sae = SparseAutoencoder(SaeConfig(**settings), {0: 0.7, 2: 1.3}, seed=1)
    checkpoint.save(folder, sae)
    return folder


@pytest.fixture(scope="module", params=["layer_scale", "token_standardize"])
def described(request, run, row_filter, tmp_path_factory):
    """What is reported of an autoencoder, and what the model itself computes of it, token by token."""
    model, folder = run
    sae_folder = saved(tmp_path_factory.mktemp("sae"), scaling=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.latent_contexts._BATCH_ROWS", 3 * CONTEXT)  # several batches
        latents = LatentContexts(model, 50, folder / "validation.zarr", row_filter)
        report = latents.report(sae_folder, LAYERS)
    return report, reference(model, folder, row_filter, checkpoint.load(sae_folder)[0])


def reference(model, folder, row_filter, sae):
    """Per layer: activations of all latents at (sequence, position), and which tokens count."""
    store = ActivationStore.open(folder / "validation.zarr")
    ids = TokenStore.open(folder / "tokens.zarr").ids("validation", stored_sequences(store.spec))
    activations = LanguageModel(model).activations(torch.from_numpy(ids), LAYERS)
    found = {}
    for layer, x in activations.items():
        limit = row_filter.median_norms[layer] * 1.2
        keep = torch.from_numpy(~np.isin(ids, SPECIAL)) & (x.norm(dim=-1) <= limit)
        keep[:, 0] = False
        rows = x.flatten(0, 1)
        layers = torch.full((len(rows),), layer)
        dense = sae.reconstruct(rows, layers).latents.dense()
        found[layer] = dense.unflatten(0, keep.shape), keep
    return found


def test_counts_equal_those_of_the_models_own_activations(described):
    report, wanted = described
    for row, (dense, keep) in enumerate(wanted.values()):
        kept = dense[keep]
        assert int(report.statistics.n_tokens[row]) == len(kept) < keep.numel()
        assert torch.equal(report.statistics.counts[row], (kept > 0).sum(0))
        assert torch.allclose(report.statistics.sums[row], kept.double().sum(0), rtol=1e-4)
    everything = torch.cat([dense[keep] for dense, keep in wanted.values()])
    assert torch.allclose(report.statistics.maxima, everything.amax(0), rtol=1e-4)


def test_top_contexts_are_the_strongest_tokens_with_what_stands_around_them(described):
    report, wanted = described
    for latent in range(D_SAE):
        best = torch.stack(
            [torch.where(keep, dense[..., latent], 0.0) for dense, keep in wanted.values()]
        )
        values = best.amax(0).flatten().sort(descending=True).values[:N_CONTEXTS]
        assert torch.allclose(report.top.values[latent], values, rtol=1e-4)
        for slot in range(int((values > 0).sum())):
            place = int(report.top.places[latent, slot])
            sequence, position = divmod(place, CONTEXT)
            dense, keep = wanted[int(report.top.layers[latent, slot])]
            assert float(dense[sequence, position, latent]) == pytest.approx(
                float(values[slot]), rel=1e-4
            )
            for i, shown in enumerate(report.top.windows[latent, slot].tolist()):
                there = position - BEFORE + i
                if 0 <= there < CONTEXT and keep[sequence, there]:
                    assert shown == pytest.approx(
                        float(dense[sequence, there, latent]), rel=1e-3, abs=1e-5
                    )
                else:
                    assert shown != shown  # noqa: PLR0124 (NaN)
    assert report.top.windows.shape[2] == BEFORE + 1 + AFTER


def test_encoders_have_no_decoded_tokens_and_causal_models_only_those_with_a_text(run, described):
    report, _ = described
    if "bert" in run[0].name:
        assert report.decoded is None
    else:
        assert report.decoded.ids.shape == (D_SAE, 8)
        assert int(report.decoded.ids.max()) < 50 < VOCABULARY


def test_neighbours_are_by_cosine_of_decoder_rows(described, run, row_filter):
    report, _ = described
    assert report.nearest[0].shape == (D_SAE, 8)
    assert bool((report.nearest[0].diff(dim=1) <= 0).all())
    assert not bool((report.nearest[1] == torch.arange(D_SAE)[:, None]).any())


def test_the_store_names_a_place_by_the_rank_of_its_sequence(run):
    spec = ActivationStore.open(run[1] / "validation.zarr").spec
    found = stored_sequences(spec)
    assert len(found) == N_STORED
    assert found.tolist() == sorted(
        {int(s) for k in range(spec.n_shards) for s in spec.rows_of(k)[0]}
    )


def test_an_autoencoder_of_another_width_is_refused(run, row_filter, tmp_path):
    latents = LatentContexts(run[0], 50, run[1] / "validation.zarr", row_filter)
    with pytest.raises(InputError, match=f"width 9, and those of the run's model have {D_MODEL}"):
        latents.report(saved(tmp_path, d_model=9), LAYERS)
    weights = tmp_path / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        latents.report(tmp_path, LAYERS)


def test_a_filter_that_keeps_nothing_is_refused(run, tmp_path):
    nothing = RowFilter(Hygiene(), range(VOCABULARY), dict.fromkeys((0, 1, 2), 1.0))
    latents = LatentContexts(run[0], 50, run[1] / "validation.zarr", nothing)
    with pytest.raises(InputError, match=r"keeps none of the .* rows of a layer of"):
        latents.report(saved(tmp_path), LAYERS)
