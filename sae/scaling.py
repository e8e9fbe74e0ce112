"""Between the model's units and the autoencoder's: what is done to an activation first."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_EPSILON = 1e-5


class TokenUnits(NamedTuple):
    """Per token, x = scaled * unit + shift."""

    unit: Float[Tensor, "tokens 1"]
    shift: Float[Tensor, "tokens 1"]

    def scale(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """From the model's units to the autoencoder's."""
        return (x - self.shift) / self.unit

    def restore(self, scaled: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """From the autoencoder's units to the model's."""
        return scaled * self.unit + self.shift


class LayerScale(nn.Module):
    """One factor per layer: brings each layer of a group to the same mean norm (Group-SAE, 2.3).

    With factor sqrt(d_model) / (mean norm of the layer), the mean norm becomes sqrt(d_model).

    Raises:
        ValueError: If a factor is missing, not finite or not positive.
    """

    def __init__(self, factors: Mapping[int, float]) -> None:
        super().__init__()
        bad = {layer: factor for layer, factor in factors.items() if not 0 < factor < float("inf")}
        if bad or not factors:
            raise ValueError(
                f"layer_scale={dict(factors)}; every layer the autoencoder reads needs a positive "
                "finite factor; give sqrt(d_model) / (mean norm) of each, or use token_standardize"
            )
        layers = sorted(factors)
        self.register_buffer("layers", torch.tensor(layers, dtype=torch.int64))
        self.register_buffer("factors", torch.tensor([float(factors[i]) for i in layers]))
        self.layers: Tensor
        self.factors: Tensor

    def units(
        self, x: Float[Tensor, "tokens d_model"], layer: Int[Tensor, " tokens"]
    ) -> TokenUnits:
        """The unit of each token: 1 / the factor of its layer.

        Raises:
            ValueError: If a token comes from a layer without a factor.
        """
        places = torch.searchsorted(self.layers, layer).clamp(max=len(self.layers) - 1)
        known = self.layers[places] == layer
        if not known.all():
            strange = sorted(set(layer[~known].tolist()))
            raise ValueError(
                f"activations of layers {strange} have no scale; this autoencoder was made for "
                f"layers {self.layers.tolist()}; pass one of those, or train one for theirs"
            )
        unit = (1 / self.factors[places]).to(x.dtype)[:, None]
        return TokenUnits(unit, torch.zeros_like(unit))


class TokenStandardize(nn.Module):
    """Each token to mean 0 and deviation 1 over d_model (the BatchTopK code's way).

    Deviation with n - 1 in the denominator plus 1e-5, as there; a constant row becomes zeros.
    """

    def units(
        self,
        x: Float[Tensor, "tokens d_model"],
        layer: Int[Tensor, " tokens"],
    ) -> TokenUnits:
        """Deviation and mean of each token."""
        deviation, mean = torch.std_mean(x, dim=1, keepdim=True, correction=min(1, x.shape[1] - 1))
        return TokenUnits(deviation + _EPSILON, mean)
