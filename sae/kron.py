"""The Kronecker encoder (KronSAE, arXiv 2505.22255, 3.2): latents are products of two factors.

Head a has a composition base P (m rows) and a composition extension Q (n rows). With u = P x + b and
v = Q x + b, latent (i, j) of the head is mAND(u_i, v_j) = sqrt(u_i v_j) if both are positive,
else 0. Latents are numbered a*m*n + i*n + j.

Unlike the paper, which writes no centring, the factors read x - b_dec, as the dense encoder does.
Both encoders then see the same input and the decoder's additive start C[i, j] = P_i + Q_j reads
and writes the same directions. It is the same family of functions: the bias can undo the shift.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config import KronShape
from sae.drawing import unit_rows
from sae.encoders import BLOCK_ELEMENTS, BLOCK_LATENTS, linear_grads, token_blocks
from sae.kernels import kernels_for
from sae.latents import Pattern
from sae.selection import MatrixBlock, Picks, ScoreBlock, Selection, top_k_per_row


def mand(u: Float[Tensor, "*#shape"], v: Float[Tensor, "*#shape"]) -> Float[Tensor, "..."]:
    """Geometric mean of u and v where both are positive, else 0 (eq 3 of arXiv 2505.22255).

    The gradient is exactly 0 where a factor is off. It is unbounded as a factor falls to 0, but
    always finite: a product too small for the dtype counts as off.
    """
    product = u.relu() * v.relu()
    on = product > 0
    return torch.where(on, root(torch.where(on, product, 1.0)), 0.0)


def root(product: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Square root of positive numbers, within two units in the last place; infinity stays what it is.

    Not `sqrt`: the first large one of a process has been seen to be wrong by 1e-3 in half of its
    rows where torch hands it to a vector library, which `rsqrt` never is.
    """
    return _Root.apply(product)


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor) -> Tensor:
        ctx.save_for_backward(product)
        return (product * product.rsqrt()).nan_to_num_(nan=torch.inf, posinf=torch.inf)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # That of x * rsqrt(x) would cube the rsqrt, which overflows for small products.
        return grad_outputs[0] * 0.5 * ctx.saved_tensors[0].rsqrt()


