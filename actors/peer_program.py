"""Runs where another library is installed, and knows nothing of Strata: what that library makes of a folder.

`python peer_program.py FORMAT SCRATCH FOLDER ...`: SCRATCH/in-0.safetensors holds the rows `x` for the first
folder, and so on; SCRATCH/out-0.safetensors gets the latents and reconstructions that the library computes
of them after loading the folder by its own loader, and the library's version. All in one process, as
importing such a library takes longer than anything else here.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib.metadata
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def sae_lens(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`SAE.load_from_disk`; a plugin beside the weights is imported first, as a user would."""
    if (Path(folder) / "kronsae.py").is_file() and "kronsae" not in sys.modules:
        sys.path.insert(0, folder)
        __import__("kronsae")
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    acts = sae.encode(x)
    return acts, sae.decode(acts)


def sparsify(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`SparseCoder.load_from_disk`."""
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    code = coder.encode(x)
    acts = torch.zeros(len(x), coder.num_latents).scatter(1, code.top_indices, code.top_acts)
    return acts, coder(x).sae_out


def dictionary_learning(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`utils.load_dictionary`."""
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(folder, device="cpu")
    return dictionary.encode(x), dictionary(x)


PACKAGES = {
    "sae_lens": (sae_lens, "sae-lens"),
    "sparsify": (sparsify, "eai-sparsify"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
}

if __name__ == "__main__":
    kind, scratch, *folders = sys.argv[1:]
    torch.set_num_threads(1)
    load, package = PACKAGES[kind]
    about = {"library": f"{package} {importlib.metadata.version(package)}"}
    for i, folder in enumerate(folders):
        with torch.no_grad():
            acts, x_hat = load(folder, load_file(f"{scratch}/in-{i}.safetensors")["x"])
        found = {"acts": acts.contiguous(), "x_hat": x_hat.contiguous()}
        save_file(found, f"{scratch}/out-{i}.safetensors", about)
