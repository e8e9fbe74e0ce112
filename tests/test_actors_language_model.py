import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
)

from actors.errors import InputError
from actors.language_model import LanguageModel, ModelShape, describe
from actors.model_source import ModelSource
from tests.models import CONTEXT, D_MODEL, VOCABULARY, random_model


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def folder(request, tmp_path_factory) -> Path:
    return random_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, CONTEXT))


def test_residuals_are_the_hidden_states_but_for_the_last_which_is_before_the_norm(folder, ids):
    reference = AutoModel.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True, use_cache=False).hidden_states

    residuals = LanguageModel(ModelSource(name=str(folder))).activations(ids, range(3))

    assert list(residuals) == [0, 1, 2]
    torch.testing.assert_close(residuals[0], hidden[1], rtol=0, atol=0)
    torch.testing.assert_close(residuals[1], hidden[2], rtol=0, atol=0)
    final_norm = next(
        module for name, module in reference.named_children() if "norm" in name or name == "ln_f"
    )
    with torch.no_grad():
        torch.testing.assert_close(final_norm(residuals[2]), hidden[3], rtol=0, atol=0)


def test_one_layer_alone_is_what_it_is_among_all_and_later_blocks_do_not_run(folder, ids):
    model = LanguageModel(ModelSource(name=str(folder)))
    every = model.activations(ids, [2, 0, 1])
    reached = []
    for layer, block in enumerate(model._hook_points):
        block.register_forward_hook(lambda *_, layer=layer: reached.append(layer))
    alone = model.activations(ids, [1])
    assert list(alone) == [1]
    assert reached == [0, 1]
    torch.testing.assert_close(alone[1], every[1], rtol=0, atol=0)


def test_the_head_changes_nothing_of_the_residuals(folder, ids):
    source = ModelSource(name=str(folder))
    with_head, without = (
        LanguageModel(source, head=head).activations(ids, [2]) for head in (True, False)
    )
    torch.testing.assert_close(with_head, without, rtol=0, atol=0)


def test_clean_losses_average_to_the_models_own_loss(folder, ids):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        expected = reference(ids, labels=ids).loss
    losses = LanguageModel(ModelSource(name=str(folder)), head=True).token_losses(ids)
    assert losses.shape == (4, CONTEXT - 1)
    torch.testing.assert_close(losses.mean(), expected)


def test_loss_of_a_token_depends_on_those_before_it_alone(folder, ids):
    model = LanguageModel(ModelSource(name=str(folder)), head=True)
    other = ids.clone()
    other[:, 10] = (other[:, 10] + 1) % VOCABULARY
    same = model.token_losses(ids).isclose(model.token_losses(other), rtol=1e-5, atol=1e-5)
    assert same[:, :9].all()
    assert not same[:, 9:].all(dim=1).any()


def test_an_edit_that_changes_nothing_leaves_the_losses_exactly(folder, ids):
    model = LanguageModel(ModelSource(name=str(folder)), head=True)
    clean = model.token_losses(ids)
    seen = {}

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        seen["x"] = x.clone()
        return x.clone()

    assert model.token_losses(ids, {1: unchanged}).equal(clean)
    assert seen["x"].equal(model.activations(ids, [1])[1])
    assert model.token_losses(ids).equal(clean)


