"""How a run stands, as a person reads it."""

from rich.console import Console

from orchestrator.labels import duration
from orchestrator.status import Status

_QUIET_SECONDS = 120.0
"""After which it is worth saying how old the newest figures are."""


def show(console: Console, found: Status) -> None:
    """Print a few lines: the run, the stage, its trials, the last error."""
    lines = [f"{found['run_dir']}: {_state(found)}"]
    if found["stage"]:
        lines.append(_stage(found))
        if limit := found["stage"]["limit"]:
            lines.append(f"limit:  {limit}, over all actors of the stage")
    if found["trials"]:
        lines.append("trials: " + ", ".join(f"{n} {state}" for state, n in found["trials"].items()))
    if found["stage_seconds"]:
        spent = (f"{name} {duration(s)}" for name, s in found["stage_seconds"].items())
        lines.append("spent:  " + ", ".join(spent))
    if found["error"]:
        lines.append(f"error:  {found['error']}")
    if found["state"] in ("failed", "interrupted"):
        lines.append(f"        `strata run {found['run_dir']}` goes on with it")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _state(found: Status) -> str:
    holder = found["holder"]
    if holder is None:
        return {
            "finished": "finished",
            "failed": "the last call failed; nothing works on it now",
            "interrupted": "not finished, and nothing works on it now",
        }[found["state"]]
    who = f"process {holder['pid']} on {holder['host']}" if holder["pid"] else "another process"
    quiet = found["updated"] or 0.0
    return f"running, by {who}" + (
        f"; nothing new for {duration(quiet)}" if quiet > _QUIET_SECONDS else ""
    )


def _stage(found: Status) -> str:
    stage, left = found["stage"], found["stage"]["seconds_left"]
    done = f"{stage['done']:,} of {stage['total']:,} {stage['unit']}"
    share = f" ({stage['done'] / stage['total']:.0%})" if stage["total"] else ""
    rate = (
        f"{stage['per_second']:,.0f}" if stage["per_second"] >= 10 else f"{stage['per_second']:.2g}"
    )
    ends = f", about {duration(left)} left" if left is not None else ""
    note = f"; {stage['note']}" if stage["note"] else ""
    return f"stage:  {stage['title']}: {done}{share}, {rate} {stage['unit']}/s{ends}{note}"
