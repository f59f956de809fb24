"""The options of a job and of waiting for it, each declared once: name, type, default, choices, a sentence.

Signatures stay explicit where people read them (`Job`, `run_job`, the operators, `@batch_asset`, the
component) and repeat names and defaults; `tests/test_options.py` fails where one of them differs from this
table. The command line's parser, the component's descriptions and `docs/options.md` are made from it.

To add an option: add it here, then to each signature that the test names.

Nothing but the standard library is imported: a DAG file imports this module at every parse.
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
"""Seconds for the batches of a round: the usual completion window, and what a provider needs to write the
files of a batch that has ended."""


class Part(Enum):
    """What an option belongs to."""

    ACCOUNT = "account"  # who is asked, and with which credentials
    JOB = "job"  # what is to be done: the fields of `Job`
    RUN = "run"  # how long to wait, and which results are good enough: the keywords of `Client.run`
    TABLE = "table"  # how requests are made of a table's rows: the arguments of `build_requests`


class Mark(Enum):
    """What stands in place of a default."""

    REQUIRED = "required"
    SAME = "same"


REQUIRED: Final = Mark.REQUIRED


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    `type` is the type as signatures write it, and None in place of an empty mapping is the same default.
    `in_fingerprint` says that another value makes another job: what was submitted before with the same
    identity is replaced. `in_pipelines` is the default in Airflow and Dagster, where it is not `default`.
    """

    name: str
    type: str
    default: Any
    part: Part
    text: str
    choices: tuple[str, ...] = ()
    in_fingerprint: bool = False
    in_pipelines: Any = Mark.SAME

    @property
    def pipeline_default(self) -> Any:
        return self.default if self.in_pipelines is Mark.SAME else self.in_pipelines


