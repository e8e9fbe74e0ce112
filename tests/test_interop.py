"""Every architecture, written in every format that holds it, loaded by the library itself in `.peers`.

`make interop` runs it and prints the table of differences.
"""

import subprocess
from pathlib import Path

import pytest
import torch

from actors.export_check import check_files, check_library
from actors.parity import ACTIVATION_TOLERANCE, RECONSTRUCTION_TOLERANCE, Parity
from actors.target_library import LIBRARIES, by_library
from benchmarks import peers
from sae import KronShape, SaeConfig, SparseAutoencoder
from sae.fit import Fit, FitConfig
from sae.formats import FORMATS
from sae.formats.description import Description
from sae.formats.distillation import distilled
from sae.formats.folding import folded
from sae.formats.selecting import as_topk

D_MODEL, D_SAE, K, LAYER = 64, 512, 16, 5
KRON = KronShape(h=32, m=4, n=4)
CASES = {
    "TopK": {},
    "BatchTopK": {"selection": "batch_topk"},
    "Matryoshka": {"selection": "batch_topk", "prefixes": (64, 256, D_SAE)},
    "Matryoshka TopK": {"prefixes": (64, 256, D_SAE)},
    "JumpReLU": {"selection": "jumprelu"},
    "Kron TopK": {"encoder": KRON},
    "Kron BatchTopK": {"encoder": KRON, "selection": "batch_topk"},
    "Kron JumpReLU": {"encoder": KRON, "selection": "jumprelu"},
    "TopK, standardized": {"scaling": "token_standardize"},
    "BatchTopK, standardized": {"selection": "batch_topk", "scaling": "token_standardize"},
    "Kron distilled": {"encoder": KRON, "selection": "batch_topk"},
    "Kron distilled as TopK": {"encoder": KRON, "selection": "batch_topk"},
}
HELD = {
    "sae_lens": set(CASES),
    "sparsify": {"TopK", "Matryoshka TopK", "Kron distilled as TopK"},
    "dictionary_learning": set(CASES)
    - {"Kron TopK", "Kron BatchTopK", "Kron JumpReLU"}
    - {"TopK, standardized", "BatchTopK, standardized"},
}
"""What each library is said to hold in docs/export.md."""

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(1800),  # a library may take minutes to be imported
    pytest.mark.skipif(not peers.ready(), reason="needs the peers' environment: make interop"),
]


def activations(n: int, seed: int) -> torch.Tensor:
    """Sparse sums of fixed directions with a mean of their own, of a norm like a deep layer's."""
    fixed = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, D_MODEL, generator=fixed), dim=1)
    mean = 2 * torch.randn(D_MODEL, generator=fixed)
    drawn = torch.Generator().manual_seed(seed)
    strengths = torch.rand(n, 256, generator=drawn) * (torch.rand(n, 256, generator=drawn) < 0.05)
    return 30 * (strengths @ directions) + mean + 0.3 * torch.randn(n, D_MODEL, generator=drawn)


def about(sae: SparseAutoencoder) -> Description:
    return Description(
        model="EleutherAI/pythia-70m",
        revision=None,
        tokenizer="0123456789abcdef",
        layer=LAYER,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        module=f"gpt_neox.layers.{LAYER}",
        trunk_module=f"layers.{LAYER}",
        context=128,
        prepend_bos=False,
        excluded_tokens=(0,),
        corpus="stdlib",
        trial="g0",
        selection=sae.cfg.selection,
        k=K,
        prefixes=sae.cfg.prefixes,
        l0=float(K),
        config_hash="0",
        mlflow_run=None,
    )


