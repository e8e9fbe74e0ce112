"""A sample of one layer's rows, spread over a whole store."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actors.errors import InputError
from storage.activations import ActivationStore
from storage.hygiene import RowFilter
from storage.places import Location


def layer_rows(
    store: Location, layer: int, row_filter: RowFilter, limit: int
) -> Float[Tensor, "rows d_model"]:
    """At most `limit` rows that the filter keeps, evenly from every chunk; always the same ones.

    Args:
        store: A store with an array per layer: the pilot's or the validation store.
        layer: Whose rows.
        row_filter: The one the autoencoders were trained with.
        limit: Of the rows.

    Raises:
        InputError: If the store lacks the layer, or the filter keeps none of its rows.
        StoreError: If there is no store, or it lacks a shard.
    """
    opened = ActivationStore.open(store)
    if layer not in opened.spec.layers:
        raise InputError(
            f"{store} has layers {', '.join(map(str, opened.spec.layers))}, and was asked for {layer}; "
            "choose one of these"
        )
    spec, array = opened.spec, f"layers/{layer}"
    each = -(-limit // spec.n_chunks)
    parts = []
    for chunk in range(spec.n_chunks):
        start, stop = spec.chunk_range(chunk)
        keep = row_filter.keep(
            opened.column("token_id", start, stop),
            opened.column("position", start, stop),
            np.full(stop - start, layer),
            opened.column(f"{array}/norm", start, stop),
        ).nonzero()[0]
        n = min(each, len(keep))
        if n:
            parts.append(opened.read(array, start, stop)[keep[np.arange(n) * len(keep) // n]])
    if not parts:
        raise InputError(
            f"the row filter keeps none of the {spec.n_rows} rows of layer {layer} of {store}; at least one "
            "is needed: loosen the hygiene settings or harvest more"
        )
    return torch.from_numpy(np.concatenate(parts)[:limit])