OPTIONS: Final[tuple[Option, ...]] = (
    # --- the account: it is in the fingerprint, but for the key, which may be rotated while a batch runs
    Option(
        "provider", "str", REQUIRED, Part.ACCOUNT,
        "Name of the provider, such as openai, anthropic or local.",
        in_fingerprint=True,
    ),
    Option(
        "api_key", "str | None", None, Part.ACCOUNT,
        "The provider's key; left out, it is read from the provider's environment variable.",
    ),
    Option(
        "api_base", "str | None", None, Part.ACCOUNT,
        "Address of the provider's API, where it is not the usual one; for local, "
        "sqlite:///absolute/path.db.",
        in_fingerprint=True,
    ),
    Option(
        "client_args", "Mapping[str, Any]", {}, Part.ACCOUNT,
        "Arguments of the HTTP client: timeout, proxy, verify, headers and others.",
    ),
    Option(
        "settings", "Mapping[str, str]", {}, Part.ACCOUNT,
        "What the provider's account has beside key and address, by name, such as a region or a project; "
        "left out, each is read from the provider's environment variable, where secret ones belong.",
        in_fingerprint=True,
    ),
    # --- the job
    Option(
        "input", "JobInput", REQUIRED, Part.JOB,
        "The request lines: a JSONL file (a path or fsspec URL), or in Python an iterable of request "
        "objects.",
        in_fingerprint=True,
    ),
    Option(
        "output", "str | os.PathLike[str] | UPath", REQUIRED, Part.JOB,
        "The job's own folder, a path or fsspec URL, for its record and its results; the same folder "
        "continues the same job.",
    ),
    Option(
        "endpoint", "str", "/v1/chat/completions", Part.JOB,
        "Endpoint of the requests: OpenAI's path, translated for providers that speak otherwise, or the "
        "provider's own.",
        in_fingerprint=True,
    ),
    Option(
        "id", "str | None", None, Part.JOB,
        "The job's identity: the same identity is the same job, which is never paid for twice; left out, it "
        "is the location of the output.",
    ),
    Option(
        "model", "str | None", None, Part.JOB,
        "Model of all requests that name none themselves.",
        in_fingerprint=True,
    ),
    Option(
        "completion_window", "str", "24h", Part.JOB,
        "How long the provider may take, in the provider's own words.",
        in_fingerprint=True,
    ),
    Option(
        "metadata", "Mapping[str, str]", {}, Part.JOB,
        "Strings to put on every batch at the provider, beside anybatch's own.",
    ),
    Option(
        "options", "Mapping[str, Any]", {}, Part.JOB,
        "The provider's own options for creating a batch.",
        in_fingerprint=True,
    ),
    Option(
        "on_orphan", "OnOrphan", "fail", Part.JOB,
        "What to do where a create got no answer and the provider offers no way to look for the batch: fail, "
        "or resubmit, and perhaps pay for both.",
        choices=get_args(OnOrphan),
    ),
    Option(
        "on_changed", "OnChanged", "cancel_and_resubmit", Part.JOB,
        "What to do where the job was submitted before with other input or options: replace what was "
        "submitted (cancel_and_resubmit), or fail.",
        choices=get_args(OnChanged),
    ),
    Option(
        "on_untranslatable", "OnUntranslatable", "fail", Part.JOB,
        "What to do with a parameter that the provider has no word for: fail and name its line, or drop it.",
        choices=get_args(OnUntranslatable),
        in_fingerprint=True,
    ),
    Option(
        "on_lost", "OnLost", "fail", Part.JOB,
        "What to do where a batch or a result file is gone at the provider, or shorter than the provider "
        "counts: fail, land the other rows, or resubmit, which buys the lost rows again, also after "
        "they have landed as missing.",
        choices=get_args(OnLost),
    ),
    Option(
        "shard_requests", "int | None", None, Part.JOB,
        "How many requests one batch may hold at most, below the provider's own limit; in force from the "
        "job's first submission on.",
    ),
    Option(
        "keep_requests", "KeepRequests", "until_landed", Part.JOB,
        "How long request lines that were given as objects stay in the job's folder, prompts and all: until "
        "each has its batch, after which a later round needs them once more, until the job has landed, or "
        "always.",
        choices=get_args(KeepRequests),
    ),
    Option(
        "max_rounds", "int", 1, Part.JOB,
        "How often a row may be submitted: with 2 and more, rows that expired, went missing or failed in a "
        "way that may pass are submitted again.",
    ),
    Option(
        "restart", "str | None", None, Part.JOB,
        "Any text: the same input is submitted once more, once for each such text, and what still runs of "
        "the job is cancelled.",
        in_fingerprint=True,
    ),
    Option(
        "lease", "float", 90.0, Part.JOB,
        "For how many seconds a create that another attempt has begun is left to that attempt.",
    ),
    Option(
        "price", "tuple[float, float] | None", None, Part.JOB,
        "USD for a million input tokens and for a million output tokens, where the provider does not tell "
        "the cost.",
    ),
    # --- waiting, and what is good enough
    Option(
        "timeout", "float | timedelta | None", None, Part.RUN,
        "How long to wait, in seconds: plain Python and the command line count from now on, Airflow and "
        "Dagster from the creation of each round's batches.",
        in_pipelines=DEFAULT_TIMEOUT,
    ),
    Option(
        "deadline", "float | None", None, Part.RUN,
        "The moment at which the waiting ends, in unix seconds; in place of timeout.",
    ),
    Option(
        "on_progress", "OnProgress | None", None, Part.RUN,
        "A function that is called with the batch at each new status or count.",
    ),
    Option(
        "on_timeout", "OnTimeout", "leave", Part.RUN,
        "What becomes of batches that have not ended in time: leave them running, cancel them, or "
        "land_partial, which cancels them and lands what they have finished.",
        choices=get_args(OnTimeout),
    ),
    Option(
        "on_partial", "OnPartial", "keep", Part.RUN,
        "What to do where rows have no result after the last round: keep the results, if max_failed_ratio "
        "accepts them, or fail once they have landed.",
        choices=get_args(OnPartial),
    ),
    Option(
        "max_failed_ratio", "float", 1.0, Part.RUN,
        "Share of rows without a result above which the job counts as failed, once its results have landed; "
        "Airflow and Dagster, where it is left out, count it as failed if no row succeeded.",
        in_pipelines=None,
    ),
    # --- requests made of a table: another prompt makes other input
    Option(
        "prompt", "Prompt", REQUIRED, Part.TABLE,
        "The prompt for each row of a table: a template in which {column} stands for the row's value, never "
        "Jinja, or a function of the row.",
        in_fingerprint=True,
        in_pipelines=None,  # where it is left out, the input holds requests
    ),
    Option(
        "id_column", "str | Callable | None", None, Part.TABLE,
        "The column that holds the rows' ids, or a function of the row; left out, the ids are row-1, row-2 "
        "and so on, which are only as stable as the table's order.",
        in_fingerprint=True,
    ),
    Option(
        "system", "str | None", None, Part.TABLE,
        "The system prompt of every request.",
        in_fingerprint=True,
    ),
    Option(
        "body", "Mapping[str, Any]", {}, Part.TABLE,
        "The other parameters of every request, such as max_tokens.",
        in_fingerprint=True,
    ),
)  # fmt: skip

_BY_NAME = {one.name: one for one in OPTIONS}


def option(name: str) -> Option:
    """An option by its name; KeyError if there is none."""
    return _BY_NAME[name]


def options_of(*parts: Part) -> Iterator[Option]:
    """The options that belong to these parts, in the table's order."""
    return (one for one in OPTIONS if one.part in parts)


def wrong_choice(name: str, value: object) -> str | None:
    """What to say of a value that is none of an option's choices; None if it is one of them.

    Each caller raises it as the error that is its users' own: `Job` a ConfigurationError, the operator a
    ValueError while the DAG is parsed, the asset Dagster's error for definitions.
    """
    known = _BY_NAME[name].choices
    return None if value in known else f"{name}: {' or '.join(map(repr, known))}, not {value!r}"
