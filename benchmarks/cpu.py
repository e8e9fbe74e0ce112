"""A process that does a piece of work each time it is asked, and counts its CPU-seconds.

CPU-seconds of all its threads: what else the machine does falls on none of them, and a contender that
uses more cores gains nothing.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from benchmarks.worker import open_answers

Findings = Callable[[], Mapping[str, float]]
Turn = Callable[[int], Findings]
"""Does the work; gives what looks at its result or clears it away, which is not counted."""


def serve_turns(make: Callable[[dict[str, Any]], Turn], packages: list[str]) -> None:
    """Build from the JSON argument, then a turn (its number is given) per line of stdin.

    The first turn brings in libraries' code, so the asking side should not count it.
    """
    answers = open_answers()
    turn = make(json.loads(sys.argv[1]))
    versions = {name: version(name) for name in packages}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for number, _ in enumerate(sys.stdin):
        start = time.process_time()
        findings = turn(number)
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, **findings()}), file=answers, flush=True)