def test_an_edit_replaces_what_later_blocks_see(folder, ids):
    """Replacing a block's output by another sequence's gives that sequence's predictions."""
    model = LanguageModel(ModelSource(name=str(folder)), head=True)
    shuffled = ids.flip(0)
    donor = model.activations(shuffled, [1])[1]
    logits = model._model(shuffled, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    spliced = model.token_losses(ids, {1: lambda _: donor})
    torch.testing.assert_close(spliced.flatten(), expected)
    assert not spliced.equal(model.token_losses(ids))


def test_shape_comes_from_the_configuration_alone(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    shape = describe(ModelSource(name=str(tmp_path)))
    assert shape == ModelShape(n_layers=3, d_model=D_MODEL, longest=CONTEXT, vocabulary=VOCABULARY)
    assert LanguageModel(ModelSource(name=str(folder))).shape == shape


@pytest.mark.parametrize(
    ("config", "longest", "context"),
    [
        (LlamaConfig(max_position_embeddings=131_072), 131_072, 1024),
        (GPT2Config(n_positions=512), 512, 512),
        (MptConfig(max_seq_len=2048), 2048, 1024),
        (BloomConfig(), None, 1024),  # ALiBi takes any
    ],
)
def test_sequences_are_the_models_longest_but_not_so_long_that_a_shard_holds_few(
    tmp_path, config, longest, context
):
    config.save_pretrained(tmp_path)
    shape = describe(ModelSource(name=str(tmp_path)))
    assert (shape.longest, shape.context) == (longest, context)
    assert shape.takes(longest or 10**6)
    assert longest is None or not shape.takes(longest + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_the_model_computes_in_the_dtype_of_its_source(folder, ids, dtype):
    residual = LanguageModel(ModelSource(name=str(folder), dtype=dtype)).activations(ids, [0])[0]
    assert residual.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))


def test_sequences_beyond_the_models_positions_are_refused(folder):
    model = LanguageModel(ModelSource(name=str(folder)))
    with pytest.raises(InputError, match=r"25 tokens.*24 positions.*lower harvest\.context"):
        model.activations(torch.zeros(1, CONTEXT + 1, dtype=torch.int64), [0])


def test_tokens_and_layers_that_are_not_the_models_are_refused(folder, ids):
    model = LanguageModel(ModelSource(name=str(folder)))
    with pytest.raises(InputError, match=r"token 61 .* which has 61"):
        model.activations(torch.full((1, 3), VOCABULARY), [0])
    with pytest.raises(InputError, match=r"layers 0 to 2, and was asked for \[3\]"):
        model.activations(ids, [1, 3])


def test_a_folder_without_weights_is_named_with_the_remedy(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(
        InputError, match=r"the model .* can't be loaded: .*no file named .*safetensors"
    ):
        LanguageModel(ModelSource(name=str(tmp_path)))


def test_a_folder_with_part_of_the_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = 4
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "layer_types": None}))
    with pytest.raises(InputError, match=r"lack \d+ of the model's tensors"):
        LanguageModel(ModelSource(name=str(tmp_path / "m")))


def test_torn_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match=r"the model .* can't be loaded"):
        LanguageModel(ModelSource(name=str(tmp_path / "m")))


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        describe(ModelSource(name=str(tmp_path)))
    for text in ("{not json", '{"model_type": "nonesuch"}', "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"the model .* can't be loaded"):
            describe(ModelSource(name=str(tmp_path)))


def test_an_encoder_with_a_decoder_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(
        InputError, match=r"t5.* does not say its max_position.*give a decoder-only"
    ):
        describe(ModelSource(name=str(tmp_path)))


def test_a_path_that_is_no_folder_is_named():
    with pytest.raises(InputError, match=r"'/nowhere/model' is no folder that exists"):
        describe(ModelSource(name="/nowhere/model"))


def test_a_hub_model_without_network_says_how_to_use_a_folder():
    """The suite sets HF_HUB_OFFLINE, so that nothing asks the network."""
    with pytest.raises(
        InputError, match=r"not a local folder and the Hub can't be reached.*give the folder"
    ):
        LanguageModel(ModelSource(name="nobody/no-such-model"))


def test_the_shared_model_predicts_its_stories(shared):
    path = shared / "models/stories260K"
    stories = (shared / "data/tinystories.jsonl").read_text().splitlines()
    text = json.loads(stories[0])["text"]
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
    loss = LanguageModel(ModelSource(name=str(path)), head=True).token_losses(ids).mean()
    assert 1.0 < loss < 2.0  # about 1.5 nats per token is its known loss on these stories
