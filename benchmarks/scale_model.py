"""The figures of docs/scale.md: `python -m benchmarks.scale_model` prints them, `--write` puts them there."""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.language_model import describe
from orchestrator.config_file import parse
from orchestrator.pages.scale_page import COLUMNS, cells, lines
from orchestrator.planning.plan import plan
from orchestrator.planning.scale import Hardware, Scale, scale

DOC = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- python -m benchmarks.scale_model --write -->\n", "<!-- end -->\n"

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "Llama-3-70B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672},
}
"""What their published config.json say; both have heads of 128, 8 of keys, and 128,256 tokens."""

TOKENS = {"1 B": 10**9, "10 B": 10**10, "100 B": 10**11}
GPUS = 64


def modelled(folder: Path, name: str, n_tokens: int) -> Scale:
    """A run of a model that is not on the disk: its config.json is enough.

    Args:
        folder: Where that is written.
        name: One of MODELS.
        n_tokens: To harvest, and to train every trial on.
    """
    sizes = MODELS[name]
    d_model = sizes["hidden_size"]
    config = {
        **sizes,
        "model_type": "llama",
        "num_attention_heads": d_model // 128,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config))
    h = 2 * d_model
    cfg = parse(
        {
            "run_dir": str(folder / "run"),
            "model": {"name": str(folder), "dtype": "bfloat16"},
            "corpus": {"source": "stdlib"},
            "harvest": {
                "tokens": n_tokens,
                "pilot_tokens": 10**7,
                "validation_tokens": 10**6,
                "context": 1024,
                "batch_tokens": 32_768,
                "store": "s3://bucket/run",
            },
            "group": {"n_groups": 8},
            "sweep": {
                "d_sae": 16 * d_model,
                "k": [32, 64],
                "tokens": n_tokens,
                "encoders": ["dense", {"h": h, "m": 2, "n": 4}],
                "selection": ["batch_topk"],
            },
            "train": {"batch_tokens": 8192},
            "evaluate": {"sequences": 512},
            "compute": {"cpus": 8, "gpus_per_actor": 1},
        },
        name,
    )
    shape = describe(cfg.model)
    return scale(cfg, shape, plan(cfg, shape), Hardware(gpus=GPUS))


def figures() -> str:
    """All tables, in Markdown."""
    text = ""
    for name in MODELS:
        for label, n_tokens in TOKENS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = modelled(Path(folder), name, n_tokens)
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
    made = figures()
    if "--write" not in sys.argv[1:]:
        print(made)
        return
    text = DOC.read_text()
    DOC.write_text(text.replace(f"{BEGIN}{written(text)}{END}", f"{BEGIN}{made}{END}"))


if __name__ == "__main__":
    main()
