"""The text of single tokens against the text that tokenizers make of whole ones."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.token_text import TokenText
from tests.tokenizers_of_words import byte_pairs

TEXT = "the quick  brown fox\n jumps\tover </script> it's"


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_bytes() -> Tokenizer:
    """As byte_pairs, with the decoder that such a tokenizer has."""
    tokenizer = byte_pairs()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_spaces() -> Tokenizer:
    """As SentencePiece: a mark for a space, which is left out at the start of a text."""
    vocabulary = {"<unk>": 0, "\u2581": 1, "\u2581a": 2, "\u2581the": 3, "b": 4, "a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_the_texts_of_the_tokens_of_a_text_are_the_text():
    tokenizer = wrapped(with_bytes())
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert "".join(TokenText(tokenizer).of(ids)) == TEXT


def test_the_space_that_a_token_opens_with_is_kept_where_decoders_drop_it():
    tokenizer = wrapped(with_spaces())
    assert tokenizer.decode([3]) == "the"
    assert TokenText(tokenizer).of([3, 4, 2]) == [" the", "b", " a"]


def test_a_part_of_a_character_is_named_by_the_vocabulary():
    tokenizer = wrapped(with_bytes())
    ids = tokenizer("é", add_special_tokens=False).input_ids
    assert len(ids) == 2
    assert TokenText(tokenizer).of(ids) == [f"⟨{t}⟩" for t in tokenizer.convert_ids_to_tokens(ids)]


@pytest.mark.parametrize("ids", [[], [0], [0, 0]])
def test_special_tokens_have_their_name(ids):
    assert TokenText(wrapped(with_bytes())).of(ids) == ["<bos>"] * len(ids)
