"""Refuses tokens that are not those whose activations a run has stored."""

from orchestrator.errors import UserError
from orchestrator.run_directory import RunDirectory, read_json, write_json
from storage.tokens import TokenStore


def note_tokens(run: RunDirectory, tokens: TokenStore) -> None:
    """Write down which tokens a run is made of; refuse others as soon as activations were stored.

    Raises:
        UserError: If they are others.
    """
    there = read_json(run.token_note).get("fingerprint") if run.token_note.is_file() else None
    if run.has_stored and there not in (None, tokens.fingerprint):
        raise UserError(
            f"{tokens.place} holds other tokens than those whose activations this run has stored (fingerprint "
            f"{tokens.fingerprint}, and {there} in {run.token_note}): the text of the corpus has changed, or the "
            "store was exchanged; put the former store back, or put the former text back and delete the store, or "
            "run again with another run_dir"
        )
    if there != tokens.fingerprint:
        write_json(run.token_note, {"fingerprint": tokens.fingerprint})
