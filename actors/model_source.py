"""Where a language model comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A pretrained causal language model with its tokenizer."""

    name: str
    """A local folder as `save_pretrained` writes it, or the id of a model on the Hub."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; by default its main branch."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the weights in memory and of the forward pass; `auto` is what the weights are stored in."""

    @property
    def is_local(self) -> bool:
        """Whether the name is a folder of this machine; then the network is never asked."""
        return Path(self.name).is_dir()
