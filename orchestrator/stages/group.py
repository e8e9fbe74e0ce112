"""The grouping stage: distances between layers, the groups they give, and what rows are fit."""

from functools import partial

from actors.grouper import Grouper, distances
from actors.grouping import choose
from orchestrator.pages.figures.groups import amad_curve, distance_matrix, merges
from orchestrator.pool import Pool
from orchestrator.session import Session
from orchestrator.stages.group_file import GroupStage, load_groups, save_groups
from storage.hygiene import RowFilter
from storage.tokens import TokenStore


def group(session: Session, tokens: TokenStore, pool: Pool) -> GroupStage:
    """The groups of layers, from `groups.json` if they are there already."""
    if session.run.groups.is_file():
        found = load_groups(session.run)
    else:
        with session.run.timed("group"):
            found = _measured(session, tokens, pool)
            save_groups(session.run, found)
        session.say(
            f"group     {len(found.grouping.groups)} groups, AMAD {found.grouping.amad:.3f}: "
            + " ".join(f"[{_span(g.layers)}]" for g in found.grouping.groups)
        )
    _tell(session, found)
    return found


def _measured(session: Session, tokens: TokenStore, pool: Pool) -> GroupStage:
    pilot, cfg = session.run.pilot, session.cfg
    medians = pool.call(Grouper, (pilot,), "median_norms")
    row_filter = RowFilter(cfg.hygiene, tokens.special_ids, medians)
    work = partial(pool.work, Grouper, n_actors=cfg.compute.harvesters)
    report = distances(pilot, row_filter, medians, cfg.group.center, work)
    grouping = choose(report.matrix, cfg.group, report.layers)
    return GroupStage(grouping=grouping, report=report, row_filter=row_filter)


def _tell(session: Session, found: GroupStage) -> None:
    cfg, grouping = session.cfg.group, found.grouping
    session.tracker.stage(
        "group",
        params={"method": cfg.method, "threshold": cfg.threshold},
        metrics={"amad": grouping.amad, "n_groups": float(len(grouping.groups))},
    )
    session.tracker.figure(distance_matrix(found.report, grouping), "distances.png")
    session.tracker.figure(amad_curve(grouping, cfg.threshold), "amad.png")
    dendrogram = merges(found.report, grouping)
    if dendrogram is not None:
        session.tracker.figure(dendrogram, "dendrogram.png")
    session.tracker.artifact(session.run.groups)


def _span(layers: tuple[int, ...]) -> str:
    """Layers in short: `2-4` where they are contiguous, else `2,5`."""
    first, last = min(layers), max(layers)
    is_run = last > first and last - first == len(layers) - 1
    return f"{first}-{last}" if is_run else ",".join(map(str, layers))
