"""Forward hooks on a model's modules: reading their outputs, and replacing them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _AllCaptured(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def captured_outputs(
    modules: Sequence[nn.Module], layers: Iterable[int], shape: tuple[int, int], copy: bool
) -> Iterator[dict[int, Tensor]]:
    """The outputs of some modules, by layer, of the forward pass made inside.

    The pass ends after the last of these modules, so its own result does not come about.

    Args:
        modules: One per layer.
        layers: Whose outputs are wanted.
        shape: Sequences and context of the pass.
        copy: Whether the rest of the pass may write into these outputs, so that copies are kept.
    """
    outputs: dict[int, Tensor] = {}
    wanted = set(layers)

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = _by_sequence(_hidden(output), shape)
            outputs[layer] = hidden.clone() if copy else hidden
            if len(outputs) == len(wanted):
                raise _AllCaptured

        return keep

    hooks = [modules[layer].register_forward_hook(hook_of(layer)) for layer in wanted]
    try:
        yield outputs
    except _AllCaptured:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def edited_outputs(
    modules: Sequence[nn.Module],
    edits: Mapping[int, Callable[[Tensor], Tensor]],
    shape: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Inside, the output of each module of `edits` is what its function makes of it.

    Args:
        modules: One per layer.
        edits: By layer.
        shape: Sequences and context of the passes; without it a module's activations are given in
            whatever shape they have.
    """

    def hook_of(edit: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = _hidden(output)
            edited = edit(_by_sequence(hidden, shape)).to(hidden).view_as(hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return replace

    hooks = [modules[layer].register_forward_hook(hook_of(edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(output: Any) -> Tensor:
    """The activations in a module's output: modules return them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _by_sequence(hidden: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """Activations as (sequences, context, width): some modules see all tokens in one row."""
    return hidden.unflatten(0, shape) if shape is not None and hidden.ndim == 2 else hidden
