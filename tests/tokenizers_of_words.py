"""Tokenizers of a few words, built here, and corpora of those words."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from actors.corpus import FilesCorpus
from actors.model_source import ModelSource
from actors.packer import load_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "does",
    "so",
    "again",
]
BOS, EOS = 0, 1


def byte_pairs(template: str = "") -> Tokenizer:
    """A byte-level BPE that knows `<bos>` and `<eos>`, and puts them around a text as the template says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
        )
    return tokenizer


def saved(
    tokenizer: Tokenizer,
    folder: Path,
    cls: bool = False,
    special: bool = True,
    chat_template: str | None = None,
    **roles: object,
) -> ModelSource:
    """A model's folder with this tokenizer; `cls` names its special tokens as BERT does, `roles` others."""
    tokenizer.enable_truncation(4)  # what a tokenizer.json may well say, and must not be obeyed
    first, last = ("cls_token", "sep_token") if cls else ("bos_token", "eos_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        **({first: "<bos>", last: "<eos>"} if special else {}),
        **roles,
    ).save_pretrained(folder)
    GPTNeoXConfig().save_pretrained(folder)  # without one it is no model's folder
    return ModelSource(name=str(folder))


def corpus_of(texts: Sequence[str], folder: Path) -> FilesCorpus:
    """A document per text, in one file."""
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FilesCorpus(paths=(str(path),))


@cache
def token_ids(model: ModelSource, text: str) -> list[int]:
    """The ids of a text, nothing added and nothing cut."""
    backend = load_tokenizer(model).backend_tokenizer
    backend.no_truncation()
    return backend.encode(text, add_special_tokens=False).ids


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 59 words, always the same ones."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 60))) for _ in range(n)]
