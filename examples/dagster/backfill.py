"""A backfill: ten days in one run and one batch, each day with its own value, and an asset downstream.

    tickets ──▶ ticket_kinds_batch ──▶ ticket_kinds ──▶ daily_kinds        all partitioned by day

Launch the backfill on all three from the asset graph. Three batches are submitted, three runs wait in the
queue, no process is alive, and the backfill is complete when the last day of `daily_kinds` is.
"""

from collections import Counter
from typing import Any

import dagster as dg

from anybatch import Row
from anybatch_dagster import BatchResource, batch_asset, build_batch_sensor

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-01-31")


@dg.asset(partitions_def=DAYS)
def tickets(context: dg.AssetExecutionContext) -> list[dict[str, Any]]:
    """A day's tickets."""
    day = context.partition_key
    return [{"ticket": f"{day}-{number}", "text": f"Ticket {number} of {day}"} for number in range(20)]


@batch_asset(
    partitions_def=DAYS,
    backfill_policy=dg.BackfillPolicy.multi_run(max_partitions_per_run=10),
    model="local:echo?delay=20",
    prompt="Is this a question, a complaint or praise? Answer with one word.\n\n{text}",
    id_column="ticket",
    value="rows",
)
def ticket_kinds(tickets: Any) -> Any:
    """What kind of ticket each is.

    `tickets` is one day's table, or in a run over several days a mapping from day to table. Both may be
    returned as they are.
    """
    return tickets


@dg.asset(partitions_def=DAYS)
def daily_kinds(ticket_kinds: list[Row]) -> dict[str, int]:
    """How many of each kind."""
    return Counter(row.result.choices[0].message.content for row in ticket_kinds if row.result)


defs = dg.Definitions(
    assets=[tickets, *ticket_kinds, daily_kinds],
    sensors=[build_batch_sensor()],
    resources={"anybatch": BatchResource(provider="local")},
)
