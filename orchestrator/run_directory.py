"""Where everything of a run lies, and what makes it belong to one configuration."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator import config_file, links_out, run_lock
from orchestrator.config import FREE_SETTINGS, RunConfig
from orchestrator.errors import UserError
from storage.files import is_partial, write_file, writing
from storage.metadata import has_metadata
from storage.places import Place, place
from storage.seal import opened, sealed

_SENT = re.compile(r"[^\s'\"]*/working_dir_files/_ray_pkg_[0-9a-f]+/")
"""Where Ray puts what `strata submit` sends: elsewhere on another cluster, or once a file of it has changed."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Every file in it is whole or absent."""

    path: Path

    store: Place
    """Where its tokens and activations lie: the same folder, or what `harvest.store` names."""

    @classmethod
    def of(cls, cfg: RunConfig) -> "RunDirectory":
        """The directory of `cfg`, whether it is there or not."""
        return cls(cfg.run_dir, place(cfg.harvest.store or cfg.run_dir))

    @classmethod
    def claim(cls, cfg: RunConfig) -> "RunDirectory":
        """The directory of `cfg`, created if need be, for this process alone as long as it lives.

        Raises:
            UserError: If it belongs to another configuration (with the difference), another process
                works on it, a folder in it is a link to elsewhere, or it can't be written.
        """
        run = cls.of(cfg)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            others = (f.name for f in run.path.iterdir() if not is_partial(f.name))
            if not run.config.is_file() and any(name != "lock" for name in others):
                raise UserError(
                    f"{run.path} holds files but no run of strata; give a run_dir that is new or empty"
                )
            run.hold()
        except OSError as error:
            raise UserError(
                f"{run.path} can't be written ({error.strerror}); set run_dir to a place that can"
            ) from None
        if run.store.folder is not None:  # of another run directory another process may write there
            with writing(run.store.folder):
                run.store.folder.mkdir(parents=True, exist_ok=True)
                links_out.refuse_lock(run.store.folder)
                run_lock.hold(run.store.folder)
        dumped = config_file.dump(cfg)
        run._own(place(run.path), dumped)
        if run.store != place(run.path):
            run._own(run.store.hasty, dumped)
        return run

    def hold(self) -> None:
        """Keep it for this process alone, as long as that lives.

        Raises:
            UserError: If another process works on it, or what is written would follow a link to elsewhere.
        """
        links_out.refuse_lock(self.path)
        run_lock.hold(self.path)
        links_out.refuse_folders(self.path)

    @classmethod
    def finished(cls, cfg: RunConfig) -> "RunDirectory | None":
        """The directory of `cfg`, claimed, if its run is finished, told to MLflow and undamaged.

        Raises:
            UserError: As `claim`.
        """
        if not cls.of(cfg).summary.is_file():
            return None
        run = cls.claim(cfg)
        whole = run.pareto.is_file() and run.cards.is_file() and not run.damage.is_file()
        if not whole or read_json(run.cards).get("tolerance") != cfg.evaluate.tolerance:
            return None
        data = read_summary(run)
        winners = [(w["trial"], g["layers"]) for g in data["groups"] for w in g.get("winners", ())]
        needed = [
            *(
                run.evaluations / name / f"layer-{at}.json"
                for name, layers in winners
                for at in layers
            ),
            *(run.trials / name / "sae" / "sae.safetensors" for name, _ in winners),
        ]
        mlflow = data.get("mlflow", {})
        # Another server is told as well, if it costs no harvest.
        elsewhere = cfg.tracking.uri not in (None, mlflow.get("tracking_uri"))
        told = mlflow.get("complete") and not (elsewhere and has_metadata(run.train))
        return run if told and all(file.is_file() for file in needed) else None

    def _own(self, where: Place, dumped: str) -> None:
        """Write the configuration there, or compare it with the one that is there.

        Of a store elsewhere this also finds out, before anything is computed, whether it answers.
        """
        try:
            there = where.read("config.yaml").decode()
        except FileNotFoundError:
            where.write("config.yaml", [dumped.encode()])
            return
        changed = [
            difference
            for difference in config_file.differences(
                _completed(_SENT.sub("", there)), yaml.safe_load(_SENT.sub("", dumped))
            )
            if not _is_free(difference[0])
        ]
        # A store elsewhere has not been asked before, where this is the folder of the run.
        stores = (self.store.hasty / store.name for store in (self.tokens, self.pilot))
        if changed and (self.groups.is_file() or any(map(has_metadata, stores))):
            lines = [f"  {path}: {a!r} there, {b!r} now" for path, a, b in changed]
            what = "run_dir" if where == place(self.path) else "harvest.store"
            raise UserError(
                f"{where} belongs to another configuration:\n"
                + "\n".join(lines)
                + f"\nRestore these values to continue it, or set another {what}; nothing was changed"
            )
        if (
            there != dumped
        ):  # nothing came of the former one, what is free changed, or settings were added
            where.write("config.yaml", [dumped.encode()])

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """Which model it is made with."""
        return self.path / "model.json"

    @property
    def ring(self) -> Place:
        """Where trials say which shards they need, while there is a disk budget."""
        return place(self.path / "ring")

    @property
    def tokens(self) -> Place:
        """Packed token ids."""
        return self.store / "tokens.zarr"

    @property
    def has_stored(self) -> bool:
        """Whether activations of its layers were stored, here or where its store has been."""
        return has_metadata(self.pilot) or self.groups.is_file()

    @property
    def pilot(self) -> Place:
        """A sample of all layers at the same positions."""
        return self.store / "pilot.zarr"

    @property
    def validation(self) -> Place:
        """The same of documents that nothing is trained on."""
        return self.store / "validation.zarr"

    @property
    def train(self) -> Place:
        """One activation per token and group."""
        return self.store / "train.zarr"

    @property
    def token_note(self) -> Path:
        """Which tokens the stored activations are of."""
        return self.path / "tokens.json"

    @property
    def groups(self) -> Path:
        """The groups of layers, with the distances they come from."""
        return self.path / "groups.json"

    @property
    def rows(self) -> Path:
        """How many rows of the training store are used, and why others are not."""
        return self.path / "rows.json"

    @property
    def damage(self) -> Path:
        """What `strata verify` found damaged and the harvest has not taken back yet."""
        return self.path / "damage.json"

    @property
    def suggestions(self) -> Path:
        """What Optuna has suggested, in order."""
        return self.path / "suggested.json"

    @property
    def trials(self) -> Path:
        """A folder per trial."""
        return self.path / "trials"

    @property
    def evaluations(self) -> Path:
        """A file per winner and layer."""
        return self.path / "evaluations"

    @property
    def cards(self) -> Path:
        """The fidelity card of every group."""
        return self.path / "cards.json"

    @property
    def baselines(self) -> "BaselineDirectory":
        """The same run, for an autoencoder of every layer's own."""
        return BaselineDirectory(self.path, self.store)

    @property
    def progressive(self) -> Path:
        """What `strata progressive` found, a file per winner and layer; absent if nobody asked."""
        return self.path / "progressive"

    @property
    def exports(self) -> Path:
        """A folder per format, in it one per trial, in it one per layer."""
        return self.path / "exports"

    @property
    def environment(self) -> Path:
        """Versions, code and machine of the calls that made it."""
        return self.path / "environment.json"

    @property
    def system_metrics(self) -> Path:
        """Load of the driver's machine."""
        return self.path / "system_metrics.jsonl"

    @property
    def progress(self) -> Path:
        """How far the newest call is, or how it ended."""
        return self.path / "progress.json"

    @property
    def summary(self) -> Path:
        """The result; written last, so a run with it is finished."""
        return self.path / "summary.json"

    @property
    def pareto(self) -> Path:
        """Every group's Pareto front."""
        return self.path / "pareto.json"

    @property
    def pareto_figure(self) -> Path:
        """The same as a page of its own."""
        return self.path / "report" / "pareto.html"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report" / "index.html"

    @property
    def dashboard(self) -> Path:
        """The pages about latents."""
        return self.path / "dashboard"

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to the stage's, also when it is cut short by an exception."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.stage_seconds()
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 2)
            write_json(self.path / "stage_seconds.json", seconds)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds spent in each stage so far, all calls together."""
        file = self.path / "stage_seconds.json"
        found = read_json(file) if file.is_file() else {}
        if not all(isinstance(seconds, int | float) for seconds in found.values()):
            raise UserError(
                f"{file} is not what Strata writes, which is a number for each stage; it says how long they took "
                "and nothing else: delete it"
            )
        return found


class BaselineDirectory(RunDirectory):
    """The same run, with what belongs to an autoencoder of every layer's own elsewhere."""

    @property
    def train(self) -> Place:
        """An activation of every layer per token: a group for each."""
        return self.store / "baselines.zarr"

    @property
    def ring(self) -> Place:
        """As of the run."""
        return place(self.path / "baselines" / "ring")

    @property
    def trials(self) -> Path:
        """A folder per layer."""
        return self.path / "baselines" / "trials"

    @property
    def evaluations(self) -> Path:
        """A file per layer."""
        return self.path / "baselines" / "evaluations"


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file of a run holds: an object, or what `kind` says.

    Raises:
        UserError: If it is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        fault = None if isinstance(data, kind) else f"it holds no {kind.__name__}"
        if isinstance(data, dict):
            data = opened(data)
    except (ValueError, RecursionError) as error:
        data, fault = None, str(error)
    if fault:
        raise UserError(
            f"{path} is damaged ({fault}); delete it: `strata run`, or the command that made it, makes it "
            "again"
        )
    return data


