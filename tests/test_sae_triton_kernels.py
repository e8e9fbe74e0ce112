"""The Triton kernels against their formulas: on a GPU where there is one, else interpreted.

The comparisons are marked `gpu`. `test_through_triton_s_interpreter_...` runs the same ones in a
process of its own, because Triton decides at its import whether it interprets.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sae import Fit, FitConfig, KronShape, SaeConfig, SparseAutoencoder
from sae.bags import entry_dots, entry_dots_reference, weighted_sums, weighted_sums_reference
from sae.decoding import decode, decode_reference
from sae.kernels import kernels_for
from sae.kron import HeadBlock
from sae.latents import Pattern, SparseLatents
from tests import test_sae_parity as parity

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # One unit in the last of 8 bits: sums are float32, and the interpreter cuts where GPUs round.
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}
COUNTS = {"ragged": [0, 5, 1, 0, 16, 17], "long": [0, 1, 200], "none": [0, 0, 0]}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def device():
    """Where the kernels run."""
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="is itself what starts the interpreter")
def test_through_triton_s_interpreter_the_kernels_equal_their_formulas():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, __file__],
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout


POINTERS = {"table", "weights", "left", "right", "out", "base", "extension"}
CONSTANTS = {"m": 3, "n": 4, "m_padded": 4, "n_padded": 4}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", ["_weighted_sums", "_entry_dots", "_head_maxima"])
def test_the_kernels_compile_for_a_gpu_and_use_no_atomics(name, dtype, tmp_path, monkeypatch):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sae import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    constants = {
        **CONSTANTS,
        **dict.fromkeys(("n_entries_at_once", "n_columns", "n_heads_at_once"), 16),
        "sum_dtype": tl.float64 if dtype == "fp64" else tl.float32,
    }
    signature, indices = {}, {"picks", "rows", "offsets", "bags"}
    for argument in kernel.arg_names:
        floats = f"*{dtype}" if argument in POINTERS else "i32"
        kind = "*i64" if argument in indices else floats
        signature[argument] = "constexpr" if argument in constants else kind
    constexprs = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    compiled = compile(
        ASTSource(kernel, signature=signature, constexprs=constexprs),
        target=GPUTarget("cuda", 90, 32),
    )
    assert "ld.global" in compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])


def sparse_problem(counts, d_model, dtype, device):
    offsets = torch.tensor([0, *counts], device=device).cumsum(0)
    n_entries, n_rows = int(offsets[-1]), len(counts)
    rows = torch.arange(n_rows).repeat_interleave(torch.tensor(counts)).to(device)
    picks = torch.randint(0, 9, (n_entries,)).to(device)
    weights = torch.rand(n_entries).to(device, dtype)
    table, left = (torch.randn(n, d_model).to(device, dtype) for n in (9, n_rows))
    return offsets, rows, picks, weights, table, left


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("d_model", [1, 33, 130])
def test_weighted_sums_and_entry_dots(counts, d_model, dtype, device):
    offsets, rows, picks, weights, table, left = sparse_problem(
        COUNTS[counts], d_model, dtype, device
    )
    expected = weighted_sums_reference(table.double(), picks, weights.double(), offsets)
    ours = weighted_sums(table, picks, weights, offsets)
    torch.testing.assert_close(ours, expected.to(dtype), **TOLERANCE[dtype])
    assert torch.equal(ours, weighted_sums(table, picks, weights, offsets))

    expected = entry_dots_reference(left.double(), table.double(), rows, picks)
    ours = entry_dots(left, table, rows, picks)
    torch.testing.assert_close(ours, expected.to(dtype), **TOLERANCE[dtype])
    assert torch.equal(ours, entry_dots(left, table, rows, picks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("h", "m", "n"), [(1, 1, 1), (5, 3, 4), (130, 2, 5)])
def test_head_maxima_are_exact(h, m, n, dtype, device):
    acts = torch.randn(7, h * (m + n)).relu().to(device, dtype)
    base, extension = acts[:, : h * m].unflatten(1, (h, m)), acts[:, h * m :].unflatten(1, (h, n))
    products = base.double()[..., None] * extension.double()[:, :, None]
    wide = torch.promote_types(dtype, torch.float32)
    ours = HeadBlock(base, extension).maxima()
    assert torch.equal(ours, products.amax((2, 3)).to(wide))


@pytest.mark.gpu
@pytest.mark.parametrize("prefixes", [(), (24, 72, 96)], ids=["one", "nested"])
@pytest.mark.parametrize("selection", ["topk", "batch_topk"])
@pytest.mark.parametrize("encoder", ["dense", "kron", "product"])
def test_values_and_gradients_of_an_autoencoder(encoder, selection, prefixes, device):
    cfg = SaeConfig(
        d_model=11,
        d_sae=96,
        k=7,
        encoder=parity.ENCODERS[encoder],
        selection=selection,
        prefixes=prefixes,
    )
    sae = parity.autoencoder(cfg, torch.float32).to(device)
    x = torch.randn(9, 11).to(device)
    values, grads = parity.values_and_grads(parity.ours, sae, x)
    expected, expected_grads = parity.values_and_grads(parity.reference, sae, x)
    torch.testing.assert_close(values, expected, **parity.TOLERANCE[torch.float32])
    torch.testing.assert_close(grads, expected_grads, **parity.TOLERANCE[torch.float32])


@pytest.mark.gpu
def test_bfloat16_gradients_of_the_decoder(device):
    offsets, _, picks, values, w_dec, cotangent = sparse_problem(
        COUNTS["ragged"], 33, torch.bfloat16, device
    )
    pattern = Pattern(indices=picks, offsets=offsets, d_sae=len(w_dec))
    results = []
    for fn, dtype in ((decode, torch.bfloat16), (decode_reference, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (values, w_dec)]
        out = fn(SparseLatents(inputs[0], pattern), inputs[1])
        grads = torch.autograd.grad(out, inputs, cotangent.to(dtype))
        results.append([t.bfloat16() for t in (out, *grads)])
    torch.testing.assert_close(*results, **TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("encoder", "selection"),
    [
        ("dense", "topk"),
        (KronShape(h=4, m=2, n=4), "batch_topk"),
        (KronShape(h=4, m=2, n=4), "jumprelu"),
    ],
)
def test_an_autoencoder_trains(encoder, selection, device):
    cfg = SaeConfig(
        d_model=12, d_sae=32, k=4, encoder=encoder, selection=selection, prefixes=(16, 32)
    )
    sae = SparseAutoencoder(cfg, {0: 1.0}).to(device)
    fit = Fit(sae, FitConfig(lr=1e-2, dead_after_tokens=8), n_steps=4)
    x, layer = torch.randn(8, 12).to(device), torch.zeros(8, dtype=torch.long, device=device)
    fit.initialise(x, layer)
    reports = [fit.step(x, layer) for _ in range(4)]
    assert reports[-1].fvu < reports[0].fvu
    assert sae.reconstruct(x, layer).x_hat.isfinite().all()


WITHOUT_TRITON = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")

sys.meta_path.insert(0, Refuse())
import torch
from sae.bags import weighted_sums
one = torch.ones(1, 1)
try:
    weighted_sums(one, torch.tensor([0]), torch.ones(1), torch.tensor([0, 1]))
except ValueError as error:
    print(error)
"""


def test_without_triton_the_kernels_are_refused_clearly():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Triton cannot be imported (No module named 'triton')" in done.stdout


def test_tensors_on_the_cpu_need_no_kernels():
    assert INTERPRETED or kernels_for(torch.ones(1)) is None
