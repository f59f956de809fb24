"""What the package declares to Airflow, through the entry point `apache_airflow_provider`.

Airflow imports this module while it reads its own configuration, in every process. So it imports nothing but
the standard library: neither Airflow, nor the core, nor a third party.
"""

from __future__ import annotations

from typing import Any

_INTEGRATION = "anybatch"


def get_provider_info() -> dict[str, Any]:
    """Modules, connection form and configuration options, by the schema `provider_info.schema.json`."""
    return {
        "package-name": "anybatch",
        "name": "anybatch",
        "description": (
            "LLM batch jobs on any provider: no worker slot held while waiting, every batch paid for once, "
            "every row accounted for."
        ),
        "integrations": [{"integration-name": _INTEGRATION, "tags": ["ai", "service"]}],
        "hooks": _modules("hooks"),
        "operators": _modules("operators"),
        "sensors": _modules("sensors"),
        "triggers": _modules("triggers", "events"),
        "connection-types": [connection_type()],
        "task-decorators": [{"name": "anybatch", "class-name": "anybatch_airflow.decorators.anybatch_task"}],
        "extra-links": ["anybatch_airflow.links.BatchLink", "anybatch_airflow.links.ResultsLink"],
        "config": {"anybatch": {"description": "Options of the anybatch provider.", "options": _options()}},
    }


def _modules(*names: str) -> list[dict[str, Any]]:
    modules = [f"anybatch_airflow.{name}" for name in names]
    return [{"integration-name": _INTEGRATION, "python-modules": modules}]


def connection_type() -> dict[str, Any]:
    """The connection type and its form. Airflow 3.2 and later read it here; the hook passes it to 3.1."""
    return {
        "connection-type": "anybatch",
        "hook-class-name": "anybatch_airflow.hooks.AnyBatchHook",
        "hook-name": "anybatch (LLM batches)",
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "login", "port"],
            "relabeling": {"host": "API base URL", "password": "API key"},
            "placeholders": {
                "host": "empty: the provider's own; else e.g. https://gateway.example.com/v1",
                "password": "empty: from the environment, e.g. OPENAI_API_KEY",
            },
        },
        "conn-fields": {
            "provider": {
                "label": "Provider",
                "description": "openai, anthropic, mistral, groq, openai-compatible, local or any other that "
                "anybatch knows",
                "schema": {"type": ["string", "null"]},
            },
            "client_args": {
                "label": "HTTP client arguments",
                "description": 'Passed to httpx, e.g. {"timeout": 60, "proxy": "http://proxy:3128"}',
                "schema": {"type": ["object", "null"]},
            },
            "settings": {
                "label": "Account settings",
                "description": "What the provider's account has besides key and URL, by name, e.g. "
                '{"region": "eu-west-1"}',
                "schema": {"type": ["object", "null"]},
            },
            "console_url": {
                "label": "Console URL",
                "description": "The page of a batch, for the link on a task, if it is not the "
                "provider's own, e.g. https://gateway.example.com/batches/{batch_id}",
                "schema": {"type": ["string", "null"]},
            },
        },
    }


def _options() -> dict[str, Any]:
    return {
        "min_defer_seconds": {
            "description": (
                "A task resumes no sooner than this many seconds after it deferred. Airflow fails some "
                "tasks that resume while their executor still reports the deferral (issues 66374, 71580 and "
                "72716 of apache/airflow)."
            ),
            "version_added": "0.1.0",
            "type": "float",
            "example": None,
            "default": "10",
        },
        "deployment": {
            "description": (
                "A name for this deployment; it becomes part of the identity of each task's job. Set it if "
                "several deployments with the same DAGs, such as staging and production, use one account at "
                "a provider. Change it only while no task waits: a waiting task would no longer recognize "
                "the job in its folder."
            ),
            "version_added": "0.1.0",
            "type": "string",
            "example": "staging",
            "default": "",
        },
    }
