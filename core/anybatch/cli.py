"""The `anybatch` command: `run` a job, show its `status`, `serve` the embedded provider on a port.

Errors that a user can cause print one message on stderr. Exit codes: 0 if the results have landed, 3 if they
have but no row succeeded, 2 for invalid arguments or input, 130 for Ctrl-C, 1 for all other errors.
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

# Every process of the machine can read a key on a command line; functions and the arguments of the HTTP
# client cannot be written there; `run_job` takes no deadline.
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
_TEXTS = "Mapping[str, str]"  # the type of an option whose values stay text even if they look like JSON
RUN_OPTIONS = tuple(
    option for option in options_of(Part.JOB, Part.ACCOUNT, Part.RUN) if option.name not in _NOT_HERE
)


class UsageError(Exception):
    """The arguments are invalid, or do not fit this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code."""
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

    status = commands.add_parser("status", help="show the report of a job, or how far it has come")
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
        "--concurrency",
        type=int,
        default=8,
        help="concurrent requests to the upstream (default: %(default)s)",
    )
    serve.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that clients must send"
    )
    serve.set_defaults(command=_serve)
    return parser


def _flag(option: Option) -> str:
    """Return the flag of an option; `input` and `output` are positional."""
    return option.name if option.name in _POSITIONAL else f"--{option.name.replace('_', '-')}"


def _argument(option: Option) -> dict[str, Any]:
    """Return the keywords of `add_argument` for an option."""
    keywords: dict[str, Any] = {"help": _help(option)}
    if option.name in _POSITIONAL:
        return keywords
    keywords["required"] = option.default is REQUIRED
    if option.type.startswith("Mapping["):
        return keywords | {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    keywords["default"] = None if option.default is REQUIRED else option.default
    if option.choices:
        return keywords | {"choices": option.choices}
    if option.name in _METAVARS:
        keywords["metavar"] = _METAVARS[option.name]
    if option.type.startswith("tuple["):
        return keywords | {"nargs": 2, "type": float}
    kind = option.type.partition(" ")[0]
    return keywords | {"type": {"int": int, "float": float}.get(kind, str)}


def _help(option: Option) -> str:
    text = option.text.replace("%", "%%")
    if option.type.startswith("Mapping["):
        as_json = "" if option.type == _TEXTS else " A VALUE that is JSON is parsed."
        return f"{text} May be repeated.{as_json}"
    return text if option.default in (None, REQUIRED) else f"{text} Default: %(default)s."


def _run(options: argparse.Namespace) -> int:
    from . import Outcome, run_job

    if options.provider == "local":
        _database(options.api_base)
    keywords = {option.name: _value(option, getattr(options, option.name)) for option in RUN_OPTIONS}
    report = run_job(**keywords, on_progress=_progress)
    print(_summary(report))
    return 0 if report.counts.get(Outcome.SUCCEEDED) else NO_ROW_SUCCEEDED


def _value(option: Option, parsed: Any) -> Any:
    """Return an option's parsed value in the form that `run_job` takes."""
    if option.type.startswith("Mapping["):
        pairs = (_pair(option, text) for text in parsed)
        return {key: value if option.type == _TEXTS else _json(value) for key, value in pairs}
    return tuple(parsed) if isinstance(parsed, list) else parsed


def _pair(option: Option, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{_flag(option)} {text}: expected KEY=VALUE")
    return key, value


def _json(text: str) -> Any:
    """Return the value of JSON, so that numbers and objects can be passed, or the text if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except ValueError:
        return text


def _no_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON, although Python accepts it")


def _progress(batch: Batch) -> None:
    counts = batch.request_counts
    rows = f"  {counts.completed + counts.failed}/{counts.total}" if counts and counts.total else ""
    failed = f"  {counts.failed} failed" if counts and counts.failed else ""
    print(f"{time.strftime('%H:%M:%S')}  {batch.id}  {batch.status}{rows}{failed}", flush=True)


def _summary(report: Report) -> str:
    """Describe a finished job in a few lines."""
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
        print(_summary(report))
    elif ledger is not None:
        print(_pending(ledger))
    else:
        raise UsageError(f"{options.output} holds no job")
    return 0


def _pending(ledger: Ledger) -> str:
    """Describe an unfinished job in a few lines, from its ledger alone."""
    lines = [
        f"job {ledger.job}: {ledger.rows} rows, {len(ledger.shards)} batches at {ledger.provider}, not landed"
    ]
    for record in ledger.shards:
        state = record.ended.status if record.ended else record.status or record.step
        again = f"  round {record.round}" if record.round > 1 else ""
        lines.append(
            f"  rows {record.first_row}+{record.rows}  {record.batch_id or 'no batch yet'}  {state}{again}"
        )
    return "\n".join([*lines, "repeat the same `run` to continue it"])


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
    except KeyboardInterrupt:  # Ctrl-C is how a person stops the server
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
