"""Texts from elsewhere, such as what a server answers, without the credentials that they may repeat."""

import os
import re
from base64 import b64encode
from urllib.parse import quote

_SECRET = re.compile(
    r"""(^|_)(
        [A-Z0-9]*(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN)
        | (API|ACCESS|ACCOUNT|AUTH|PRIVATE|SECRET)?KEY
        | CREDENTIALS? | SAS | DSN | PAT | JWT | CONNECTION_?STRING | (DATABASE|DB)_UR[IL]
    )(_|$) | (^|_)PASS$ | _PWD$""",
    re.IGNORECASE | re.VERBOSE,
)
_SHORTEST = 6
"""Of a value that is looked for: `true` and `1` stand for no secret, and everywhere."""

_IN_URL = re.compile(r"(?<=://)[^/\s]*(?=@)")
"""Up to the last @: a password may hold others."""

HIDDEN = "***"


def is_secret(variable: str) -> bool:
    """Whether an environment variable holds a secret, by its name: AWS_SECRET_ACCESS_KEY, PGPASSWORD.

    Where a secret lies (RAY_AUTH_TOKEN_PATH) is none, and what a user has to be told if nothing is there.
    """
    return (
        not variable.upper().endswith(("_PATH", "_FILE")) and _SECRET.search(variable) is not None
    )


def redacted(text: str) -> str:
    """The text with HIDDEN for user and password of every URL, and for what secrets of the environment hold."""
    plain = {name: value for name, value in os.environ.items() if is_secret(name)}
    in_url = {quote(value, safe="", errors="surrogateescape") for value in plain.values()}
    in_headers = {_in_header(name, plain[name]) for name in plain if "PASSWORD" in name}
    secrets = {*plain.values(), *in_url, *in_headers}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)


def _in_header(variable: str, password: str) -> str:
    """A password as an HTTP request has it: after its user, in base64."""
    user = os.environ.get(variable.replace("PASSWORD", "USERNAME"), "")
    return b64encode(f"{user}:{password}".encode(errors="surrogateescape")).decode()
