"""The configuration of a run, as frozen dataclasses; `orchestrator.config_file` reads it from YAML.

Sections belong to their owners (`ModelSource`, `Hygiene`, `GroupConfig`, `FitConfig`, ...); here they
are only composed, with the sections that belong to the orchestrator itself. A configuration that
exists is possible: what can be known to fail without the model is refused here, every fault at once.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from actors.corpus import FilesCorpus, HubCorpus, StdlibCorpus
from actors.grouping import GroupConfig
from actors.model_source import ModelSource
from orchestrator.sweeps.axes import Positive
from orchestrator.sweeps.rank_grid import RankGrid, Ranks, indivisible
from orchestrator.sweeps.space import impossible_training
from orchestrator.sweeps.sweep_config import SweepConfig
from sae.fit import FitConfig
from storage.errors import StoreError
from storage.hygiene import Hygiene
from storage.places import is_broken_url, place

Tokens = Annotated[int, Field(ge=1, le=10**12)]
Mebibytes = Annotated[float, Field(gt=0, le=2**20)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch takes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Corpus = Annotated[StdlibCorpus | FilesCorpus | HubCorpus, Field(discriminator="source")]


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What is stored of the model's activations, and in which pieces."""

    tokens: Tokens
    """Rows per group in the training store: one activation per token and group."""

    pilot_tokens: Tokens | None = None
    """Rows per layer in the pilot; by default 1 % of `tokens`, at least 50,000 (or all)."""

    validation_tokens: Tokens = 20_000
    """Rows per layer in the validation store, from documents that nothing is trained on."""

    context: Annotated[int, Field(ge=8, le=2**16)] | None = None
    """Tokens per sequence; by default the model's longest, but at most 1024. A store numbers 2^16."""

    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Of the stored activations; float16 is scaled per layer by a power of two, int8 per row."""

    codec: Literal["none", "zstd", "blosc", "pcodec"] = "none"
    """How chunks are compressed: without loss, and at a price in time (docs/store_format.md)."""

    batch_tokens: Positive = 8192
    """Tokens per forward pass; lower it when the model runs out of memory."""

    chunk_mib: Mebibytes = 8.0
    """Size of a chunk, the unit of reading; a chunk holds a whole sequence at least."""

    shard_mib: Mebibytes = 128.0
    """Size of a shard, the unit of writing and of resuming; one per array and work item. Up to four times as
    large where single sequences are larger than chunk_mib (docs/configuration.md)."""

    store: str | None = None
    """Where tokens and activations lie: a folder, or s3://, gs:// or az://BUCKET/PREFIX; by default
    the run directory. One run has it for itself."""

    disk_budget: str | int | None = None
    """Most bytes that the training store may take, such as 200GB, or a number of them; beyond, it is harvested beside
    training, and shards are released that every trial has passed. By default it is kept whole."""

    def __post_init__(self) -> None:
        """Refuse shards below their chunks, what pcodec can't compress, URLs of no store, no sizes."""
        if self.store is not None:
            try:
                place(self.store)
            except StoreError as error:
                raise ValueError(f"store: {error}") from None
        try:
            _ = self.budget_bytes
        except ValidationError:
            raise ValueError(
                f"disk_budget: {self.disk_budget!r} is no size; write a number and a unit, such as "
                "500MB or 2TB"
            ) from None
        if self.codec == "pcodec" and self.dtype == "int8":
            raise ValueError(
                "codec: pcodec takes float16, bfloat16 and float32, not int8; choose zstd, blosc or "
                "none, or another dtype"
            )
        if self.shard_mib < self.chunk_mib:
            raise ValueError(
                f"shard_mib: {self.shard_mib} is less than chunk_mib = {self.chunk_mib}; "
                "a shard holds whole chunks, so raise shard_mib or lower chunk_mib"
            )

    @property
    def budget_bytes(self) -> int | None:
        """`disk_budget` as a number."""
        if self.disk_budget is None:
            return None
        return TypeAdapter(ByteSize).validate_python(self.disk_budget)

    @property
    def n_pilot_tokens(self) -> int:
        """Rows per layer in the pilot, with the default resolved."""
        return self.pilot_tokens or min(self.tokens, max(50_000, self.tokens // 100))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the winners are evaluated."""

    sequences: Positive = 64
    """Validation sequences for cross-entropy; FVU uses the whole validation store."""

    tolerance: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Most that a layer's FVU may be above that of an autoencoder of its own, or, where there is none, above
    its group's mean, before a split is advised. Group-SAE lost 0.011 to 0.022 on average."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """What the actors may use. None of it changes what a run computes, but for the rounding of ranks."""

    address: str | None = None
    """Of a running Ray cluster: auto or HOST:PORT; by default a private one on this machine."""

    cpus: Positive | None = None
    """Cores of the private cluster; by default all."""

    harvesters: Positive | None = None
    """Copies of the model at work; by default as many as fit."""

    cpus_per_actor: Positive = 1
    """Cores, and so threads, of every harvester, trainer (or rank of a trial) and evaluator."""

    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    """Share of a GPU of every harvester, trainer and evaluator; 0 computes on the CPU."""

    wait_seconds: Annotated[float, Field(gt=0)] = 600.0
    """That a cluster at `address` is given to have room for an actor, as its nodes may still be starting."""

    gpus_per_trial: Annotated[float, Field(ge=0)] | None = None
    """Share of a GPU of every trial, in place of gpus_per_actor for trainers; trials of one actor have
    theirs together, and ranks of one trial divide them."""

    trials_per_actor: Positive = 1
    """Trials of one group and batch size that train in one process on the same batches, each read,
    copied to the device and decoded once. Results are the same."""

    ranks_per_trial: Ranks = 1
    """Processes that train each trial together: a number of them divides the latents, {latents: 2,
    batch: 2} the tokens of a batch too. Results are the same within rounding."""

    def __post_init__(self) -> None:
        """Refuse what Ray has no notion of."""
        n_ranks = self.ranks.n_ranks
        if n_ranks > 1 and self.trials_per_actor > 1:
            raise ValueError(
                f"ranks_per_trial: {n_ranks} processes train one trial, and trials_per_actor: "
                f"{self.trials_per_actor} has one process train several; leave out either"
            )
        if n_ranks > 1 and self.gpus_per_trainer not in (0, 1):
            name = "gpus_per_actor" if self.gpus_per_trial is None else "gpus_per_trial"
            raise ValueError(
                f"{name}: {getattr(self, name)} gives each of the {n_ranks} ranks of a trial "
                f"{self.gpus_per_trainer:g} GPUs; a rank has one of its own, or none; set gpus_per_trial to "
                f"{n_ranks}, or to 0"
            )
        for setting, kind, asked in self.asked:
            if kind == "GPU" and asked > 1 and asked % 1:
                all_told = f" x trials_per_actor: {self.trials_per_actor} = {asked:g}"
                raise ValueError(
                    f"{setting}: {getattr(self, setting)}"
                    f"{all_told if asked != getattr(self, setting) else ''} is neither a share of one "
                    "GPU nor a whole number of them; give at most 1, or 2, 3, ..."
                )
        if "@" in (self.address or ""):  # not repeated, as it may be a password
            raise ValueError(
                "address: holds more than a host and a port; give HOST:PORT, and a token by Ray's own "
                "RAY_AUTH_TOKEN_PATH"
            )
        if self.address in ("", "local"):
            raise ValueError(
                f"address: {self.address!r} is no cluster's; leave address out to use this machine alone, or "
                "give auto for the cluster that this machine belongs to, or HOST:PORT"
            )
        if self.address and self.cpus:
            raise ValueError(
                "cpus: sizes a private cluster, but address names a running one; leave out either"
            )

    @property
    def gpus_per_trainer(self) -> float:
        """Of a process that trains: of all its trials together, or of its share of one."""
        if self.gpus_per_trial is None:
            return self.gpus_per_actor
        of_actor = self.gpus_per_trial * self.trials_per_actor / self.ranks.n_ranks
        return round(of_actor, 4)  # as finely as Ray counts

    @property
    def ranks(self) -> RankGrid:
        """`ranks_per_trial` as a grid."""
        given = self.ranks_per_trial
        return RankGrid(latents=given) if isinstance(given, int) else given

    @property
    def asked(self) -> list[tuple[str, str, float]]:
        """Settings, with what they ask for at once: the resource, as Ray names it, and how much of it."""
        asked = [
            ("cpus_per_actor", "CPU", float(self.cpus_per_actor)),
            ("gpus_per_actor", "GPU", self.gpus_per_actor),
        ]
        if self.gpus_per_trial is not None:
            asked.append(("gpus_per_trial", "GPU", self.gpus_per_trainer))
        n_ranks = self.ranks.n_ranks
        if n_ranks > 1:
            asked.append(("ranks_per_trial", "CPU", float(n_ranks * self.cpus_per_actor)))
            asked.append(("ranks_per_trial", "GPU", n_ranks * self.gpus_per_trainer))
        return asked


_DATABASES = ("postgresql", "mysql", "mssql")
"""In whose addresses a user may stand, without a password."""

_PLAIN_QUERY = (
    *("sslmode", "sslrootcert", "host", "port", "service", "connect_timeout"),  # PostgreSQL
    *("charset", "unix_socket", "read_default_file", "ssl_ca"),  # MySQL
    *("driver", "encrypt", "trustservercertificate", "trusted_connection"),  # SQL Server
)
"""What may stand in the query of a tracking address: names, places and switches, and no secret in any of them."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the runs."""

    uri: str | None = None
    """An MLflow tracking server; by default an SQLite file beside the run directory. No password stands
    in it: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD hold them, of a database its own environment."""

    @property
    def sqlite_file(self) -> Path | None:
        """The SQLite file that the address names, if it names one; perhaps relative."""
        found = re.fullmatch(r"sqlite:///(.+)", self.uri or "")
        return Path(found[1]) if found else None

    def __post_init__(self) -> None:
        """Refuse what would be copied into the run directory, MLflow and the report."""
        if self.uri is not None and _may_hold_a_secret(self.uri):
            raise ValueError(
                "uri: it holds a password, a token, a fragment or a query that is not known to be harmless, and would be "
                f"copied with the configuration (a query may have {', '.join(_PLAIN_QUERY)}); leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database its own environment, such as "
                "PGUSER and PGPASSWORD, or a file, such as MySQL's read_default_file)"
            )


def _may_hold_a_secret(uri: str) -> bool:
    """Whether an address says more than a place and plain settings, however a library may read it."""
    try:
        url = urlsplit(uri)
    except ValueError:  # whose message may repeat a part of it
        return True
    kind = url.scheme.split("+")[0]
    is_file = kind in ("", "sqlite", "file") and not url.netloc
    user, *at = url.netloc.split("@")
    names_a_user = kind in _DATABASES and len(at) == uri.count("@") == 1 and ":" not in user
    query = parse_qsl(url.query, keep_blank_values=True)
    plain = all(
        key.lower() in _PLAIN_QUERY and re.fullmatch(r"[\w ./~:-]*", value) for key, value in query
    )
    named = re.search(r"(pwd|passwd|password)=", uri, re.IGNORECASE)  # as ODBC has it, anywhere
    suspicious = ("@" in uri and not names_a_user) or bool(named)
    return (suspicious and not is_file) or bool(url.fragment) or not plain


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does. Given as one YAML file."""

    run_dir: Path
    """Where everything is written; relative to the working directory."""

    name: Name = "strata"
    """The MLflow experiment: one for all runs that are to be compared."""

    seed: Seed = 0
    """Decides every random draw of the run."""

    model: ModelSource
    corpus: Corpus
    harvest: HarvestConfig
    hygiene: Hygiene = field(default_factory=Hygiene)
    group: GroupConfig = field(default_factory=GroupConfig)
    sweep: SweepConfig
    train: FitConfig = field(default_factory=FitConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse a bucket for a folder, and what only shows where sections meet."""
        if is_broken_url(str(self.run_dir)):  # as a path leaves of a URL
            told = str(self.run_dir).rpartition("@")[2]  # before it may be a password
            raise ValueError(
                f"run_dir: {told} is no folder; give one, and a bucket for the activations alone, as "
                "harvest.store"
            )
        if self.compute.trials_per_actor > 1 and self.sweep.search.method == "optuna":
            raise ValueError(
                f"compute.trials_per_actor: {self.compute.trials_per_actor} with sweep.search.method: "
                "optuna, which suggests one trial at a time, knowing what came of those before; leave "
                "it out, or search by grid or random"
            )
        faults: dict[str, None] = {}
        for _, space in self.sweep.kinds():
            faults |= dict.fromkeys(impossible_training(space, self.train))
        for group in self.sweep.groups:
            if not 0 <= group < (self.group.n_groups or math.inf):
                bound = f"group.n_groups = {self.group.n_groups}" if group >= 0 else "from 0"
                faults[f"groups[{group}]: there is no such group ({bound}); correct the number"] = (
                    None
                )
        faults = dict.fromkeys(f"sweep.{fault}" for fault in faults)
        for _, space in self.sweep.kinds():
            faults |= dict.fromkeys(indivisible(space, self.train, self.compute.ranks))
        if faults:
            raise ValueError("\n".join(faults))


FREE_SETTINGS = (
    "run_dir",
    "compute",
    "tracking",
    "model.device_map",
    "harvest.store",
    "harvest.disk_budget",
    "evaluate.tolerance",
)
"""What may change between two calls that continue one run: none of it changes the results."""
