"""Text to packed contexts: every context is full, and no document is in two splits."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt32
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.corpus import Corpus
from actors.document import Document
from actors.errors import InputError
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained
from storage.places import Location
from storage.tokens import TokenSpec, TokenWriter

BATCH_DOCUMENTS = 64
"""Documents tokenized at once, by all cores; more only delays the end of a small job."""

_NO_TOKENIZER = (
    "the model {name} comes without a tokenizer; the folder must hold its tokenizer.json too: save "
    "the tokenizer there with `save_pretrained`"
)

LEAST_SHARE = 0.05
"""Share of the documents that even the smallest split gets: with few of them, luck rules."""


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """What packing read and made."""

    n_documents: int
    """Documents read from the corpus, of all splits, with those that were not needed."""

    n_sequences: dict[str, int]
    """Contexts of each split."""

    spec: TokenSpec
    """How they were made."""


class Packer:
    """Tokenizes a corpus as a model's tokenizer wants it and packs it into contexts.

    What the tokenizer puts around a text by itself stays: its first token (BOS, or CLS in BERT) opens
    every document and every context, its last (EOS, or SEP) closes every document. Where it adds
    nothing, documents are closed by EOS; where it has none either, they follow one another. Nothing
    is truncated or padded, whatever the tokenizer's file says; a document may run over into the next
    contexts, an empty one leaves no trace.
    """

    def __init__(self, model: ModelSource, corpus: Corpus, context: int) -> None:
        self._corpus = corpus
        self._tokenizer = load_tokenizer(model)
        self._name = model.name
        self._backend = self._tokenizer.backend_tokenizer
        self._opener, self._closer = document_edges(self._tokenizer)
        digest = fingerprint(self._tokenizer)
        self.spec = TokenSpec(
            context=context,
            first_position=int(self._opener is not None),
            separator_id=self._closer if self._opener is None else self._opener,
            special_ids=special_ids(self._tokenizer),
            tokenizer=digest,
        )

    def pack(
        self,
        location: Location,
        sequences: Mapping[str, int],
        seed: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> TokenReport:
        """Write a token store, reading the corpus only as far as is needed.

        The same corpus, counts and seed give the same bytes.

        Args:
            location: Of the new store; there must be none.
            sequences: Contexts to make for each split. A document goes to a split by a hash of the
                seed and its index, with probabilities in proportion to these counts.
            seed: Of the draw of splits.
            on_tokens: Told how many tokens have been packed since it was last called.

        Raises:
            InputError: If the corpus is too small, or can't be read.
            StoreError: If there is a store already.
        """
        shares = split_shares(sequences)
        streams = {
            split: _Stream(self.spec.context, self._opener, self._closer, n)
            for split, n in sequences.items()
        }
        n_documents = 0
        writer = TokenWriter(location, self.spec, sequences)
        documents = enumerate(self._corpus.documents())
        while unfilled := {s for s, stream in streams.items() if stream.missing}:
            batch = list(islice(documents, BATCH_DOCUMENTS))
            if not batch:
                raise InputError(_too_small(streams, sequences, n_documents, self.spec.context))
            n_documents += len(batch)
            for split, index, ids in self._tokenized(batch, seed, shares, unfilled):
                streams[split].append(ids, index)
            for split, stream in streams.items():
                contexts = stream.take()
                writer.append(split, *contexts)
                if on_tokens is not None and contexts[0].size:
                    on_tokens(contexts[0].size)
        writer.seal()
        return TokenReport(n_documents=n_documents, n_sequences=dict(sequences), spec=self.spec)

    def _tokenized(
        self,
        batch: list[tuple[int, Document]],
        seed: int,
        shares: Mapping[str, float],
        unfilled: set[str],
    ) -> Iterator[tuple[str, int, UInt32[np.ndarray, " tokens"]]]:
        """Split, index and ids of those documents of the batch that are needed and not empty."""
        needed = [
            (split, index, self._text(document))
            for index, document in batch
            if (split := split_of(seed, index, shares)) in unfilled
        ]
        encodings = self._backend.encode_batch_fast(
            [text for _, _, text in needed], add_special_tokens=False
        )
        for (split, index, _), encoding in zip(needed, encodings, strict=True):
            if encoding.ids:
                yield split, index, np.asarray(encoding.ids, np.uint32)

    def _text(self, document: Document) -> str:
        """A document's text; a conversation's by the tokenizer's template."""
        if not document.messages:
            return document.text
        if self._tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer of {self._name} has no chat template, which corpus.chat_template asks "
                "for; save one with the tokenizer, or give texts and leave chat_template out"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(document.messages), tokenize=False)
        except Exception as error:  # a template is a program of its own
            raise InputError(
                f"{document.name}: the chat template of {self._name} does not take this conversation "
                f"({error}); mend or remove the line"
            ) from error
        return str(text)