class KronEncoder(nn.Module):
    """Latents as mAND of every base row with every extension row of the same head."""

    def __init__(self, d_model: int, shape: KronShape, heads: range | None = None) -> None:
        """Weights of 0, for all heads of `shape` or for those held here."""
        super().__init__()
        h, m, n = shape.h, shape.m, shape.n
        heads = range(h) if heads is None else heads
        self.shape = replace(shape, h=len(heads))
        """Of what is held: its h counts the heads held."""
        self.latents = range(heads.start * m * n, heads.stop * m * n)
        """Latents whose weights these are."""
        self.rows = [
            range(heads.start * m, heads.stop * m),
            range(h * m + heads.start * n, h * m + heads.stop * n),
        ]
        """Rows of the whole encoder's weights that these are."""
        self.n_rows = shape.n_rows
        """Rows of the whole encoder's weights."""
        self.w_enc = nn.Parameter(torch.zeros(self.shape.n_rows, d_model))
        """(h*m + h*n, d_model): first P, row a*m + i; then Q, row h*m + a*n + j."""
        self.b_enc = nn.Parameter(torch.zeros(self.shape.n_rows))
        """(h*m + h*n,), added before the ReLU; there is no bias per latent."""

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Float[Tensor, "d_sae d_model"]:
        """Draw unit rows P and Q; return decoder rows C[i, j] = P_i + Q_j, each of norm 1.

        The paper draws P and Q at deviation 1/sqrt(2 d_sae); unit rows point the same way and
        give pre-activations of deviation 1 when the input has norm sqrt(d_model).
        """
        self.w_enc.copy_(unit_rows(generator, self.n_rows, self.w_enc.shape[1], self.rows))
        self.b_enc.zero_()
        h, m, n = self.shape.h, self.shape.m, self.shape.n
        base, extension = (
            self.w_enc[: h * m].view(h, m, 1, -1),
            self.w_enc[h * m :].view(h, 1, n, -1),
        )
        return F.normalize((base + extension).flatten(0, 2), dim=1)

    @torch.no_grad()
    def blocks(
        self, centred: Float[Tensor, "tokens d_model"], only: Int[Tensor, " latents"] | None = None
    ) -> Iterator[ScoreBlock]:
        """Products u*v of all latents, or of those in `only`, block by block.

        Args:
            centred: x - b_dec.
            only: Latents to score; all of them if None.
        """
        if only is not None:
            yield from self._blocks_of(centred, only)
            return
        h, m, n = self.shape.h, self.shape.m, self.shape.n
        for first_token, tokens in token_blocks(centred, self.shape.n_rows):
            base, extension = (  # each in one piece, so that a head is a row to be copied
                F.linear(tokens, self.w_enc[rows], self.b_enc[rows]).relu_()
                for rows in (slice(h * m), slice(h * m, None))
            )
            yield HeadBlock(base.unflatten(1, (h, m)), extension.unflatten(1, (h, n)), first_token)

    def _blocks_of(self, centred: Tensor, only: Tensor) -> Iterator[MatrixBlock]:
        width = min(len(only), BLOCK_LATENTS)
        for ids in only.split(width):
            base_rows, extension_rows = self.rows_of(ids)
            rows, places = torch.cat([base_rows, extension_rows]).unique(return_inverse=True)
            w_enc, b_enc = self.w_enc[rows], self.b_enc[rows]
            for first_token, tokens in token_blocks(centred, 4 * width):
                acts = (
                    F.linear(tokens, w_enc, b_enc)
                    .relu_()
                    .to(torch.promote_types(w_enc.dtype, torch.float32))
                )
                leads = acts[:, places[: len(ids)]]
                yield MatrixBlock(leads * acts[:, places[len(ids) :]], ids, first_token, leads)

    def rows_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of w_enc that latents read: of P, and of Q."""
        h, m, n = self.shape.h, self.shape.m, self.shape.n
        return ids // n, h * m + ids // (m * n) * n + ids % n

    def score_bound(self, value: Tensor) -> Tensor:
        """A product that every latent above `value` reaches: for mAND, just under its square."""
        return value if self.shape.activation == "relu_product" else value.square() * (1 - 1e-5)

    def values(
        self,
        selection: Selection,
        x: Float[Tensor, "tokens d_model"],
        b_dec: Float[Tensor, " d_model"],
    ) -> Float[Tensor, " entries"]:
        """Values of the selected latents; gradients flow through these entries alone."""
        rows = torch.stack(self.rows_of(selection.pattern.indices), 1)
        return _KronValues.apply(
            selection.scores,
            selection.leads,
            x,
            self.w_enc,
            self.b_enc,
            b_dec,
            selection.pattern,
            rows,
            self.shape.activation == "mand",
        )

    def reference(
        self, x: Float[Tensor, "tokens d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "tokens d_sae"]:
        """All latents before selection, as the formula has it; what the blocks stand for."""
        h, m, n = self.shape.h, self.shape.m, self.shape.n
        pre_acts = F.linear(x - b_dec, self.w_enc, self.b_enc)
        u = pre_acts[:, : h * m].unflatten(1, (h, m, 1))
        v = pre_acts[:, h * m :].unflatten(1, (h, 1, n))
        acts = mand(u, v) if self.shape.activation == "mand" else u.relu() * v.relu()
        return acts.flatten(1)


class _KronValues(torch.autograd.Function):
    """Latents at the selected entries: their score u*v and their base's u are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        leads: Tensor,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        pattern: Pattern,
        rows: Tensor,
        mean: bool,
    ) -> Tensor:
        ctx.save_for_backward(scores, leads, x, w_enc, b_dec, rows)
        ctx.pattern, ctx.mean = pattern, mean
        on = scores > 0
        values = root(torch.where(on, scores, 1.0)) if mean else scores
        return torch.where(on, values, 0.0).to(b_enc.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        scores, leads, x, w_enc, b_dec, rows = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        on = scores > 0
        # d sqrt(uv)/du = v / (2 sqrt(uv)), and exactly 0 where a factor is off.
        slope = 0.5 * torch.where(on, scores, 1.0).rsqrt() if ctx.mean else 1.0
        slope = torch.where(on, grad * slope, 0.0)
        u = torch.where(on, leads, 1.0)
        grads = torch.stack([slope * (scores / u), slope * u], 1).flatten().to(w_enc.dtype)
        factors = Pattern(indices=rows.flatten(), offsets=2 * pattern.offsets, d_sae=len(w_enc))
        needs = linear_grads(ctx, grads, factors.indices, factors, x, w_enc, b_dec)
        return None, None, *needs, None, None, None


@dataclass(frozen=True, eq=False)
class HeadBlock:
    """Scores of some tokens for all latents, as their two rectified factors.

    The largest product of a head is the product of its factors' largest: also in floating point,
    where rounding keeps order. So heads are compared without expanding them.
    """

    base: Float[Tensor, "tokens h m"]
    extension: Float[Tensor, "tokens h n"]
    first_token: int = 0

    def maxima(self) -> Float[Tensor, "tokens h"]:
        """The largest product of every head, at least in float32."""
        kernels = kernels_for(self.base)
        if kernels is not None:
            return kernels.head_maxima(self.base, self.extension)
        return _wide(self.base.amax(-1)) * _wide(self.extension.amax(-1))

    def top_k(self, k: int) -> Picks:
        """The k largest of each token, from the k heads with the largest maxima."""
        m, n = self.base.shape[-1], self.extension.shape[-1]
        _, heads = top_k_per_row(self.maxima(), min(k, self.base.shape[1]))
        # Only these heads are looked into, and of so many tokens at once as a block may hold.
        width = heads.shape[1] * (m + n) + min(k, heads.shape[1] * m) * n
        at_once = max(1, BLOCK_ELEMENTS // width)
        parts = [
            self._best_of(base, extension, some, k)
            for base, extension, some in zip(
                self.base.split(at_once),
                self.extension.split(at_once),
                heads.split(at_once),
                strict=True,
            )
        ]
        return parts[0] if len(parts) == 1 else Picks(*map(torch.cat, zip(*parts, strict=True)))

    @staticmethod
    def _best_of(base: Tensor, extension: Tensor, heads: Tensor, k: int) -> Picks:
        """The k largest of some tokens in the heads that are given.

        They lie in the k base rows of these heads with the largest maxima, each u_i * max v.
        """
        m, n = base.shape[-1], extension.shape[-1]
        u, v = _wide(_taken(base, heads)), _wide(_taken(extension, heads))
        maxima = (u * v.amax(-1, keepdim=True)).flatten(1)
        _, rows = top_k_per_row(maxima, min(k, maxima.shape[1]))
        leads = u.flatten(1).gather(1, rows)
        products = (leads[:, :, None] * _taken(v, rows // m)).flatten(1)
        best, places = top_k_per_row(products, min(k, products.shape[1]))
        row = rows.gather(1, places // n)
        ids = (heads.gather(1, row // m) * m + row % m) * n + places % n
        return Picks(best, leads.gather(1, places // n), ids)

    def lower_bound(self, n: int) -> Tensor | None:
        """The n-th largest of the heads' maxima."""
        maxima = self.maxima().flatten()
        return None if len(maxima) < n else maxima.topk(n, sorted=False).values.min()

    def above(self, bound: Tensor | float) -> tuple[Picks, Tensor]:
        """Entries whose score is positive and at least `bound`, and their tokens."""
        m, n = self.base.shape[-1], self.extension.shape[-1]
        maxima = self.maxima()
        tokens, heads = ((maxima >= bound) & (maxima > 0)).nonzero(as_tuple=True)
        at_once = max(1, BLOCK_ELEMENTS // (m * n))
        parts = []
        for some, theirs in zip(tokens.split(at_once), heads.split(at_once), strict=True):
            u, v = _wide(self.base[some, theirs]), _wide(self.extension[some, theirs])
            pairs, i = (u * v.amax(-1, keepdim=True) >= bound).nonzero(as_tuple=True)
            leads = u[pairs, i]
            products = leads[:, None] * v[pairs]
            rows, j = ((products >= bound) & (products > 0)).nonzero(as_tuple=True)
            pairs, i = pairs[rows], i[rows]
            ids = (theirs[pairs] * m + i) * n + j
            parts.append((products[rows, j], leads[rows], ids, some[pairs]))
        *picks, found = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return Picks(*picks), found + self.first_token


def _taken(rows: Float[Tensor, "tokens all n"], which: Int[Tensor, "tokens some"]) -> Tensor:
    """Some rows of every token: (tokens, some, n). Whole rows are copied, which `gather` does not."""
    first = torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    taken = rows.flatten(0, 1).index_select(0, (first + which).flatten())
    return taken.unflatten(0, which.shape)


def _wide(x: Tensor) -> Tensor:
    """At least float32, where the product of two bfloat16 numbers is exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
