"""What each token id stands for in a text, for people to read."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no text


class TokenText:
    """The text of single tokens as it stands inside a text, with the space that a token opens with.

    A token that is only part of a character has no text: its name in the vocabulary stands for
    it, in ⟨ ⟩.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        # Decoders drop the space at the start of a text, so tokens are decoded after another one.
        ids = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor: list[int] = ids[-1:]
        self._anchor_text = self._decoded([self._anchor])[0]

    @property
    def vocabulary(self) -> int:
        """Ids from 0 to below this have a text."""
        return len(self._tokenizer)

    def of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        after = self._decoded([[*self._anchor, i] for i in ids])
        alone = self._decoded([[i] for i in ids])
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        return [
            f"⟨{name}⟩" if _REPLACEMENT in one else self._without_anchor(two, one)
            for two, one, name in zip(after, alone, names, strict=True)
        ]

    def _without_anchor(self, after: str, alone: str) -> str:
        found = after.startswith(self._anchor_text)
        return after.removeprefix(self._anchor_text) if found else alone

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [str(self._tokenizer.decode(each, **options)) for each in ids]