def read_summary(run: RunDirectory) -> dict[str, Any]:
    """What `summary.json` holds; its trials, groups and layers name files, here and below alone.

    Raises:
        UserError: If it is damaged.
    """
    data = read_json(run.summary)
    try:
        trials = [w["trial"] for g in data["groups"] for w in (g["best"], *g.get("winners", ()))]
        numbers = [n for g in data["groups"] for n in (g["id"], *g["layers"])]
    except (KeyError, TypeError, AttributeError) as error:
        fault = repr(error)
    else:
        named = all(
            isinstance(t, str) and t not in ("", "..") and Path(t).name == t for t in trials
        )
        if named and all(isinstance(n, int) for n in numbers):
            return data
        fault = "it names trials, groups or layers that can be none"
    raise UserError(
        f"{run.summary} is damaged ({fault}); delete it, and `strata run {run.path}` makes it again"
    )


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is whole or absent; an object with a checksum, which `read_json` looks at."""
    held = sealed(data) if isinstance(data, Mapping) else data
    write_atomically(path, json.dumps(held, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent, whatever happens meanwhile."""
    write_file(path, [text.encode()])


def _completed(there: str) -> dict[str, Any]:
    """A configuration that was written by this version or an older one: what it lacks has its default."""
    given = yaml.safe_load(there)
    try:
        return yaml.safe_load(config_file.dump(config_file.parse(given, "config.yaml")))
    except UserError:  # of a version that knew other settings
        return given


def _is_free(path: str) -> bool:
    """Whether a setting may change between two calls of one run."""
    return any(path == free or path.startswith(f"{free}.") for free in FREE_SETTINGS)
