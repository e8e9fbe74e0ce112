"""Hook points of many architectures: what is read there, and that edits happen at the same place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from actors import pretrained
from actors.errors import InputError
from actors.evaluator import Evaluator
from actors.harvester import Harvester
from actors.hook_points import find_hook_points
from actors.language_model import LanguageModel, describe
from actors.model_source import ModelSource
from sae import checkpoint
from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig
from storage.activations import ActivationStore
from storage.hygiene import Hygiene, RowFilter
from storage.layout import StoreSpec
from storage.tokens import TokenStore
from tests.models import (
    CONFIGS,
    CONTEXT,
    D_MODEL,
    N_LAYERS,
    VOCABULARY,
    random_model,
    random_tokens,
)

LAYERS = range(N_LAYERS)
BLOCKS = {
    **dict.fromkeys(("gpt_neox", "llama", "qwen2", "mistral", "gemma2"), "layers.{layer}"),
    **dict.fromkeys(("gpt2", "falcon", "bloom"), "h.{layer}"),
    "mpt": "blocks.{layer}",
    "opt": "decoder.layers.{layer}",
    "bert": "encoder.layer.{layer}",
}
FINAL_NORM = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "gemma2"), "norm"),
    **dict.fromkeys(("gpt2", "falcon", "bloom"), "ln_f"),
    "mpt": "norm_f",
    "gpt_neox": "final_layer_norm",
    "opt": "decoder.final_layer_norm",
}
PARTS = {
    "residual": dict.fromkeys(CONFIGS, ""),
    "mlp": {
        **dict.fromkeys(CONFIGS, ".mlp"),
        "opt": ".fc2",
        "bert": ".output.dense",
        "mpt": ".ffn",
    },
    "attention": {
        **dict.fromkeys(CONFIGS, ".self_attn"),
        "gpt2": ".attn",
        "gpt_neox": ".attention",
        **dict.fromkeys(("falcon", "bloom"), ".self_attention"),
        "mpt": ".attn",
        "bert": ".attention.output.dense",
    },
}
CAUSAL = [kind for kind in CONFIGS if kind != "bert"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        kind: str(random_model(tmp_path_factory.mktemp(kind), kind)) for kind in sorted(CONFIGS)
    }


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (4, CONTEXT))


def template(kind: str, site: str) -> str:
    return BLOCKS[kind] + PARTS[site][kind]


def by_hand(folder: str, path: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a module of every layer, by hooks on transformers' own model."""
    model = AutoModel.from_pretrained(folder, dtype="float32").eval()
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.append(output.detach().clone().reshape(*ids.shape, D_MODEL))

    for layer in LAYERS:
        model.get_submodule(path.format(layer=layer)).register_forward_hook(keep)
    with torch.no_grad():
        model(ids)
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_residual_stream_is_the_hidden_state_of_the_next_index(folders, kind, ids):
    reference = AutoModel.from_pretrained(folders[kind], dtype="float32").eval()
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states
    activations = LanguageModel(ModelSource(name=folders[kind])).activations(ids, LAYERS)
    assert sorted(activations) == list(LAYERS)
    for layer in LAYERS[:-1]:
        assert activations[layer].equal(hidden[layer + 1])
    last = activations[N_LAYERS - 1]
    if kind in FINAL_NORM:
        assert not last.isclose(hidden[N_LAYERS]).all()
        with torch.no_grad():
            last = reference.get_submodule(FINAL_NORM[kind])(last)
    assert last.equal(hidden[N_LAYERS])