@pytest.fixture(scope="module")
def trained() -> dict[str, SparseAutoencoder]:
    """Every architecture after a few steps, on a layer whose scale is not 1."""
    x = activations(2048, 1)
    scale = {2: 1.7, LAYER: D_MODEL**0.5 / float(x.norm(dim=1).mean())}
    layer = torch.full((256,), LAYER)
    found = {}
    for name, changes in CASES.items():
        sae = SparseAutoencoder(
            SaeConfig(**{"d_model": D_MODEL, "d_sae": D_SAE, "k": K, **changes}), scale
        )
        fit = Fit(sae, FitConfig(batch_tokens=256, lr=2e-3), n_steps=40, seed=0)
        fit.initialise(x[:256], layer)
        for start in range(0, 40 * 256, 256):
            fit.step(x[torch.arange(start, start + 256) % len(x)], layer)
        sae.eval()
        if sae.log_thresholds is not None:  # so few steps leave them at 0.001, where all is on
            sae.log_thresholds.data = torch.linspace(0.3, 0.9, D_SAE).log()
        if name.startswith("Kron distilled"):
            sae = distilled(folded(sae, LAYER), x, seed=0)
        found[name] = as_topk(sae, K) if name.endswith("as TopK") else sae
    return found


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return activations(1000, 2)


@pytest.fixture(scope="module")
def parities(
    trained: dict[str, SparseAutoencoder],
    rows: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], Parity]:
    """Of every library and architecture that it holds; one process for each library."""
    root, found = tmp_path_factory.mktemp("interop"), {}
    for kind in LIBRARIES:
        folders: dict[str, Path] = {}
        for name, sae in trained.items():
            alone = folded(sae, LAYER)
            if FORMATS[kind].refusal(alone) is None:
                folders[name] = root / kind / name
                folders[name].mkdir(parents=True)
                FORMATS[kind].write(folders[name], alone, about(sae))
                check_files(kind, folders[name], sae, LAYER, rows)
        jobs = [(folder, rows) for folder in folders.values()]
        with by_library(peers.PYTHON, kind, jobs) as answers:
            for name, (codes, library) in zip(folders, answers, strict=True):
                sae = trained[name]
                found[library, name] = check_library(kind, library, codes, sae, LAYER, rows)
    return found


def test_each_library_loads_what_it_is_said_to_hold_and_computes_the_same(parities, capsys):
    kinds = {
        "sae-lens": "sae_lens",
        "eai-sparsify": "sparsify",
        "dictionary-learning": "dictionary_learning",
    }
    held: dict[str, set[str]] = {}
    lines = ["| library | architecture | latents | reconstructions | at the cut | L0 |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for (library, name), parity in parities.items():
        held.setdefault(kinds[library.split()[0]], set()).add(name)
        lines.append(
            f"| {library} | {name} | {parity.absolute_activation_delta:.1e} | "
            f"{parity.reconstruction_delta:.1e} | {parity.at_the_edge} | "
            f"{parity.n_latents / parity.n_rows:.1f} |"
        )
    with capsys.disabled():
        print("\n\n" + "\n".join(lines) + "\n")  # noqa: T201
    assert held == HELD
    for parity in parities.values():
        assert parity.absolute_activation_delta <= ACTIVATION_TOLERANCE
        assert parity.reconstruction_delta <= RECONSTRUCTION_TOLERANCE
        assert parity.at_the_edge <= 3
        assert parity.n_latents > parity.n_rows


def test_sae_lens_finds_in_the_metadata_what_its_activation_store_asks_for(trained, tmp_path):
    FORMATS["sae_lens"].write(tmp_path, folded(trained["TopK"], LAYER), about(trained["TopK"]))
    program = """
import sys
from sae_lens import SAE
metadata = SAE.load_from_disk(sys.argv[1]).cfg.metadata
print([getattr(metadata, name) for name in ("hook_name", "context_size", "prepend_bos", "model_name")])
"""
    done = subprocess.run(
        [str(peers.PYTHON), "-c", program, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    wanted = ["blocks.5.hook_resid_post", 128, False, "EleutherAI/pythia-70m"]
    assert done.stdout.strip().splitlines()[-1] == str(wanted)
