"""Which model a run is made with: noted, kept to, and compared with the one that is there now."""

from dataclasses import replace

from actors.language_model import describe
from actors.model_origin import identity, is_same
from actors.packer import Packer
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json, write_json
from storage.tokens import TokenSpec


def pinned(cfg: RunConfig, run: RunDirectory) -> RunConfig:
    """The settings with a model of the Hub at the commit that the run has noted, wherever its branch is now.

    Every node looks a branch up in a cache of its own.
    """
    noted = read_json(run.model).get("weights") if run.model.is_file() else None
    if cfg.model.is_local or noted is None:
        return cfg
    return replace(cfg, model=replace(cfg.model, revision=noted))


def note_model(cfg: RunConfig, run: RunDirectory) -> None:
    """Write down which model a run is made with; refuse another as soon as something was stored of it.

    Raises:
        UserError: If it is another.
        InputError: If the model can't be found.
    """
    if run.model.is_file() and run.has_stored:
        _refuse_another(cfg, run)
    else:
        write_json(run.model, {"name": cfg.model.name, "weights": identity(cfg.model)})


def _refuse_another(cfg: RunConfig, run: RunDirectory) -> None:
    there = read_json(run.model).get("weights")
    if not cfg.model.is_local and there in (None, cfg.model.revision):
        return  # of an older version, which did not know the commit
    here = identity(pinned(cfg, run).model)
    if not is_same(here, there):
        raise UserError(
            f"{cfg.model.name} has {_what_differs(here, there)} than this run was made with (fingerprint {here}, "
            f"and {there} in {run.model}), so its activations would not be those that are stored; put the former "
            "files back, or run again with another run_dir"
        )


def _what_differs(here: str | None, there: str | None) -> str:
    alike = here is not None and there is not None and is_same(here, there.partition("-")[0])
    return "another config.json" if alike else "other weights"


def check_model(cfg: RunConfig, run: RunDirectory, tokens: TokenSpec, d_model: int) -> None:
    """Refuse to go on with a model whose width, tokenizer or weights are not what the run recorded.

    Args:
        cfg: Of the run.
        run: Where it lies.
        tokens: How its token store was made.
        d_model: Width of the activations it stored.

    Raises:
        UserError: If one of them is another.
        InputError: If the model can't be loaded.
    """
    width = describe(cfg.model).d_model
    if width != d_model:
        raise UserError(
            f"{cfg.model.name} has activations of width {width}, and those that this run stored and trained "
            f"on have {d_model}; the model was replaced since: put the former one back, or run again with "
            "another run_dir"
        )
    fingerprint = Packer(cfg.model, cfg.corpus, tokens.context).spec.tokenizer
    if fingerprint != tokens.tokenizer:
        raise UserError(
            f"the tokenizer of {cfg.model.name} has the fingerprint {fingerprint}, and this run's tokens were "
            f"made by {tokens.tokenizer}; ids of the same text differ: put the former tokenizer back, or run "
            "again with another run_dir"
        )
    if run.model.is_file():  # runs of older versions have none
        _refuse_another(cfg, run)
