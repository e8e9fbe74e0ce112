"""Forward hooks on a model's blocks: reading their outputs, and replacing them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _AllCaptured(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def captured_outputs(
    blocks: Sequence[nn.Module], layers: Iterable[int]
) -> Iterator[dict[int, Tensor]]:
    """The outputs of some blocks, by layer, of the forward pass made inside.

    The pass ends after the last of these blocks, so its own result does not come about.
    """
    outputs: dict[int, Tensor] = {}
    wanted = sorted(set(layers))

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = _hidden(output)
            if layer == wanted[-1]:
                raise _AllCaptured

        return keep

    hooks = [blocks[layer].register_forward_hook(hook_of(layer)) for layer in wanted]
    try:
        yield outputs
    except _AllCaptured:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def edited_outputs(
    blocks: Sequence[nn.Module], edits: Mapping[int, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Inside, the output of each block of `edits` is what its function makes of it."""

    def hook_of(edit: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = _hidden(output)
            edited = edit(hidden).to(hidden.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return replace

    hooks = [blocks[layer].register_forward_hook(hook_of(edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> Tensor:
    """The residual stream in a block's output: blocks return it alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
