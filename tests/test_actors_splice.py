"""Splicing into models of several architectures, against forward passes made by hand."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from actors.errors import InputError
from actors.splice import splice, used_rows
from sae.autoencoder import SparseAutoencoder
from sae.config import KronShape, SaeConfig
from sae.interventions import ablate, clamp
from storage.hygiene import Hygiene, RowFilter
from tests.models import BOS, D_MODEL, N_LAYERS, VOCABULARY, random_model

KINDS = ("gpt2", "llama", "bert", "falcon")
BLOCKS = {"gpt2": "h", "llama": "layers", "bert": "encoder.layer", "falcon": "h"}
D_SAE, K = 48, 5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for kind in KINDS:
        folder = random_model(tmp_path_factory.mktemp(kind), kind)
        auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
        made[kind] = auto.from_pretrained(folder).eval().requires_grad_(False)
    return made


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (3, 7))


def autoencoder(selection: Any = "topk", d_model: int = D_MODEL, layers: Any = range(N_LAYERS)):
    cfg = SaeConfig(d_model=d_model, d_sae=D_SAE, k=K, selection=selection)
    sae = SparseAutoencoder(cfg, {layer: 0.5 + layer for layer in layers}, seed=3)
    nn.init.normal_(sae.b_dec, std=0.3)
    if selection == "batch_topk":
        sae.set_threshold(0.7)
    return sae.requires_grad_(False)


def block(model, kind, layer):
    return model.base_model.get_submodule(f"{BLOCKS[kind]}.{layer}")


def by_hand(model, kind, ids, layer, replace):
    """Logits with a layer's output replaced by a hook of this test's own."""

    def hook(_module, _inputs, output):
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    handle = block(model, kind, layer).register_forward_hook(hook)
    logits = model(ids).logits
    handle.remove()
    return logits


def reconstructed(sae, layer):
    def replace(x):
        rows = x.reshape(-1, x.shape[-1])
        return sae.reconstruct(rows, torch.full((len(rows),), layer)).x_hat.view_as(x)

    return replace


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spliced_model_equals_one_spliced_by_hand(models, ids, kind, selection):
    model, sae = models[kind], autoencoder(selection)
    expected = by_hand(model, kind, ids, 1, reconstructed(sae, 1))
    with splice(model, {1: sae}) as spliced:
        found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert not found.isclose(model(ids).logits).all()
    assert spliced.rows[1].shape == ids.shape
    assert spliced.latents[1].n_tokens == ids.numel()
    assert not n_hooks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_its_error_term_a_model_computes_what_it_computes_alone(models, ids, kind, dtype):
    model = models[kind].to(dtype)
    clean = model(ids).logits
    with splice(model, {layer: autoencoder() for layer in range(N_LAYERS)}, error_term=True):
        found = model(ids).logits
    models[kind].to(torch.float32)
    assert found.dtype == dtype
    assert found.equal(clean)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_latents(models, ids, kind, error_term):
    model, sae = models[kind], autoencoder()
    with splice(model, {1: sae}, error_term=error_term) as spliced:
        model(ids).logits.square().mean().backward()
    latents = spliced.latents[1]
    assert latents.values.grad is not None

    # The same by finite differences on one latent of one token, by an edit that moves it.
    entry = int(latents.values.grad.abs().argmax())
    step = 1e-2

    def moved(by):
        def move(z):
            values = z.values.clone()
            values[entry] += by
            return type(z)(values, z.pattern)

        with splice(model, {1: sae}, error_term=error_term, edits={1: move}), torch.no_grad():
            return model(ids).logits.double().square().mean()

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert float(latents.values.grad[entry]) == pytest.approx(float(slope), rel=0.02)


def test_gradients_pass_through_the_latents_to_earlier_layers_and_to_autoencoders(models, ids):
    model, saes = models["gpt2"], {0: autoencoder(), 2: autoencoder().requires_grad_(True)}
    with splice(model, saes, error_term=True) as spliced:
        model(ids).logits.square().mean().backward()
    for parameter in (spliced.latents[0].values, saes[2].w_dec):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert saes[0].w_dec.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_the_latents_alone_and_the_error_stays(models, ids, kind):
    model, sae = models[kind], autoencoder()
    with splice(model, {1: sae}) as spliced, torch.no_grad():
        model(ids)
    latent = int(spliced.latents[1].indices.mode().values)

    def without(x):
        rows = x.reshape(-1, x.shape[-1])
        latents = sae.reconstruct(rows, torch.full((len(rows),), 1)).latents.dense()
        write = latents[:, latent, None] * sae.w_dec[latent] / sae.layer_scale[1]
        return (rows - write).view_as(x)

    expected = by_hand(model, kind, ids, 1, without)
    edits = {1: lambda z: ablate(z, [latent])}
    with splice(model, {1: sae}, error_term=True, edits=edits) as spliced:
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert latent in spliced.latents[1].indices, "latents are those before the edit"


def test_ablated_and_clamped_codes_are_what_dense_ones_would_be():
    sae = autoencoder()
    latents = sae.encode(torch.randn(9, D_MODEL))
    first, second = int(latents.indices[0]), int((latents.indices[0] + 1) % D_SAE)
    expected = latents.dense()
    expected[:, first] = 0
    torch.testing.assert_close(ablate(latents, [first]).dense(), expected)
    expected[:, [first, second]] = 2.5
    clamped = clamp(latents, torch.tensor([second, first, first]), 2.5)
    torch.testing.assert_close(clamped.dense(), expected)
    torch.testing.assert_close(sae.decode(clamped), expected @ sae.w_dec + sae.b_dec)
    for intervene in (lambda z: ablate(z, [D_SAE]), lambda z: clamp(z, [-1], 1.0)):
        with pytest.raises(ValueError, match="are not of this dictionary, which has 48; give"):
            intervene(latents)


def test_only_the_rows_of_the_mask_are_replaced(models, ids):
    model, sae = models["llama"], autoencoder()
    mask = torch.rand(ids.shape) < 0.5
    replace = reconstructed(sae, 1)
    expected = by_hand(
        model, "llama", ids, 1, lambda x: torch.where(mask[..., None], replace(x), x)
    )
    with splice(model, {1: sae}, rows=mask) as spliced:
        torch.testing.assert_close(model(ids).logits, expected)
    assert spliced.rows[1].equal(mask)
    assert spliced.latents[1].n_tokens == mask.sum()

    with splice(model, {1: sae}, rows=torch.zeros_like(mask)) as spliced:
        assert model(ids).logits.equal(model(ids).logits)
        assert not spliced.latents


def test_the_rows_may_be_those_that_training_uses(models, ids):
    model, sae = models["gpt2"], autoencoder()
    ids[1, 3] = BOS
    row_filter = RowFilter(Hygiene(), [BOS], dict.fromkeys(range(N_LAYERS), 1e6))
    with splice(model, {1: sae}, rows=used_rows(ids.numpy(), row_filter, 1)) as spliced:
        model(ids)
        expected = torch.ones_like(ids, dtype=torch.bool)
        expected[:, 0] = expected[1, 3] = False
        assert spliced.rows[1].equal(expected)
        with pytest.raises(InputError, match=r"rows: \(3, 7\) token ids .* give the ids of the"):
            model(ids[:2])


def test_a_spliced_model_generates_token_by_token(models):
    model, sae = models["llama"], autoencoder("batch_topk")
    prompt, options = torch.tensor([[2, 9, 4]]), {"do_sample": False, "max_new_tokens": 5}
    with splice(model, {1: sae}), torch.no_grad():
        cached = model.generate(prompt, **options)
        assert cached.equal(model.generate(prompt, use_cache=False, **options))


def test_a_failure_inside_leaves_the_model_and_the_autoencoder_as_they_were(models, ids):
    model, sae = models["gpt2"], autoencoder().train()
    clean = model(ids).logits

    def fail() -> None:
        with splice(model, {0: sae, 2: sae}):
            assert not sae.training
            model(ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not n_hooks(model)
    assert sae.training
    assert model(ids).logits.equal(clean)


def test_latents_are_of_the_last_forward_pass_alone(models, ids):
    model = models["gpt2"]
    with splice(model, {0: autoencoder(), 2: autoencoder()}) as spliced:
        model(ids)
        handle = block(model, "gpt2", 1).register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:1])
        handle.remove()
        assert set(spliced.latents) == {0}
        assert spliced.latents[0].n_tokens == ids.shape[1]


def test_a_kronecker_autoencoder_can_be_spliced_in(models, ids):
    shape = KronShape(h=6, m=2, n=4)
    cfg = SaeConfig(d_model=D_MODEL, d_sae=D_SAE, k=K, encoder=shape)
    sae = SparseAutoencoder(cfg, {1: 1.0})
    expected = by_hand(models["gpt2"], "gpt2", ids, 1, reconstructed(sae, 1))
    with splice(models["gpt2"], {1: sae}), torch.no_grad():
        torch.testing.assert_close(models["gpt2"](ids).logits, expected)


@pytest.mark.parametrize(
    ("saes", "options", "message"),
    [
        ({3: autoencoder()}, {}, "no layer 3; the model has 3, counted from 0; give 0 to 2"),
        ({-1: autoencoder()}, {}, "no layer -1; the model has 3, counted from 0; give 0 to 2"),
        ({1: autoencoder(d_model=24)}, {}, r"saes\[1\] reads .* width 24, .* 16; give an auto"),
        (
            {2: autoencoder(layers=[0, 1])},
            {},
            r"saes\[2\] has no scale for layer 2, only .* splice",
        ),
        ({1: autoencoder()}, {"edits": {0: ablate}}, r"edits: layers \[0\] have no .* saes"),
    ],
    ids=["too-high", "negative", "width", "scale", "edit"],
)
def test_what_does_not_fit_is_refused_before_anything_runs(models, saes, options, message):
    with pytest.raises(InputError, match=message), splice(models["gpt2"], saes, **options):
        raise AssertionError("it began")
    assert not n_hooks(models["gpt2"])


@pytest.mark.parametrize("shape", [(2, 2), (7, 3), (21,)], ids=str)
def test_a_mask_of_another_shape_is_refused(models, ids, shape):
    wrong = torch.ones(shape, dtype=torch.bool)
    with (
        splice(models["gpt2"], {1: autoencoder()}, rows=lambda *_: wrong),
        pytest.raises(InputError, match=r"rows: .* give one boolean for each"),
    ):
        models["gpt2"](ids)


def test_a_mask_may_be_numpys(models, ids):
    sae, mask = autoencoder(), torch.rand(ids.shape) < 0.5
    with splice(models["gpt2"], {1: sae}, rows=mask), torch.no_grad():
        expected = models["gpt2"](ids).logits
    with splice(models["gpt2"], {1: sae}, rows=mask.numpy()), torch.no_grad():
        assert models["gpt2"](ids).logits.equal(expected)
