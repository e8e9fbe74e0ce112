"""What must hold from one process to the next: resuming, and loading elsewhere."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder, load_fit, save
from tests.test_sae_fit import CONFIGS, batches, make, trained

ROOT = Path(__file__).resolve().parents[1]


def python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


TRAIN = """
import sys
from pathlib import Path
import torch
from sae import load_fit, save_fit
from tests.test_sae_fit import CONFIGS, batches, make, trained

torch.set_num_threads(1)
source, target, start, stop = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
data = list(batches(stop))
for name in CONFIGS:
    fit = make(name)
    if start:
        load_fit(source / name, fit)
    else:
        fit.initialise(*data[0])
    trained(fit, data[start:])
    save_fit(target / name, fit)
"""


def test_a_fit_resumed_by_another_process_equals_an_unbroken_one_bit_for_bit(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    python(TRAIN, first, first, 0, 5)
    python(TRAIN, first, second, 5, 9)
    data = list(batches(9))
    for name in CONFIGS:
        whole, resumed = make(name), make(name)
        whole.initialise(*data[0])
        trained(whole, data)
        load_fit(second / name, resumed)
        for key, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[key]), (name, key)


LOAD = """
import importlib.abc
import sys

REFUSED = {
    *("ray", "mlflow", "zarr", "numcodecs", "obstore", "transformers", "datasets"),
    *("pydantic", "yaml", "scipy", "triton"),
}


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named '{name}'")


sys.meta_path.insert(0, Refuse())
from pathlib import Path
from safetensors.torch import load_file, save_file
from sae import load

for folder in Path(sys.argv[1]).iterdir():
    given = load_file(folder / "given.safetensors")
    out = load(folder)[0].reconstruct(given["x"], given["layer"])
    save_file({"x_hat": out.x_hat}, folder / "x_hat.safetensors")
assert not REFUSED & {name.split(".")[0] for name in sys.modules}
"""


def test_a_saved_autoencoder_loads_where_none_of_the_other_packages_is(tmp_path):
    x, layer = torch.randn(20, 10), torch.zeros(20, dtype=torch.long)
    expected = {}
    for name, encoder in (("dense", "dense"), ("kron", KronShape(h=6, m=2, n=4))):
        cfg = SaeConfig(d_model=10, d_sae=48, k=5, encoder=encoder, selection="batch_topk")
        sae = SparseAutoencoder(cfg, {0: 1.5})
        Fit(sae, FitConfig(), n_steps=1).step(x, layer)
        save(tmp_path / name, sae)
        save_file({"x": x, "layer": layer}, tmp_path / name / "given.safetensors")
        expected[name] = sae.reconstruct(x, layer).x_hat
    python(LOAD, tmp_path)
    for name, x_hat in expected.items():
        assert torch.equal(load_file(tmp_path / name / "x_hat.safetensors")["x_hat"], x_hat)
