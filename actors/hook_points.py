"""Finds where a model is read: for each layer the module whose output is the activation.

Models name their parts differently. Blocks are found by their number; an MLP or an attention by the
names that transformers uses; everything else by the path that the user gives.
"""

from torch import nn

from actors.errors import InputError
from actors.model_source import ModelSource

_NAMES = {
    # In BERT and its kin the module `output` adds the residual, so what it adds is read.
    "mlp": ("mlp", "feed_forward", "ffn", "output.dense", "fc2"),
    "attention": ("self_attn", "attn", "self_attention", "attention.output.dense", "attention"),
}
"""Paths inside a block, the first that is there counts."""


def find_hook_points(trunk: nn.Module, n_layers: int, source: ModelSource) -> list[nn.Module]:
    """The module of each layer whose output is read.

    Args:
        trunk: The model without its head.
        n_layers: Layers of the model.
        source: Whose `site` or `hook_points` says what is wanted.

    Raises:
        InputError: If the model has no such modules, or its blocks can't be told.
    """
    if source.hook_points is not None:
        return [
            _at_path(trunk, source.hook_points, layer, source.name) for layer in range(n_layers)
        ]
    blocks = _blocks(trunk, n_layers, source.name)
    if source.site == "residual":
        return blocks
    return [_part(block, source) for block in blocks]


def _at_path(trunk: nn.Module, template: str, layer: int, name: str) -> nn.Module:
    path = template.replace("{layer}", str(layer))
    # Who looked at the model with its head sees one more name in front.
    head = f"{getattr(trunk, 'base_model_prefix', '')}."
    module = _submodule(trunk, path) or _submodule(trunk, path.removeprefix(head))
    if module is None:
        known = ", ".join(path for path, _ in trunk.named_modules() if ".0." in f".{path}.")
        raise InputError(
            f"{name} has no module {path} for model.hook_points; of its first layer it has "
            f"{known or 'none'}: give the path of one, with {{layer}} in place of the number"
        )
    return module


def _part(block: nn.Module, source: ModelSource) -> nn.Module:
    for path in _NAMES[source.site]:
        module = _submodule(block, path)
        if module is not None:
            return module
    raise InputError(
        f"the blocks of {source.name} ({type(block).__name__}) name no {source.site}; they have "
        f"{', '.join(name for name, _ in block.named_children())}: give the path of the module as "
        "model.hook_points, with {layer} in place of the layer's number"
    )


def _blocks(trunk: nn.Module, n_layers: int, name: str) -> list[nn.Module]:
    """The list of the model's blocks: the outermost ModuleList that has one item per layer."""
    found = {
        path: module
        for path, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise InputError(
            f"the blocks of {name} ({type(trunk).__name__}) can't be told: of its lists of modules, "
            f"{len(outermost)} have {n_layers} items, one per layer ({', '.join(outermost)}), and it "
            "must be one; name them by model.hook_points, such as decoder.layers.{layer}"
        )
    return list(found[outermost[0]])


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
