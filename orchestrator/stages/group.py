"""The grouping stage: distances between layers, the groups they give, and what rows are fit."""

from dataclasses import asdict, dataclass
from typing import Any

from actors.grouper import DistanceReport, Grouper
from actors.grouping import Grouping, LayerGroup, choose
from orchestrator.errors import UserError
from orchestrator.pages.figures.groups import amad_curve, distance_matrix, merges
from orchestrator.pool import Pool
from orchestrator.run_directory import RunDirectory, read_json, write_json
from orchestrator.session import Session
from storage.hygiene import RowFilter
from storage.tokens import TokenStore


@dataclass(frozen=True, kw_only=True)
class GroupStage:
    """What the later stages need to know of the layers."""

    grouping: Grouping
    report: DistanceReport
    row_filter: RowFilter

    @property
    def partition(self) -> tuple[tuple[int, ...], ...]:
        """The layers of every group."""
        return tuple(group.layers for group in self.grouping.groups)


def group(session: Session, tokens: TokenStore, pool: Pool) -> GroupStage:
    """The groups of layers, from `groups.json` if they are there already."""
    if session.run.groups.is_file():
        found = load_groups(session.run)
    else:
        with session.run.timed("group"):
            found = _measured(session, tokens, pool)
            write_json(session.run.groups, _to_json(found))
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
    report: DistanceReport = pool.call(Grouper, (pilot, row_filter), "distances", cfg.group.center)
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


def load_groups(run: RunDirectory) -> GroupStage:
    """What `groups.json` holds.

    Raises:
        UserError: If it is damaged or was edited into something else.
    """
    try:
        return _from_json(read_json(run.groups))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.groups} is not what the grouping wrote ({error!r}); restore it, or delete it, and "
            "the same command makes it again from the pilot"
        ) from None


def _span(layers: tuple[int, ...]) -> str:
    """Layers in short: `2-4` where they are contiguous, else `2,5`."""
    first, last = min(layers), max(layers)
    is_run = last > first and last - first == len(layers) - 1
    return f"{first}-{last}" if is_run else ",".join(map(str, layers))


def _to_json(stage: GroupStage) -> dict[str, Any]:
    grouping, report = stage.grouping, stage.report
    return {
        "version": 1,
        "groups": [asdict(g) for g in grouping.groups],
        "amad": grouping.amad,
        "amad_curve": grouping.amad_curve,
        "linkage": grouping.linkage,
        "measured": asdict(report),
        "row_filter": stage.row_filter.to_json(),
    }


def _from_json(data: dict[str, Any]) -> GroupStage:
    measured = data["measured"]
    return GroupStage(
        grouping=Grouping(
            groups=tuple(
                LayerGroup(id=g["id"], layers=tuple(g["layers"]), max_distance=g["max_distance"])
                for g in data["groups"]
            ),
            amad=data["amad"],
            amad_curve={int(g): value for g, value in data["amad_curve"].items()},
            linkage=data["linkage"] and tuple(tuple(row) for row in data["linkage"]),
        ),
        report=DistanceReport(
            layers=tuple(measured["layers"]),
            distances=tuple(tuple(row) for row in measured["distances"]),
            centered=measured["centered"],
            n_rows=measured["n_rows"],
            n_stored=measured["n_stored"],
            mean_norm={int(layer): norm for layer, norm in measured["mean_norm"].items()},
            median_norm={int(layer): norm for layer, norm in measured["median_norm"].items()},
        ),
        row_filter=RowFilter.from_json(data["row_filter"]),
    )
