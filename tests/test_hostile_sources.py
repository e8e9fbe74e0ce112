"""What the sources may not do with files of others: held by reading them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("sae", "storage", "actors", "orchestrator", "benchmarks", "examples")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]

RUNS_WHAT_IT_READS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("dill.load", "dill.loads", "joblib.load", "shelve.open", "marshal.load", "marshal.loads"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval", "exec"),
}
ALLOWED = {("orchestrator/pool.py", "cloudpickle.loads")}
"""What a driver sends to its own processes through Ray, which pickles all it carries."""


def faults(source: str) -> Iterator[str]:
    """Calls in a source that could run what a file of someone else holds."""
    tree = ast.parse(source)
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        loads = name in ("np.load", "numpy.load")
        if name in RUNS_WHAT_IT_READS:
            yield name
        elif name == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only"
        elif name == "yaml.load" and given.get("Loader") not in safe:
            yield "yaml.load with another loader"
        elif loads and given.get("allow_pickle", "False") != "False":
            yield "numpy.load with pickle"
        elif given.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            items = zip(node.keys, node.values, strict=True)
            pairs = {ast.unparse(k): ast.unparse(v) for k, v in items if k is not None}
            if pairs.get("'trust_remote_code'", "False") != "False":
                yield "trust_remote_code"
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "marshal"):
            yield f"from {node.module} import"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("pickle.loads(data)", "pickle.loads"),
        ("torch.load(file)", "torch.load without weights_only"),
        ("torch.load(file, weights_only=False)", "torch.load without weights_only"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load with another loader"),
        ("yaml.load(text, yaml.SafeLoader)", "yaml.load with another loader"),
        ("np.load(file, allow_pickle=True)", "numpy.load with pickle"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("from pickle import loads", "from pickle import"),
    ],
)
def test_what_runs_what_it_reads_is_found(source: str, fault: str):
    assert list(faults(source)) == [fault]


def test_no_source_runs_what_a_file_of_others_holds():
    found = {
        (file.relative_to(ROOT).as_posix(), fault)
        for file in FILES
        for fault in faults(file.read_text())
    }
    assert found == ALLOWED
