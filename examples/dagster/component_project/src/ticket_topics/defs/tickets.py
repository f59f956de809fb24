"""The upstream table, an asset like any other."""

from typing import Any

import dagster as dg

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", end_date="2026-02-01")


@dg.asset(partitions_def=DAYS, key_prefix="support")
def tickets(context: dg.AssetExecutionContext) -> list[dict[str, Any]]:
    """A day's tickets, on some days more than on others."""
    day = context.partition_key
    count = 40 + 17 * int(day[-2:]) % 50
    return [{"ticket": f"{day}-{number}", "text": f"Ticket {number} of {day}"} for number in range(count)]
