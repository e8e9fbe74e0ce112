"""Refuses an autoencoder, or a run, that belongs to another model than the one that is there now."""

from actors.language_model import describe
from actors.packer import Packer
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from storage.tokens import TokenSpec


def check_model(cfg: RunConfig, tokens: TokenSpec, d_model: int) -> None:
    """Refuse to go on with a model whose width or tokenizer is not what the run recorded.

    Args:
        cfg: Of the run.
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
