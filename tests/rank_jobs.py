"""What the ranks of tests do; the same functions, alone, are what they are held against."""

import dataclasses
from collections import Counter
from pathlib import Path

import torch

from actors.bundle import Bundle
from actors.trial import Trial
from sae import (
    DivergenceError,
    Fit,
    FitConfig,
    SaeConfig,
    SparseAutoencoder,
    load,
    load_fit,
    save,
    save_fit,
)
from sae.parallel import ParallelRanks
from sae.ranks import ALONE, Ranks

SCALE = {0: 2.0, 3: 0.5}


def made(cfg: SaeConfig, fit_cfg: FitConfig, ranks: Ranks, dtype=torch.float64) -> Fit:
    sae = SparseAutoencoder(cfg, SCALE, seed=None, ranks=ranks).to(dtype)
    return Fit(sae, fit_cfg, n_steps=40, seed=5)


def share_of(ranks: Ranks, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[ranks.part(len(tensor))]


def silence(fit: Fit, latents: range) -> None:
    """Some latents of a dense encoder are too small to be selected, though they are on."""
    held = fit.sae.held
    inside = [j - held.start for j in latents if j in held]
    with torch.no_grad():
        fit.sae.encoder.w_enc[inside] *= 1e-3


def entries(fit: Fit, x: torch.Tensor, layer: torch.Tensor) -> set[tuple[int, int]]:
    """(token, latent) of what training selects of this rank's tokens and latents, by whole numbers."""
    sae, first = fit.sae, fit.sae.ranks.batch_rank * len(x)
    sae.train()
    with torch.no_grad():
        latents = sae.encode(sae.scaling.units(x, layer).scale(x))
    on = latents.values > 0
    tokens, ids = latents.tokens[on] + first, latents.indices[on] + sae.held.start
    return set(zip(tokens.tolist(), ids.tolist(), strict=True))


def trained(
    cfg: SaeConfig,
    fit_cfg: FitConfig,
    data: list,
    folder: Path,
    n_dictionary: int | None = None,
    dtype: torch.dtype = torch.float64,
    silent: range = range(0),
    resume: Path | None = None,
) -> tuple[list[dict], list[set], list[Counter]]:
    """Train; save fit and autoencoder. Reports, selections and bytes handed over, step by step."""
    ranks = ALONE if n_dictionary is None else ParallelRanks(n_dictionary)
    fit = made(cfg, fit_cfg, ranks, dtype)
    parts = [(share_of(ranks, x.to(dtype)), share_of(ranks, layer)) for x, layer in data]
    if resume is None:
        fit.initialise(*parts[0])
        silence(fit, silent)
    else:
        load_fit(resume, fit)
    reports, selections, payloads = [], [], []
    for x, layer in parts:
        selections.append(entries(fit, x, layer))
        before = Counter(ranks.payload) if isinstance(ranks, ParallelRanks) else Counter()
        reports.append(dataclasses.asdict(fit.step(x, layer)))
        if isinstance(ranks, ParallelRanks):
            payloads.append(Counter(ranks.payload) - before)
    save_fit(folder, fit)
    save(folder, fit.sae)
    return reports, selections, payloads


def reconstructed(folder: Path, x: torch.Tensor, layer: torch.Tensor, n_dictionary: int | None):
    ranks = ALONE if n_dictionary is None else ParallelRanks(n_dictionary)
    sae, _ = load(folder, ranks=ranks)
    return sae.reconstruct(share_of(ranks, x), share_of(ranks, layer)).x_hat


def bytes_held(cfg: SaeConfig, n_dictionary: int | None, x, layer) -> dict[str, int]:
    """Of weights, gradients are as large, and of the optimizer, after a step."""
    ranks = ALONE if n_dictionary is None else ParallelRanks(n_dictionary)
    fit = made(cfg, FitConfig(), ranks, torch.float32)
    fit.initialise(x, layer)
    fit.step(x, layer)
    moments = [v for state in fit.adam.state.values() for k, v in state.items() if k != "step"]
    return {
        "weights": sum(p.nbytes for p in fit.sae.parameters()),
        "moments": sum(v.nbytes for v in moments),
    }


def message_of(cfg: SaeConfig, x, layer, wrong: dict[int, tuple]) -> tuple[str, bool]:
    """What a step says that some ranks are given other data, and whether it left the weights alone.

    A good step must go on afterwards.
    """
    import torch.distributed as dist

    ranks = ParallelRanks(2)
    fit = made(cfg, FitConfig(), ranks)
    good = share_of(ranks, x), share_of(ranks, layer)
    fit.initialise(*good)
    fit.step(*good)
    before, said = fit.state_dict(), ""
    try:
        fit.step(*wrong.get(dist.get_rank(), good))
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    unchanged = all(torch.equal(before[name], t) for name, t in fit.state_dict().items())
    fit.step(*good)
    return said, unchanged


def overflowed(cfg: SaeConfig, x, layer) -> bool:
    """Whether this rank refuses a batch whose loss overflows on one data rank only."""
    ranks = ParallelRanks(2)
    fit = made(cfg, FitConfig(), ranks, torch.float32)
    good = share_of(ranks, x).float(), share_of(ranks, layer)
    fit.initialise(*good)
    try:
        fit.step(good[0] * (1e25 if ranks.batch_rank else 1.0), good[1])
    except DivergenceError:
        return True
    return False


def kept_of_tied(kind: str, scores: torch.Tensor, k: int) -> torch.Tensor:
    """Scores that stay, as a matrix that is 0 elsewhere, of this rank's columns of (tokens, latents)."""
    from sae.selection import MatrixBlock, select_batch_top_k, select_top_k

    ranks = ParallelRanks()
    mine = ranks.share(scores.shape[1])
    part = scores[:, mine.start : mine.stop]
    blocks = [MatrixBlock(part, torch.arange(len(mine)))]
    if kind == "topk":
        chosen = ranks.top_k(select_top_k(blocks, len(scores), k, len(mine)), k)
    else:
        budget = k * len(scores)
        chosen = select_batch_top_k(blocks, len(scores), budget, len(mine))
        chosen = ranks.batch_top_k(chosen, budget)
    kept = torch.zeros_like(part)
    kept[chosen.pattern.rows, chosen.pattern.indices] = chosen.scores
    return kept


def saved_again(cfg: SaeConfig, fit_cfg: FitConfig, source: Path, target: Path) -> None:
    """What one process has saved, read and written by all ranks."""
    fit = made(cfg, fit_cfg, ParallelRanks())
    load_fit(source, fit)
    save_fit(target, fit)
    save(target, fit.sae)


def thresholds_set(source: Path, target: Path, thresholds: torch.Tensor) -> None:
    """A saved autoencoder with a threshold for each latent, of the whole, set by ranks."""
    sae, _ = load(source, ranks=ParallelRanks())
    sae.set_threshold(thresholds)
    save(target, sae)


def absent(folder: Path) -> str:
    """What a rank says when the first one alone looks into another folder, where nothing is."""
    ranks = ParallelRanks()
    try:
        load(folder / "nothing" if ranks.dictionary_rank == 0 else folder, ranks=ranks)
    except ValueError as error:
        return str(error)
    return ""


def refusal(cfg: SaeConfig, n_dictionary: int) -> str:
    try:
        SparseAutoencoder(cfg, SCALE, ranks=ParallelRanks(n_dictionary))
    except ValueError as error:
        return str(error)
    return ""


def trial_trained(trial: Trial, n_dictionary: int | None, until: int | None = None) -> dict:
    """What the last report of a trial's bundle was, after it has ended, or come to a step and paused."""
    ranks = ALONE if n_dictionary is None else ParallelRanks(n_dictionary)
    bundle, told = Bundle([trial], ranks=ranks), {}
    while not bundle.is_over and bundle.step != until:
        told |= bundle.advance(3 - bundle.step % 3).get(trial.id, {})
    for failure in bundle.failures.values():
        raise failure
    if not bundle.is_over:
        bundle.pause()
    return told
