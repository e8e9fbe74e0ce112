"""The peers' own environment, `.peers/`: their pins need not suit ours."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".peers"
PYTHON = FOLDER / "bin" / "python"
# torch first: the others would bring another build of it. dictionary_learning without what it asks for,
# of which its trainers need nothing and its loader zstandard.
INSTALLS = (
    ("torch==2.13.0",),
    ("sae-lens==6.54.12", "eai-sparsify==1.3.3"),
    ("--no-deps", "dictionary-learning==0.1.0"),
    ("zstandard==0.25.0",),
)
# sparsify decodes with Triton wherever Triton can be imported, also where there is no GPU.
VARIABLES = {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
_READY = FOLDER / "ready.json"


def ready() -> bool:
    """Whether the environment stands, with the versions named here."""
    return _installed() == _wanted()


def _wanted() -> list[list[str]]:
    return [list(packages) for packages in INSTALLS]


def _installed() -> list[list[str]]:
    return json.loads(_READY.read_text()) if _READY.is_file() else []


def ensure() -> None:
    """Build the environment if it is missing or of other versions; add what alone is missing.

    Raises:
        subprocess.CalledProcessError: If a package can't be installed; pip says why.
    """
    if ready():
        return
    done = _installed()
    if not done or done != _wanted()[: len(done)]:
        print("building the peers' environment in .peers (minutes, 2 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
        done = []
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in INSTALLS[len(done) :]:
        subprocess.run([*pip, *packages], check=True)
    site = subprocess.run(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    # dictionary_learning imports nnsight for its buffers alone.
    stand_in = Path(site.stdout.strip()) / "nnsight.py"
    stand_in.write_text("class LanguageModel: pass\n")
    _READY.write_text(json.dumps(INSTALLS))


if __name__ == "__main__":
    ensure()
