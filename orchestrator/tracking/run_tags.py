"""The tags by which everything of a run can be found in MLflow."""

import hashlib
import json
from pathlib import Path

from actors.corpus import FilesCorpus, HubCorpus
from orchestrator import config_file
from orchestrator.config import FREE_SETTINGS, RunConfig
from orchestrator.tracking.environment import git_revision

MAX_TAG_CHARACTERS = 5000


def run_tags(cfg: RunConfig, run_dir: Path) -> dict[str, str]:
    """What every MLflow run of a run can be searched by: its directory and what it was made of.

    `git_revision` is that of the working directory, and absent where that is no git checkout.
    """
    revision = git_revision()
    return {
        "run_dir": str(run_dir),
        "model": cfg.model.name,
        "corpus": _corpus_name(cfg),
        "config_hash": _config_hash(cfg),
        **({"git_revision": revision} if revision else {}),
    }


def _corpus_name(cfg: RunConfig) -> str:
    if isinstance(cfg.corpus, HubCorpus):
        return cfg.corpus.dataset
    if isinstance(cfg.corpus, FilesCorpus):
        return " ".join(cfg.corpus.paths)[:MAX_TAG_CHARACTERS]
    return cfg.corpus.source


def _config_hash(cfg: RunConfig) -> str:
    """The same for configurations that compute the same."""
    settings = config_file.as_data(cfg)
    del settings["name"]
    for path in FREE_SETTINGS:
        section, _, key = path.partition(".")
        if key:
            settings[section].pop(key)
        else:
            settings.pop(section)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
