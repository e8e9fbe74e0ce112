"""`groups.json`: what the grouping stage found, for all who come after it."""

from dataclasses import asdict, dataclass
from typing import Any

from actors.grouper import DistanceReport
from actors.grouping import Grouping, LayerGroup
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json, write_json
from storage.hygiene import RowFilter


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


def save_groups(run: RunDirectory, found: GroupStage) -> None:
    """Write `groups.json`."""
    write_json(run.groups, _to_json(found))


def load_groups(run: RunDirectory) -> GroupStage:
    """What `groups.json` holds.

    Raises:
        UserError: If it is damaged or was edited into something else.
    """
    try:
        return _from_json(read_json(run.groups))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{run.groups} is not what the grouping wrote ({error!r}); it is damaged, or was edited: restore "
            "it, or delete it, and the same command makes it again from the pilot"
        ) from None


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
    numbers = [n for g in data["groups"] for n in (g["id"], *g["layers"])]
    if not all(isinstance(n, int) for n in numbers):  # names of folders are made of them
        raise ValueError("groups and layers are numbers")
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
