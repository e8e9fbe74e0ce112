"""The embedded model is what its card says: small, loadable offline, and really trained."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from examples.tiny_lm import train
from examples.tiny_lm.train import (
    CONTEXT,
    SEPARATOR,
    held_out_loss,
    is_held_out,
    split_corpus,
    tokenize,
    unigram_entropy,
)

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "tiny_lm"
MODEL = FOLDER / "model"


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    return tokenize(tokenizer.backend_tokenizer, split_corpus()[1])


def test_it_is_a_pythia_in_small(model: GPTNeoXForCausalLM):
    cfg = model.config
    assert cfg.model_type == "gpt_neox"
    assert (cfg.num_hidden_layers, cfg.hidden_size) == (8, 128)
    assert (cfg.max_position_embeddings, cfg.vocab_size) == (CONTEXT, 4096)


def test_it_predicts_held_out_modules_two_nats_better_than_their_token_frequencies(
    model: GPTNeoXForCausalLM, held_out: np.ndarray
):
    # Every twelfth context, so that the sample takes from all held-out modules.
    contexts = held_out[: len(held_out) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    loss = held_out_loss(model, contexts[::12].ravel())
    assert loss < unigram_entropy(held_out) - 2


def test_the_card_states_the_loss_that_the_weights_have(
    model: GPTNeoXForCausalLM, held_out: np.ndarray
):
    card = (FOLDER / "README.md").read_text()
    stated = re.search(r"held-out loss\*\* \| \*\*([\d.]+) nats", card)
    assert stated is not None
    contexts = held_out[: len(held_out) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    # Another Python release has other modules; a twelfth of them is another sample.
    assert held_out_loss(model, contexts[::12].ravel()) == pytest.approx(float(stated[1]), abs=0.3)


def test_the_tokenizer_adds_no_bos_and_gives_text_back():
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    text = "def f(x):\n    return x  # ünïcode\n"
    assert tokenizer.eos_token == SEPARATOR
    assert tokenizer.bos_token_id not in tokenizer("x").input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_weights_are_safetensors_of_at_most_eight_megabytes():
    files = list(MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_about_three_percent_of_the_modules_are_held_out_for_ever():
    seen, held_out = split_corpus()
    assert 0.02 < len(held_out) / (len(seen) + len(held_out)) < 0.05
    assert is_held_out("shutil")
    assert not is_held_out("os")


def test_a_training_that_was_cut_short_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "BATCH_SEQUENCES", 2)
    tokens = np.random.default_rng(0).integers(0, train.VOCABULARY, 5000)

    def weights_after(stops: list[int], work: Path) -> dict[str, torch.Tensor]:
        work.mkdir()
        for stop in stops:
            training = train.Training(work, tokens, n_steps=4, device="cpu")
            training.run_to(stop)
            training.save()
        return torch.load(work / "checkpoint.pt", weights_only=True)["model"]

    unbroken = weights_after([4], tmp_path / "unbroken")
    continued = weights_after([1, 4], tmp_path / "continued")
    for name, weight in unbroken.items():
        assert torch.equal(weight, continued[name]), name
