"""The options of a job and of waiting for it, each declared once: name, type, default, choices, a sentence.

Signatures that people read (`Job`, `run_job`, the operators, `@batch_asset`, the component) stay explicit and
repeat names and defaults; `tests/test_options.py` fails if one of them differs from this table. The command
line's parser, the component's descriptions and `docs/options.md` are generated from it.

To add an option, add it here, then to each signature that the test names.

This module imports only the standard library, since a DAG file imports it at every parse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, TypeAlias, get_args

__all__ = [
    "DEFAULT_TIMEOUT",
    "OPTIONS",
    "REQUIRED",
    "KeepRequests",
    "OnChanged",
    "OnLost",
    "OnOrphan",
    "OnPartial",
    "OnTimeout",
    "OnUntranslatable",
    "Option",
    "Part",
    "option",
    "options_of",
    "wrong_choice",
]

OnOrphan: TypeAlias = Literal["fail", "resubmit"]
OnChanged: TypeAlias = Literal["cancel_and_resubmit", "fail"]
OnUntranslatable: TypeAlias = Literal["fail", "drop"]
OnLost: TypeAlias = Literal["fail", "land", "resubmit"]
KeepRequests: TypeAlias = Literal["until_submitted", "until_landed", "always"]
OnPartial: TypeAlias = Literal["keep", "fail"]
OnTimeout: TypeAlias = Literal["leave", "cancel", "land_partial"]

DEFAULT_TIMEOUT = 26 * 3600.0
"""Seconds to wait for the batches of a round: the usual completion window of 24 hours, and two hours for the
provider to write the result files of a batch that has ended."""


class Part(Enum):
    """What an option belongs to."""

    ACCOUNT = "account"  # provider, base URL, credentials and settings
    JOB = "job"  # what to submit: the fields of `Job`
    RUN = "run"  # how long to wait, and which results are good enough: the keywords of `Client.run`
    TABLE = "table"  # how to build requests from a table's rows: the arguments of `build_requests`


class Placeholder(Enum):
    """A value of `Option.default` or `Option.in_pipelines` that is not itself a default."""

    REQUIRED = "required"
    SAME = "same"


REQUIRED: Final = Placeholder.REQUIRED


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        name: The name, the same in every signature.
        type: The type as signatures write it.
        default: The default; a signature may write None for an empty mapping.
        part: What the option belongs to.
        text: One sentence for the docs, the command line's help and the component's descriptions.
        choices: The allowed values, if they are few.
        in_fingerprint: Whether another value makes another job, which replaces what was submitted before
            under the same identity.
        in_pipelines: The default in Airflow and Dagster, if it differs from `default`.
    """

    name: str
    type: str
    default: Any
    part: Part
    text: str
    choices: tuple[str, ...] = ()
    in_fingerprint: bool = False
    in_pipelines: Any = Placeholder.SAME

    @property
    def pipeline_default(self) -> Any:
        """The default in Airflow and Dagster."""
        return self.default if self.in_pipelines is Placeholder.SAME else self.in_pipelines


