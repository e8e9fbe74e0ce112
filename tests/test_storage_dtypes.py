import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from storage.dtypes import DTYPES, power_of_two_scale, stored_dtype
from storage.encoding import EncodedBlock, decode, encode


def matrices(largest: float):
    values = arrays(np.float32, (3, 4), elements=st.floats(-largest, largest, width=32))
    return values.map(torch.from_numpy)


# Well beyond it the norm of a row overflows, and the store refuses the row.
STORABLE = matrices(2.0**62)


def encoded(x: Tensor, dtype: str, scale: float = 1.0) -> EncodedBlock:
    """All rows, which are so few that they are one block."""
    ((span, block),) = encode(x, torch.arange(len(x)), scale, dtype)
    assert span.start == 0
    return block


def clipped(block: EncodedBlock) -> Tensor:
    return block.clipped if len(block.clipped) else torch.zeros_like(block.norm, dtype=torch.int64)


def scales(block: EncodedBlock, scale: float = 1.0) -> Tensor:
    return block.scale if len(block.scale) else torch.full_like(block.norm, scale)


@given(matrices(float(np.finfo(np.float32).max)))
def test_bfloat16_bits_are_those_of_torch(x: Tensor):
    block = encoded(x, "bfloat16")
    unclipped = x.abs() <= 2.0**127 * (2 - 2.0**-7)
    expected = x.bfloat16().view(torch.int16)
    assert torch.equal(block.stored.view(torch.int16)[unclipped], expected[unclipped])
    assert torch.equal(clipped(block), (~unclipped).sum(dim=1))


def test_bfloat16_rounds_ties_to_even():
    halfway = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]])
    rounded = decode(encoded(halfway, "bfloat16").stored, torch.ones(1), "bfloat16")
    assert rounded.tolist() == [[1, 1 + 2.0**-6, 1 + 2.0**-7]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(x=STORABLE, exponent=st.integers(-20, 20))
def test_what_is_read_is_what_the_dtype_itself_would_round_to(dtype: str, x: Tensor, exponent: int):
    block = encoded(x, dtype, 2.0**exponent)
    assert block.stored.numpy().dtype == stored_dtype(dtype)
    expected = (x.double() * 2.0**exponent).float().to(getattr(torch, dtype)).double()
    fits = x.double().abs() * 2.0**exponent <= torch.finfo(getattr(torch, dtype)).max
    read = decode(block.stored, scales(block, 2.0**exponent), dtype)
    assert torch.equal(read[fits], (expected / 2.0**exponent).float()[fits])
    assert torch.equal(clipped(block), (~fits).sum(dim=1))
    torch.testing.assert_close(block.norm, x.double().norm(dim=1).float(), rtol=1e-6, atol=1e-22)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_again_what_was_read_changes_nothing(dtype: str):
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    block = encoded(x, dtype, 0.125)
    again = encoded(decode(block.stored, scales(block, 0.125), dtype), dtype, 0.125)
    assert torch.equal(block.stored.view(torch.uint8), again.stored.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_encoded_alike_in_blocks_and_at_once_and_left_as_they_are(dtype, of):
    x = torch.randn(2000, 768, generator=torch.Generator().manual_seed(0)).to(of)
    before, rows = x.clone(), torch.arange(1999, -1, -2)
    n_blocks = 0
    for span, block in encode(x, rows, 0.5, dtype):
        n_blocks += 1
        for row, index in list(zip(rows[span], range(len(block.norm)), strict=True))[::50]:
            alone = encoded(x[row : row + 1].float(), dtype, 0.5)
            for whole, single in zip(block, alone, strict=True):
                assert torch.equal(whole[index : index + 1], single)
    assert n_blocks > 1
    assert torch.equal(x, before)


def test_what_float16_can_not_hold_is_clipped_and_counted_by_row():
    x = torch.tensor([[1.0, 70000.0, -1e30], [65504.0, 0.0, -65504.0]])
    block = encoded(x, "float16")
    assert block.clipped.tolist() == [2, 0]
    assert block.stored.tolist() == [[1.0, 65504.0, -65504.0], [65504.0, 0.0, -65504.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_gets_a_norm_that_is_not(dtype: str, value: float):
    norm = encoded(torch.tensor([[1.0, value], [1.0, 2.0]]), dtype).norm
    assert norm.isfinite().tolist() == [False, True]


@given(norm=st.floats(1e-20, 1e20), d_model=st.integers(1, 16384))
def test_scale_is_a_power_of_two_that_brings_rms_near_a_sixteenth(norm: float, d_model: int):
    scale = power_of_two_scale(norm, d_model)
    assert np.frexp(scale)[0] == 0.5
    assert 1 / 16 / 1.42 <= norm * scale / np.sqrt(d_model) <= 1.42 / 16


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_is_none_is_refused(norm: float):
    with pytest.raises(ValueError, match="positive and finite"):
        power_of_two_scale(norm, 64)


@given(STORABLE)
def test_int8_rows_are_rounded_to_a_127th_of_their_largest_value(x: Tensor):
    block = encoded(x, "int8")
    largest = x.abs().amax(dim=1, keepdim=True)
    error = (decode(block.stored, block.scale, "int8").double() - x).abs()
    assert block.stored.dtype == torch.int8
    assert not block.clipped.any()
    assert (error <= (largest / 127).clamp(min=2.0**-96) * 0.5001).all()
    assert (block.stored.abs().amax(dim=1) == 127)[largest[:, 0] > 2.0**-88].all()
    squares = error.square().sum(dim=1)
    torch.testing.assert_close(block.squared_error.double(), squares, rtol=1e-3, atol=1e-37)


def test_a_row_of_zeros_stays_one_as_int8():
    block = encoded(torch.zeros(1, 4), "int8")
    assert block.scale.tolist() == [1.0]
    assert (decode(block.stored, block.scale, "int8") == 0).all()
