"""The tokens on which each latent is strongest, with what it does on the tokens around them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.latents import SparseLatents

NOWHERE = -1
"""Place and layer of a slot that no token has taken."""


class TopActivations:
    """Of every latent the `n` tokens of largest activation, merged batch by batch.

    A token counts once: where several layers were read at it, the largest activation counts. Of equal
    activations the earlier place comes first, then the lower layer, so what is kept does not
    depend on the order of batches. Memory: (16 + 4 * window) bytes per latent and slot.

    A token is named by its place, `sequence * context + position`. A batch holds whole sequences, as
    the window around a token is taken from its own batch.
    """

    def __init__(self, d_sae: int, n: int, context: int, before: int, after: int) -> None:
        """Empty slots.

        Args:
            d_sae: Latents.
            n: Tokens kept of each.
            context: Positions of a sequence.
            before: Tokens of the window before the strongest one.
            after: And after it.
        """
        self.values: Float[Tensor, "d_sae n"] = torch.zeros(d_sae, n)
        """Activations, falling; 0 in slots that no token has taken."""
        self.places: Int[Tensor, "d_sae n"] = torch.full((d_sae, n), NOWHERE)
        """Where they are."""
        self.layers: Int[Tensor, "d_sae n"] = torch.full((d_sae, n), NOWHERE, dtype=torch.int16)
        """The layer that each was read at."""
        window = before + 1 + after
        self.windows: Float[Tensor, "d_sae n window"] = torch.full((d_sae, n, window), torch.nan)
        """The latent's activations at that layer on the tokens around; NaN where none was read."""
        self._context, self._offsets = context, torch.arange(-before, after + 1)

    def update(self, latents: SparseLatents, places: Int[Tensor, " tokens"], layer: int) -> None:
        """Merge a batch of one layer.

        Args:
            latents: Of whole sequences; tokens may be left out, and count as not read.
            places: Of each token, ascending.
            layer: All are from.

        Raises:
            ValueError: If the places do not ascend.
        """
        if bool((places.diff() <= 0).any()):
            raise ValueError(
                "the places of a batch do not ascend; windows are looked up in their order: pass each "
                "token once, in reading order"
            )
        batch = _Batch(latents, places)
        entering = self._entering(batch, layer)
        if not len(entering):
            return
        latent = batch.latents[entering]
        touched = torch.unique(latent)
        slots = torch.arange(self.values.shape[1])
        kept = (touched[:, None] * len(slots) + slots)[self.values[touched] > 0]
        all_latents = torch.cat([kept // len(slots), latent])
        all_values = torch.cat([self.values.view(-1)[kept], batch.values[entering]])
        all_places = torch.cat([self.places.view(-1)[kept], places[batch.tokens[entering]]])
        new_layers = torch.full_like(entering, layer, dtype=torch.int16)
        all_layers = torch.cat([self.layers.view(-1)[kept], new_layers])

        order, ranks = _ranked(all_latents, all_values, all_places)
        order, ranks = order[ranks < len(slots)], ranks[ranks < len(slots)]
        is_new = order >= len(kept)
        windows = self.windows.new_empty(len(order), len(self._offsets))
        windows[~is_new] = self.windows.flatten(0, 1)[kept[order[~is_new]]]
        windows[is_new] = self._window(batch, entering[order[is_new] - len(kept)], places)

        self.values[touched], self.places[touched], self.layers[touched] = 0, NOWHERE, NOWHERE
        self.windows[touched] = torch.nan
        targets = all_latents[order] * len(slots) + ranks
        self.values.view(-1)[targets] = all_values[order]
        self.places.view(-1)[targets] = all_places[order]
        self.layers.view(-1)[targets] = all_layers[order]
        self.windows.flatten(0, 1)[targets] = windows

    def _entering(self, batch: "_Batch", layer: int) -> Int[Tensor, " entering"]:
        """Entries of the batch that may take a slot; older ones at the same token give theirs up."""
        candidates = (batch.values >= self.values[batch.latents, -1]).nonzero().flatten()
        latent, value = batch.latents[candidates], batch.values[candidates]
        place = batch.places[batch.tokens[candidates]]
        same = self.places[latent] == place[:, None]  # at most one slot of each
        entry, slot = same.nonzero(as_tuple=True)
        there, its_layer = self.values[latent[entry], slot], self.layers[latent[entry], slot]
        better = (value[entry] > there) | ((value[entry] == there) & (layer < its_layer))
        self.values[latent[entry[better]], slot[better]] = 0
        beaten = torch.zeros(len(candidates), dtype=torch.bool)
        beaten[entry[~better]] = True
        return candidates[~beaten]

    def _window(
        self, batch: "_Batch", entries: Int[Tensor, " new"], places: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "new window"]:
        """What each entry's latent does around its token."""
        place = places[batch.tokens[entries]][:, None]
        around = place + self._offsets
        token = torch.searchsorted(places, around).clamp(max=len(places) - 1)
        read = (places[token] == around) & (around // self._context == place // self._context)
        values = batch.look_up(batch.latents[entries][:, None].expand_as(token), token)
        return torch.where(read, values, torch.nan)


class _Batch:
    """The entries above 0 of a sparse code, in memory of the host, to be looked up by latent."""

    def __init__(self, latents: SparseLatents, places: Int[Tensor, " tokens"]) -> None:
        active: Bool[Tensor, " entries"] = latents.values > 0
        self.values = latents.values[active].detach().float().cpu()
        self.latents, self.tokens = latents.indices[active].cpu(), latents.tokens[active].cpu()
        self.places, self._n_tokens = places, latents.n_tokens
        self._keys, self._order = torch.sort(self.latents * self._n_tokens + self.tokens)

    def look_up(
        self, latent: Int[Tensor, "new window"], token: Int[Tensor, "new window"]
    ) -> Float[Tensor, "new window"]:
        """The activation of each latent on each token; 0 where it is off."""
        key = latent * self._n_tokens + token
        entry = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[entry] == key, self.values[self._order[entry]], 0.0)


def _ranked(
    latents: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    places: Int[Tensor, " entries"],
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
    """Entries by latent, falling value and place; and the rank of each inside its latent."""
    order = torch.argsort(places)
    order = order[torch.argsort(values[order], descending=True, stable=True)]
    order = order[torch.argsort(latents[order], stable=True)]
    _, sizes = torch.unique_consecutive(latents[order], return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order, torch.arange(len(order)) - starts
