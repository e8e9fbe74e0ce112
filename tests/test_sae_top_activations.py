"""The strongest tokens of each latent against sorting everything."""

from math import isnan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.top_activations import NOWHERE, TopActivations
from tests.test_sae_latent_statistics import sparse

CONTEXT, D_SAE, BEFORE, AFTER = 5, 4, 2, 1
LAYERS = (2, 3, 7)


def reference(read, n):
    """Of each latent (value, place, layer, window), by a loop over everything.

    Args:
        read: Per layer a dictionary from place to activations.
        n: Kept of each.
    """
    found = []
    for latent in range(D_SAE):
        best = {}
        for layer, tokens in read.items():
            for place, x in tokens.items():
                key = (-float(x[latent]), layer)
                if x[latent] > 0 and (place not in best or key < best[place]):
                    best[place] = key
        ranked = sorted((value, place, layer) for place, (value, layer) in best.items())[:n]
        found.append(
            [
                (-value, place, layer, window(read[layer], latent, place))
                for value, place, layer in ranked
            ]
        )
    return found


def window(tokens, latent, place):
    around = range(place - BEFORE, place + AFTER + 1)
    return [
        float(tokens[p][latent]) if p in tokens and p // CONTEXT == place // CONTEXT else None
        for p in around
    ]


def found_by(top):
    rows = []
    for latent in range(D_SAE):
        slots = [s for s in range(top.values.shape[1]) if top.places[latent, s] != NOWHERE]
        windows = [
            [None if isnan(v) else v for v in top.windows[latent, s].tolist()] for s in slots
        ]
        rows.append(
            [
                (
                    float(top.values[latent, s]),
                    int(top.places[latent, s]),
                    int(top.layers[latent, s]),
                    w,
                )
                for s, w in zip(slots, windows, strict=True)
            ]
        )
    return rows


@settings(max_examples=60)
@given(
    n_sequences=st.integers(1, 5),
    n=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    random=st.randoms(use_true_random=False),
)
def test_any_batches_in_any_order_keep_what_sorting_everything_keeps(n_sequences, n, seed, random):
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that ties are everywhere.
    sizes = torch.tensor([0.0, 0.0, 0.5, 1.0, 2.0])
    read, batches = {layer: {} for layer in LAYERS}, []
    for layer in LAYERS:
        cuts = sorted({random.randint(1, n_sequences), n_sequences})
        for first, last in zip([0, *cuts], cuts, strict=False):
            places = torch.arange(first * CONTEXT, last * CONTEXT)
            places = places[torch.rand(len(places), generator=generator) < 0.8]
            x = sizes[torch.randint(len(sizes), (len(places), D_SAE), generator=generator)]
            read[layer].update(zip(places.tolist(), x, strict=True))
            if len(places):
                batches.append((layer, places, x))
    random.shuffle(batches)
    top = TopActivations(D_SAE, n, CONTEXT, BEFORE, AFTER)
    for layer, places, x in batches:
        top.update(sparse(x), places, layer)
    assert found_by(top) == reference(read, n)


def test_many_tokens_of_continuous_activations():
    generator = torch.Generator().manual_seed(0)
    top, read = TopActivations(D_SAE, 3, CONTEXT, BEFORE, AFTER), {}
    for layer in LAYERS:
        x = torch.rand(400, D_SAE, generator=generator) - 0.5
        x = x.clamp(min=0)
        read[layer] = dict(enumerate(x))
        for start in range(0, 400, 50):
            span = slice(start, start + 50)
            top.update(sparse(x[span]), torch.arange(start, start + 50), layer)
    assert found_by(top) == reference(read, 3)


def test_a_latent_that_never_fires_has_no_token():
    top = TopActivations(D_SAE, 3, CONTEXT, BEFORE, AFTER)
    top.update(sparse(torch.zeros(5, D_SAE)), torch.arange(5), 2)
    assert bool((top.places == NOWHERE).all())
    assert bool(top.windows.isnan().all())


def test_tokens_out_of_reading_order_are_refused():
    top = TopActivations(D_SAE, 3, CONTEXT, BEFORE, AFTER)
    with pytest.raises(ValueError, match="do not ascend"):
        top.update(sparse(torch.ones(2, D_SAE)), torch.tensor([3, 1]), 2)
