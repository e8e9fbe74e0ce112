"""Which layers share one autoencoder: clustering of layer distances, judged by AMAD (Group-SAE).

Everything here works on row indices of a distance matrix; only `choose` speaks of layer ids.
Clusterings are cut by replaying their merges, because cutting at a height (`fcluster`, `cut_tree`)
need not give exactly G groups when distances tie.
Source: Group-SAE, https://arxiv.org/abs/2410.21508; `docs/grouping.md` compares with its figures.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from actors.errors import InputError

Partition = tuple[tuple[int, ...], ...]
"""Disjoint groups of row indices; each sorted, and the groups ordered by their first row."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """How layers are grouped."""

    method: Literal["complete", "contiguous", "optimal"] = "complete"
    """Complete linkage (as published), complete linkage that merges neighbours only, or the
    contiguous partition of least AMAD."""

    threshold: float = 0.2
    """The smallest number of groups whose AMAD lies below this is taken; in (0, 1]."""

    n_groups: int | None = None
    """Form exactly so many groups instead; a last layer that stands alone comes on top."""

    center: bool = True
    """Subtract each layer's mean activation before angles are measured (papers.md 2.1)."""

    last_layer: Literal["exclude", "alone", "grouped"] = "exclude"
    """The last layer gets no autoencoder (as published), one of its own, or joins the grouping."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(
                f"threshold: {self.threshold} is no AMAD, which lies in [0, 1]; "
                "the threshold must lie in (0, 1], and the published value is 0.2"
            )
        if self.n_groups is not None and self.n_groups < 1:
            raise InputError(
                f"n_groups: {self.n_groups}, but at least one group is needed; "
                "give 1 or more, or leave it out to let the threshold decide"
            )


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that share one autoencoder."""

    id: int
    """Place of the group, counted from 0 in order of its first layer."""

    layers: tuple[int, ...]
    """Layer ids, ascending."""

    max_distance: float
    """Largest angular distance between two of its layers, in [0, 1]; 0 for a single layer."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The groups that were chosen, and what they were chosen from."""

    groups: tuple[LayerGroup, ...]
    """Every group that gets an autoencoder."""

    amad: float
    """AMAD of the chosen partition; lower is better. A last layer standing alone isn't counted."""

    amad_curve: dict[int, float]
    """AMAD of the partition into G groups, for every G from 1 to the number of layers grouped."""

    linkage: tuple[tuple[float, ...], ...] | None
    """Merges in scipy's form (left, right, height, size); None for `optimal`, which has none."""


def max_distance(distances: Float[np.ndarray, "rows rows"], group: Sequence[int]) -> float:
    """Largest distance between two rows of a group; 0 for a single row."""
    return float(distances[np.ix_(group, group)].max())


def amad(distances: Float[np.ndarray, "rows rows"], partition: Partition) -> float:
    """Average over groups of the largest angular distance inside a group; lower is better.

    In [0, 1]. Groups count equally whatever their size, and a single row counts as 0, so the
    partition into single rows has AMAD 0. More groups don't always mean a lower AMAD: a wide group
    cut into two that are as wide raises it.
    """
    return sum(max_distance(distances, group) for group in partition) / len(partition)


def complete_linkage(distances: Float[np.ndarray, "rows rows"], n_groups: int) -> Partition:
    """Partition into exactly `n_groups` by complete linkage; groups may skip rows."""
    return _cut(_complete_merges(distances), n_groups)


def contiguous_linkage(distances: Float[np.ndarray, "rows rows"], n_groups: int) -> Partition:
    """Partition into exactly `n_groups` runs of rows by complete linkage between neighbours."""
    return _cut(_contiguous_merges(distances), n_groups)


def optimal(distances: Float[np.ndarray, "rows rows"], n_groups: int) -> Partition:
    """Partition of least AMAD among all partitions into exactly `n_groups` runs of rows."""
    assert 1 <= n_groups <= len(distances)
    return _optimal_partitions(distances)[n_groups - 1]


def choose(
    distances: Float[np.ndarray, "rows columns"],
    cfg: GroupConfig,
    layers: Sequence[int] | None = None,
) -> Grouping:
    """Groups by `cfg.method`: as many as `cfg.n_groups`, or the fewest with AMAD below threshold.

    Args:
        distances: Mean angular distance of every pair of layers.
        cfg: How to group.
        layers: Ascending ids of the matrix's rows, the model's last layer last; None: 0, 1, 2...

    Raises:
        InputError: If the matrix isn't one of angular distances, or it has too few layers.
    """
    distances = checked(distances)
    layers = tuple(range(len(distances))) if layers is None else tuple(layers)
    if len(layers) != len(distances):
        raise InputError(
            f"{len(layers)} layers are named for a distance matrix of {len(distances)} rows; "
            "name every row once"
        )
    n_grouped = len(layers) - (cfg.last_layer != "grouped")
    if n_grouped < (cfg.n_groups or 1):
        raise InputError(
            f"{n_grouped} of {len(layers)} layers can be grouped (last_layer={cfg.last_layer}), "
            f"which does not make {cfg.n_groups or 1} groups; "
            "lower n_groups, or set last_layer to grouped"
        )
    inner = distances[:n_grouped, :n_grouped]
    partitions, merges = _partitions(inner, cfg.method)
    curve = {len(partition): amad(inner, partition) for partition in partitions}
    # There is always one: single layers have AMAD 0, which lies below any threshold.
    n_groups = cfg.n_groups or min(g for g, value in curve.items() if value < cfg.threshold)
    chosen = partitions[n_groups - 1]
    if cfg.last_layer == "alone":
        chosen = (*chosen, (n_grouped,))
    return Grouping(
        groups=tuple(
            LayerGroup(
                id=i,
                layers=tuple(layers[row] for row in group),
                max_distance=max_distance(distances, group),
            )
            for i, group in enumerate(chosen)
        ),
        amad=curve[n_groups],
        amad_curve=curve,
        linkage=None if merges is None else tuple(map(tuple, merges.tolist())),
    )


