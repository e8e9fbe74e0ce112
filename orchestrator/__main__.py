"""The command line: `strata VERB ...`. Heavy imports wait until a verb needs them."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

VERBS = {
    "run": "do the whole job; given again after any interruption, it does what is missing",
    "submit": "do the whole job on a running cluster, and follow it there",
    "plan": "print what a run would need (disk, memory, rows, trials) and whether it fits",
    "harvest": "do everything up to the training store",
    "verify": "read all stores of a run again and name what is damaged; `harvest` then rewrites that",
    "group": "do everything up to the groups of layers",
    "sweep": "do everything up to the trained autoencoders",
    "evaluate": "do everything up to the evaluation of the winners",
    "progressive": "read the winners of a finished run at many dictionary sizes",
    "export": "write autoencoders of a run as folders that SAELens, sparsify or dictionary_learning load",
    "report": "write the HTML report of a finished run",
    "dashboard": "write pages about every latent of a finished run, and say where they are",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser(
        prog="strata",
        description="Train a sparse autoencoder for every layer of a language model, for the price of a few.",
        epilog="Exit status: 0 done; 2 something you gave can't be used (the message says what to do); 1 anything else.",
    )
    verbs = main.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument(
            "config", type=Path, help="a YAML file (see examples/), or a run directory"
        )
        _add_set(sub)
    _add_address(verbs.choices["run"])
    _add_submit(verbs.choices["submit"])
    _add_export(verbs.choices["export"])
    verbs.choices["plan"].add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="model the run on a cluster of N GPUs instead of this machine (docs/scale.md); of the model "
        "config.json is enough",
    )
    verbs.choices["evaluate"].add_argument(
        "--baselines",
        action="store_true",
        help="also train every layer an autoencoder of its own, and tell what sharing costs and saves",
    )
    _add_foreign(verbs.choices["evaluate"])
    verbs.choices["progressive"].add_argument(
        "--sequences",
        type=int,
        default=16,
        help="validation sequences that cross-entropy is over: a forward pass of them for each size and "
        "order (default: %(default)s)",
    )
    demo = verbs.add_parser(
        "demo", help="the whole job on the embedded model and corpus, in minutes"
    )
    _add_set(demo)
    status = verbs.add_parser(
        "status", help="how far a run is, whoever works on it; from another terminal"
    )
    status.add_argument("config", type=Path, help="a YAML file, or a run directory")
    status.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    runs = verbs.add_parser("runs", help="list the runs that MLflow knows, or their trials")
    ui = verbs.add_parser("ui", help="open MLflow's pages on the right store")
    for sub in (runs, ui):
        sub.add_argument(
            "config", type=Path, nargs="?", help="a YAML file or run directory; by default ./runs"
        )
    runs.add_argument(
        "--trials", action="store_true", help="list trials: those of the run, or of all in ./runs"
    )
    runs.add_argument(
        "--filter", help='a search in MLflow\'s syntax, such as "metrics.final_fvu < 0.1"'
    )
    runs.add_argument(
        "--json", action="store_true", help="everything MLflow knows of them, as JSON"
    )
    ui.add_argument("--port", type=_port, default=5000, help="on 127.0.0.1 (default: %(default)s)")
    return main


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        *("--set", "-s"),
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override a setting, value in YAML, for instance --set sweep.k=[16,32]; may be repeated",
    )


def _add_address(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--address",
        metavar="ADDRESS",
        help="drive a running Ray cluster from one of its nodes, instead of a private one: auto, or HOST:PORT; "
        "as compute.address, and without compute.cpus",
    )
    # What `strata submit` says of itself.
    sub.add_argument("--from-client", metavar="VERSIONS", help=argparse.SUPPRESS)


def _add_submit(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"),
        help="the dashboard of the cluster; also RAY_API_SERVER_ADDRESS (default: %(default)s)",
    )
    sub.add_argument(
        "--image",
        action="store_true",
        help="send the configuration alone: the nodes have Strata installed, from an image or by cluster.yaml; by "
        "default the working directory is sent, without what .gitignore names, and its code is what runs",
    )
    sub.add_argument(
        "--no-follow", action="store_true", help="leave when the cluster has taken the run"
    )


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--to",
        required=True,
        choices=("sae_lens", "sparsify", "dictionary_learning", "safetensors"),
        help="the library whose format is written; safetensors is Strata's own",
    )
    sub.add_argument("--trial", metavar="NAME", help="of which trial; by default each group's best")
    sub.add_argument(
        "--python",
        type=Path,
        metavar="PATH",
        help="an interpreter that has the library, to load there what was written; by default this one, if it has it",
    )
    sub.add_argument(
        "--calibrate",
        action="store_true",
        help="fit the threshold of BatchTopK to each layer's own rows, for a mean L0 of k",
    )
    sub.add_argument(
        "--distil",
        action="store_true",
        help="put a dense encoder, fitted to its latents, in place of a Kronecker one",
    )
    sub.add_argument(
        "--as-topk",
        action="store_true",
        help="put TopK with k = the mean L0 in place of a threshold",
    )


def _add_foreign(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--sae",
        type=Path,
        metavar="FOLDER",
        help="judge this autoencoder instead (SAELens, sparsify, dictionary_learning or Strata), on the run's model and validation rows",
    )
    sub.add_argument(
        "--layer", type=int, help="the layer that --sae reads; by default what its files say"
    )
    sub.add_argument(
        "--same-model",
        action="store_true",
        help="the model that the files of --sae name is the run's, under another name",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port; give one from 1 to 65535")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    # SIGTERM, by which batch systems stop a job and Kubernetes a pod, is an interruption as well.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("strata: interrupted; the same command continues where this one stopped\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _main(arguments: list[str] | None) -> int:
    args = parser().parse_args(arguments)
    _be_quiet()
    sys.excepthook = _print_redacted
    try:
        from actors.errors import InputError
        from orchestrator import verbs
        from orchestrator.errors import UserError
        from orchestrator.redaction import redacted
        from storage.errors import StoreError
    except (
        ModuleNotFoundError
    ) as error:  # such as a Ray that was started outside of Strata's environment
        sys.stderr.write(
            f"strata: {sys.executable} has no {error.name}, which Strata needs; install Strata with it "
            "(`pip install -e .`), or have PATH find the environment that has both first, on a cluster when "
            "`ray start` is given\n"
        )
        return 2

    try:
        status = getattr(verbs, args.verb)(args)
    except (UserError, InputError, StoreError) as error:
        sys.stderr.write(f"strata: {redacted(str(error))}\n")
        return 2
    return status or 0


def _print_redacted(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    """A traceback, in which a library's message may repeat what it was given."""
    from orchestrator.redaction import redacted

    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, where))))


def _be_quiet() -> None:
    """Keep libraries from phoning home and from printing over the progress; set before they load."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MPLBACKEND": "Agg",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
