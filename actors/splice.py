"""Autoencoders inside a running language model: for circuit work, and for cross-entropy recovered.

    with splice(model, {3: sae}) as spliced:
        logits = model(ids).logits
    spliced.latents[3].l0()

`examples/splice.py` is a whole experiment.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from actors.capture import edited_outputs
from actors.errors import InputError
from actors.hook_points import find_hook_points
from actors.model_source import SITES, ModelSource, Site
from sae.autoencoder import SparseAutoencoder
from sae.latents import SparseLatents
from sae.scaling import LayerScale
from storage.hygiene import RowFilter

Replacement = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]
"""What stands in for activations of one layer, in the model's units."""

LatentEdit = Callable[[SparseLatents], SparseLatents]
"""What is made of the latents of the rows of one layer; `sae.interventions` has the usual ones."""

Rows = Callable[[int, Float[Tensor, "*tokens d_model"]], Bool[Tensor, "*tokens"]]
"""Which activations of a layer are replaced; all others pass through as they are."""


@dataclass
class Spliced:
    """What autoencoders saw in the last forward pass."""

    latents: dict[int, SparseLatents] = field(default_factory=dict)
    """By layer, the code of its replaced rows in reading order, before it was edited; absent if none was.

    In the autoencoder's units. After a backward pass `latents[l].values.grad` is the gradient."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    """By layer, (sequences, context) booleans: which rows were replaced."""


@contextmanager
def splice(
    model: PreTrainedModel,
    saes: Mapping[int, SparseAutoencoder],
    *,
    error_term: bool = False,
    edits: Mapping[int, LatentEdit] | None = None,
    rows: Bool[Tensor, "sequences context"]
    | Bool[np.ndarray, "sequences context"]
    | Rows
    | None = None,
    site: Site = "residual",
    hook_points: str | None = None,
) -> Iterator[Spliced]:
    """Inside, reconstructions stand in for the activations of some layers in every forward pass.

    Gradients flow through the latents, into the model's parameters and the autoencoders' where
    these require them. Autoencoders select as at inference. What comes out has the model's dtype
    and device. Afterwards, however that comes, the model is as before.

    Args:
        model: Any transformers model whose blocks can be told.
        saes: By layer, counted from 0; one autoencoder may serve several.
        error_term: Whether what an autoencoder misses is added again, without gradient. Without
            edits the model then computes what it computes alone.
        edits: By layer, what is made of its latents, such as `lambda z: ablate(z, [17])`.
        rows: Which are replaced: booleans, or a function such as `used_rows` gives; all if None.
        site: Where in a block the autoencoders were trained (`model.site` of the configuration).
        hook_points: A module's path instead, as `ModelSource.hook_points`.

    Yields:
        The latents of the last forward pass; they stay afterwards.

    Raises:
        InputError: If the model has no such layer, or its width or layer is none an autoencoder was
            made for, or an edit is of a layer without an autoencoder; in a forward pass, if `rows`
            are of another shape than its tokens.
    """
    edits = edits or {}
    if not hasattr(model, "config") or not hasattr(model, "base_model"):
        raise InputError(
            f"model: {type(model).__name__} is no transformers model; give what from_pretrained returns"
        )
    if site not in SITES:
        raise InputError(f"site: {site!r} is no place in a block; give one of {', '.join(SITES)}")
    text = model.config.get_text_config()
    _check(saes, edits, text.num_hidden_layers, text.hidden_size)
    source = ModelSource(
        name=model.config.name_or_path or type(model).__name__, site=site, hook_points=hook_points
    )
    modules = find_hook_points(model.base_model, text.num_hidden_layers, source)
    spliced = Spliced()

    def forget(*_: object) -> None:
        spliced.latents.clear()
        spliced.rows.clear()

    def splice_in(layer: int, output: Tensor) -> Tensor:
        def replace(x: Tensor) -> Tensor:
            return _through(saes[layer], layer, x, spliced, edits.get(layer), error_term)

        keep = _mask(rows, layer, output)
        spliced.rows[layer] = keep
        return _with_rows_replaced(output, keep, replace)

    with ExitStack() as stack:
        for sae in {id(sae): sae for sae in saes.values()}.values():
            if sae.training:
                stack.callback(sae.train)
                sae.eval()
        stack.callback(model.base_model.register_forward_pre_hook(forget).remove)
        hooks = {layer: lambda x, layer=layer: splice_in(layer, x) for layer in saes}
        stack.enter_context(edited_outputs(modules, hooks))
        yield spliced


def used_rows(
    ids: Int[np.ndarray, "sequences context"], row_filter: RowFilter, first_position: int
) -> Rows:
    """The rows that training uses, in a forward pass over these very tokens.

    The row filter keeps them, judged by their own norm, and they stand at `first_position` or later.
    """
    position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    stored = position >= first_position

    def used(layer: int, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() != ids.size:
            raise InputError(
                f"rows: {ids.shape} token ids do not say which of the {tuple(x.shape[:-1])} tokens of "
                "this forward pass are replaced; give the ids of the very pass"
            )
        norms = torch.linalg.vector_norm(x.float(), dim=-1).detach().cpu().numpy()
        keep = stored & row_filter.keep(
            ids, position, np.full(ids.shape, layer), norms.reshape(ids.shape)
        )
        return torch.from_numpy(keep)

    return used


def edit(
    replacement: Replacement,
    layer: int,
    ids: Int[np.ndarray, "sequences context"],
    row_filter: RowFilter,
    first_position: int,
) -> Callable[[Float[Tensor, "sequences context d_model"]], Tensor]:
    """An edit of one layer's output for `LanguageModel.logits`, of its `used_rows` alone."""
    used = used_rows(ids, row_filter, first_position)

    def replace(x: Tensor) -> Tensor:
        return replacement(x.float())

    return lambda output: _with_rows_replaced(output, used(layer, output), replace)


