import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage.dtypes import DTYPES, decode, encode, power_of_two_scale, row_scales, stored_dtype

ONE = np.ones((1, 1), np.float32)


def matrices(largest: float):
    return arrays(np.float32, (3, 4), elements=st.floats(-largest, largest, width=32))


STORABLE = matrices(2.0**63)  # beyond it the norm of a row overflows, and the store refuses the row


@given(matrices(float(np.finfo(np.float32).max)))
def test_bfloat16_bits_are_those_of_torch(x: np.ndarray):
    stored, clipped = encode(x, ONE, "bfloat16")
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    unclipped = np.abs(x) <= 2.0**127 * (2 - 2.0**-7)
    np.testing.assert_array_equal(stored[unclipped], expected[unclipped])
    np.testing.assert_array_equal(clipped, (~unclipped).sum(axis=1))


def test_bfloat16_rounds_ties_to_even():
    halfway = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]], np.float32)
    stored, _ = encode(halfway, ONE, "bfloat16")
    rounded = decode(stored, ONE, "bfloat16")
    np.testing.assert_array_equal(rounded, [[1, 1 + 2.0**-6, 1 + 2.0**-7]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(x=STORABLE, exponent=st.integers(-20, 20))
def test_what_is_read_is_what_the_dtype_itself_would_round_to(
    dtype: str, x: np.ndarray, exponent: int
):
    scale = np.full((len(x), 1), 2.0**exponent, np.float32)
    stored, clipped = encode(x, scale, dtype)
    assert stored.dtype == stored_dtype(dtype)
    scaled = torch.from_numpy(x.astype(np.float64) * 2.0**exponent).float()
    expected = scaled.to(getattr(torch, dtype)).double().numpy() / 2.0**exponent
    fits = np.abs(x.astype(np.float64)) * 2.0**exponent <= torch.finfo(getattr(torch, dtype)).max
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)
    np.testing.assert_array_equal(decode(stored, scale, dtype)[fits], expected[fits])
    np.testing.assert_array_equal(clipped, (~fits).sum(axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_again_what_was_read_changes_nothing(dtype: str):
    scale = np.array([[2.0], [0.125]], np.float32)
    x = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    stored, _ = encode(x, scale, dtype)
    again, _ = encode(decode(stored, scale, dtype), scale, dtype)
    np.testing.assert_array_equal(stored, again)


def test_what_float16_can_not_hold_is_clipped_and_counted_by_row():
    x = np.array([[1.0, 70000.0, -1e30], [65504.0, 0.0, -65504.0]], np.float32)
    stored, clipped = encode(x, ONE, "float16")
    assert clipped.tolist() == [2, 0]
    assert stored.tolist() == [[1.0, 65504.0, -65504.0], [65504.0, 0.0, -65504.0]]


@given(norm=st.floats(1e-20, 1e20), d_model=st.integers(1, 16384))
def test_scale_is_a_power_of_two_that_brings_rms_near_a_sixteenth(norm: float, d_model: int):
    scale = power_of_two_scale(norm, d_model)
    assert np.frexp(scale)[0] == 0.5
    assert 1 / 16 / 1.42 <= norm * scale / np.sqrt(d_model) <= 1.42 / 16


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_is_none_is_refused(norm: float):
    with pytest.raises(ValueError, match="positive and finite"):
        power_of_two_scale(norm, 64)


@given(matrices(2.0**63))
def test_int8_rows_are_rounded_to_a_127th_of_their_largest_value(x: np.ndarray):
    scales = row_scales(x)[:, None]
    stored, clipped = encode(x, scales, "int8")
    largest = np.abs(x).max(axis=1, keepdims=True)
    error = np.abs(decode(stored, scales, "int8").astype(np.float64) - x)
    assert stored.dtype == np.int8
    assert not clipped.any()
    assert (error <= np.maximum(largest / 127, 2.0**-96) * 0.5001).all()
    assert (np.abs(stored).max(axis=1) == 127)[largest[:, 0] > 2.0**-88].all()


def test_a_row_of_zeros_stays_one_as_int8():
    zeros = np.zeros((1, 4), np.float32)
    assert row_scales(zeros).tolist() == [1.0]
    assert (decode(encode(zeros, ONE, "int8")[0], ONE, "int8") == 0).all()
