import pytest

from sae import KronShape, SaeConfig


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"k": 65}, "k=65 exceeds d_sae=64"),
        ({"k": 0}, "k=0"),
        ({"d_model": -1}, "d_model=-1"),
        ({"encoder": KronShape(h=3, m=4, n=4)}, r"h\*m\*n = 3\*4\*4 = 48, but d_sae=64"),
        ({"prefixes": (16, 32)}, "end at 32, but d_sae=64"),
        ({"prefixes": (32, 16, 64)}, "do not rise"),
        ({"prefixes": (0, 64)}, "do not rise"),
        (
            {"encoder": KronShape(h=4, m=4, n=4), "prefixes": (16, 24, 64)},
            r"prefixes \[24\] cut a head of m\*n=16",
        ),
    ],
)
def test_contradicting_sizes_are_refused_with_the_remedy(wrong, says):
    with pytest.raises(ValueError, match=says):
        SaeConfig(**{"d_model": 8, "d_sae": 64, "k": 4, **wrong})


def test_a_head_has_at_least_one_row_of_each_factor():
    with pytest.raises(ValueError, match="every size is a whole number from 1"):
        KronShape(h=4, m=0, n=2)


def test_parameter_counts_are_the_papers():
    dense = SaeConfig(d_model=100, d_sae=32768, k=32)
    kron = SaeConfig(d_model=100, d_sae=32768, k=32, encoder=KronShape(h=1024, m=4, n=8))
    assert dense.n_encoder_parameters == 32768 * 101
    assert kron.n_encoder_parameters / dense.n_encoder_parameters == 0.375
    assert dense.n_parameters == 32768 * 101 + 32768 * 100 + 100
    assert kron.encoder_flops_per_token == 100 * 1024 * 12 + 32768
    assert dense.encoder_flops_per_token == 100 * 32768


@pytest.mark.parametrize("wrong", [{"encoder": "thin"}, {"selection": "top"}, {"scaling": "none"}])
def test_an_unknown_choice_is_refused(wrong):
    # The tests' type checker comes first (TypeError); at run time it is the ValueError.
    with pytest.raises((ValueError, TypeError), match=f"'{next(iter(wrong.values()))}'"):
        SaeConfig(d_model=8, d_sae=64, k=4, **wrong)
