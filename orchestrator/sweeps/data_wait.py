"""How long trials waited for data, and what to do about it."""

from collections.abc import Sequence
from statistics import median

from orchestrator.config import RunConfig
from orchestrator.planning.memory import shares_chunks
from orchestrator.progress import WAIT_LIMIT
from orchestrator.sweeps.winners import Result


def waiting(cfg: RunConfig, results: Sequence[Result]) -> str:
    """One line: the median and the worst share of their time that trials waited for the next batch."""
    shares = {str(result["trial"]): float(result["data_wait_fraction"]) for result in results}
    worst = max(shares, key=lambda name: shares[name])
    told = (
        f"trials waited for data for {median(shares.values()):.1%} of their time "
        f"(the worst {shares[worst]:.1%}: {worst})"
    )
    return f"{told}; to wait less, {_remedy(cfg)}" if shares[worst] > WAIT_LIMIT else told


def _remedy(cfg: RunConfig) -> str:
    together = "let trials train together on what is read (compute.trials_per_actor)"
    if cfg.harvest.disk_budget is not None:
        return f"raise harvest.disk_budget or compute.harvesters, or {together}"
    if shares_chunks(cfg):
        return (
            f"{together}, or keep the store uncompressed on a disk (harvest.codec, harvest.store)"
        )
    return f"{together}, or give reading a core (compute.cpus_per_actor)"
