"""What each verb of the command line does, given its parsed arguments."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator import config_file
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.run_directory import RunDirectory


def run(args: Namespace) -> None:
    """The whole job; a finished run only prints its result."""
    if args.from_client is not None:
        from orchestrator.versions import check_same, versions

        said = [part.partition("=") for part in args.from_client.split()]
        if not all(equals for _, equals, _ in said):
            raise UserError(
                f"--from-client: {args.from_client!r} is no list of NAME=VERSION; it is what `strata submit` says "
                "of itself: leave it out"
            )
        client = {name: version for name, _, version in said}
        check_same(versions(), client, "where the run was submitted it is")
    if args.address is not None:
        args.overrides += [f"compute.address={json.dumps(args.address)}", "compute.cpus=null"]
    _drive(args, "run")


def submit(args: Namespace) -> int:
    """The whole job on a running cluster; the exit status of the run."""
    from orchestrator.jobs import Jobs, Request, outcome

    request = Request.of(args.config, args.overrides, None if args.image else Path.cwd())
    jobs = Jobs(args.address)
    job = jobs.at_work(request)
    found = "is at work already" if job else "takes the run"
    job = job or jobs.submit(request)
    _console().print(
        f"submit    {jobs.address} {found}, as job {job}\n"
        f"          Leaving it (Ctrl-C) leaves it at work: the same command follows it again; "
        f"`{jobs.stopping(job)}` stops it",
        highlight=False,
        soft_wrap=True,
    )
    if args.no_follow:
        return 0
    try:
        details = jobs.follow(job, _write)
    except KeyboardInterrupt:
        sys.stderr.write(f"strata: left; job {job} is still at work\n")
        return 1
    if details is None:
        sys.stderr.write(
            f"strata: {jobs.address} answers no longer; if only the way there is cut, job {job} is at work, and the "
            "same command follows it again; if the cluster is gone, the same command continues the run on another\n"
        )
        return 1
    status, left = outcome(details)
    for text in left:
        sys.stderr.write(f"strata: job {job} {text}\n")
    return status


def harvest(args: Namespace) -> None:
    """Everything up to the training store."""
    _drive(args, "harvest")


def verify(args: Namespace) -> None:
    """Read all stores of a run again; refuse what is damaged."""
    from orchestrator.run_directory import RunDirectory
    from orchestrator.stages.verify import verify

    cfg = config_file.load(args.config, args.overrides)
    verify(RunDirectory.of(cfg), _console())


def group(args: Namespace) -> None:
    """Everything up to the groups."""
    _drive(args, "group")


def sweep(args: Namespace) -> None:
    """Everything up to the trained autoencoders."""
    _drive(args, "sweep")


def evaluate(args: Namespace) -> None:
    """Everything up to the evaluation, with summary, report and fidelity cards; or judge a folder."""
    if args.sae is None:
        if args.layer is not None or args.same_model:
            raise UserError(
                "--layer and --same-model say more of --sae; give that too, or leave them out"
            )
        from orchestrator.pages import cards_page
        from orchestrator.run_directory import read_json

        directory = _drive(args, "run", args.baselines)
        cards_page.show(_console(), read_json(directory.cards))
        return
    if args.baselines:
        raise UserError(
            "--baselines trains autoencoders, and --sae judges one that is there; give one"
        )
    from orchestrator.stages.judge import judge

    cfg = config_file.load(args.config, args.overrides)
    judge(cfg, args.sae, args.layer, args.same_model, _console())


def export(args: Namespace) -> None:
    """Write autoencoders of a run in the format of another library."""
    from orchestrator.stages.export import export
    from orchestrator.stages.exported_layer import ExportOptions

    options = ExportOptions(
        to=args.to,
        trial=args.trial,
        python=args.python,
        calibrate=args.calibrate,
        distil=args.distil,
        as_topk=args.as_topk,
    )
    console = _console()
    for folder in export(config_file.load(args.config, args.overrides), options, console):
        console.print(f"Export: {folder}", soft_wrap=True, highlight=False)


def demo(args: Namespace) -> None:
    """The whole job on what the installation carries."""
    args.config = _demo_config()
    _drive(args, "run")


def plan(args: Namespace) -> None:
    """Print what a run would need; refuse what can't fit. With --gpus: what it asks of a cluster of so many."""
    from actors.language_model import describe
    from orchestrator.pages import plan_page, scale_page
    from orchestrator.planning import plan as planning
    from orchestrator.planning.estimate import estimate
    from orchestrator.planning.hardware import Hardware
    from orchestrator.planning.rounding import int8_cost
    from orchestrator.planning.scale import model_flops, scale
    from orchestrator.run_directory import RunDirectory

    cfg = config_file.load(args.config, args.overrides)
    shape, console = describe(cfg.model), _console()
    figures = planning.plan(cfg, shape)
    plan_page.show(console, figures)
    if args.gpus is not None:
        if args.gpus < 1:
            raise UserError(f"--gpus {args.gpus}: a cluster has 1 GPU or more; give their number")
        flops = model_flops(cfg, shape, figures)
        scale_page.show(console, scale(cfg, shape, figures, flops, Hardware(gpus=args.gpus)))
        return
    plan_page.show_rounding(console, int8_cost(RunDirectory.of(cfg).validation))
    planning.refuse_what_cannot_fit(figures, cfg)
    plan_page.show_time(console, estimate(cfg, shape, figures))


