"""Small language models of random weights, and token stores for them."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from storage.tokens import TokenSpec, TokenWriter

VOCABULARY, CONTEXT, N_LAYERS, D_MODEL = 61, 24, 3, 16
BOS = 1
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "intermediate_size": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=32),
    "llama": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2, n_positions=CONTEXT
    ),
    "qwen2": Qwen2Config(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=8),
    "gemma2": Gemma2Config(**_LLAMA, head_dim=8, sliding_window=8, layer_types=None),
    "opt": OPTConfig(**_SIZES, ffn_dim=32, word_embed_proj_dim=D_MODEL),
    "falcon": FalconConfig(**_SIZES),  # sums its MLP and attention in place
    "bert": BertConfig(**_SIZES, intermediate_size=32),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=2),
    "mpt": MptConfig(
        vocab_size=VOCABULARY, d_model=D_MODEL, n_layers=N_LAYERS, n_heads=2, max_seq_len=CONTEXT
    ),
}


def random_model(folder: Path, kind: str = "gpt_neox") -> Path:
    """A model of one of CONFIGS with its head, saved in `folder`; always the same one."""
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(CONFIGS[kind])
    for parameter in model.parameters():  # the default is so small that blocks hardly differ
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def random_tokens(
    path: Path,
    n_sequences: int,
    context: int = CONTEXT,
    ids: np.ndarray | None = None,
    split: str = "train",
) -> Path:
    """A token store of one split: BOS and random ids, always the same ones, or `ids`."""
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
    writer = TokenWriter(path, spec, {split: n_sequences})
    writer.append(split, ids, np.zeros_like(ids))
    writer.seal()
    return path
