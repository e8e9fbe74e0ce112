"""A frozen language model, read at the output of each of its blocks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from actors.capture import captured_outputs, edited_outputs
from actors.errors import InputError
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model's configuration says about its activations."""

    n_layers: int
    """Blocks, and so layers that have activations."""

    d_model: int
    """Width of the activations."""

    context: int
    """Tokens of the longest sequence it takes."""

    vocabulary: int
    """Token ids run from 0 to below this."""


Loader = Callable[..., tuple[PreTrainedModel, dict[str, Any]]]  # with output_loading_info


def describe(source: ModelSource) -> ModelShape:
    """A model's shape from its configuration alone, without its weights.

    Raises:
        InputError: If there is no such model, or its configuration lacks a size.
    """
    return _shape(load_pretrained(source, AutoConfig.from_pretrained), source)


def parameter_count(source: ModelSource) -> int:
    """Weights of the model without its head, from its configuration alone.

    Raises:
        InputError: As `describe`.
    """
    config = load_pretrained(source, AutoConfig.from_pretrained)
    with torch.device("meta"):
        return AutoModel.from_config(config).num_parameters()


class LanguageModel:
    """A frozen model on one device. Layers are counted from 0; nothing is ever computed twice."""

    def __init__(self, source: ModelSource, device: str = "cpu", head: bool = False) -> None:
        """Load the model, without its language-modelling head unless that is asked for.

        Raises:
            InputError: If there is no such model, or part of its weights is missing.
        """
        auto = AutoModelForCausalLM if head else AutoModel
        model, loading = load_pretrained(
            source,
            cast("Loader", auto.from_pretrained),
            dtype=source.dtype,
            output_loading_info=True,
        )
        missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise InputError(
                f"the weights of {source.name} lack {len(missing)} of the model's tensors "
                f"({', '.join(missing[:3])}, ...), which would be random; give a whole checkpoint "
                "of this architecture"
            )
        self.shape = _shape(model.config, source)
        self._name = source.name
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False)
        cast("nn.Module", model).to(self._device)  # a decorator hides the type of its own `to`
        self._blocks = _find_blocks(model.base_model, self.shape.n_layers, source.name)

    @torch.inference_mode()
    def residuals(
        self, ids: Int64[Tensor, "sequences context"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "sequences context d_model"]]:
        """The residual stream after each of some blocks, in the model's own dtype and units.

        That is `hidden_states[layer + 1]` of transformers, but for the last layer, where
        transformers gives it after the final norm. The forward pass ends after the last of `layers`.

        Raises:
            InputError: If the sequences are too long, or a token or layer is not the model's.
        """
        layers = list(layers)
        self._check_layers(layers)
        ids = self._checked(ids)
        with captured_outputs(self._blocks, layers) as outputs:
            self._model.base_model(input_ids=ids, use_cache=False)
        return outputs

    @torch.inference_mode()
    def token_losses(
        self,
        ids: Int64[Tensor, "sequences context"],
        edits: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float32[Tensor, "sequences predictions"]:
        """Cross-entropy of each token given those before it, in nats; lower is better.

        Of position 1 on, so one prediction less than the context. With `edits`, the output of block
        l is replaced by `edits[l](output)`, a function of (sequences, context, d_model) activations.

        Raises:
            InputError: As `residuals`.
        """
        edits = edits or {}
        self._check_layers(edits)
        ids = self._checked(ids)
        with edited_outputs(self._blocks, edits):
            logits = self._model(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return losses.unflatten(0, (len(ids), -1))

    def _check_layers(self, layers: Iterable[int]) -> None:
        wrong = [layer for layer in layers if not 0 <= layer < self.shape.n_layers]
        if wrong:
            raise InputError(
                f"{self._name} has layers 0 to {self.shape.n_layers - 1}, and was asked for {wrong}; "
                "correct the layers"
            )

    def _checked(self, ids: Int64[Tensor, "sequences context"]) -> Tensor:
        """The token ids on the model's device, if it can take them."""
        context, largest = ids.shape[1], int(ids.max())
        if context > self.shape.context:
            raise InputError(
                f"sequences of {context} tokens are longer than the {self.shape.context} positions "
                f"that {self._name} knows; lower harvest.context to {self.shape.context} at most"
            )
        if largest >= self.shape.vocabulary:
            raise InputError(
                f"token {largest} is not in the vocabulary of {self._name}, which has "
                f"{self.shape.vocabulary}; give the model with its own tokenizer"
            )
        return ids.to(self._device)


def _shape(config: Any, source: ModelSource) -> ModelShape:
    text = config.get_text_config()
    names = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "context": "max_position_embeddings",
        "vocabulary": "vocab_size",
    }
    lacking = [name for name in names.values() if not isinstance(getattr(text, name, None), int)]
    if lacking:
        raise InputError(
            f"the configuration of {source.name} (model type {text.model_type}) does not say its "
            f"{', '.join(lacking)}; give a decoder-only or encoder-only transformer whose longest "
            "sequence is known"
        )
    return ModelShape(**{size: getattr(text, name) for size, name in names.items()})


def _find_blocks(trunk: nn.Module, n_layers: int, name: str) -> list[nn.Module]:
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
            "must be one; give a model whose layers stand in one list"
        )
    return list(found[outermost[0]])
