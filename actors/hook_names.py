"""The names by which other libraries find the activations of a layer."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from actors.hook_points import find_hook_points
from actors.language_model import describe
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained

_TRANSFORMER_LENS = {
    "residual": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "attention": "blocks.{layer}.hook_attn_out",
}


@dataclass(frozen=True, kw_only=True)
class HookNames:
    """Names of one layer's hook point."""

    transformer_lens: str | None
    """Of TransformerLens; None if the module was chosen by its path."""

    module: str
    """Path of the module in the model with its head."""

    trunk_module: str
    """The same in the model without its head."""


def hook_names(source: ModelSource) -> list[HookNames]:
    """Names of every layer's hook point, from the model's configuration alone, without its weights.

    Raises:
        InputError: If there is no such model, or it has no such hook points.
    """
    shape = describe(source)
    config = load_pretrained(source, AutoConfig.from_pretrained)
    auto = AutoModelForCausalLM if shape.is_causal else AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config)
    paths = {id(module): path for path, module in model.named_modules()}
    trunk = {id(module): path for path, module in model.base_model.named_modules()}
    template = _TRANSFORMER_LENS[source.site] if source.hook_points is None else None
    return [
        HookNames(
            transformer_lens=template and template.replace("{layer}", str(layer)),
            module=paths[id(module)],
            trunk_module=trunk[id(module)],
        )
        for layer, module in enumerate(find_hook_points(model.base_model, shape.n_layers, source))
    ]