class _Stream:
    """The documents of a split one after the other, cut into contexts."""

    def __init__(
        self, context: int, opener: int | None, closer: int | None, n_sequences: int
    ) -> None:
        self.missing = n_sequences
        self.n_documents = 0
        self._context, self._opener, self._closer = context, opener, closer
        self._parts: list[UInt32[np.ndarray, "2 tokens"]] = [np.empty((2, 0), np.uint32)]

    @property
    def n_waiting(self) -> int:
        """Tokens that are in no context yet."""
        return sum(part.shape[1] for part in self._parts)

    def append(self, ids: UInt32[np.ndarray, " tokens"], document: int) -> None:
        """Add a document; a chat template may have written opener and closer itself."""
        before = [] if self._opener in (None, ids[0]) else [self._opener]
        after = [] if self._closer in (None, ids[-1]) else [self._closer]
        tokens = np.concatenate([np.array(before, np.uint32), ids, np.array(after, np.uint32)])
        self._parts.append(np.stack([tokens, np.full_like(tokens, document)]))
        self.n_documents += 1

    def take(self) -> tuple[UInt32[np.ndarray, "n context"], UInt32[np.ndarray, "n context"]]:
        """Ids and document indices of the contexts that are full by now and still missing."""
        stream = np.concatenate(self._parts, axis=1)
        contexts: list[UInt32[np.ndarray, "2 context"]] = []
        start = 0
        while len(contexts) < self.missing:
            context = stream[:, start : start + self._context]
            start_of_next = start + self._context
            if self._opener not in (None, *context[0, :1]) and context.shape[1]:
                opener = np.array([[self._opener], [context[1, 0]]], np.uint32)
                context = np.concatenate([opener, context[:, :-1]], axis=1)
                start_of_next -= 1
            if context.shape[1] < self._context or start_of_next > stream.shape[1]:
                break
            contexts.append(context)
            start = start_of_next
        self.missing -= len(contexts)
        self._parts = [stream[:, start:]]
        packed = np.stack(contexts, axis=1) if contexts else np.empty((2, 0, self._context), "u4")
        return packed[0], packed[1]


def load_tokenizer(model: ModelSource) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Raises:
        InputError: If there is none, or it is not one of the `tokenizers` library.
    """
    folder = Path(model.name)
    if model.is_local and not [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
        raise InputError(_NO_TOKENIZER.format(name=model.name))
    tokenizer = load_pretrained(model, AutoTokenizer.from_pretrained)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of {model.name} is a {type(tokenizer).__name__}, which has no fast "
            "form; convert it to a tokenizer.json and give the local folder as model.name"
        )
    # Where its files are missing, transformers makes up a tokenizer that knows no text at all.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(_NO_TOKENIZER.format(name=model.name))
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """What tells a tokenizer from others; from now on it neither truncates nor pads."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]


def document_edges(tokenizer: PreTrainedTokenizerFast) -> tuple[int | None, int | None]:
    """The tokens that open and close a text, as the model was trained to see it; None for none."""
    ids = tokenizer("x", padding=False, truncation=False).input_ids
    openers = {_id(tokenizer, tokenizer.bos_token), _id(tokenizer, tokenizer.cls_token)} - {None}
    eos, sep = (_id(tokenizer, token) for token in (tokenizer.eos_token, tokenizer.sep_token))
    opener = ids[0] if ids and ids[0] in openers else None
    if ids and ids[-1] in {eos, sep} - {None}:
        return opener, ids[-1]
    return opener, (eos if opener is None else None)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids, ascending, of all that the tokenizer marks as special, such as the turns of a chat template.

    Not of its token for unknown text, unless that has another role too: it stands for a piece of a document.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special} | set(
        tokenizer.all_special_tokens
    )
    others = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")
    if tokenizer.unk_token not in [getattr(tokenizer, name) for name in others]:
        special.discard(str(tokenizer.unk_token))
    ids = (_id(tokenizer, token) for token in special)
    return tuple(sorted(i for i in ids if i is not None))


def _id(tokenizer: PreTrainedTokenizerFast, token: object) -> int | None:
    return None if token is None else tokenizer.backend_tokenizer.token_to_id(str(token))


def split_shares(sequences: Mapping[str, int]) -> dict[str, float]:
    """Share of the documents that each split gets: in proportion to its contexts, none tiny."""
    total = sum(sequences.values())
    shares = {split: max(n / total, LEAST_SHARE) for split, n in sequences.items() if n}
    return {split: share / sum(shares.values()) for split, share in shares.items()}


def split_of(seed: int, document: int, shares: Mapping[str, float]) -> str:
    """The split of a document, by a hash of the seed and its index in the corpus."""
    digest = hashlib.sha256(f"split {seed} {document}".encode()).digest()
    uniform = int.from_bytes(digest[:8]) / 2**64
    *others, last = shares
    for split in others:
        uniform -= shares[split]
        if uniform < 0:
            return split
    return last


def _too_small(
    streams: Mapping[str, _Stream], sequences: Mapping[str, int], n_documents: int, context: int
) -> str:
    """What was found of what was asked, for every split."""
    found = "; ".join(
        f"{split} {(sequences[split] - stream.missing) * context + stream.n_waiting:,} of "
        f"{sequences[split] * context:,} tokens asked (from {stream.n_documents:,} documents)"
        for split, stream in streams.items()
    )
    return (
        f"the corpus is too small: its {n_documents:,} documents give {found}; a document belongs "
        "to one split as a whole: lower harvest.tokens or harvest.validation_tokens, or give "
        "more text in more documents"
    )
