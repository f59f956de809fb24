"""Write docs/options.md from the table of options in the core and the signatures that take them.

make options
"""

from __future__ import annotations

import atexit
import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "AIRFLOW_HOME" not in os.environ:  # where Airflow, imported for its operator's signature, writes a config
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="anybatch-options-")
    atexit.register(shutil.rmtree, os.environ["AIRFLOW_HOME"], ignore_errors=True)

from anybatch import Client, build_requests, run_job
from anybatch.cli import RUN_OPTIONS
from anybatch.jobs.options import DEFAULT_TIMEOUT, OPTIONS, REQUIRED, Option, Part, options_of
from anybatch_airflow import AnyBatchOperator
from anybatch_dagster import BatchResource, build_batch_assets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = Path(__file__).with_name("options.md")

HEAD = """# Options

<!-- Made by `make options` from core/anybatch/jobs/options.py, where each option is declared once. -->

The options of a job and of waiting for it have the same names and defaults wherever they are given:

- **Python**: the fields of `Job`, the keywords of `Client.run`, and both as keywords of `run_job` and
  `arun_job`;
- **CLI**: `anybatch run`, where `max_rounds` is `--max-rounds`;
- **Airflow**: `AnyBatchOperator` and `@task.anybatch`. What else these take is in [airflow.md](airflow.md);
- **Dagster**: `@batch_asset`, `build_batch_assets` and `BatchAssetComponent`; the account is a
  `BatchResource`. What else these take is in [dagster.md](dagster.md).

The last column says where an option is given, if not in all four. An option with a star (\\*) decides what
the provider is asked: with another value it is another job, and what was submitted before under the same
identity is replaced, or the job fails, as `on_changed` says.
"""

PARTS = {
    Part.JOB: ("The job", "What is to be done, and where its results land."),
    Part.RUN: ("Waiting and accepting", "How long to wait, and which results are good enough."),
    Part.TABLE: (
        "Requests from a table",
        "In Python these are arguments of `build_requests`, with the parameters in `body` as keywords.",
    ),
    Part.ACCOUNT: (
        "The account",
        "Arguments of `Client` and of each function, which take settings as keywords; `run_job` a mapping. "
        "In Airflow the connection has the key and the rest.",
    ),
}


# What the names of types stand for.
SPOKEN = {"JobInput": "a path or requests", "OnProgress": "a function", "Prompt": "a template or a function"}


def page() -> str:
    where = surfaces()
    sections = (
        "\n".join([f"## {title}", "", text, "", *_table(part, where)])
        for part, (title, text) in PARTS.items()
    )
    return "\n".join([HEAD, "\n\n".join(sections), ""])


def surfaces() -> dict[str, set[str]]:
    """Which options can be given where, as the signatures have it."""
    return {
        "Python": _names(run_job) | _names(Client.run) | _names(build_requests),
        "CLI": {option.name for option in RUN_OPTIONS},
        "Airflow": _names(AnyBatchOperator.__init__),
        # A function that makes the requests stands in place of `input`.
        "Dagster": _names(build_batch_assets) | {*BatchResource.model_fields},
    }


def _names(function: Callable[..., Any]) -> set[str]:
    return {*inspect.signature(function).parameters} & {option.name for option in OPTIONS}


def _table(part: Part, where: dict[str, set[str]]) -> Iterator[str]:
    yield "| option | value | default | meaning | where |"
    yield "|---|---|---|---|---|"
    for option in options_of(part):
        star = r" \*" if option.in_fingerprint else ""
        places = [name for name, names in where.items() if option.name in names]
        told = "" if len(places) == len(where) else ", ".join(places)
        cells = (f"`{option.name}`{star}", _value(option), _default(option), option.text, told)
        yield f"| {' | '.join(cells)} |"


def _value(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kind = option.type.removesuffix(" | None")
    return SPOKEN.get(kind) or f"`{kind}`".replace("|", r"\|")


def _default(option: Option) -> str:
    if option.default is REQUIRED:
        return "required"
    if option.pipeline_default == option.default:
        return _shown(option.default)
    here, there = (_shown(one) or "none" for one in (option.default, option.pipeline_default))
    return f"{here}; {there} in Airflow and Dagster"


def _shown(default: Any) -> str:
    if default == DEFAULT_TIMEOUT:
        return f"{default / 3600:g} h"
    return f"`{default}`" if default not in (None, {}) else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
