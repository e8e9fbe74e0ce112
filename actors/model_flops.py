"""What a forward pass of a model costs, counted from its configuration alone."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from actors.language_model import describe
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained


def forward_flops_per_token(source: ModelSource, context: int) -> float | None:
    """Floating-point operations per token of a forward pass over a context, a multiply-add being two.

    All matrix products of the model without its head, as torch counts them on a model without
    weights; attention as if every position saw all others. Of a model with 4 * d_model in its MLPs
    that is 24 L d_model^2 + 4 L context d_model, Group-SAE's A (papers: arXiv 2410.21508).

    Returns:
        None for a model whose pass depends on the values in it, such as a mixture of experts.

    Raises:
        InputError: If there is no such model.
    """
    options = {"use_cache": True} if describe(source).is_causal else {}
    config = load_pretrained(source, AutoConfig.from_pretrained)
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
        ids = torch.zeros(1, context, dtype=torch.int64)
        try:
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                model(input_ids=ids, **options)
        except (RuntimeError, NotImplementedError):
            return None
    return counter.get_total_flops() / context
