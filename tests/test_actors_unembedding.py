"""Decoded tokens against each architecture's own norm and unembedding, written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actors.language_model import LanguageModel
from actors.model_source import ModelSource
from actors.unembedding import Unembedding
from tests.models import CONFIGS, D_MODEL, VOCABULARY, random_model

NORMS = {
    "gpt_neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "qwen2": "model.norm",
    "mistral": "model.norm",
    "gemma2": "model.norm",
    "opt": "model.decoder.final_layer_norm",
    "falcon": "transformer.ln_f",
    "bloom": "transformer.ln_f",
    "mpt": "transformer.norm_f",
}


def test_every_causal_architecture_is_listed():
    assert set(NORMS) == set(CONFIGS) - {"bert"}


@pytest.mark.parametrize("kind", NORMS)
def test_tokens_are_ranked_by_the_models_own_norm_and_unembedding(kind, tmp_path):
    source = ModelSource(name=str(random_model(tmp_path, kind)))
    transformer = LanguageModel(source, head=True).transformer
    norm, head = transformer.get_submodule(NORMS[kind]), transformer.get_output_embeddings()
    rows = torch.randn(20, D_MODEL)
    if isinstance(norm, nn.LayerNorm):
        z = F.layer_norm(rows, [D_MODEL]) * norm.weight
    else:
        gain = 1 + norm.weight if kind == "gemma2" else norm.weight
        z = F.rms_norm(rows, [D_MODEL]) * gain
    wanted = (z @ head.weight.T)[:, :50].topk(6)
    found = Unembedding.of(source).top_tokens(rows, 6, 50)
    assert torch.equal(found.ids, wanted.indices)
    assert torch.allclose(found.logits, wanted.values, rtol=1e-3, atol=1e-4)


def test_biases_and_the_length_of_a_direction_change_nothing(tmp_path, monkeypatch):
    source = ModelSource(name=str(random_model(tmp_path)))
    model = LanguageModel(source, head=True)
    monkeypatch.setattr("actors.unembedding._LOGITS_AT_ONCE", 3 * VOCABULARY)  # several blocks
    rows = torch.randn(10, D_MODEL)
    before = Unembedding(model).top_tokens(rows, 5, VOCABULARY)
    nn.init.normal_(model.transformer.get_submodule(NORMS["gpt_neox"]).bias, std=30)
    after = Unembedding(model).top_tokens(rows * torch.logspace(-3, 3, 10)[:, None], 5, VOCABULARY)
    assert torch.equal(before.ids, after.ids)
    assert torch.allclose(before.logits, after.logits, rtol=1e-3)
    assert bool((before.logits.diff(dim=1) <= 0).all())


def test_a_model_in_half_precision_ranks_in_float32(tmp_path):
    source = ModelSource(name=str(random_model(tmp_path)), dtype="bfloat16")
    transformer = LanguageModel(source, head=True).transformer
    weight = transformer.get_output_embeddings().weight.float()
    gain = transformer.get_submodule(NORMS["gpt_neox"]).weight.float()
    rows = torch.randn(20, D_MODEL)
    wanted = ((F.layer_norm(rows, [D_MODEL]) * gain) @ weight.T).topk(5)
    found = Unembedding.of(source).top_tokens(rows, 5, VOCABULARY)
    assert torch.equal(found.ids, wanted.indices)


def test_of_few_tokens_all_are_given(tmp_path):
    source = ModelSource(name=str(random_model(tmp_path)))
    found = Unembedding.of(source).top_tokens(torch.randn(2, D_MODEL), 8, 3)
    assert found.ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2
