"""The `anybatch` command: `run` a job, look at its `status`, `serve` the embedded provider on a port.

What a user can cause ends in one clean message on stderr: exit code 2 for arguments and input, 1 for the
rest, 130 for Ctrl-C. A job whose results have landed ends in 0, unless not one of its rows succeeded: in 3.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .jobs.options import REQUIRED, Option, Part, options_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .jobs.ledger import Ledger
    from .models import Batch, Report


NO_ROW_SUCCEEDED = 3  # exit code

# A key on a command line is seen by every process of the machine; a callable and the arguments of the HTTP
# client cannot be written there; `run_job`, which begins now, takes no deadline.
_NOT_HERE = frozenset(("api_key", "client_args", "on_progress", "deadline"))
_POSITIONAL = ("input", "output")
_METAVARS = {
    "lease": "SECONDS",
    "max_failed_ratio": "SHARE",
    "max_rounds": "N",
    "price": ("INPUT", "OUTPUT"),
    "shard_requests": "N",
    "timeout": "SECONDS",
}
_TEXTS = "Mapping[str, str]"  # the type of an option whose values are text, also where they look like JSON
RUN_OPTIONS = tuple(
    option for option in options_of(Part.JOB, Part.ACCOUNT, Part.RUN) if option.name not in _NOT_HERE
)


class UsageError(Exception):
    """The arguments do not fit together, or to this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from .errors import AnyBatchError, ConfigurationError, InputError

    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except (UsageError, ConfigurationError, InputError) as error:
        return _complain(error, 2)
    except (AnyBatchError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(error: object, code: int) -> int:
    print(f"anybatch: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "anybatch", description="LLM batch jobs: paid for once, every row accounted for."
    )
    parser.add_argument("--version", action="version", version=f"anybatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="submit a JSONL file as a job, wait, and land its results in a folder",
        epilog=f"Exit code {NO_ROW_SUCCEEDED}: the results have landed, and no row succeeded.",
    )
    for option in RUN_OPTIONS:
        run.add_argument(_flag(option), **_argument(option))
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="what is on record of a job")
    status.add_argument("output", help="the job's folder")
    status.set_defaults(command=_status)

    serve = commands.add_parser("serve", help="an OpenAI-compatible batch server on one SQLite file")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0 takes a free one")
    serve.add_argument(
        "--db", metavar="PATH", help="default: the local provider's, in the user's state folder"
    )
    serve.add_argument(
        "--upstream", metavar="URL", help="answer with this chat endpoint, e.g. http://127.0.0.1:11434/v1"
    )
    serve.add_argument(
        "--upstream-key-env", metavar="NAME", help="environment variable with the upstream's key"
    )
    serve.add_argument(
        "--concurrency", type=int, default=8, help="requests upstream at once (default: %(default)s)"
    )
    serve.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that clients must bear"
    )
    serve.set_defaults(command=_serve)
    return parser


def _flag(option: Option) -> str:
    """What the user writes for an option; the two places of a job are given without a name."""
    return option.name if option.name in _POSITIONAL else f"--{option.name.replace('_', '-')}"