@pytest.mark.parametrize("site", PARTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_site_is_what_a_hook_made_by_hand_sees(folders, kind, site, ids):
    expected = by_hand(folders[kind], template(kind, site), ids)
    source = ModelSource(name=folders[kind], site=site)
    activations = LanguageModel(source).activations(ids, LAYERS)
    for layer in LAYERS:
        assert activations[layer].equal(expected[layer])


@pytest.mark.parametrize("kind", [k for k in CAUSAL if k not in ("gemma2", "bloom", "mpt")])
def test_attention_and_mlp_add_up_to_what_a_block_adds(folders, kind, ids):
    """But for Gemma 2, which norms them first, BERT, which norms the sum, and those that have added it."""
    residual, attention, mlp = (
        LanguageModel(ModelSource(name=folders[kind], site=site)).activations(ids, LAYERS)
        for site in ("residual", "attention", "mlp")
    )
    for layer in LAYERS[1:]:
        torch.testing.assert_close(
            residual[layer - 1] + attention[layer] + mlp[layer], residual[layer]
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_path_names_the_same_module_with_or_without_the_heads_prefix(folders, kind, ids):
    path = template(kind, "mlp")
    prefix = AutoModel.from_pretrained(folders[kind]).base_model_prefix
    expected = by_hand(folders[kind], path, ids)
    for hook_points in (path, f"{prefix}.{path}"):
        source = ModelSource(name=folders[kind], hook_points=hook_points)
        assert LanguageModel(source).activations(ids, [1])[1].equal(expected[1])


@pytest.mark.parametrize("site", PARTS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_an_edit_happens_where_activations_are_read(folders, kind, site, ids):
    reference = AutoModelForCausalLM.from_pretrained(folders[kind], dtype="float32").eval()
    model = LanguageModel(ModelSource(name=folders[kind], site=site), head=True)
    read = model.activations(ids, [1])[1]
    clean = model.token_losses(ids)
    seen = {}

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        seen["x"] = x.clone()
        return x.clone()

    assert model.token_losses(ids, {1: unchanged}).equal(clean)
    assert seen["x"].equal(read)

    def zeros(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    module = reference.base_model.get_submodule(template(kind, site).format(layer=1))
    module.register_forward_hook(zeros)
    with torch.no_grad():
        logits = reference(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    ablated = model.token_losses(ids, {1: torch.zeros_like})
    torch.testing.assert_close(ablated.flatten(), expected)
    assert not ablated.isclose(clean).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_stored_is_the_site(folders, kind, tmp_path):
    tokens = random_tokens(tmp_path / "tokens.zarr", 6)
    source = ModelSource(name=folders[kind], site="attention")
    store = harvested(tmp_path / "s", source, tokens)
    ids = torch.from_numpy(TokenStore.open(tokens).ids("train", np.arange(6)))
    expected = by_hand(folders[kind], template(kind, "attention"), ids)
    sequence, position = (
        store.column(name, 0, store.spec.n_rows).astype(np.int64)
        for name in ("sequence", "position")
    )
    for layer in LAYERS:
        stored = torch.from_numpy(store.read(f"layers/{layer}", 0, store.spec.n_rows))
        torch.testing.assert_close(stored, expected[layer][sequence, position])


def harvested(
    path: Path, source: ModelSource, tokens: Path, split: str = "train"
) -> ActivationStore:
    spec = StoreSpec(
        d_model=D_MODEL,
        layers=tuple(LAYERS),
        split=split,
        n_population=6,
        n_sequences=6,
        rows_per_sequence=CONTEXT - 1,
        first_position=1,
        sequences_per_chunk=3,
        chunks_per_shard=1,
        seed=5,
        dtype="float32",
        scales=(1.0,) * N_LAYERS,
    )
    store = ActivationStore.create(path, spec)
    harvester = Harvester(source, tokens, batch_tokens=2 * CONTEXT)
    for shard in range(spec.n_shards):
        harvester.harvest(path, shard)
    return store


def test_an_encoder_is_told_from_its_configuration_and_predicts_nothing(folders, ids):
    causal = {kind: describe(ModelSource(name=folders[kind])).is_causal for kind in CONFIGS}
    assert [kind for kind, is_causal in causal.items() if not is_causal] == ["bert"]
    with pytest.raises(InputError, match=r"is an encoder.*leave cross-entropy out"):
        LanguageModel(ModelSource(name=folders["bert"])).token_losses(ids)


def test_an_encoder_is_evaluated_without_cross_entropy(folders, tmp_path):
    tokens = random_tokens(tmp_path / "tokens.zarr", 6, split="validation")
    source = ModelSource(name=folders["bert"])
    store = harvested(tmp_path / "s", source, tokens, "validation").place
    checkpoint.save(
        tmp_path / "sae",
        SparseAutoencoder(SaeConfig(d_model=D_MODEL, d_sae=24, k=3), {1: 0.5}, seed=0),
    )
    row_filter = RowFilter(Hygiene(), (), {1: 1e3})
    evaluator = Evaluator(source, tokens, store, row_filter, n_sequences=4, batch_tokens=64)
    report = evaluator.evaluate(tmp_path / "sae", 1)
    of_predictions = [name for name in vars(report) if name.startswith(("ce_", "kl"))]
    assert len(of_predictions) == 8
    assert [getattr(report, name) for name in of_predictions] == [None] * 8
    assert report.n_rows == 6 * (CONTEXT - 1)
    assert report.fvu > 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_is_torchs_own_where_it_can_be(folders, kind):
    config = LanguageModel(ModelSource(name=folders[kind]))._model.config
    own = kind in ("gemma2", "bloom", "mpt")  # caps the scores; ALiBi
    assert config._attn_implementation == ("eager" if own else "sdpa")


def test_a_model_spread_by_accelerate_gives_the_same(folders, ids):
    pytest.importorskip("accelerate")
    for head in (False, True):
        one, spread = (
            LanguageModel(ModelSource(name=folders["llama"], device_map=device_map), head=head)
            for device_map in (None, "auto")
        )
        assert spread.activations(ids, [2])[2].equal(one.activations(ids, [2])[2])
    edits = {1: torch.zeros_like}
    assert spread.token_losses(ids, edits).equal(one.token_losses(ids, edits))


def test_a_device_map_without_accelerate_is_refused(folders, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"device_map: auto.*not installed; .*pip install"):
        LanguageModel(ModelSource(name=folders["llama"], device_map="auto"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"hook_points": "layers.{layer}.nonesuch"},
            r"no module layers\.0\.nonesuch.*layers\.0\.mlp",
        ),
        ({"hook_points": "blocks.{layer}"}, r"no module blocks\.0.*layers\.0,"),
        ({"hook_points": "layers.{layer}.mlp.up_proj"}, r"gives \(4, 24, 32\).*\(4, 24, 16\)"),
    ],
)
def test_a_path_that_is_no_hook_point_is_named(folders, ids, settings, named):
    with pytest.raises(InputError, match=named):
        LanguageModel(ModelSource(name=folders["llama"], **settings)).activations(ids, [0])


def test_a_hook_point_that_never_runs_is_named(folders, ids):
    model = LanguageModel(ModelSource(name=folders["llama"]))
    model._hook_points[1] = nn.Identity()
    with pytest.raises(InputError, match=r"layers \[1\] of .* take no part.*choose another module"):
        model.activations(ids, [0, 1])


def test_blocks_that_name_no_such_part_are_named():
    config = CONFIGS["llama"]
    model = AutoModel.from_config(config)
    for block in model.layers:
        block.feed, block.mlp = block.mlp, None
    with pytest.raises(InputError, match=r"name no mlp; they have self_attn.*model\.hook_points"):
        find_hook_points(model, N_LAYERS, ModelSource(name="x", site="mlp"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hook_points": "layers.0"}, r"hook_points: 'layers\.0' names no module for each layer"),
        ({"hook_points": "h.{layer}.{x}"}, "names no module for each layer"),
        ({"hook_points": "h.{layer}", "site": "mlp"}, "site: mlp says it too; leave out either"),
    ],
)
def test_impossible_hook_points_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        ModelSource(name="x", **settings)
