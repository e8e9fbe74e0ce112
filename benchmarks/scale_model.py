"""The figures of docs/scale.md: `python -m benchmarks.scale_model` prints them, `--write` puts them there."""

import json
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from actors.language_model import describe
from orchestrator.config import RunConfig
from orchestrator.config_file import parse
from orchestrator.pages.scale_page import COLUMNS, cells, lines
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.plan import plan
from orchestrator.planning.scale import Scale, model_flops, scale

DOC = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- python -m benchmarks.scale_model --write -->\n", "<!-- end -->\n"

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "Llama-3-70B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672},
}
"""What their published config.json say; both have heads of 128, 8 of keys, and 128,256 tokens."""

TOKENS = {"1 B": 10**9, "10 B": 10**10, "100 B": 10**11}
GPUS = 64


def modelled(
    models: Collection[str] = MODELS, tokens: Collection[str] = TOKENS, **compute: object
) -> dict[tuple[str, str], Scale]:
    """By model and number of tokens, with `compute` beside its settings here.

    The models are not on the disk: their config.json is enough.
    """
    found = {}
    for name in models:
        sizes = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            config = {
                **sizes,
                "model_type": "llama",
                "num_attention_heads": sizes["hidden_size"] // 128,
                "num_key_value_heads": 8,
                "vocab_size": 128_256,
                "max_position_embeddings": 8192,
            }
            Path(folder, "config.json").write_text(json.dumps(config))
            flops = None
            for label in tokens:
                cfg = _configuration(folder, sizes["hidden_size"], TOKENS[label], compute)
                shape = describe(cfg.model)
                figures = plan(cfg, shape)
                flops = flops or model_flops(cfg, shape, figures)
                hardware = Hardware(gpus=GPUS)
                found[name, label] = scale(cfg, shape, figures, flops, hardware)
    return found


def _configuration(
    folder: str, d_model: int, n_tokens: int, compute: Mapping[str, object]
) -> RunConfig:
    return parse(
        {
            "run_dir": f"{folder}/run",
            "model": {"name": folder, "dtype": "bfloat16", "device_map": "auto"},
            "corpus": {"source": "stdlib"},
            "harvest": {
                "tokens": n_tokens,
                "pilot_tokens": 10**7,
                "validation_tokens": 10**6,
                "context": 1024,
                "batch_tokens": 2048,
                "store": "s3://bucket/run",
            },
            "group": {"n_groups": 8},
            "sweep": {
                "d_sae": 16 * d_model,
                "k": [32, 64],
                "encoders": ["dense", {"h": 2 * d_model, "m": 2, "n": 4}],
                "selection": ["batch_topk"],
                "tokens": n_tokens,
            },
            "train": {"batch_tokens": 8192},
            "evaluate": {"sequences": 512},
            # The larger model lies on two.
            "compute": {
                "cpus": 8,
                "gpus_per_actor": 1 + (d_model > 4096),
                "gpus_per_trial": 1,
                **compute,
            },
        },
        "the configuration of docs/scale.md",
    )


def tables(runs: Mapping[tuple[str, str], Scale]) -> str:
    """All of them, in Markdown."""
    text = ""
    for (name, label), found in runs.items():
        text += f"\n### {name}, {label} tokens\n\n| {' | '.join(COLUMNS)} |\n"
        text += f"|{'---|' * len(COLUMNS)}\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in cells(found))
        text += "\n" + "".join(f"- {line}\n" for line in lines(found))
    return text + "\n"


def written(text: str) -> str:
    """The part of the document that this makes."""
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Print, or write."""
    made = tables(modelled())
    if "--write" not in sys.argv[1:]:
        print(made)
        return
    text = DOC.read_text()
    DOC.write_text(text.replace(f"{BEGIN}{written(text)}{END}", f"{BEGIN}{made}{END}"))


if __name__ == "__main__":
    main()
