"""Where the sparse operations run: as Triton kernels on a GPU, as torch on a CPU."""

import os
from types import ModuleType

from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`sae.triton_kernels` if the tensor is on a GPU, else None.

    With TRITON_INTERPRET=1 in the environment Triton interprets its kernels, and tensors on the
    CPU get them too: slow, and how they are tested without a GPU.

    Raises:
        ValueError: If the kernels are called for and Triton is not installed.
    """
    if not (tensor.is_cuda or _INTERPRETED):
        return None
    try:
        from sae import triton_kernels
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the tensors are on {tensor.device} and Triton cannot be imported ({error}); "
            "autoencoders need it on a GPU, and on a CPU torch alone; install the triton that "
            "this torch was built with, or move autoencoder and activations to the CPU"
        ) from error
    return triton_kernels
