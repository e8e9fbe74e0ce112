"""A frozen language model, read at one hook point of each of its layers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from actors.capture import captured_outputs, edited_outputs
from actors.errors import InputError
from actors.hook_points import find_hook_points
from actors.model_source import ModelSource
from actors.pretrained import check_device_map, load_pretrained
from sae.metrics import next_token_losses

DEFAULT_CONTEXT = 1024
"""Tokens of a sequence at most, unless more are asked for: a shard of longer ones holds few, which mix badly."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model's configuration says about its activations."""

    n_layers: int
    """Blocks, and so layers that have activations."""

    d_model: int
    """Width of the activations."""

    longest: int | None
    """Tokens of the longest sequence it takes; None where any is taken, as ALiBi does."""

    vocabulary: int
    """Token ids run from 0 to below this."""

    is_causal: bool = True
    """Whether a position sees only those before it and predicts the next; encoders see all."""

    @property
    def context(self) -> int:
        """Tokens of a sequence where `harvest.context` says nothing."""
        return min(self.longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)

    def takes(self, context: int) -> bool:
        """Whether it has positions for sequences of so many tokens."""
        return self.longest is None or context <= self.longest


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
    """A frozen model. Layers are counted from 0; nothing is ever computed twice.

    Attention is computed as transformers chooses on every device: by torch's
    `scaled_dot_product_attention`, but for models that it can't compute (Gemma 2 caps the scores).
    """

    def __init__(self, source: ModelSource, device: str = "cpu", head: bool = False) -> None:
        """Load the model, without its language-modelling head unless that is asked for.

        Args:
            source: The model, and where in it activations are read.
            device: Where it computes, unless `source.device_map` spreads it over all there are.
            head: Whether `logits` or `token_losses` will be wanted.

        Raises:
            InputError: If there is no such model, part of its weights is missing, or it has no
                such hook points.
        """
        check_device_map(source)
        auto = AutoModelForCausalLM if head else AutoModel
        model, loading = load_pretrained(
            source,
            cast("Loader", auto.from_pretrained),
            dtype=source.dtype,
            device_map=source.device_map,
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
        self._model = model.eval().requires_grad_(False)
        if source.device_map is None:
            cast("nn.Module", model).to(device)  # a decorator hides the type of its own `to`
        self._device = torch.device(device) if source.device_map is None else model.device
        self._hook_points = find_hook_points(model.base_model, self.shape.n_layers, source)
        self._options = {"use_cache": False} if self.shape.is_causal else {}
        # What comes after a block leaves its output alone; inside a block a sum may be in place.
        self._copy = source.site != "residual" or source.hook_points is not None

    @property
    def transformer(self) -> PreTrainedModel:
        """The model of transformers itself, with its head if that was asked for."""
        return self._model

    @torch.inference_mode()
    def activations(
        self, ids: Int64[Tensor, "sequences context"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "sequences context d_model"]]:
        """The output of each of some layers' hook points, in the model's own dtype and units.

        At the site `residual`, that of layer l is `hidden_states[l + 1]` of transformers
        (`hidden_states[0]` is the embedding). The last layer differs in models that end in a norm:
        transformers gives it after that norm, this method before. The forward pass ends after the
        last hook point of `layers`.

        Raises:
            InputError: If the sequences are too long, a token or layer is not the model's, or a hook
                point does not give one vector of width d_model per token.
        """
        layers = list(layers)
        self._check_layers(layers)
        ids = self._checked(ids)
        shape = (len(ids), ids.shape[1])
        with captured_outputs(self._hook_points, layers, shape, self._copy) as outputs:
            self._model.base_model(input_ids=ids, **self._options)
        silent = sorted(set(layers) - set(outputs))
        if silent:
            raise InputError(
                f"the hook points of layers {silent} of {self._name} take no part in a forward pass; "
                "choose another module as model.hook_points"
            )
        for layer, x in outputs.items():
            if x.shape != (*shape, self.shape.d_model):
                raise InputError(
                    f"the hook point of layer {layer} of {self._name} gives {tuple(x.shape)} for "
                    f"{shape} tokens; {(*shape, self.shape.d_model)} can be stored: choose another "
                    "module as model.hook_points"
                )
        return outputs

    @torch.inference_mode()
    def token_losses(
        self,
        ids: Int64[Tensor, "sequences context"],
        edits: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float32[Tensor, "sequences predictions"]:
        """Cross-entropy of each token given those before it, in nats; lower is better.

        Of position 1 on, so one prediction less than the context. `edits` as in `logits`.

        Raises:
            InputError: As `logits`.
        """
        logits = self.logits(ids, edits)
        pairs = zip(logits, ids.to(logits.device), strict=True)
        return torch.stack([next_token_losses(row, tokens) for row, tokens in pairs])

    @torch.inference_mode()
    def logits(
        self,
        ids: Int64[Tensor, "sequences context"],
        edits: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "sequences context vocabulary"]:
        """What the model says of the token after each.

        With `edits`, the output of layer l's hook point, the one that `activations` reads, is
        replaced by `edits[l](output)`, a function of (sequences, context, d_model) activations.

        Raises:
            InputError: As `activations`, and if the model is an encoder.
        """
        if not self.shape.is_causal:
            raise InputError(
                f"{self._name} is an encoder, whose positions see each other, and only a causal model "
                "predicts the next token; leave cross-entropy out"
            )
        edits = edits or {}
        self._check_layers(edits)
        ids = self._checked(ids)
        with edited_outputs(self._hook_points, edits, (len(ids), ids.shape[1])):
            return self._model(input_ids=ids, **self._options).logits

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
        if not self.shape.takes(context):
            raise InputError(
                f"sequences of {context} tokens are longer than the {self.shape.longest} positions "
                f"that {self._name} knows; lower harvest.context to {self.shape.longest} at most"
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
        "vocabulary": "vocab_size",
    }
    lacking = [name for name in names.values() if not isinstance(getattr(text, name, None), int)]
    longest = _longest(text)
    if longest is None and config.is_encoder_decoder:
        lacking.append("max_position_embeddings")
    if lacking:
        raise InputError(
            f"the configuration of {source.name} (model type {text.model_type}) does not say its "
            f"{', '.join(lacking)}; give a decoder-only or encoder-only transformer"
        )
    sizes = {size: getattr(text, name) for size, name in names.items()}
    return ModelShape(**sizes, longest=longest, is_causal=_is_causal(config))


def _longest(text: Any) -> int | None:
    """The longest sequence of a configuration, as architectures call it; that of ALiBi has none."""
    named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((n for n in named if isinstance(n, int)), None)


def _is_causal(config: Any) -> bool:
    """Whether it is a decoder: architectures that fill in masks are none, unless set up as one."""
    fills_masks = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return not config.is_encoder_decoder and (
        not fills_masks or bool(getattr(config, "is_decoder", False))
    )
