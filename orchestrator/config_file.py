"""The door: one YAML file becomes a `RunConfig`, or a list of everything that is wrong with it.

Paths of inputs (model folder, text files) are taken relative to the file's folder, else to the
working directory; the run directory and MLflow's file relative to the working directory.
"""

import dataclasses
import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from orchestrator.config import RunConfig
from orchestrator.errors import UserError

Location = tuple[str | int, ...]
Problem = tuple[Location, str]


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration from a YAML file, or from a run directory.

    Args:
        path: The file, or a run directory (its `config.yaml` is read).
        overrides: `section.key=value` each, the value in YAML.

    A run directory may be read where its model is not, so its absence is left to those who load it.

    Raises:
        UserError: Naming every fault in the file with its path and the remedy.
    """
    cfg, file = read(path, overrides)
    try:
        return _with_absolute_paths(
            cfg, file.resolve().parent, None if path.is_dir() else str(file)
        )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: a path in it can't be: {error}; correct it") from None


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path]:
    """The same with its paths as they are written, for a run on another machine; and the file it is in.

    Raises:
        UserError: As `load`, of all that does not lie in its paths.
    """
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        known = ", ".join(sorted(str(p) for p in Path("examples").glob("*.yaml")))
        raise UserError(
            f"{file} does not exist; strata takes a YAML file or a run directory"
            + (f", for instance one of: {known}" if known else "; see docs/configuration.md")
        )
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{file} holds no settings; see docs/configuration.md for what it must hold"
        )
    if path.is_dir():
        raw["run_dir"] = str(path.resolve())  # it may have been moved or copied
    raw = dict(_numbered(raw))
    for override in overrides:
        _apply(raw, override)
    return parse(raw, str(file)), file


def parse(raw: Mapping[str, Any], origin: str) -> RunConfig:
    """Turn plain data into a `RunConfig`; `origin` names it in errors."""
    adapter, raw = TypeAdapter(RunConfig), _numbered(raw)
    try:
        cfg = adapter.validate_python(raw, extra="forbid")
        problems = list(_disguised(raw, adapter.dump_python(cfg), ()))
        if not problems:
            return cfg
    except ValidationError as error:
        problems = _problems(error, raw)
    # Faults in a section's fields hide its cross-field checks: look again without those fields.
    faulty = [location for location, _ in problems]
    hidden = {step for *_, step in filter(None, faulty) if isinstance(step, str)}
    pruned = _without(raw, faulty)
    replaced = [
        (section, key)
        for (section, key), value in _STAND_INS.items()
        if (section, key) in faulty
        or ((section, key, 0) in faulty and pruned[section][key] is value)
    ]
    try:
        adapter.validate_python(pruned, extra="forbid")
    except ValidationError as error:
        found = [(_before_pruning(loc, faulty), text) for loc, text in _problems(error, pruned)]
        problems += [
            (location, text)
            for location, text in found
            if not text.startswith("is missing")
            and not any(location[: len(stand)] == stand for stand in replaced)
            and location not in _COUNTING
            and not any(known[: len(location)] == location for known in faulty)
            and not hidden & set(re.findall(r"\w+", text))
        ]
    lines = [f"  {_dotted(location)}: {text}" for location, text in problems]
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise UserError(f"{origin} has {count}:\n" + "\n".join(lines))


def dump(cfg: RunConfig) -> str:
    """The configuration as YAML, every default written out."""
    return yaml.safe_dump(as_data(cfg), sort_keys=False)


def as_data(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, every default written out."""
    return TypeAdapter(RunConfig).dump_python(cfg, mode="json")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings in which two dumped configurations differ: (path, old value, new value)."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from ((f"{key}.{path}", x, y) for path, x, y in differences(a, b))
        elif a != b:
            yield key, a, b


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads 1e6 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice; keep one", node.start_mark
                )
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply(raw: dict[Any, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: give section.key=value, for instance sweep.k=[16,32]")
    # Only groups are named by numbers.
    steps = path.strip().split(".")
    *sections, key = (int(step) if re.fullmatch(r"\d{1,9}", step) else step for step in steps)
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {section} is not a section; give section.key=value")
        raw = inner
    try:
        raw[key] = yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {error}") from None


def _numbered(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data with groups that are named by text, as "0", under their numbers."""
    sweep: Any = raw.get("sweep")
    groups = sweep.get("groups") if isinstance(sweep, Mapping) else None
    if not isinstance(groups, Mapping):
        return raw
    names = [key for key in groups if isinstance(key, str) and re.fullmatch(r"\d{1,9}", key)]
    free = {key: int(key) for key in names if [*groups, *map(int, names)].count(int(key)) == 1}
    return {**raw, "sweep": {**sweep, "groups": {free.get(k, k): v for k, v in groups.items()}}}


def _problems(error: ValidationError, raw: Mapping[str, Any]) -> list[Problem]:
    """Pydantic's findings, at paths of the file and with the remedy in words."""
    problems: list[Problem] = []
    for item in error.errors(include_url=False):
        location = _in_file(item["loc"], raw, keep_last=item["type"] in _AT_ABSENT_KEYS)
        if item["type"] == "too_short" and item["input"]:
            continue  # pydantic counts items without the faulty ones, which are told already
        if item["type"] == "value_error":  # from a __post_init__: one fault a line, "key: text"
            for line in str(item.get("ctx", {})["error"]).splitlines():
                path, _, text = line.partition(": ")
                is_path = re.fullmatch(r"([a-z_]+|\[-?\d+\]|\.)+", path)
                steps = re.findall(r"([a-z_]+)|(-?\d+)", path) if is_path else []
                inner: Location = tuple(name or int(number) for name, number in steps)
                if inner[:1] and inner[0] in (_section(raw, location) or {}):
                    problems.append((location + inner, text))
                else:
                    problems.append((location, line))
        else:
            problems.append((location, _remedy(dict(item), location)))
    return problems


_AT_ABSENT_KEYS = {"missing", "missing_keyword_only_argument", "unexpected_keyword_argument"}


def _remedy(item: dict[str, Any], location: Location) -> str:
    kind, given = item["type"], item.get("input")
    if kind.startswith("missing"):
        return "is missing; give it a value (docs/configuration.md says which)"
    if kind == "unexpected_keyword_argument":
        known = _known_keys(location[:-1])
        if location[-1] in known:
            beside = "this `source`" if location[0] == "corpus" else "what stands beside it"
            return f"does not go with {beside}; docs/configuration.md says which settings do"
        if location[:-1] == ("sweep", "vary") and location[-1] in ("k", "encoders", "selection"):
            return f"has a list of its own; move it up, to sweep.{location[-1]}"
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"is not a setting; {meant}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{item['msg']}; set `source` to stdlib, files or hub"
    if kind in ("dataclass_type", "dataclass_exact_type", "model_attributes_type"):
        known = ", ".join(_known_keys(location))
        return f"{given!r} is not a section; give it settings of its own, some of: {known}"
    if kind == "too_short":
        return "is an empty list, so there is nothing to train; list at least one value"
    if kind == "dict_type":
        return f"{given!r} is no mapping of group numbers to settings; write {{0: {{k: [32]}}}}"
    if kind == "tuple_type" and isinstance(given, Mapping):
        example = "dense" if location[-1] == "encoders" else "16, 32"
        return f"{given!r} is a range or a section, and this takes a list; write [{example}]"
    if kind == "literal_error" and "encoders" in location and isinstance(location[-1], int):
        return f"{given!r} is no encoder; give dense, {{h: 64, m: 4, n: 4}} or {{kron: {{m: [2], n: [4]}}}}"
    if kind == "tuple_type" and isinstance(location[-1], int):
        return f"{given!r} is not a list, and each value here is one; write [[{given}], ...]"
    if kind == "tuple_type":
        return f"{given!r} is not a list; write [{given}]"
    message = item["msg"].removeprefix("Input ").replace("'", "")
    return f"{given!r} {message[:1].lower()}{message[1:]}"


def _known_keys(location: Location) -> list[str]:
    """The settings of the section at `location`; for a union, those of all its members."""
    types: list[Any] = [RunConfig]
    for step in location:
        if isinstance(step, str):
            types = [f.type for t in types for f in dataclasses.fields(t) if f.name == step]
        types = [member for t in types for member in _dataclasses_in(t)]
    return sorted({f.name for t in types for f in dataclasses.fields(t)})


def _dataclasses_in(annotation: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(annotation):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _dataclasses_in(inner)


def _in_file(loc: Location, raw: Any, keep_last: bool) -> Location:
    """Pydantic's location without the union tags that it puts between the file's own keys."""
    steps: list[str | int] = []
    for step in loc:
        here: Any = dict(enumerate(raw)) if isinstance(raw, list | tuple) else raw
        if isinstance(here, Mapping) and step in here:
            steps.append(step)
            raw = here[step]
    if keep_last and steps[-1:] != [loc[-1]]:
        steps.append(loc[-1])
    return tuple(steps)


def _section(raw: Any, location: Location) -> Any:
    for step in location:
        raw = raw[step]
    return raw if isinstance(raw, Mapping) else None


_STAND_INS: Mapping[Location, Any] = {
    ("harvest", "tokens"): 1,
    ("sweep", "d_sae"): 1,
    ("sweep", "k"): [1],
}
"""For required settings that are at fault, so that the rest of their section can be checked; what is
then said of them is dropped."""

_COUNTING: Sequence[Location] = [("sweep", "search", "trials")]
"""Settings that are compared with how many values others have: without the faulty ones that means nothing."""


def _without(raw: Any, locations: Sequence[Location], at: Location = ()) -> Any:
    """A copy of plain data without what stands at `locations`, and without lists that this empties."""
    if isinstance(raw, list):
        kept = [(*at, i) not in locations for i in range(len(raw))]
        return [_without(raw[i], locations, (*at, i)) for i, keep in enumerate(kept) if keep]
    if not isinstance(raw, Mapping):
        return raw
    copy = {}
    for key, value in raw.items():
        left = None if (*at, key) in locations else _without(value, locations, (*at, key))
        if (*at, key) not in locations and not (left == [] and value):
            copy[key] = left
        elif (*at, key) in _STAND_INS:
            copy[key] = _STAND_INS[*at, key]
    return copy


def _before_pruning(location: Location, dropped: Sequence[Location]) -> Location:
    """Where something of the pruned data stands in the whole: indices count dropped items again."""
    steps: list[str | int] = []
    for step in location:
        if isinstance(step, int):
            gone = [loc[-1] for loc in dropped if list(loc[:-1]) == steps]
            for index in sorted(index for index in gone if isinstance(index, int)):
                step += index <= step
        steps.append(step)
    return tuple(steps)


def _disguised(raw: Any, parsed: Any, location: Location) -> Iterator[Problem]:
    """Text and truth values that pydantic took for numbers."""
    if isinstance(raw, Mapping) and isinstance(parsed, Mapping):
        for key, value in raw.items():
            if isinstance(key, str) and key.isdecimal():
                yield (*location, key), f"{key!r} and {int(key)} are the same number; keep one"
            if isinstance(key, bool):
                yield (*location, key), f"{key} is no number of a group; write one"
            yield from _disguised(value, parsed.get(key), (*location, key))
    elif isinstance(raw, list) and isinstance(parsed, list | tuple):
        for i, (a, b) in enumerate(zip(raw, parsed, strict=True)):
            yield from _disguised(a, b, (*location, i))
    elif isinstance(parsed, bool) and not isinstance(raw, bool):
        yield location, f"{raw!r} is not true or false; write one of them"
    elif isinstance(raw, bool | str) and isinstance(parsed, int | float) and raw is not parsed:
        yield location, f"{raw!r} is not a number; write one, without quotes"


def _dotted(location: Location) -> str:
    text = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in location)
    return text.removeprefix(".") or "(top level)"


def _with_absolute_paths(cfg: RunConfig, folder: Path, origin: str | None) -> RunConfig:
    """Of a file named `origin`, whose model must be there, or of a run directory."""

    def found(text: str) -> Path | None:
        for base in (folder, Path.cwd()):
            path = (base / Path(text).expanduser()).resolve()
            if path.exists():
                return path
        return None

    model, corpus = cfg.model, cfg.corpus
    local = found(model.name)
    if local:
        model = dataclasses.replace(model, name=str(local))
    elif origin and (model.name.startswith((".", "/", "~")) or model.name.count("/") > 1):
        raise UserError(
            f"{origin}: model.name: there is no folder {model.name} beside this file or in the "
            "working directory; give the folder of a model saved by transformers, or a Hub name"
        )
    if corpus.source == "files":
        corpus = dataclasses.replace(
            corpus, paths=tuple(_anchored(pattern, folder) for pattern in corpus.paths)
        )
    run_dir = cfg.run_dir.expanduser().resolve()
    harvest = cfg.harvest
    if harvest.store is not None and "://" not in harvest.store:
        harvest = dataclasses.replace(
            harvest, store=str(Path(harvest.store).expanduser().resolve())
        )
    tracking = cfg.tracking
    if tracking.sqlite_file is not None:
        file = tracking.sqlite_file.expanduser().resolve()
        tracking = dataclasses.replace(tracking, uri=f"sqlite:///{file}")
    return dataclasses.replace(
        cfg, model=model, corpus=corpus, harvest=harvest, tracking=tracking, run_dir=run_dir
    )


def _anchored(pattern: str, folder: Path) -> str:
    """A glob pattern made absolute, where it matches something; else at the file's folder."""
    anchored = [
        os.path.normpath(base / Path(pattern).expanduser()) for base in (folder, Path.cwd())
    ]
    return next((p for p in anchored if glob.glob(p, recursive=True)), anchored[0])
