"""How fast this machine is at the two things a run spends its time on, measured in seconds.

A model is measured by its first two blocks with random weights: how fast it is does not depend on its
weights, nor a block on the others, so nothing is downloaded and a large model costs little.
"""

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from actors.language_model import describe
from actors.model_source import ModelSource
from actors.pretrained import load_pretrained
from sae.autoencoder import SparseAutoencoder
from sae.config import SaeConfig
from sae.fit import Fit, FitConfig

_BLOCKS = 2


def model_rate(
    source: ModelSource,
    context: int,
    batch_tokens: int,
    device: str,
    n_threads: int,
    seconds: float,
) -> float:
    """Tokens per second of a forward pass through all blocks, in batches of whole sequences.

    Raises:
        InputError: If there is no such model.
    """
    torch.set_num_threads(n_threads)
    shape = describe(source)
    config = load_pretrained(source, AutoConfig.from_pretrained)
    text = config.get_text_config()
    n_blocks = text.num_hidden_layers = min(_BLOCKS, shape.n_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_blocks]
    dtype = torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype)
    model = nn.Module.to(AutoModel.from_config(config, dtype=dtype).eval(), device)
    n_sequences = max(1, batch_tokens // context)
    ids = torch.randint(shape.vocabulary, (n_sequences, context), device=device)

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=ids)

    return ids.numel() * n_blocks / shape.n_layers / _seconds_of(forward, device, seconds)


def step_rate(sae: SaeConfig, fit: FitConfig, device: str, n_threads: int, seconds: float) -> float:
    """Tokens per second of training steps of an autoencoder, on random activations."""
    torch.set_num_threads(n_threads)
    trained = Fit(SparseAutoencoder(sae, {0: 1.0}, seed=0).to(device), fit, n_steps=10**9, seed=0)
    x = torch.randn(fit.batch_tokens, sae.d_model, device=device)
    layer = torch.zeros(len(x), dtype=torch.int64, device=device)
    trained.initialise(x, layer)
    return len(x) / _seconds_of(lambda: trained.step(x, layer), device, seconds)


def _seconds_of(work: Callable[[], object], device: str, seconds: float) -> float:
    """Of one call, the median of all that fit into `seconds`; the first is not counted."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if len(times) > 1 and sum(times) > 2 * seconds:
            break
    return sorted(times[1:])[(len(times) - 1) // 2]
