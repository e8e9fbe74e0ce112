"""The address of MLflow: its default, and what is wrong with one that does not work."""

import re
from pathlib import Path

from mlflow.exceptions import MlflowException

from orchestrator.errors import UserError
from orchestrator.redaction import redacted

REFUSED = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")

_GIVEN = "was given what MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, hold"


def default_uri(run_dir: Path) -> str:
    """One SQLite file for all runs that lie beside each other, so that they can be compared."""
    return f"sqlite:///{run_dir.parent / 'mlflow.db'}"


def check_form(uri: str) -> None:
    """Refuse a server without a scheme, and an address of SQLite that names no file.

    Raises:
        UserError: If it is one of them.
    """
    if "://" not in uri and re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        raise UserError(
            f"tracking.uri: {uri} does not say how to speak to it; write http://{uri} or https://{uri}"
        )
    if uri.startswith("sqlite:") and (
        not uri.startswith("sqlite:///") or uri == "sqlite:///" or uri.endswith(":memory:")
    ):
        raise UserError(
            f"tracking.uri: {uri} names no file; give sqlite:////the/whole/path.db, or leave tracking.uri out "
            "to keep it beside the run directory"
        )


def check(uri: str) -> None:
    """Refuse what `check_form` does, and an SQLite file that can't be written: MLflow would go on trying.

    Raises:
        UserError: If it is one of them.
    """
    check_form(uri)
    if not uri.startswith("sqlite:"):
        return
    file = Path(uri.removeprefix("sqlite:///"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    except OSError as error:
        raise UserError(
            f"tracking.uri: {file} can't be written ({error.strerror}); give a file that can, or leave "
            "tracking.uri out to keep it beside the run directory"
        ) from None


def is_outage(error: BaseException) -> bool:
    """Whether MLflow could not be reached, or did not take what it was told: not a fault of ours."""
    return isinstance(error, MlflowException | OSError | ImportError) or type(
        error
    ).__module__.startswith(("sqlalchemy", "requests", "urllib3"))


def refusal(error: BaseException, uri: str, run_dir: Path) -> UserError:
    """What to tell a user whose MLflow can't be used at the start of a run."""
    return UserError(
        f"tracking.uri: {trouble(error, uri)}, or leave tracking.uri out to use a local file. Nothing was "
        f"started, and what {run_dir} holds is kept"
    )


def trouble(error: BaseException, uri: str) -> str:
    """What is wrong with a server or a file, and what to do about it."""
    if uri.startswith("sqlite:"):
        return f"{uri} can't be used ({why(error)}); correct the address"
    if isinstance(error, MlflowException) and error.error_code in REFUSED:
        return f"{uri} refuses access ({why(error)}); it {_GIVEN}: set them to a user who may write there"
    if isinstance(error, MlflowException) and "Max retries exceeded" not in str(error):
        return (
            f"{uri} answers with an error ({why(error)}); correct the address, if MLflow's server is not "
            f"there; if it wants credentials, it {_GIVEN}"
        )
    return f"{uri} does not answer ({why(error)}); start the server, correct the address"


def why(error: BaseException) -> str:
    """The first line of what an exception says, or of the cause that it names, without credentials."""
    lines = redacted(str(error)).splitlines() or [type(error).__name__]
    cause = re.search(r"\(Caused by \w+\((.+)\)\)", lines[0])
    return (cause[1].strip("\"'") if cause else lines[0])[:300]
