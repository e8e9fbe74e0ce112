"""Edits of a sparse code for causal experiments: switching latents off, and setting them."""

import torch
from jaxtyping import Int
from torch import Tensor

from sae.latents import Pattern, SparseLatents


def ablate(latents: SparseLatents, which: Int[Tensor, " ablated"] | list[int]) -> SparseLatents:
    """The code with some latents at 0 on every token; gradients of the others flow on.

    Raises:
        ValueError: If a latent is not of this dictionary.
    """
    off = _checked(latents, which)
    return SparseLatents(latents.values * ~torch.isin(latents.indices, off), latents.pattern)


def clamp(
    latents: SparseLatents, which: Int[Tensor, " clamped"] | list[int], value: float
) -> SparseLatents:
    """The code with some latents at `value` on every token, whether they were on or not: steering.

    Args:
        latents: The code.
        which: Latents to set.
        value: In the autoencoder's units, as all latents.

    Raises:
        ValueError: If a latent is not of this dictionary.
    """
    which = _checked(latents, which)
    kept = ~torch.isin(latents.indices, which)
    every = torch.arange(latents.n_tokens, device=which.device)
    tokens = torch.cat([latents.tokens[kept], every.repeat_interleave(len(which))])
    order = tokens.argsort(stable=True)
    indices = torch.cat([latents.indices[kept], which.repeat(latents.n_tokens)])[order]
    set_to = latents.values.new_full((latents.n_tokens * len(which),), value)
    values = torch.cat([latents.values[kept], set_to])[order]
    offsets = torch.cat(
        [tokens.new_zeros(1), tokens.bincount(minlength=latents.n_tokens).cumsum(0)]
    )
    pattern = Pattern(
        indices=indices, offsets=offsets.to(latents.offsets.dtype), d_sae=latents.d_sae
    )
    return SparseLatents(values, pattern)


def _checked(latents: SparseLatents, which: Int[Tensor, " latents"] | list[int]) -> Tensor:
    wanted = torch.as_tensor(which, dtype=latents.indices.dtype, device=latents.indices.device)
    wrong = wanted[(wanted < 0) | (wanted >= latents.d_sae)]
    if len(wrong):
        raise ValueError(
            f"latents {wrong.tolist()} are not of this dictionary, which has {latents.d_sae}; "
            f"give numbers from 0 to {latents.d_sae - 1}"
        )
    return wanted.unique()
