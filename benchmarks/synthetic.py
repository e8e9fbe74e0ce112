"""Quality on data whose dictionary is known: is it found, and are its correlations?

Uncorrelated: sums of a few of 4 * d_model unit directions. Correlated: KronSAE's toy model (arXiv
2505.22255, 5.1): z = TopK(ReLU(x)), x normal, code = L z with L the Cholesky factor of a block
covariance; the activations are the code times unit directions. (The paper takes the hidden layer of a
trained tied autoencoder; with directions drawn instead, the dictionary is known.)
"""

from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment, quadratic_assignment
from torch import Tensor

from benchmarks.fitting import fitted, measured
from sae import KronShape, SaeConfig, SparseAutoencoder
from sae.dictionary import cosines, dictionary_mcc, effective_rank

D_MODEL, D_SAE, BATCH = 64, 256, 1024
DEAD_AFTER = 10_000
LR = 1e-2
K_PLAIN, K_TOY = 4, 8
CORRELATION = 0.8
_UNTRAINED = "TopK, untrained"


def directions(seed: int) -> Tensor:
    """(D_SAE, D_MODEL) unit rows, whatever the seed not those that an autoencoder starts from."""
    # An autoencoder draws as many numbers, from its own seed: with the same one it would begin with
    # the answer. A seed far from any of those.
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    rows = torch.randn(D_SAE, D_MODEL, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def uncorrelated(dictionary: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of activations and their codes; K_PLAIN latents on, on average, each for itself."""
    generator = torch.Generator().manual_seed(seed)
    shape = BATCH, D_SAE
    while True:
        on = torch.rand(shape, generator=generator) < K_PLAIN / D_SAE
        code = on * (0.5 + torch.rand(shape, generator=generator))
        yield code @ dictionary, code


def correlated(dictionary: Tensor, block: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The toy model, with blocks of `block` latents that correlate with one another."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.full((block, block), CORRELATION).fill_diagonal_(1.0)
    factor = torch.linalg.cholesky(torch.block_diag(*[within] * (D_SAE // block)))
    while True:
        best = torch.randn(BATCH, D_SAE, generator=generator).relu().topk(K_TOY, dim=1)
        sparse = torch.zeros(BATCH, D_SAE).scatter(1, best.indices, best.values)
        code = sparse @ factor.T
        yield code @ dictionary, code


def matched_rv(truth: Tensor, latents: Tensor) -> float:
    """RV coefficient of the two covariances under the permutation that aligns them best.

    As the paper measures it: the permutation is found from the covariances alone (FAQ), so a high
    value needs no latent to be right. In [0, 1], 1 the same structure.
    """
    ours, theirs = torch.cov(latents.T).double(), torch.cov(truth.T).double()
    found: Any = quadratic_assignment(
        theirs.numpy(), ours.numpy(), method="faq", options={"maximize": True, "maxiter": 50}
    )
    order = torch.as_tensor(found.col_ind)
    return _rv(theirs, ours[order][:, order])


def aligned(
    truth: Tensor, latents: Tensor, dictionary: Tensor, w_dec: Tensor
) -> tuple[float, float]:
    """The stricter question: do latents that stand for two correlated directions correlate?

    Latents are matched to the directions that they write. Returns the RV coefficient of the
    covariances, and Pearson's correlation of the off-diagonal correlations: variances, which
    dominate RV and which an untrained autoencoder has too, count nothing there. 1 is best of both.
    """
    table = cosines(dictionary, w_dec)
    _, order = linear_sum_assignment(table.numpy(), maximize=True)
    ours = latents[:, torch.as_tensor(order)].T.double()
    apart = ~torch.eye(len(ours), dtype=torch.bool)
    # A latent that is never on correlates with none.
    pairs = torch.stack([torch.corrcoef(x).nan_to_num(0)[apart] for x in (truth.T.double(), ours)])
    return _rv(torch.cov(truth.T).double(), torch.cov(ours)), float(torch.corrcoef(pairs)[0, 1])


def _rv(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def plain_configs() -> dict[str, SaeConfig]:
    """What is fitted to uncorrelated data."""
    base: dict[str, Any] = {"d_model": D_MODEL, "d_sae": D_SAE, "k": K_PLAIN}
    return {
        "TopK": SaeConfig(**base),
        "BatchTopK": SaeConfig(**base, selection="batch_topk"),
        "Matryoshka BatchTopK": SaeConfig(
            **base, selection="batch_topk", prefixes=(D_SAE // 8, D_SAE // 2, D_SAE)
        ),
        "Kron (32, 2, 4) TopK": SaeConfig(**base, encoder=KronShape(h=32, m=2, n=4)),
        "Kron (16, 4, 4) TopK": SaeConfig(**base, encoder=KronShape(h=16, m=4, n=4)),
    }


def toy_configs() -> dict[str, SaeConfig]:
    """What is fitted to correlated data: the paper's shapes, and the one its guideline names."""
    base: dict[str, Any] = {"d_model": D_MODEL, "d_sae": D_SAE, "k": K_TOY}
    shapes = [(2, 4, 32), (4, 2, 32), (4, 8, 8), (8, 2, 16), (32, 2, 4)]
    krons = {
        f"Kron {shape} TopK": SaeConfig(
            **base, encoder=KronShape(h=shape[0], m=shape[1], n=shape[2])
        )
        for shape in shapes
    }
    return {
        "TopK": SaeConfig(**base),
        "BatchTopK": SaeConfig(**base, selection="batch_topk"),
        **krons,
    }


def plain_table(n_steps: int) -> list[dict[str, Any]]:
    """MCC with the true directions, FVU and L0, on uncorrelated data; untrained TopK as chance."""
    dictionary, table = directions(0), []
    for name, cfg in {_UNTRAINED: plain_configs()["TopK"], **plain_configs()}.items():
        data = (x for x, _ in uncorrelated(dictionary, seed=1))
        steps = 1 if name == _UNTRAINED else n_steps
        sae = fitted(cfg, data, steps, lr=LR, dead_after_tokens=DEAD_AFTER)
        x = torch.cat([x for x, _ in _take(uncorrelated(dictionary, seed=2), 8)])
        out = measured(sae, x)
        mcc = dictionary_mcc(sae.w_dec, dictionary)
        table.append({"autoencoder": name, "mcc": mcc, "fvu": out.fvu, "l0": out.l0})
        print(
            f"  uncorrelated  {name:24} mcc {mcc:.3f}  fvu {out.fvu:.4f}  l0 {out.l0:.2f}",
            flush=True,
        )
    return table


def toy_table(n_steps: int, block: int, n_seeds: int) -> list[dict[str, Any]]:
    """MCC, RV and effective rank on correlated data, means over seeds; untrained TopK as chance."""
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(n_seeds):
        dictionary = directions(10 + seed)
        held_out = _take(correlated(dictionary, block, seed=300 + seed), 8)
        x, truth = (torch.cat(part) for part in zip(*held_out, strict=True))
        for name, cfg in {_UNTRAINED: toy_configs()["TopK"], **toy_configs()}.items():
            data = (x for x, _ in correlated(dictionary, block, seed=100 + seed))
            steps = 1 if name == _UNTRAINED else n_steps
            sae = fitted(cfg, data, steps, lr=LR, dead_after_tokens=DEAD_AFTER)
            rows.setdefault(name, []).append(_toy_row(sae, x, truth, dictionary))
    table = []
    for name, found in rows.items():
        means = {key: sum(row[key] for row in found) / len(found) for key in found[0]}
        table.append({"autoencoder": name, "block": block, "seeds": n_seeds, **means})
        figures = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
        print(f"  blocks of {block}  {name:24} {figures}", flush=True)
    return table


def _toy_row(
    sae: SparseAutoencoder, x: Tensor, truth: Tensor, dictionary: Tensor
) -> dict[str, float]:
    w_dec = sae.w_dec.detach()
    layer = torch.zeros(len(x), dtype=torch.int64)
    latents = sae.reconstruct(x, layer).latents.dense()
    out = measured(sae, x)
    rv_aligned, correlations = aligned(truth, latents, dictionary, w_dec)
    return {
        "mcc": dictionary_mcc(w_dec, dictionary),
        "rv_matched": matched_rv(truth, latents),
        "rv_aligned": rv_aligned,
        "correlations": correlations,
        "effective_rank": effective_rank(torch.cov(latents.T)),
        "fvu": out.fvu,
        "l0": out.l0,
    }


def _take(batches: Iterator[tuple[Tensor, Tensor]], n_batches: int) -> list[tuple[Tensor, Tensor]]:
    return [next(batches) for _ in range(n_batches)]