def report(args: Namespace) -> None:
    """Write the report of a finished run again."""
    from orchestrator.pages.report import rewrite_report
    from orchestrator.run_directory import RunDirectory

    directory = RunDirectory.of(config_file.load(args.config, args.overrides))
    if not directory.summary.is_file():
        raise UserError(
            f"{directory.path} holds no finished run; finish it with `strata run {args.config}`"
        )
    directory.hold()
    rewrite_report(directory)
    _console().print(f"Report: {directory.report}", soft_wrap=True, highlight=False)


def progressive(args: Namespace) -> None:
    """Read every winner of a finished run at many dictionary sizes, and write its report again with them."""
    from orchestrator.pages import progressive_page
    from orchestrator.pages.report import rewrite_report
    from orchestrator.run_directory import RunDirectory
    from orchestrator.stages.progressive import progressive

    cfg, console = config_file.load(args.config, args.overrides), _console()
    curves, directory = progressive(cfg, args.sequences, console), RunDirectory.of(cfg)
    rewrite_report(directory)
    progressive_page.show(console, directory, curves)


def dashboard(args: Namespace) -> None:
    """Write the dashboard of a finished run, or what of it is missing."""
    from orchestrator.run_directory import RunDirectory

    cfg = config_file.load(args.config, args.overrides)
    directory = RunDirectory.of(cfg)
    if not directory.summary.is_file():
        raise UserError(
            f"{directory.path} holds no finished run; finish it with `strata run {args.config}`"
        )
    from orchestrator.stages.dashboard import dashboard  # which brings in torch and Ray: seconds

    directory.hold()
    page = dashboard(directory, cfg, _console())
    _console().print(f"Dashboard: {page}", soft_wrap=True, highlight=False)


def runs(args: Namespace) -> None:
    """List the runs in MLflow, or their trials."""
    from orchestrator.tracking import queries

    kind = "trial" if args.trials else "run"
    run_dir = config_file.load(args.config).run_dir if args.trials and args.config else None
    uri = _tracking_uri(args)
    found = queries.find(uri, kind, args.filter, run_dir)
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    elif not found and args.filter:
        _console().print(f"No {kind} meets {args.filter!r}", highlight=False)
    else:
        show = queries.trial_table if args.trials else queries.run_table
        _console().print(show(uri, found))


def status(args: Namespace) -> None:
    """Say how a run stands, from its directory alone."""
    from orchestrator.pages import status_page
    from orchestrator.status import status

    found = status(config_file.load(args.config))
    if args.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        status_page.show(_console(), found)


def ui(args: Namespace) -> None:
    """Serve MLflow's pages on the right store, on this machine only."""
    from orchestrator.tracking.queries import serve

    serve(_tracking_uri(args), args.port, _console())


def _drive(args: Namespace, until: str, with_baselines: bool = False) -> "RunDirectory":
    from orchestrator.pages import summary_page
    from orchestrator.run_directory import RunDirectory, read_json

    cfg, console = config_file.load(args.config, args.overrides), _console()
    directory = RunDirectory.finished(cfg)
    lacks_baselines = with_baselines and not (
        directory and read_json(directory.cards)["against_baselines"]
    )
    if directory is None or lacks_baselines:
        from orchestrator import pipeline  # which brings in torch, Ray and MLflow: seconds

        directory = pipeline.run(cfg, until, console, with_baselines)
    if directory.summary.is_file():
        data = {**read_json(directory.summary), "run_dir": str(directory.path)}  # it may have moved
        summary_page.show(console, data, read_json(directory.pareto))
    else:
        console.print(f"Done up to {until}. Run: {directory.path}", highlight=False, soft_wrap=True)
    return directory


def _tracking_uri(args: Namespace) -> str:
    from orchestrator.tracking.tracking_uri import default_uri

    if args.config is None:
        return default_uri(Path("runs", "any").resolve())
    cfg = config_file.load(args.config)
    return cfg.tracking.uri or default_uri(cfg.run_dir)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _console() -> Console:
    # A log file has no width of its own; a table must not be cut to 80 characters there.
    # Nor is what stands in brackets, in a path for instance, ever a mark for the terminal.
    return Console(width=None if sys.stdout.isatty() else 140, markup=False)


def _demo_config() -> Path:
    """The embedded example: in a checkout beside this folder, in a wheel inside it."""
    here = Path(__file__).resolve().parent
    for base in (here.parent, here):
        if (base / "examples" / "demo.yaml").is_file():
            return base / "examples" / "demo.yaml"
    raise FileNotFoundError("examples/demo.yaml is missing from this installation")
