"""A dense encoder in place of a Kronecker one, for formats that hold affine encoders alone.

mAND, sqrt(u v), is no affine function of x, so this is an approximation. It starts from the mean of the
two factors, (u + v) / 2, which is never less than sqrt(u v), and is fitted to the latents themselves before
selection and not to the reconstruction: the latents are to keep their meaning, and the decoder stays as
it is.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.formats.folding import thresholds
from sae.formats.selecting import threshold_for
from sae.kron import KronEncoder

EPOCHS, BATCH_ROWS, LEARNING_RATE = 5, 512, 1e-3
"""The rate is for weights whose rows have norm 1; it is scaled to theirs."""


def distilled(
    sae: SparseAutoencoder, x: Float[Tensor, "rows d_model"], seed: int
) -> SparseAutoencoder:
    """A dense autoencoder of one layer with nearly the same latents, and the same mean L0 on x.

    Args:
        sae: With a Kronecker encoder, as `folded` gives it; left as it is.
        x: Rows of its layer to fit on, in the model's units; some ten thousands.
        seed: Of the order in which they are seen.

    Raises:
        ValueError: If the encoder is dense already, or x doesn't fit.
    """
    if not isinstance(sae.encoder, KronEncoder):
        raise ValueError(  # noqa: TRY004 (of the architecture, not of the argument's class)
            "its encoder is dense already, so there is nothing to distil; leave distillation out"
        )
    sae.check(x)
    layer = torch.full((len(x),), next(iter(sae.layer_scale), 0))
    x = sae.scaling.units(x, layer).scale(x)
    by_threshold = thresholds(sae) is not None
    cfg = replace(sae.cfg, encoder="dense", selection="batch_topk" if by_threshold else "topk")
    dense = SparseAutoencoder(cfg, sae.layer_scale or {0: 1.0}, seed=None)
    with torch.no_grad():
        base, extension = sae.encoder.rows_of(torch.arange(cfg.d_sae))
        for mine, theirs in (
            (dense.encoder.w_enc, sae.encoder.w_enc),
            (dense.encoder.b_enc, sae.encoder.b_enc),
        ):
            mine.copy_((theirs[base] + theirs[extension]) / 2)
        dense.w_dec.copy_(sae.w_dec)
        dense.b_dec.copy_(sae.b_dec)
    _fit(dense, sae, x, seed)
    if not by_threshold:
        return dense.eval()
    parts = [sae.encode(rows).l0() for rows in x.split(BATCH_ROWS)]
    dense.set_threshold(threshold_for(dense, x, float(torch.cat(parts).double().mean())))
    return dense.eval()


def _fit(dense: SparseAutoencoder, sae: SparseAutoencoder, x: Tensor, seed: int) -> None:
    """Least squares of the rectified pre-activations against the latents, relative to their size."""
    w_enc, b_enc = dense.encoder.w_enc, dense.encoder.b_enc
    norm = float(w_enc.detach().norm(dim=1).mean())
    optimizer = torch.optim.Adam(
        [{"params": [w_enc], "unit": norm}, {"params": [b_enc], "unit": 1.0}]
    )
    order = torch.Generator().manual_seed(seed)
    n_steps = EPOCHS * -(-len(x) // BATCH_ROWS)
    step = 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=order).split(BATCH_ROWS):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * group["unit"] * (1 - step / n_steps)
            with torch.no_grad():
                wanted = sae.encoder.reference(x[rows], sae.b_dec)
            error = dense.encoder.reference(x[rows], dense.b_dec.detach()) - wanted
            loss = error.square().sum() / wanted.square().sum().clamp(min=1e-30)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
