"""The main job on an encoder and at another hook point than the residual stream."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForMaskedLM, BertConfig

from orchestrator.run_directory import read_json
from storage.activations import ActivationStore
from tests.runs import strata, write_config
from tests.tokenizers_of_words import byte_pairs, corpus_of, random_texts, saved

pytestmark = [pytest.mark.ray, pytest.mark.crash]


def test_an_encoder_is_harvested_and_evaluated_but_for_cross_entropy(tmp_path: Path):
    model = tmp_path / "model"
    saved(byte_pairs("<bos> $A <eos>"), model, cls=True)
    bert = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(bert).save_pretrained(model)
    config = write_config(
        tmp_path,
        model={"name": str(model), "site": "mlp"},
        corpus={"source": "files", "paths": list(corpus_of(random_texts(600), tmp_path).paths)},
        harvest={
            "tokens": 6000,
            "pilot_tokens": 2000,
            "validation_tokens": 500,
            "chunk_mib": 0.02,
            "shard_mib": 1,
        },
        group={"n_groups": 1},
        sweep={"d_sae": 32, "k": [4], "tokens": 8000},
        train={"batch_tokens": 128, "lr": 1e-3},
    )
    status, output = strata("run", config)
    assert status == 0, output
    assert "is an encoder, which predicts no next token: cross-entropy is left out" in output
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    [group] = summary["groups"]
    assert group["best"]["ce_recovered"] == {}
    assert set(group["best"]["fvu_per_layer"]) == {"0", "1"}
    status, judged = strata("evaluate", config)
    assert status == 0, judged
    assert (
        "The model is an encoder, which predicts no next token: no cross-entropy, no KL." in judged
    )
    assert "CE rec." not in judged

    # Special tokens close and open every document: they are dropped, counted, told.
    [counts] = read_json(run / "rows.json").values()
    store = ActivationStore.open(run / "train.zarr")
    special = int((store.column("token_id", 0, store.spec.n_rows) < 2).sum())
    assert counts["special_tokens"] == special > 0
    assert counts["stored"] == store.spec.n_rows
    dropped = counts["stored"] - counts["used"]
    assert f"{counts['used']:,} of {counts['stored']:,} rows are used" in output
    assert f"{special:,} special tokens" in output
    client = MlflowClient(summary["mlflow"]["tracking_uri"])
    metrics = client.get_run(summary["mlflow"]["parent_run_id"]).data.metrics
    assert metrics["rows_used"] == counts["used"]
    assert metrics["dropped_special_tokens"] == special
    assert sum(v for name, v in metrics.items() if name.startswith("dropped_")) == dropped
    assert "worst_ce_recovered" not in metrics
    assert (run / "report" / "index.html").is_file()

    status, output = strata("progressive", config)
    assert status == 0, output
    assert "is an encoder, which predicts no next token: cross-entropy is left out" in output
    files = sorted((run / "progressive").glob("*/layer-*.json"))
    assert [file.name for file in files] == ["layer-0.json", "layer-1.json"]
    for file in files:
        report = json.loads(file.read_text())
        assert report["ce_clean"] is report["n_sequences"] is None
        assert all(p["ce_recovered"] is None for c in report["curves"].values() for p in c)
    assert strata("progressive", config)[1].count("2 curves are there already, 0 to go") == 1