OPTIONS: Final[tuple[Option, ...]] = (
    # --- the account: all of it but the key is in the fingerprint; keys are rotated while batches run
    Option(
        "provider", "str", REQUIRED, Part.ACCOUNT,
        "Name of the provider, such as openai, anthropic or local.",
        in_fingerprint=True,
    ),
    Option(
        "api_key", "str | None", None, Part.ACCOUNT,
        "The provider's API key; if left out, it is read from the provider's environment variable.",
    ),
    Option(
        "api_base", "str | None", None, Part.ACCOUNT,
        "Base URL of the provider's API, if it is not the usual one; for local, sqlite:///absolute/path.db.",
        in_fingerprint=True,
    ),
    Option(
        "client_args", "Mapping[str, Any]", {}, Part.ACCOUNT,
        "Arguments for the HTTP client (httpx), such as timeout, proxy, verify or headers.",
    ),
    Option(
        "settings", "Mapping[str, str]", {}, Part.ACCOUNT,
        "The account's other settings by name, such as a region or a project; a setting that is left out is "
        "read from the provider's environment variable, which is the place for secret ones.",
        in_fingerprint=True,
    ),
    # --- the job
    Option(
        "input", "JobInput", REQUIRED, Part.JOB,
        "The request lines: a JSONL file (a path or fsspec URL) or, in Python, an iterable of request "
        "objects.",
        in_fingerprint=True,
    ),
    Option(
        "output", "str | os.PathLike[str] | UPath", REQUIRED, Part.JOB,
        "The job's own folder (a path or fsspec URL) for its ledger, results and report; the same folder "
        "continues the same job.",
    ),
    Option(
        "endpoint", "str", "/v1/chat/completions", Part.JOB,
        "Endpoint of every request: OpenAI's path, translated for providers with another API, or the "
        "provider's own path.",
        in_fingerprint=True,
    ),
    Option(
        "id", "str | None", None, Part.JOB,
        "The job's identity, by default the location of the output; the same identity is the same job, which "
        "is never paid for twice.",
    ),
    Option(
        "model", "str | None", None, Part.JOB,
        "Model of every request whose body names none.",
        in_fingerprint=True,
    ),
    Option(
        "completion_window", "str", "24h", Part.JOB,
        "How long the provider may take, as the provider writes it.",
        in_fingerprint=True,
    ),
    Option(
        "metadata", "Mapping[str, str]", {}, Part.JOB,
        "Strings put on every batch at the provider, beside anybatch's own.",
    ),
    Option(
        "options", "Mapping[str, Any]", {}, Part.JOB,
        "The provider's own options for creating a batch.",
        in_fingerprint=True,
    ),
    Option(
        "on_orphan", "OnOrphan", "fail", Part.JOB,
        "What to do if a create got no answer and the provider offers no way to look for its batch: fail, or "
        "resubmit and risk paying for both.",
        choices=get_args(OnOrphan),
    ),
    Option(
        "on_changed", "OnChanged", "cancel_and_resubmit", Part.JOB,
        "What to do if the job was submitted before with other input or options: cancel_and_resubmit, which "
        "replaces what was submitted, or fail.",
        choices=get_args(OnChanged),
    ),
    Option(
        "on_untranslatable", "OnUntranslatable", "fail", Part.JOB,
        "What to do with a parameter that has no counterpart in the provider's API: fail and name its line, "
        "or drop it.",
        choices=get_args(OnUntranslatable),
        in_fingerprint=True,
    ),
    Option(
        "on_lost", "OnLost", "fail", Part.JOB,
        "What to do if the provider has lost a batch or a result file, or a result file holds fewer rows "
        "than the provider counts: fail, land the other rows, or resubmit, which pays for the lost rows "
        "again, even if they have already landed as missing.",
        choices=get_args(OnLost),
    ),
    Option(
        "shard_requests", "int | None", None, Part.JOB,
        "The most requests in one batch, if lower than the provider's own limit; the value of the job's "
        "first submission applies to all later ones.",
    ),
    Option(
        "keep_requests", "KeepRequests", "until_landed", Part.JOB,
        "How long requests that were passed as objects stay in the job's folder, with their prompts: "
        "until_submitted (a later round then needs them passed again), until_landed, or always.",
        choices=get_args(KeepRequests),
    ),
    Option(
        "max_rounds", "int", 1, Part.JOB,
        "How often a row may be submitted: with 2 or more, rows that expired, are missing or failed with an "
        "error that may be temporary are submitted again.",
    ),
    Option(
        "restart", "str | None", None, Part.JOB,
        "Any text: each new text submits the same input once more and cancels what still runs of the job.",
        in_fingerprint=True,
    ),
    Option(
        "lease", "float", 90.0, Part.JOB,
        "Seconds for which a create that another attempt has begun is left to that attempt.",
    ),
    Option(
        "price", "tuple[float, float] | None", None, Part.JOB,
        "USD per million input tokens and per million output tokens, for providers that do not report the "
        "cost.",
    ),
    # --- waiting, and what is good enough
    Option(
        "timeout", "float | timedelta | None", None, Part.RUN,
        "How long to wait, in seconds: in Python and on the command line from the start of the call, in "
        "Airflow and Dagster from the creation of each round's batches.",
        in_pipelines=DEFAULT_TIMEOUT,
    ),
    Option(
        "deadline", "float | None", None, Part.RUN,
        "When to stop waiting, in unix seconds; used instead of timeout.",
    ),
    Option(
        "on_progress", "OnProgress | None", None, Part.RUN,
        "A function called with the batch whenever its status or counts change.",
    ),
    Option(
        "on_timeout", "OnTimeout", "leave", Part.RUN,
        "What to do with batches that have not ended in time: leave them running, cancel them, or "
        "land_partial, which cancels them and lands what they have finished.",
        choices=get_args(OnTimeout),
    ),
    Option(
        "on_partial", "OnPartial", "keep", Part.RUN,
        "What to do if rows have no result after the last round: keep the results, provided "
        "max_failed_ratio accepts them, or fail once they have landed.",
        choices=get_args(OnPartial),
    ),
    Option(
        "max_failed_ratio", "float", 1.0, Part.RUN,
        "Share of rows without a result above which the job fails, once its results have landed; in Airflow "
        "and Dagster, if it is left out, the job fails only if no row succeeded.",
        in_pipelines=None,
    ),
    # --- requests built from a table: another prompt makes another input
    Option(
        "prompt", "Prompt", REQUIRED, Part.TABLE,
        "The prompt for each row of a table: a template in which {column} is replaced by the row's value "
        "(this is not Jinja), or a function of the row.",
        in_fingerprint=True,
        in_pipelines=None,  # without it, the input holds request lines
    ),
    Option(
        "id_column", "str | Callable | None", None, Part.TABLE,
        "The column that holds each row's id, or a function of the row; if left out, ids are row-1, row-2 "
        "and so on, and stay the same only while the table keeps its order.",
        in_fingerprint=True,
    ),
    Option(
        "system", "str | None", None, Part.TABLE,
        "The system prompt of every request.",
        in_fingerprint=True,
    ),
    Option(
        "body", "Mapping[str, Any]", {}, Part.TABLE,
        "Further parameters of every request, such as max_tokens.",
        in_fingerprint=True,
    ),
)  # fmt: skip

_BY_NAME = {one.name: one for one in OPTIONS}


def option(name: str) -> Option:
    """Return the option of this name.

    Args:
        name: The option's name.

    Returns:
        Its row of the table.

    Raises:
        KeyError: There is no such option.
    """
    return _BY_NAME[name]


def options_of(*parts: Part) -> Iterator[Option]:
    """Return the options of these parts.

    Args:
        parts: The parts whose options are wanted.

    Returns:
        Their rows, in the table's order.
    """
    return (one for one in OPTIONS if one.part in parts)


def wrong_choice(name: str, value: object) -> str | None:
    """Check a value against an option's choices.

    Each caller raises the message as the error its users expect: `Job` a ConfigurationError, the operator a
    ValueError while the DAG is parsed, the asset Dagster's error for definitions.

    Args:
        name: The option's name.
        value: The value to check.

    Returns:
        The error message, or None if the value is one of the choices.
    """
    known = _BY_NAME[name].choices
    return None if value in known else f"{name}: must be {' or '.join(map(repr, known))}, not {value!r}"
