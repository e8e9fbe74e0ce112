"""From directions of the residual stream to the tokens that they speak for: the logit lens."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actors.errors import InputError
from actors.language_model import LanguageModel
from actors.model_source import ModelSource

CONVENTION = (
    "Decoder row, through the model's final norm (centred and scaled as it does, times its gain) and "
    "its unembedding; biases are left out. A layer's scale changes no ranking."
)
"""What a decoded token is, in words for people."""

_LOGITS_AT_ONCE = 2**24


class DecodedTokens(NamedTuple):
    """The tokens that each direction raises most."""

    logits: Float[Tensor, "directions n"]
    """What a step along the direction, of the norm sqrt(d_model), adds to each; falling."""

    ids: Int[Tensor, "directions n"]


class Unembedding:
    """What a model does to the residual stream after its last block, without its biases.

    Of f(z), the logits of z, this is the odd part (f(z) - f(-z)) / 2: a norm's gain and centring stay,
    and what is added whatever z is drops out. So it ranks tokens by what the direction does alone
    (nostalgebraist 2020, the logit lens, for a direction in place of a state).
    """

    def __init__(self, model: LanguageModel) -> None:
        """Watch the model read two tokens, to see which modules come after its blocks.

        Args:
            model: A causal one, with its head; these modules of it become float32.

        Raises:
            InputError: If no module makes logits after the last block.
        """
        self._modules = [module.float() for module in _after_blocks(model.transformer)]
        self._device = next(self._modules[-1].parameters()).device

    @classmethod
    def of(cls, source: ModelSource, device: str = "cpu") -> "Unembedding":
        """That of a pretrained model, of which only this is kept.

        Raises:
            InputError: If the model can't be loaded.
        """
        return cls(LanguageModel(source, device, head=True))

    @torch.inference_mode()
    def top_tokens(
        self, directions: Float[Tensor, "directions d_model"], n: int, vocabulary: int
    ) -> DecodedTokens:
        """The `n` tokens that each direction raises most, of the ids below `vocabulary`."""
        found = []
        for rows in directions.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
            unit = F.normalize(rows.to(self._device).float(), dim=1)
            z = unit * unit.shape[1] ** 0.5  # of usual size, so that a norm's epsilon is nothing
            logits = ((self._logits(z) - self._logits(-z)) / 2)[:, :vocabulary]
            found.append([part.cpu() for part in logits.topk(min(n, logits.shape[1]), dim=1)])
        values, ids = zip(*found, strict=True)
        return DecodedTokens(torch.cat(values), torch.cat(ids))

    def _logits(self, z: Tensor) -> Tensor:
        for module in self._modules:
            z = module(z)
        return z


def _after_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a forward pass calls after its last block: a final norm, the unembedding."""
    named = {path: module for path, module in model.named_modules() if path}
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, module in named.items()
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    in_blocks = [path for path in named if any(part.isdigit() for part in path.split("."))]
    last = max((i for i, path in enumerate(called) if path in in_blocks), default=-1)
    after = [
        path
        for path in called[last + 1 :]
        if not any(block.startswith(f"{path}.") for block in in_blocks)
    ]
    outermost = [p for p in after if not any(p.startswith(f"{other}.") for other in after)]
    if not outermost:
        raise InputError(
            f"{type(model).__name__} calls no module after its blocks, and the last one must be its "
            "unembedding; give a causal language model of transformers"
        )
    return [named[path] for path in outermost]
