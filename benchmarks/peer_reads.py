"""The peers' side of the reading benchmark: their buffers, fed from memory as a model would feed them.

Runs in the peers' environment. What a model costs is left out; that ours reads files is not.
"""
# pyright: reportMissingImports=false

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import Findings, Turn, serve_turns
from benchmarks.read_data import LOOKED_AT, Size, distinct

SEQUENCES_AT_ONCE = 32
"""Of a forward pass: SAELens's default."""


def make(arguments: dict[str, Any]) -> Turn:
    """A turn is about one pass over the rows: as many batches as they fill."""
    size = Size.of(arguments)
    rows = size.rows(torch.arange(size.n_sequences), torch.Generator().manual_seed(0))
    contender = {"SAELens": _sae_lens, "dictionary_learning": _dictionary_learning}
    stream = contender[arguments["contender"]](size, _passes(rows, size), arguments["contexts"])
    n_batches = len(rows) // size.batch_rows

    def turn(number: int) -> Findings:
        batches = enumerate(islice(stream, n_batches))
        firsts = [batch[:, 0].clone() for i, batch in batches if i % LOOKED_AT == 0]
        return lambda: distinct(firsts)

    return turn


def _passes(rows: Tensor, size: Size) -> Iterator[Tensor]:
    """What forward passes give, epoch after epoch."""
    while True:
        yield from rows.split(SEQUENCES_AT_ONCE * size.context)


def _sae_lens(size: Size, passes: Iterator[Tensor], contexts: int) -> Iterator[Tensor]:
    from sae_lens.training.mixing_buffer import mixing_buffer

    return mixing_buffer(contexts * size.context, size.batch_rows, passes)


def _dictionary_learning(size: Size, passes: Iterator[Tensor], contexts: int) -> Iterator[Tensor]:
    # The buffer only names it as a type; its model is the stand-in below.
    sys.modules.setdefault("nnsight", SimpleNamespace(LanguageModel=object))  # type: ignore[arg-type]
    from dictionary_learning.buffer import ActivationBuffer

    def saved(value: Any) -> SimpleNamespace:
        return SimpleNamespace(value=value, save=lambda: saved(value))

    output = SimpleNamespace(
        save=lambda: SimpleNamespace(value=next(passes).unflatten(0, (-1, size.context))),
        stop=lambda: None,
    )
    mask = torch.ones(SEQUENCES_AT_ONCE, size.context)
    model = SimpleNamespace(
        dtype=torch.float16,
        trace=lambda *_, **__: nullcontext(),
        inputs=saved((None, {"attention_mask": mask})),
    )
    buffer = ActivationBuffer(
        *(iter(lambda: "", None), model, SimpleNamespace(output=output)),
        d_submodule=size.d_model,
        n_ctxs=contexts,
        ctx_len=size.context,
        refresh_batch_size=SEQUENCES_AT_ONCE,
        out_batch_size=size.batch_rows,
    )
    return iter(buffer)


if __name__ == "__main__":
    serve_turns(make, ["torch", "sae-lens", "dictionary-learning"])
