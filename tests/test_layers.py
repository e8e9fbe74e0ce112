"""The floor plan of docs/layout.md as a test: a folder imports only what lies below it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    # scipy only inside dictionary_mcc, triton only inside kernels: a notebook needs torch alone.
    "sae": {"torch", "safetensors", "jaxtyping", "scipy", "triton"},
    # torch only where rows are encoded and gathered: numpy rounds to float16 one by one.
    "storage": {
        "numpy",
        "torch",
        "zarr",
        "numcodecs",
        "obstore",
        "google_crc32c",
        "xxhash",
        "jaxtyping",
    },
    "actors": {
        *("sae", "storage"),
        *("torch", "numpy", "scipy", "transformers", "tokenizers", "datasets", "huggingface_hub"),
        *("safetensors", "pyarrow", "jaxtyping"),
    },
    "orchestrator": {
        *("sae", "storage", "actors"),
        *("ray", "optuna", "mlflow", "pydantic", "yaml", "rich", "matplotlib", "jinja2", "psutil"),
        *("numpy", "torch", "scipy", "plotly"),
        *("grpc", "aiohttp"),  # what Ray's clients raise and wait with
    },
}
# Programs that run where another library is installed, and are never imported here.
ELSEWHERE = {
    "sae/formats/plugin/kronsae.py": {"sae_lens"},
    "actors/peer_program.py": {"sae_lens", "sparsify", "dictionary_learning"},
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_what_lies_below_it(folder: str):
    allowed = MAY_IMPORT[folder] | {folder} | sys.stdlib_module_names
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    strays = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] not in allowed | ELSEWHERE.get(str(path.relative_to(ROOT)), set())
    }
    assert not strays


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_import_name_belongs_to_this_checkout(folder: str):
    found = Path(str(__import__(folder).__file__)).resolve()
    assert found.is_relative_to(ROOT), f"`import {folder}` finds {found}: another package has it"


def test_no_file_outgrows_one_concept():
    sources = [
        p
        for folder in [*MAY_IMPORT, "tests", "examples", "benchmarks"]
        for p in (ROOT / folder).rglob("*.py")
    ]
    long = {
        str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
