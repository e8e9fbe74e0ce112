"""Small language models of random weights, and token stores for them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from storage.tokens import TokenSpec, TokenWriter

VOCABULARY, CONTEXT, N_LAYERS, D_MODEL = 61, 24, 3, 16
BOS = 1
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2, n_positions=CONTEXT
    ),
}


def random_model(folder: Path, kind: str = "gpt_neox") -> Path:
    """A model of one of CONFIGS with its head, saved in `folder`; always the same one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for parameter in model.parameters():  # the default is so small that blocks hardly differ
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def random_tokens(
    path: Path, n_sequences: int, context: int = CONTEXT, ids: np.ndarray | None = None
) -> Path:
    """A token store of one split, `train`: BOS and random ids, always the same ones, or `ids`."""
    if ids is None:
        ids = np.random.default_rng(0).integers(2, VOCABULARY, (n_sequences, context), np.uint32)
        ids[:, 0] = BOS
    spec = TokenSpec(
        context=ids.shape[1],
        first_position=1,
        separator_id=BOS,
        special_ids=(BOS,),
        tokenizer="random",
    )
    writer = TokenWriter(path, spec, {"train": n_sequences})
    writer.append("train", ids, np.zeros_like(ids))
    writer.seal()
    return path
