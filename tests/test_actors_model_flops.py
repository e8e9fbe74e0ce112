"""FLOPs of a forward pass against the formula of Group-SAE and its published figures."""

import pytest
from transformers import BertConfig, GPTNeoXConfig, MixtralConfig

from actors.model_flops import forward_flops_per_token
from actors.model_source import ModelSource

PYTHIA = {
    "160m": (768, 12, 12, 207.62),
    "410m": (1024, 24, 16, 704.64),
    "1b": (2048, 16, 8, 1744.83),
}
"""d_model, layers, heads, and the published MFLOPs per token at a context of 1024."""


@pytest.mark.parametrize("name", PYTHIA)
def test_pythia_costs_what_is_published(name, tmp_path):
    d_model, n_layers, n_heads, published = PYTHIA[name]
    GPTNeoXConfig(
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=4 * d_model,
        vocab_size=50304,
        max_position_embeddings=2048,
        use_cache=False,
    ).save_pretrained(tmp_path)
    flops = forward_flops_per_token(ModelSource(name=str(tmp_path)), context=1024)
    assert flops == 24 * n_layers * d_model**2 + 4 * n_layers * 1024 * d_model
    assert flops / 1e6 == pytest.approx(published, abs=0.005)


def test_an_encoder_is_counted_and_a_pass_that_depends_on_values_is_not(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {**small, "intermediate_size": 128, "vocab_size": 99, "max_position_embeddings": 64}
    BertConfig(**sizes).save_pretrained(tmp_path / "bert")
    bert = forward_flops_per_token(ModelSource(name=str(tmp_path / "bert")), context=64)
    assert bert == pytest.approx(24 * 2 * 32**2 + 4 * 2 * 64 * 32, rel=0.02)  # and the pooler
    MixtralConfig(**sizes, num_key_value_heads=2).save_pretrained(tmp_path / "mixtral")
    assert forward_flops_per_token(ModelSource(name=str(tmp_path / "mixtral")), context=64) is None