def reconstruction(sae: SparseAutoencoder, layer: int) -> Replacement:
    """Puts the autoencoder's reconstruction in place of a layer's activations."""

    def replace(x: Tensor) -> Tensor:
        x = x.to(sae.b_dec.device)  # a model may be spread over several devices
        layers = torch.full((len(x),), layer, dtype=torch.int64, device=x.device)
        return sae.reconstruct(x, layers).x_hat

    return replace


def zero(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """Puts nothing in place of a layer's activations: zero ablation."""
    return torch.zeros_like(x)


def constant(vector: Float[Tensor, " d_model"]) -> Replacement:
    """Puts one vector in place of a layer's activations: of their mean, mean ablation."""

    def replace(x: Tensor) -> Tensor:
        return vector.to(x).expand_as(x)

    return replace


def _with_rows_replaced(output: Tensor, keep: Tensor, replacement: Replacement) -> Tensor:
    keep = keep.to(output.device)
    if not keep.any():
        return output
    edited = output.clone()
    edited[keep] = replacement(output[keep]).to(output)
    return edited


def _through(
    sae: SparseAutoencoder,
    layer: int,
    given: Tensor,
    spliced: Spliced,
    latent_edit: LatentEdit | None,
    error_term: bool,
) -> Tensor:
    """What an autoencoder, its latents edited, makes of activations; in the model's units."""
    x = given.to(sae.b_dec)
    units = sae.scaling.units(x, torch.full((len(x),), layer, dtype=torch.int64, device=x.device))
    latents = sae.encode(units.scale(x))
    if torch.is_grad_enabled():
        if latents.values.requires_grad:
            latents.values.retain_grad()
        else:  # everything is frozen: gradients begin at the latents
            latents.values.requires_grad_()
    spliced.latents[layer] = latents
    edited = latents if latent_edit is None else latent_edit(latents)
    x_hat = units.restore(sae.decode(edited))
    if not error_term:
        return x_hat
    alone = x_hat if latent_edit is None else units.restore(sae.decode(latents))
    return given.detach() + (x_hat - alone.detach()).to(given)  # unedited: x itself, bit for bit


def _mask(rows: Tensor | np.ndarray | Rows | None, layer: int, output: Tensor) -> Tensor:
    """Which of a module's rows are replaced, in the shape of its tokens."""
    tokens = output.shape[:-1]
    if rows is None:
        return torch.ones(tokens, dtype=torch.bool, device=output.device)
    keep = torch.as_tensor(rows(layer, output) if callable(rows) else rows)
    flat = (
        len(tokens) == 1 and keep.numel() == tokens.numel()
    )  # some blocks have no sequences any more
    if keep.dtype != torch.bool or not (keep.shape == tokens or flat):
        raise InputError(
            f"rows: {tuple(keep.shape)} values of {keep.dtype} do not say which of the "
            f"{tuple(tokens)} tokens of this forward pass are replaced; give one boolean for each"
        )
    return keep.reshape(tokens)


def _check(
    saes: Mapping[int, SparseAutoencoder],
    edits: Mapping[int, LatentEdit],
    n_layers: int,
    d_model: int,
) -> None:
    if not isinstance(saes, Mapping):
        raise InputError(
            f"saes: {type(saes).__name__} does not say which layers; give a dictionary from layer to "
            "autoencoder, such as {3: sae}"
        )
    for layer, sae in saes.items():
        is_number = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not is_number or not 0 <= layer < n_layers:
            raise InputError(
                f"saes: there is no layer {layer!r}; the model has {n_layers}, counted from 0; give "
                f"0 to {n_layers - 1}"
            )
        if not isinstance(sae, SparseAutoencoder):
            raise InputError(
                f"saes[{layer}] is {type(sae).__name__} and no autoencoder; give a SparseAutoencoder: "
                "sae.load reads one from a trial's folder"
            )
        if sae.d_model != d_model:
            raise InputError(
                f"saes[{layer}] reads activations of width {sae.d_model}, and the model's have "
                f"{d_model}; give an autoencoder that was trained on this model"
            )
        if isinstance(sae.scaling, LayerScale) and layer not in sae.layer_scale:
            raise InputError(
                f"saes[{layer}] has no scale for layer {layer}, only for {list(sae.layer_scale)}; "
                "splice it into one of those"
            )
    silent = sorted(set(edits) - set(saes))
    if silent:
        raise InputError(
            f"edits: layers {silent} have no autoencoder, only {sorted(saes)}; give them one in saes"
        )
