"""Where a language model comes from, and where in it activations are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Site = Literal["residual", "mlp", "attention"]
SITES: tuple[str, ...] = get_args(Site)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A pretrained transformer with its tokenizer."""

    name: str
    """A local folder as `save_pretrained` writes it, or the id of a model on the Hub."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; by default its main branch. A run keeps to the commit it began with."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the weights in memory and of the forward pass; `auto` is what the weights are stored in."""

    site: Site = "residual"
    """What is read of each block: the residual stream after it, or its MLP's or attention's output."""

    hook_points: str | None = None
    """Path of the module whose output is read instead, such as `encoder.layers.{layer}.fc2`.

    {layer} stands for the layer's number; the path begins at the model without its head."""

    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads the model over the devices of an actor; by default it is on one."""

    def __post_init__(self) -> None:
        """Refuse hook points that are no path for every layer, or that are named twice."""
        if self.hook_points is None:
            return
        if self.hook_points.count("{layer}") != 1 or "{" in self.hook_points.replace("{layer}", ""):
            raise ValueError(
                f"hook_points: {self.hook_points!r} names no module for each layer; write the path of "
                "one with {layer} once in place of the layer's number"
            )
        if self.site != "residual":
            raise ValueError(
                f"hook_points: a path says itself what is read, and site: {self.site} says it too; "
                "leave out either"
            )

    @property
    def is_local(self) -> bool:
        """Whether the name is a folder of this machine; then the network is never asked."""
        return Path(self.name).is_dir()