def checked(distances: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows rows"]:
    """The matrix in float64, exactly symmetric, when it is one of angular distances.

    Raises:
        InputError: If it isn't square, finite, in [0, 1], symmetric and 0 on the diagonal.
    """
    distances = np.asarray(distances, dtype=np.float64)
    remedy = "measure the distances again with `strata group`"
    if distances.shape[0] != distances.shape[1] or distances.size == 0:
        raise InputError(
            f"the distance matrix has shape {distances.shape}; "
            f"it needs a row and a column for every layer; {remedy}"
        )
    faults = {
        "is not finite": ~np.isfinite(distances),
        "lies outside [0, 1]": (distances < 0) | (distances > 1),
        "differs from its mirror image": np.abs(distances - distances.T) > 1e-9,
        "is not 0, though it compares a layer with itself": np.diag(np.diag(distances) != 0),
    }
    for fault, where in faults.items():
        if where.any():
            i, j = (int(index) for index in np.argwhere(where)[0])
            raise InputError(
                f"the distance of rows {i} and {j} is {distances[i, j]:g}, which {fault}; "
                f"angular distances are symmetric, in [0, 1] and 0 on the diagonal; {remedy}"
            )
    return (distances + distances.T) / 2


def _partitions(
    distances: np.ndarray, method: Literal["complete", "contiguous", "optimal"]
) -> tuple[list[Partition], np.ndarray | None]:
    """Partitions into 1, 2, ... groups, and the merges that made them where there are any."""
    if method == "optimal":
        return _optimal_partitions(distances), None
    merges = {"complete": _complete_merges, "contiguous": _contiguous_merges}[method](distances)
    return [_cut(merges, g) for g in range(1, len(distances) + 1)], merges


def _complete_merges(distances: np.ndarray) -> np.ndarray:
    # The condensed vector says "precomputed". The published code passes the square matrix, whose
    # rows were then read as points of Euclidean space (papers.md 2.2).
    if len(distances) == 1:
        return np.empty((0, 4))
    return linkage(squareform(distances, checks=False), method="complete")


def _contiguous_merges(distances: np.ndarray) -> np.ndarray:
    """Merges of neighbouring runs, the closest pair first, in scipy's form."""
    n = len(distances)
    runs = [(row, [row]) for row in range(n)]
    merges = []
    for step in range(n - 1):
        heights = [
            distances[np.ix_(left, right)].max()
            for (_, left), (_, right) in itertools.pairwise(runs)
        ]
        at = int(np.argmin(heights))
        (left_id, left), (right_id, right) = runs[at : at + 2]
        merges.append((left_id, right_id, heights[at], len(left) + len(right)))
        runs[at : at + 2] = [(n + step, left + right)]
    return np.array(merges, dtype=np.float64).reshape(-1, 4)


def _cut(merges: np.ndarray, n_groups: int) -> Partition:
    """Groups that are left after all but the last `n_groups - 1` merges."""
    n = len(merges) + 1
    assert 1 <= n_groups <= n
    groups = {row: [row] for row in range(n)}
    for step, (left, right) in enumerate(merges[: n - n_groups, :2].astype(int)):
        groups[n + step] = groups.pop(left) + groups.pop(right)
    return tuple(sorted(tuple(sorted(group)) for group in groups.values()))


def _optimal_partitions(distances: np.ndarray) -> list[Partition]:
    """Partitions of least AMAD into 1, 2, ... runs of rows, by dynamic programming.

    With G fixed, least AMAD is least sum of the groups' largest distances, and the best cut of the
    first rows doesn't depend on how the rest is cut.
    """
    n = len(distances)
    widest = np.full((n, n + 1), np.inf)  # widest[i, j]: largest distance inside rows i..j-1
    for i in range(n):
        reach = np.array([distances[i:j, j - 1].max() for j in range(i + 1, n + 1)])
        widest[i, i + 1 :] = np.maximum.accumulate(reach)
    least = np.full(n + 1, np.inf)  # least[j]: least sum for the first j rows in g groups
    least[0] = 0.0
    last_starts = []  # last_starts[g - 1][j]: where the last of those g groups starts
    partitions = []
    for g in range(1, n + 1):
        totals = least[:n, None] + widest
        last_starts.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
        groups, stop = [], n
        for starts in reversed(last_starts[:g]):
            groups.append(tuple(range(int(starts[stop]), stop)))
            stop = int(starts[stop])
        partitions.append(tuple(reversed(groups)))
    return partitions
