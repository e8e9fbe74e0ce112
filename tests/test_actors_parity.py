"""The comparison behind the gate: it lets rounding through, and nothing else."""

import torch

from actors.parity import compare

X_HAT = torch.ones(2, 3)


def acts(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_equal_codes_hold():
    code = acts([0.0, 2.0], [3.0, 0.0])
    found = compare((code, X_HAT), (code, X_HAT), 1)
    assert found.holds
    assert (found.n_latents, found.n_rows, found.wrong, found.at_the_edge) == (2, 2, 0, 0)


def test_a_latent_that_differs_is_measured_in_units_of_the_largest_of_its_row():
    a, b = acts([0.0, 20.0], [3.0, 0.0]), acts([0.0, 20.0001], [3.0, 0.0])
    found = compare((a, X_HAT), (b, X_HAT), torch.ones(2))
    assert 4e-6 < found.activation_delta < 6e-6
    assert found.holds
    assert not compare((a, X_HAT), (acts([0.0, 20.01], [3.0, 0.0]), X_HAT), torch.ones(2)).holds


def test_a_latent_at_its_threshold_may_be_on_in_one_alone_and_its_row_is_left_out():
    a, b = acts([0.0, 1.000001], [3.0, 0.0]), acts([0.0, 0.0], [3.0, 0.0])
    other = X_HAT.clone()
    other[0] = 9
    found = compare((a, X_HAT), (b, other), torch.ones(2))
    assert found.holds
    assert found.at_the_edge == 1
    other[1] = 9
    assert not compare((a, X_HAT), (b, other), torch.ones(2)).holds


def test_a_latent_that_is_missing_though_it_is_far_from_the_cut_is_wrong():
    a, b = acts([0.5, 5.0], [3.0, 0.0]), acts([0.0, 5.0], [3.0, 0.0])
    assert compare((a, X_HAT), (b, X_HAT), torch.full((2,), 0.1)).wrong == 1
    # Of TopK with k = 2 the row was not full without it; of k = 1 it is another choice.
    assert compare((a, X_HAT), (b, X_HAT), 2).wrong == 1
    assert compare((a, X_HAT), (b, X_HAT), 1).wrong == 1


def test_of_two_latents_that_tie_for_the_last_place_either_may_be_kept():
    a, b = acts([4.0, 2.0, 0.0]), acts([4.0, 0.0, 2.0])
    found = compare((a, X_HAT[:1]), (b, X_HAT[:1]), 2)
    assert found.holds
    assert found.at_the_edge == 2


def test_small_roots_are_compared_by_what_is_under_them():
    a, b = acts([1e-3, 2.0]), acts([1.1e-3, 2.0])
    assert not compare((a, X_HAT[:1]), (b, X_HAT[:1]), torch.zeros(2)).holds
    assert compare((a, X_HAT[:1]), (b, X_HAT[:1]), torch.zeros(2), rooted=True).holds
    assert not compare((a, X_HAT[:1]), (acts([1e-1, 2.0]), X_HAT[:1]), torch.zeros(2), True).holds
