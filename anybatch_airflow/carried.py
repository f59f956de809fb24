"""What only the first stretch of a task on a worker can know, carried over its wait.

A task that is resumed is a new process, and the function that makes its requests is not called a second time.
So what that call has left behind goes into the trigger and comes back in its event. The arguments of a
deferral would be the place for it, but `dag.test()` drops them (Airflow's issue 69942).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anybatch_airflow.lineage import asset_uri

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.providers.common.compat.sdk import BaseOperator, Context

_NAME = "anybatch_map_index"


@dataclass(frozen=True)
class Carried:
    """`source` is the URI of the file that the requests were made of, `map_index` the rendered
    `map_index_template`; each is None where the resumed task finds it by itself."""

    source: str | None = None
    map_index: str | None = None

    @classmethod
    def of(
        cls, operator: BaseOperator, source: object, context: Context, before: Mapping[str, Any]
    ) -> Carried:
        """What to carry once the requests were made; `before` is the context before that."""
        uri = asset_uri(source)
        if uri is not None and "?" in uri:  # it may be signed, and a trigger holds no secret
            uri = None
        return cls(uri, _rendered(operator, context) if _was_filled(context, before) else None)

    def to_text(self) -> str | None:
        """The text for a trigger; None where there is nothing to carry."""
        return None if self == Carried() else json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | None) -> Carried:
        """What a trigger told back; a version that carried less, or nothing, is as good."""
        known = json.loads(text) if text else {}
        return cls(known.get("source"), known.get("map_index"))

    def restore(self, context: Context) -> None:
        """Let Airflow render the map index as it was; without its names it would fail the landed task."""
        if self.map_index is not None:
            filled: Any = context
            filled.update({"map_index_template": f"{{{{ {_NAME} }}}}", _NAME: self.map_index})


def _was_filled(context: Context, before: Mapping[str, Any]) -> bool:
    """Whether a function has put something into the context, as Airflow's guide to named mapping does."""
    # Compared by identity: some of the values are looked up when they are used, and need not be here.
    return any(name not in before or before[name] is not value for name, value in context.items())


def _rendered(operator: BaseOperator, context: Context) -> str | None:
    template = context.get("map_index_template")
    if template is None:
        return None
    try:
        text = operator.get_template_env().from_string(str(template)).render(context)
    except Exception:  # it may name what comes later; Airflow renders it at the end, and tells
        return None
    return text if isinstance(text, str) else None
