"""What a task learns before it defers and needs again after the wait.

The task resumes in a new process, and the function that makes its requests is not called again. So what that
call left behind goes into the trigger and comes back in its event. The natural place would be the keyword
arguments of the deferral, but `dag.test()` drops them (Airflow's issue 69942).
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
    """What a trigger carries for the task that resumes.

    Attributes:
        source: The URI of the file that the requests were made from; None if the ledger names it, or there is
            none.
        map_index: The rendered `map_index_template`; None if the resumed task can render it again.
    """

    source: str | None = None
    map_index: str | None = None

    @classmethod
    def of(
        cls, operator: BaseOperator, source: object, context: Context, before: Mapping[str, Any]
    ) -> Carried:
        """What to carry, once the requests were made; `before` is the context as it was before that."""
        uri = asset_uri(source)
        if uri is not None and "?" in uri:  # it may be a signed URL, and a trigger must hold no secret
            uri = None
        return cls(uri, _rendered(operator, context) if _was_filled(context, before) else None)

    def to_text(self) -> str | None:
        """The text for a trigger, or None if there is nothing to carry."""
        return None if self == Carried() else json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | None) -> Carried:
        """What a trigger carried; members that an older version did not carry are None."""
        known = json.loads(text) if text else {}
        return cls(known.get("source"), known.get("map_index"))

    def restore(self, context: Context) -> None:
        """Put the map index that was rendered before the wait into the context.

        Airflow renders `map_index_template` again at the end of the task. The names that the function put
        into the context are gone by then, and the task would fail although its results have landed.
        """
        if self.map_index is not None:
            filled: Any = context
            filled.update({"map_index_template": f"{{{{ {_NAME} }}}}", _NAME: self.map_index})


def _was_filled(context: Context, before: Mapping[str, Any]) -> bool:
    """Whether the function put something into the context, as Airflow's guide to named mapping does."""
    # Compared by identity: some values are lazy, and comparing them would look up what does not exist.
    return any(name not in before or before[name] is not value for name, value in context.items())


def _rendered(operator: BaseOperator, context: Context) -> str | None:
    template = context.get("map_index_template")
    if template is None:
        return None
    try:
        text = operator.get_template_env().from_string(str(template)).render(context)
    except Exception:  # it may name what is set later; Airflow renders it at the end, and reports the error
        return None
    return text if isinstance(text, str) else None
