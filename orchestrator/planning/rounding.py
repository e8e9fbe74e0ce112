"""What int8 costs, measured on the rows of a validation store."""

import torch

from storage.activations import ActivationStore
from storage.encoding import decode, encode
from storage.metadata import has_metadata
from storage.places import Place

SAMPLE_ROWS = 8192


def int8_cost(validation: Place) -> dict[int, float] | None:
    """Per layer, the FVU of rows rounded to int8: the fraction of variance that rounding alone loses.

    Of an int8 store as it was measured while it was written, against float32; of another on the first
    rows of it. None where there is no store yet, or no row.

    Raises:
        StoreError: If the store is damaged.
    """
    if not has_metadata(validation):
        return None
    store = ActivationStore.open(validation)
    if 0 not in store.committed():
        return None
    if store.spec.dtype == "int8":
        return store.rounding_fvu()
    stop = min(SAMPLE_ROWS, store.spec.shard_range(0)[1])
    costs = {}
    for array, layer in zip(store.spec.arrays, store.spec.layers, strict=True):
        x = torch.from_numpy(store.read(array, 0, stop))
        error = 0.0
        for span, block in encode(x, torch.arange(stop), 1.0, "int8"):
            rounded = decode(block.stored, block.scale, "int8")
            error += float((rounded - x[span]).square().sum(dtype=torch.float64))
        costs[layer] = error / float((x - x.mean(0)).square().sum(dtype=torch.float64))
    return costs


def told(costs: dict[int, float]) -> str:
    """The costs for people: their mean, and the worst."""
    worst = max(costs, key=lambda layer: costs[layer])
    mean = sum(costs.values()) / len(costs)
    return f"an FVU of {mean:.2g}, at most {costs[worst]:.2g} (layer {worst})"
