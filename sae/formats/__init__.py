"""The formats of other libraries, and our own: an autoencoder of one layer as a folder of files.

Each module writes what its library loads and reads what it saves; none imports the library.
"""

from pathlib import Path
from typing import Protocol

from sae.autoencoder import SparseAutoencoder
from sae.formats import dictionary_learning, sae_lens, safetensors, sparsify
from sae.formats.description import Description


class Format(Protocol):
    """What each of these modules offers."""

    @property
    def CONFIG(self) -> str:  # noqa: N802
        """File that says what the weights are."""
        ...

    @property
    def WEIGHTS(self) -> str:  # noqa: N802
        """File that holds them."""
        ...

    def refusal(self, sae: SparseAutoencoder) -> str | None:
        """Why the format can't hold an autoencoder; None if it can."""
        ...

    def write(self, folder: Path, sae: SparseAutoencoder, about: Description) -> None:
        """Write an autoencoder of one layer, as `folded` gives it."""
        ...

    def read(self, folder: Path, layer: int) -> SparseAutoencoder:
        """The autoencoder in a folder, as one for `layer`."""
        ...


FORMATS: dict[str, Format] = {
    "sae_lens": sae_lens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "safetensors": safetensors,
}


def recognise(folder: Path) -> str:
    """The name of the format whose files a folder holds.

    Raises:
        ValueError: If it holds those of none.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; an autoencoder is one, with its configuration and its weights: give "
            "the path of that folder"
        )
    for name, kind in FORMATS.items():
        if (folder / kind.CONFIG).is_file() and (folder / kind.WEIGHTS).is_file():
            return name
    known = "; ".join(f"{k.CONFIG} and {k.WEIGHTS} ({name})" for name, k in FORMATS.items())
    there = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{folder} holds {there}, and no autoencoder: one has {known}; give the folder of one layer"
    )
