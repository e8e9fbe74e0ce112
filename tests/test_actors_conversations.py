"""Conversations as documents: rendered by the tokenizer's own chat template."""

import json
from pathlib import Path

import numpy as np
import pytest

from actors.corpus import FilesCorpus
from actors.errors import InputError
from actors.packer import Packer
from storage.tokens import TokenStore
from tests.tokenizers_of_words import BOS, EOS, byte_pairs, corpus_of, saved, token_ids

CHAT = (
    "<bos>{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
)


def chats(folder: Path, *conversations: object) -> FilesCorpus:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    return FilesCorpus(paths=(str(path),), chat_template=True)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("template", ["", "<bos> $A", "<bos> $A <eos>"])
def test_a_conversation_is_what_the_chat_template_makes_of_it(template: str, tmp_path: Path):
    model = saved(byte_pairs(template), tmp_path / "model", chat_template=CHAT)
    corpus = chats(tmp_path, [turn("user", "the quick"), turn("assistant", "brown fox")])
    written = [
        *(BOS, *token_ids(model, "user: the quick"), EOS),
        *(*token_ids(model, "assistant: brown fox"), EOS),
    ]
    Packer(model, corpus, len(written)).pack(tmp_path / "t", {"train": 1}, 0)
    ids = TokenStore.open(tmp_path / "t").ids("train", np.array([0]))
    assert ids.tolist() == [written]  # the template's BOS and EOS are not written twice


def test_a_conversation_that_can_not_be_rendered_is_named(tmp_path: Path):
    wizard = chats(tmp_path, [turn("user", "x")], [turn("wizard", "x")])
    with pytest.raises(InputError, match=r"tokenizer of .* has no chat template, which"):
        Packer(saved(byte_pairs(), tmp_path / "plain"), wizard, 8).pack(
            tmp_path / "t", {"train": 1}, 0
        )
    model = saved(byte_pairs(), tmp_path / "model", chat_template=CHAT)
    with pytest.raises(InputError, match=r"chats\.jsonl:2: the chat template .*no such role"):
        Packer(model, wizard, 8).pack(tmp_path / "t", {"train": 1}, 0)
    for strange in ("hello", [{"role": "user"}], None):
        with pytest.raises(
            InputError, match=r"chats\.jsonl:1 holds no conversation.*mend the line"
        ):
            next(chats(tmp_path, strange).documents())
    corpus = corpus_of(["x"], tmp_path)
    with pytest.raises(InputError, match=r"corpus\.jsonl:1 holds no conversation"):
        next(FilesCorpus(paths=corpus.paths, chat_template=True).documents())
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"a\.txt is no \.jsonl file"):
        next(FilesCorpus(paths=(str(tmp_path / "a.txt"),), chat_template=True).documents())
