import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.config import KronShape
from sae.kron import KronEncoder, mand, root


def test_latents_of_a_head_are_the_root_of_the_kronecker_product():
    shape = KronShape(h=3, m=2, n=4)
    encoder = KronEncoder(7, shape).double()
    encoder.initialise(torch.Generator().manual_seed(0))
    x, b_dec = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    latents = encoder.reference(x, b_dec).detach()
    pre_acts = (x - b_dec) @ encoder.w_enc.T
    for token in range(5):
        for head in range(3):
            p = pre_acts[token, head * 2 : head * 2 + 2].relu()
            q = pre_acts[token, 6 + head * 4 : 6 + head * 4 + 4].relu()
            expected = torch.kron(p, q).detach().numpy() ** 0.5
            got = latents[token, head * 8 : head * 8 + 8].numpy()
            assert got == pytest.approx(expected, rel=1e-12)


def test_mand_is_the_geometric_mean_where_both_are_on_and_zero_elsewhere():
    u = torch.tensor([4.0, 4.0, -4.0, -4.0, 0.0, 4.0])
    v = torch.tensor([9.0, -9.0, 9.0, -9.0, 9.0, 0.0])
    torch.testing.assert_close(mand(u, v), torch.tensor([6.0, 0, 0, 0, 0, 0]))


def test_mand_gradients_are_the_formulas_and_exactly_zero_where_a_factor_is_off():
    u = torch.tensor([4.0, 4.0, -4.0, 0.0], requires_grad=True)
    v = torch.tensor([9.0, -9.0, 9.0, 9.0], requires_grad=True)
    mand(u, v).sum().backward()
    assert u.grad is not None
    assert v.grad is not None
    torch.testing.assert_close(u.grad, torch.tensor([0.75, 0, 0, 0]))
    torch.testing.assert_close(v.grad, torch.tensor([1 / 3, 0, 0, 0]))
    assert not u.grad[1:].any()
    assert not v.grad[1:].any()


@given(st.floats(0, 2.0**50, width=32), st.floats(0, 2.0**50, width=32))
def test_mand_gradients_are_finite_for_all_activations(a, b):
    u, v = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    mand(u, v).backward()
    assert u.grad is not None
    assert v.grad is not None
    assert u.grad.isfinite()
    assert v.grad.isfinite()


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_root_is_the_square_root_to_the_last_places(x):
    assert float(root(torch.tensor(x))) == pytest.approx(x**0.5, rel=3e-7)


def test_decoder_starts_as_the_normalised_sum_of_the_factors():
    shape = KronShape(h=3, m=2, n=4)
    encoder = KronEncoder(7, shape)
    rows = encoder.initialise(torch.Generator().manual_seed(0))
    a, i, j = 2, 1, 3
    summed = encoder.w_enc[a * 2 + i] + encoder.w_enc[6 + a * 4 + j]
    torch.testing.assert_close(rows[a * 8 + i * 4 + j], (summed / summed.norm()).detach())


FRESH = """
import torch
from sae.kron import root
torch.set_num_threads(2)
x = torch.rand(1024, 8192) + 1e-3
z = root(x)
print(float((z * z / x - 1).abs().max()))
"""


def first_root_of_a_process(_):
    command = [sys.executable, "-c", FRESH]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_the_first_root_of_a_fresh_process_is_exact_every_time():
    # torch's own sqrt was seen to fail here in 3 of 85 processes, by up to 9e-4: so rarely that
    # 12 processes would see it every third time; CI has many days.
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(first_root_of_a_process, range(12)))
    assert max(errors) < 1e-6
