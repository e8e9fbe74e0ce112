"""Packing: full contexts, no token of a document lost, splits that share no document."""

import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, LlamaConfig

from actors.corpus import FilesCorpus
from actors.errors import InputError
from actors.model_source import ModelSource
from actors.packer import Packer, document_edges, load_tokenizer, split_of, split_shares
from storage.errors import StoreError
from storage.tokens import TokenStore
from tests.tokenizers_of_words import (
    BOS,
    EOS,
    WORDS,
    byte_pairs,
    corpus_of,
    random_texts,
    saved,
    token_ids,
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A byte-level BPE without BOS, as Pythia's."""
    return saved(byte_pairs(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The same with a template that opens every text with BOS, as Llama's."""
    return saved(byte_pairs("<bos> $A"), tmp_path_factory.mktemp("with_bos"))


@pytest.fixture(scope="session")
def with_cls(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """One that puts a text between CLS and SEP, as BERT's."""
    return saved(byte_pairs("<bos> $A <eos>"), tmp_path_factory.mktemp("with_cls"), cls=True)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """One that knows no special token."""
    return saved(byte_pairs(), tmp_path_factory.mktemp("bare"), special=False)


@pytest.mark.parametrize(
    ("kind", "edges"),
    [
        ("plain", (None, EOS)),
        ("with_bos", (BOS, None)),
        ("with_cls", (BOS, EOS)),
        ("bare", (None, None)),
    ],
)
def test_what_stands_around_a_document_is_asked_of_the_tokenizer_itself(
    request: pytest.FixtureRequest, kind: str, edges: tuple[int | None, int | None]
):
    assert document_edges(load_tokenizer(request.getfixturevalue(kind))) == edges


def test_documents_without_bos_are_closed_by_eos(plain: ModelSource, tmp_path: Path):
    texts = ["the quick brown fox", "", "jumps over a lazy dog"]
    stream = [*token_ids(plain, texts[0]), EOS, *token_ids(plain, texts[2]), EOS]
    Packer(plain, corpus_of(texts, tmp_path), 5).pack(tmp_path / "t", {"train": 2}, seed=0)
    store = TokenStore.open(tmp_path / "t")
    np.testing.assert_array_equal(store.ids("train", np.arange(2)).ravel(), stream[:10])
    assert (store.first_position, store.spec.separator_id, store.special_ids) == (0, EOS, (0, 1))


def test_with_bos_it_opens_every_context_and_every_document(with_bos: ModelSource, tmp_path: Path):
    a, b = "the quick brown fox jumps", "over a lazy dog and then it does"
    Packer(with_bos, corpus_of([a, b], tmp_path), 4).pack(tmp_path / "t", {"train": 3}, seed=0)
    store = TokenStore.open(tmp_path / "t")
    rest = [*token_ids(with_bos, a), BOS, *token_ids(with_bos, b)]
    expected = []
    for _ in range(3):  # a context that would open with a separator needs no second BOS
        rest = rest[1:] if rest[0] == BOS else rest
        expected.append([BOS, *rest[:3]])
        rest = rest[3:]
    np.testing.assert_array_equal(store.ids("train", np.arange(3)), expected)
    assert (store.first_position, store.spec.separator_id) == (1, BOS)


def test_between_cls_and_sep_documents_stay_between_them(with_cls: ModelSource, tmp_path: Path):
    a, b = ([BOS, *token_ids(with_cls, text), EOS] for text in ("the quick fox", "a lazy dog"))
    corpus = corpus_of(["the quick fox", "a lazy dog"], tmp_path)
    Packer(with_cls, corpus, len(a)).pack(tmp_path / "t", {"train": 2}, seed=0)
    store = TokenStore.open(tmp_path / "t")
    np.testing.assert_array_equal(store.ids("train", np.arange(2)), [a, b])
    assert (store.first_position, store.special_ids) == (1, (BOS, EOS))


def test_without_special_tokens_documents_follow_one_another(bare: ModelSource, tmp_path: Path):
    texts = ["the quick brown fox", "jumps over"]
    stream = [i for text in texts for i in token_ids(bare, text)]
    Packer(bare, corpus_of(texts, tmp_path), 3).pack(tmp_path / "t", {"train": 2}, seed=0)
    store = TokenStore.open(tmp_path / "t")
    np.testing.assert_array_equal(store.ids("train", np.arange(2)).ravel(), stream[:6])
    assert (store.spec.separator_id, store.first_position) == (None, 0)


@pytest.mark.parametrize("template", ["", "<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_gives_the_same_contexts(side: str, template: str, tmp_path: Path):
    packed = []
    for pads in (False, True):
        tokenizer = byte_pairs(template)
        if pads:
            tokenizer.enable_padding(direction=side, pad_id=EOS, pad_token="<eos>", length=64)
        model = saved(tokenizer, tmp_path / f"model {pads}")
        corpus = corpus_of(random_texts(40), tmp_path)
        Packer(model, corpus, 16).pack(tmp_path / f"t {pads}", {"train": 10}, 0)
        store = TokenStore.open(tmp_path / f"t {pads}")
        packed.append((store.ids("train", np.arange(10)).tolist(), store.spec))
    assert packed[0] == packed[1]


@pytest.mark.parametrize("kind", ["plain", "with_bos", "with_cls", "bare"])
@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.one_of(st.just(""), st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)),
        max_size=60,
    ),
    context=st.integers(2, 24),
    seed=st.integers(0, 2**32),
    counts=st.tuples(st.integers(1, 12), st.integers(1, 4)),
)
def test_no_token_of_a_document_is_lost_and_splits_share_no_document(
    request: pytest.FixtureRequest,
    kind: str,
    texts: list[str],
    context: int,
    seed: int,
    counts: tuple[int, int],
):
    model: ModelSource = request.getfixturevalue(kind)
    sequences: dict[str, int] = {"train": counts[0], "validation": counts[1]}
    texts = texts + [" ".join(WORDS)] * 300  # enough for every split
    with TemporaryDirectory() as name:
        folder = Path(name)
        Packer(model, corpus_of(texts, folder), context).pack(folder / "t", sequences, seed)
        store = TokenStore.open(folder / "t")
        seen: dict[str, set[int]] = {}
        for split, n in sequences.items():
            ids = store.ids(split, np.arange(n)).ravel()
            documents = store.documents(split, np.arange(n)).ravel()
            assert (np.diff(documents.astype(np.int64)) >= 0).all()
            seen[split] = set(documents.tolist())
            *whole, last = sorted(seen[split])
            is_text = ids > EOS
            for document in whole:
                got = ids[is_text & (documents == document)].tolist()
                assert got == token_ids(model, texts[document])
            got = ids[is_text & (documents == last)].tolist()
            assert got == token_ids(model, texts[last])[: len(got)]
            # Every document of the split up to the last, and no other one, is there.
            shares = split_shares(sequences)
            assert seen[split] == {
                i for i in range(last + 1) if texts[i] and split_of(seed, i, shares) == split
            }
        assert not seen["train"] & seen["validation"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(
    plain: ModelSource, tmp_path: Path
):
    packer = Packer(plain, corpus_of(random_texts(400), tmp_path), 16)
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        packer.pack(tmp_path / name, {"train": 60, "validation": 20}, seed)

    def content(name: str) -> dict[str, int]:
        root = tmp_path / name
        return {
            str(path.relative_to(root)): zlib.crc32(path.read_bytes())
            for path in root.rglob("*")
            if path.is_file()
        }

    assert content("a") == content("b")
    assert content("a") != content("c")


@pytest.mark.parametrize(
    ("roles", "dropped"),
    [
        ({}, {"<bos>", "<eos>", "<|turn|>", "<|header|>", "<mask>"}),
        ({"pad_token": "<unk>"}, {"<bos>", "<eos>", "<|turn|>", "<|header|>", "<mask>", "<unk>"}),
    ],
)
def test_all_that_stands_for_no_text_is_special(
    tmp_path: Path, roles: dict[str, Any], dropped: set[str]
):
    """Named or only marked, as those of chat templates are; not `<unk>`, nor tokens that were added as text."""
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens(["<|header|>", "<unk>"])
    tokenizer.add_tokens(["<tool>"])
    model = saved(
        tokenizer,
        tmp_path / "model",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=["<|turn|>"],
        **roles,
    )
    backend = load_tokenizer(model).backend_tokenizer
    ids = Packer(model, corpus_of(["x"], tmp_path), 8).spec.special_ids
    assert {backend.id_to_token(i) for i in ids} == dropped
    assert list(ids) == sorted(ids)


def test_the_specification_is_a_pure_function_of_the_tokenizer(
    plain: ModelSource, with_bos: ModelSource, tmp_path: Path
):
    corpus = corpus_of(["x"], tmp_path)
    assert Packer(plain, corpus, 8).spec == Packer(plain, corpus, 8).spec
    assert Packer(plain, corpus, 8).spec.tokenizer != Packer(with_bos, corpus, 8).spec.tokenizer


def test_reading_stops_when_all_splits_are_full_and_progress_counts_tokens(
    plain: ModelSource, tmp_path: Path
):
    packed: list[int] = []
    packer = Packer(plain, corpus_of(random_texts(3000), tmp_path), 8)
    report = packer.pack(tmp_path / "t", {"train": 300, "validation": 20}, 0, packed.append)
    assert report.n_documents < 3000
    assert report.n_sequences == {"train": 300, "validation": 20}
    assert sum(packed) == 320 * 8


def test_a_document_longer_than_the_context_runs_over_into_the_next(
    plain: ModelSource, tmp_path: Path
):
    text = random_texts(1, seed=2)[0] * 50
    Packer(plain, corpus_of([text], tmp_path), 16).pack(tmp_path / "t", {"train": 20}, 0)
    store = TokenStore.open(tmp_path / "t")
    ids = store.ids("train", np.arange(20)).ravel().tolist()
    assert ids == token_ids(plain, text)[:320]
    assert not store.documents("train", np.arange(20)).any()


def test_ids_above_65535_are_kept(tmp_path: Path):
    vocabulary = {"<bos>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 70_000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = saved(tokenizer, tmp_path / "model")
    corpus = corpus_of(["w69999 w65536 w2"], tmp_path)
    Packer(model, corpus, 4).pack(tmp_path / "t", {"train": 1}, 0)
    ids = TokenStore.open(tmp_path / "t").ids("train", np.array([0]))
    assert ids.tolist() == [[69999, 65536, 2, EOS]]


def test_a_corpus_that_is_too_small_says_what_it_has_and_what_was_asked(
    plain: ModelSource, tmp_path: Path
):
    packer = Packer(plain, corpus_of(random_texts(10), tmp_path), 16)
    with pytest.raises(InputError, match=r"10 documents give train [\d,]+ of 16,000 tokens asked"):
        packer.pack(tmp_path / "t", {"train": 1000}, 0)
    with pytest.raises(InputError, match=r"validation \d+ of 32 tokens .*lower harvest\.tokens"):
        packer.pack(tmp_path / "t", {"train": 1000, "validation": 2}, 0)
    assert not (tmp_path / "t/zarr.json").exists()


def test_an_existing_store_is_not_packed_again(plain: ModelSource, tmp_path: Path):
    packer = Packer(plain, corpus_of(random_texts(30), tmp_path), 16)
    packer.pack(tmp_path / "t", {"train": 3}, 0)
    with pytest.raises(StoreError, match="exists already"):
        packer.pack(tmp_path / "t", {"train": 3}, 0)


def test_splits_get_documents_in_proportion_and_even_the_smallest_a_few():
    shares = split_shares({"train": 900, "validation": 100})
    assert shares == pytest.approx({"train": 0.9, "validation": 0.1})
    assert split_shares({"train": 10**6, "validation": 1})["validation"] > 0.04
    drawn = [split_of(0, i, shares) for i in range(10_000)]
    assert drawn.count("validation") == pytest.approx(1000, abs=150)  # five standard deviations


def test_splits_of_documents_never_change():
    shares = split_shares({"train": 2, "validation": 1})
    assert "".join(split_of(7, i, shares)[0] for i in range(12)) == "tttvvttttttv"


@pytest.mark.parametrize("config", [GPTNeoXConfig, LlamaConfig], ids=["gpt_neox", "llama"])
def test_a_folder_without_a_tokenizer_is_named(
    tmp_path: Path, config: type[GPTNeoXConfig | LlamaConfig]
):
    config().save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"(comes without a tokenizer|can't be loaded).* tokenizer\.json"
    ):
        load_tokenizer(ModelSource(name=str(tmp_path)))
    with pytest.raises(InputError, match=r"nowhere' is no folder that exists"):
        load_tokenizer(ModelSource(name=str(tmp_path / "nowhere")))


def test_a_hub_that_cannot_be_reached_says_how_to_use_a_local_folder():
    with pytest.raises(InputError, match=r"Hub can't be reached .*hf download .*--local-dir"):
        load_tokenizer(ModelSource(name="EleutherAI/pythia-160m"))


def test_the_third_party_model_opens_contexts_with_bos(shared: Path, tmp_path: Path):
    model = ModelSource(name=str(shared / "models" / "stories260K"))
    corpus = FilesCorpus(paths=(str(shared / "data" / "tinystories.jsonl"),))
    Packer(model, corpus, 128).pack(tmp_path / "t", {"train": 50, "validation": 10}, 0)
    ids = TokenStore.open(tmp_path / "t").ids("train", np.arange(50))
    assert (ids[:, 0] == 1).all()
    assert not (ids[:, :2] == 1).all(axis=1).any()  # never BOS twice in a row
