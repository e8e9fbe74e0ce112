import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from actors.errors import InputError
from actors.harvester import SHARDS_AT_ONCE, Harvester
from actors.model_source import ModelSource
from actors.shard_rows import ShardRows
from storage.activations import ActivationStore
from storage.draw import layer_draw
from storage.dtypes import power_of_two_scale
from storage.errors import StoreError
from storage.layout import StoreSpec
from storage.tokens import TokenStore
from tests.models import CONTEXT, D_MODEL, N_LAYERS, random_model, random_tokens
from tests.stores import files_of

ROOT = Path(__file__).resolve().parents[1]
N_SEQUENCES = 50
LAYERS = tuple(range(N_LAYERS))
GROUPED = {"groups": ((0, 2), (1,))}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSource:
    return ModelSource(name=str(random_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return random_tokens(tmp_path_factory.mktemp("tokens") / "tokens.zarr", N_SEQUENCES)


def spec_of(**changes) -> StoreSpec:
    settings = {
        "d_model": D_MODEL,
        "layers": LAYERS,
        "split": "train",
        "n_population": N_SEQUENCES,
        "n_sequences": 40,
        "rows_per_sequence": CONTEXT - 1,
        "first_position": 1,
        "sequences_per_chunk": 3,
        "chunks_per_shard": 2,
        "seed": 5,
        "dtype": "float32",
        "scales": (1.0, 0.5, 0.25),
    }
    return StoreSpec(**{**settings, **changes})


def harvested(path: Path, harvester: Harvester, spec: StoreSpec, order=None) -> ActivationStore:
    store = ActivationStore.create(path, spec)
    for shard in order or range(spec.n_shards):
        harvester.harvest(path, shard)
    return store


def reference(model: ModelSource, tokens: Path) -> torch.Tensor:
    """Residuals (layer, sequence, position, d_model) by transformers' own outputs and final norm."""
    lm = AutoModel.from_pretrained(model.name, dtype="float32").eval()
    ids = torch.from_numpy(TokenStore.open(tokens).ids("train", np.arange(N_SEQUENCES)))
    last = []
    hook = lm.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: last.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    with torch.no_grad():
        hidden = lm(ids, output_hidden_states=True, use_cache=False).hidden_states
    hook.remove()
    return torch.stack([*hidden[1:-1], last[0]])


def columns_of(store: ActivationStore) -> tuple[np.ndarray, ...]:
    return tuple(
        store.column(name, 0, store.spec.n_rows) for name in ("sequence", "position", "token_id")
    )


@pytest.mark.parametrize("groups", [{}, GROUPED], ids=["layers", "groups"])
def test_every_row_is_the_models_residual_at_its_token(tmp_path, model, tokens, groups):
    expected = reference(model, tokens)
    store = harvested(tmp_path / "s", Harvester(model, tokens, 100), spec_of(**groups))
    sequence, position, token_id = columns_of(store)
    ids = TokenStore.open(tokens).ids("train", np.arange(N_SEQUENCES))
    np.testing.assert_array_equal(token_id, ids[sequence, position])
    assert position.min() == 1
    for array in store.spec.arrays:
        layer = store.row_layers(array, 0, store.spec.n_rows).astype(np.int64)
        wanted = expected[layer, sequence.astype(np.int64), position.astype(np.int64)]
        got = torch.from_numpy(store.read(array, 0, store.spec.n_rows))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_grouped_rows_are_those_of_the_per_layer_store_of_the_same_seed(tmp_path, model, tokens):
    harvester = Harvester(model, tokens, 100)
    pilot = harvested(tmp_path / "pilot", harvester, spec_of())
    train = harvested(tmp_path / "train", harvester, spec_of(**GROUPED))
    n_rows = pilot.spec.n_rows
    for one, other in zip(columns_of(pilot), columns_of(train), strict=True):
        np.testing.assert_array_equal(one, other)
    every = np.stack([pilot.read(f"layers/{layer}", 0, n_rows) for layer in LAYERS])
    drawn = train.row_layers("groups/0", 0, n_rows)
    np.testing.assert_array_equal(
        train.read("groups/0", 0, n_rows), every[drawn, np.arange(n_rows)]
    )
    assert 0.4 < (drawn == 0).mean() < 0.6


def test_a_harvest_is_the_same_bytes_again_and_in_another_order(tmp_path, model, tokens):
    spec = spec_of(**GROUPED, dtype="bfloat16")
    one = harvested(tmp_path / "1", Harvester(model, tokens, 100), spec)
    backwards = reversed(range(spec.n_shards))
    other = harvested(tmp_path / "2", Harvester(model, tokens, 100), spec, backwards)
    assert files_of(one.place.folder) == files_of(other.place.folder)


@pytest.mark.parametrize("n_harvesters", [1, 3])
def test_layers_are_drawn_uniformly_and_alike_by_any_number_of_harvesters(
    tmp_path, model, tokens, n_harvesters
):
    spec = spec_of(groups=((0, 1, 2),), n_sequences=N_SEQUENCES)
    store = ActivationStore.create(tmp_path / "s", spec)
    harvesters = [Harvester(model, tokens, 100) for _ in range(n_harvesters)]
    for shard in range(spec.n_shards):
        harvesters[shard % n_harvesters].harvest(store.place.folder, shard)
    sequence, position, _ = columns_of(store)
    drawn = store.row_layers("groups/0", 0, spec.n_rows)
    np.testing.assert_array_equal(drawn, layer_draw(spec.seed, sequence, position, 0, LAYERS))
    counts = np.bincount(drawn, minlength=N_LAYERS)
    n = len(drawn)
    assert np.abs(counts - n / 3).max() < 4 * np.sqrt(n * (1 / 3) * (2 / 3))
    # So many of each, on this and every other machine.
    assert counts.tolist() == [375, 377, 398]


def test_shards_harvested_at_once_are_the_same_bytes(tmp_path, model, tokens):
    spec = spec_of(**GROUPED)
    one = harvested(tmp_path / "1", Harvester(model, tokens, 100), spec)
    other = ActivationStore.create(tmp_path / "2", spec)
    harvester = Harvester(model, tokens, 100)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        list(
            pool.map(
                lambda shard: harvester.harvest(other.place.folder, shard), range(spec.n_shards)
            )
        )
    assert files_of(one.place.folder) == files_of(other.place.folder)


def test_the_model_computes_a_shard_while_the_one_before_is_written(
    tmp_path, model, tokens, monkeypatch: pytest.MonkeyPatch
):
    store = ActivationStore.create(tmp_path / "s", spec_of())
    harvester = Harvester(model, tokens, 100)
    begun = [Event() for _ in range(store.spec.n_shards)]
    write, compute = ActivationStore.write_shard, ShardRows.__init__

    def compute_and_tell(self, spec, shard, memory):
        begun[shard].set()
        compute(self, spec, shard, memory)

    def write_when_the_next_is_begun(self, index, *content):
        if index == 0:
            assert begun[1].wait(60), "shard 1 waits until shard 0 is written"
        return write(self, index, *content)

    monkeypatch.setattr(ShardRows, "__init__", compute_and_tell)
    monkeypatch.setattr(ActivationStore, "write_shard", write_when_the_next_is_begun)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        list(pool.map(lambda shard: harvester.harvest(store.place.folder, shard), range(2)))
    assert list(ActivationStore.open(store.place.folder).committed()) == [0, 1]


def test_an_error_in_writing_is_itself_and_leaves_the_other_shards_whole(tmp_path, model, tokens):
    spec = spec_of()
    one = harvested(tmp_path / "1", Harvester(model, tokens, 100), spec)
    store = ActivationStore.create(tmp_path / "2", spec)
    blocked = store.place.folder / "layers/2/x/c/1/0/in the way"
    blocked.mkdir(parents=True)
    harvester = Harvester(model, tokens, 100)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        calls = [pool.submit(harvester.harvest, store.place.folder, shard) for shard in range(4)]
        with pytest.raises(StoreError, match="layers/2/x/c/1/0 can't be written"):
            calls[1].result()
        for shard in (0, 2, 3):
            calls[shard].result()
    assert list(ActivationStore.open(store.place.folder).committed()) == [0, 2, 3]
    blocked.rmdir()
    blocked.parent.rmdir()
    for shard in range(spec.n_shards):
        harvester.harvest(store.place.folder, shard)
    assert files_of(store.place.folder) == files_of(one.place.folder)


CHILD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from actors.harvester import SHARDS_AT_ONCE, Harvester
from actors.model_source import ModelSource
from storage.activations import ActivationStore

model, tokens, store = sys.argv[1:]
harvester = Harvester(ModelSource(name=model), Path(tokens), 100)
missing = ActivationStore.open(Path(store)).missing()
with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
    list(pool.map(lambda shard: harvester.harvest(Path(store), shard), missing))
"""


def test_a_killed_harvest_ends_with_the_bytes_of_an_unbroken_one(tmp_path, model, tokens):
    spec = spec_of(**GROUPED, n_sequences=16, sequences_per_chunk=1, chunks_per_shard=1)
    unbroken = harvested(tmp_path / "unbroken", Harvester(model, tokens, 100), spec)
    store = ActivationStore.create(tmp_path / "killed", spec)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, model.name, str(tokens), str(store.place.folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while child.poll() is None and len(list(store.place.folder.glob("commits/*.json"))) < 4:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the harvest was over before it could be killed"
    committed = {
        path: path.stat().st_mtime_ns for path in store.place.folder.glob("commits/*.json")
    }

    harvester = Harvester(model, tokens, 100)
    receipts = [harvester.harvest(store.place.folder, shard) for shard in range(spec.n_shards)]

    assert files_of(store.place.folder) == files_of(unbroken.place.folder)
    assert sum(receipt.n_tokens == 0 for receipt in receipts) == len(committed)
    assert all(path.stat().st_mtime_ns == when for path, when in committed.items())


def test_a_receipt_tells_what_was_done_and_a_committed_shard_is_not_done_again(
    tmp_path, model, tokens
):
    harvester = Harvester(model, tokens, 100)
    spec = spec_of()
    ActivationStore.create(tmp_path / "s", spec)
    first, again = (harvester.harvest(tmp_path / "s", 6) for _ in range(2))
    assert first.record == again.record
    assert first.record.rows == 4 * (CONTEXT - 1)
    assert first.n_rows == 4 * (CONTEXT - 1) * N_LAYERS
    assert first.n_bytes == spec.shard_bytes(6)
    assert (first.n_tokens, again.n_tokens) == (4 * CONTEXT, 0)
    assert first.model_seconds > 0 < first.write_seconds


def test_mean_norms_are_those_of_the_stored_positions(model, tokens):
    sequences = np.array([4, 9, 30])
    expected = reference(model, tokens)[:, sequences, 1:].norm(dim=-1).mean(dim=(1, 2))
    norms = Harvester(model, tokens, 40).mean_norms([0, 2], "train", sequences)
    assert norms == pytest.approx({0: expected[0].item(), 2: expected[2].item()}, rel=1e-5)


def test_values_too_large_for_the_dtype_are_clipped_and_counted(tmp_path, model, tokens):
    harvester = Harvester(model, tokens, 100)
    exact = harvested(tmp_path / "32", harvester, spec_of())
    half = harvested(
        tmp_path / "16", harvester, spec_of(dtype="float16", scales=(1.0, 2.0**16, 1.0))
    )
    too_large = np.abs(exact.read("layers/1", 0, exact.spec.n_rows)) > 65504 / 2**16
    records = half.committed().values()
    assert sum(record.layers[1].n_clipped for record in records) == too_large.sum() > 0
    assert (
        sum(harvester.harvest(half.place.folder, shard).n_clipped for shard in range(7))
        == too_large.sum()
    )
    stored = np.abs(half.read("layers/1", 0, half.spec.n_rows))
    assert (stored[too_large] == 65504 / 2**16).all()


def test_activations_that_are_not_finite_name_the_layer_and_the_remedy(tmp_path, model, tokens):
    """A model whose second block overflows float16."""
    weights = load_file(Path(model.name) / "model.safetensors")
    for name, weight in weights.items():
        if "layers.1.mlp.dense_4h_to_h" in name:
            weights[name] = weight * 1e5
    folder = random_model(tmp_path / "m")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    harvester = Harvester(ModelSource(name=str(folder), dtype="float16"), tokens, 100)
    ActivationStore.create(tmp_path / "s", spec_of())
    with pytest.raises(StoreError, match=r"layers/1, .* not finite \(layer 1; .*model\.dtype"):
        harvester.harvest(tmp_path / "s", 0)
    with pytest.raises(InputError, match=r"layer 1 are not finite.*model\.dtype"):
        harvester.mean_norms(LAYERS, "train", np.arange(3))
    assert ActivationStore.open(tmp_path / "s").missing() == list(range(7))


def test_a_context_beyond_the_models_positions_is_refused(tmp_path, model):
    long = random_tokens(tmp_path / "tokens.zarr", 2, context=CONTEXT + 1)
    with pytest.raises(InputError, match=rf"{CONTEXT + 1} tokens, longer than the {CONTEXT}"):
        Harvester(model, long, 100)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_model": 8}, f"d_model 8, and .* has {D_MODEL}"),
        ({"first_position": 0}, "first_position 0, and .* has 1"),
        ({"rows_per_sequence": 5}, "rows_per_sequence 5, and .* has 23"),
        ({"n_population": 45}, "n_population 45, and .* has 50"),
    ],
)
def test_a_store_for_other_tokens_or_another_model_is_refused(
    tmp_path, model, tokens, changes, named
):
    ActivationStore.create(tmp_path / "s", spec_of(**changes))
    with pytest.raises(InputError, match=named):
        Harvester(model, tokens, 100).harvest(tmp_path / "s", 0)


def test_the_shared_model_is_stored_in_float16_to_its_precision(tmp_path, shared):
    model = ModelSource(name=str(shared / "models/stories260K"))
    stories = (shared / "data/tinystories.jsonl").read_text().splitlines()[:40]
    tokenizer = AutoTokenizer.from_pretrained(model.name)
    bos = tokenizer.bos_token_id
    ids = [i for line in stories for i in tokenizer(json.loads(line)["text"]).input_ids if i != bos]
    contexts = np.array(ids[: len(ids) // 127 * 127], np.uint32).reshape(-1, 127)
    contexts = np.pad(contexts, ((0, 0), (1, 0)), constant_values=bos)
    tokens = random_tokens(tmp_path / "tokens.zarr", len(contexts), ids=contexts)
    harvester = Harvester(model, tokens, 1024)
    norms = harvester.mean_norms(range(5), "train", np.arange(8))
    shape = {
        "d_model": 64,
        "layers": tuple(range(5)),
        "n_population": len(contexts),
        "n_sequences": 24,
        "rows_per_sequence": 127,
        "sequences_per_chunk": 4,
    }
    scales = tuple(power_of_two_scale(norm, 64) for norm in norms.values())
    exact = harvested(tmp_path / "32", harvester, spec_of(**shape, scales=(1.0,) * 5))
    half = harvested(tmp_path / "16", harvester, spec_of(**shape, scales=scales, dtype="float16"))
    for array in exact.spec.arrays:
        x, y = (store.read(array, 0, exact.spec.n_rows) for store in (exact, half))
        np.testing.assert_allclose(y, x, rtol=2**-11, atol=1e-6)
    assert sum(record.n_clipped for record in half.committed().values()) == 0