def _argument(option: Option) -> dict[str, Any]:
    """What argparse is told of an option."""
    told: dict[str, Any] = {"help": _help(option)}
    if option.name in _POSITIONAL:
        return told
    told["required"] = option.default is REQUIRED
    if option.type.startswith("Mapping["):
        return told | {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    told["default"] = None if option.default is REQUIRED else option.default
    if option.choices:
        return told | {"choices": option.choices}
    if option.name in _METAVARS:
        told["metavar"] = _METAVARS[option.name]
    if option.type.startswith("tuple["):
        return told | {"nargs": 2, "type": float}
    kind = option.type.partition(" ")[0]
    return told | {"type": {"int": int, "float": float}.get(kind, str)}


def _help(option: Option) -> str:
    text = option.text.replace("%", "%%")
    if option.type.startswith("Mapping["):
        as_json = "" if option.type == _TEXTS else " A VALUE that is JSON is taken as such."
        return f"{text} May be repeated.{as_json}"
    return text if option.default in (None, REQUIRED) else f"{text} Default: %(default)s."


def _run(options: argparse.Namespace) -> int:
    from . import Outcome, run_job

    if options.provider == "local":
        _database(options.api_base)
    given = {option.name: _value(option, getattr(options, option.name)) for option in RUN_OPTIONS}
    report = run_job(**given, on_progress=_progress)
    print(_told(report))
    return 0 if report.counts.get(Outcome.SUCCEEDED) else NO_ROW_SUCCEEDED


def _value(option: Option, given: Any) -> Any:
    """An option as `run_job` takes it."""
    if option.type.startswith("Mapping["):
        pairs = (_pair(option, text) for text in given)
        return {key: value if option.type == _TEXTS else _json(value) for key, value in pairs}
    return tuple(given) if isinstance(given, list) else given


def _pair(option: Option, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{_flag(option)} {text}: expected KEY=VALUE")
    return key, value


def _json(text: str) -> Any:
    """The value as JSON where it is JSON, so that numbers and objects can be given, else the text."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except ValueError:
        return text


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is no JSON, although Python reads it")


def _progress(batch: Batch) -> None:
    counts = batch.request_counts
    rows = f"  {counts.completed + counts.failed}/{counts.total}" if counts and counts.total else ""
    failed = f"  {counts.failed} failed" if counts and counts.failed else ""
    print(f"{time.strftime('%H:%M:%S')}  {batch.id}  {batch.status}{rows}{failed}", flush=True)


def _told(report: Report) -> str:
    """A finished job in a few lines."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report.counts.items() if count)
    usage = report.usage
    cost = f", {report.cost:.4f} USD" if report.cost is not None else ""
    return "\n".join(
        (
            f"{report.rows} rows in {report.duration_s:.0f} s: {counts}",
            f"{usage.input_tokens} input and {usage.output_tokens} output tokens{cost}",
            f"results: {report.results}",
        )
    )


def _status(options: argparse.Namespace) -> int:
    from .jobs.job import Job

    job = Job(input=(), output=options.output)
    report, ledger = job.report(), job.ledger()
    if report is not None:
        print(_told(report))
    elif ledger is not None:
        print(_pending(ledger))
    else:
        raise UsageError(f"no job is on record in {options.output}")
    return 0


def _pending(ledger: Ledger) -> str:
    """An unfinished job in a few lines, from its ledger alone."""
    lines = [
        f"job {ledger.job}: {ledger.rows} rows, {len(ledger.shards)} batches at {ledger.provider}, not landed"
    ]
    for record in ledger.shards:
        state = record.ended.status if record.ended else record.status or record.step
        again = f"  round {record.round}" if record.round > 1 else ""
        lines.append(
            f"  rows {record.first_row}+{record.rows}  {record.batch_id or 'no batch yet'}  {state}{again}"
        )
    return "\n".join([*lines, "the same `run` again continues it"])


def _serve(options: argparse.Namespace) -> int:
    try:
        from .local.server import serve
        from .local.upstream import Upstream
    except ModuleNotFoundError as error:
        raise UsageError(f"`serve` needs {error.name}: pip install 'anybatch[local]'") from None
    upstream = None
    if options.upstream:
        if not options.upstream.startswith(("http://", "https://")):
            raise UsageError(
                f"--upstream {options.upstream}: expected an address like http://127.0.0.1:11434/v1"
            )
        if options.concurrency < 1:
            raise UsageError(f"--concurrency {options.concurrency}: expected 1 or more")
        key = _secret("--upstream-key-env", options.upstream_key_env)
        upstream = Upstream(options.upstream, key=key, concurrency=options.concurrency)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: expected 0 to 65535")
    path = _database(options.db)
    key = _secret("--api-key-env", options.api_key_env)
    try:
        serve(path, host=options.host, port=options.port, api_key=key, upstream=upstream)
    except KeyboardInterrupt:  # how one stops a server
        return 0
    return 0


def _database(text: str | None) -> Path:
    from .local.store import database_path

    try:
        return database_path(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _secret(option: str, name: str | None, environ: Mapping[str, Any] = os.environ) -> str | None:
    if name is None:
        return None
    value = environ.get(name)
    if not value:
        raise UsageError(f"{option} {name}: this environment variable is not set")
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
