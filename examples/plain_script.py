"""Classify 2,400 API operations by what they do: table -> requests -> batch -> results -> joined table.

    python examples/plain_script.py

It runs on the `local` provider as it is: no key, no network, a stand-in model. To run it on a paid one,
change one name and set its key:

    OPENAI_API_KEY=… python examples/plain_script.py --provider openai --output out/openai

Stop it and start it again: it goes on where it was. Once the results have landed, it only joins them.
"""

import argparse
import csv
import itertools
import os
from collections import Counter
from pathlib import Path

from anybatch import Batch, Client, Job, build_requests, join_results

TABLE = Path(__file__).with_name("data") / "api_operations.csv"
MODELS = {
    "local": "local:echo?delay=10&fail=0.01",  # 10 s, and one answer in a hundred is an error
    "anthropic": "claude-haiku-4-5",
    "mistral": "mistral-small-latest",
}
QUESTION = "{description}\n\n(Operation {operation} of {service})"
SYSTEM = "Say what this API operation does to the caller's data, and sum it up in one short sentence."
SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"type": "string", "enum": ["read", "write", "delete", "admin"]},
        "summary": {"type": "string"},
    },
    "required": ["category", "summary"],
    "additionalProperties": False,
}
ANSWER = {"type": "json_schema", "json_schema": {"name": "operation", "strict": True, "schema": SCHEMA}}


def show(batch: Batch) -> None:
    counts = batch.request_counts
    print(f"  {batch.id} {batch.status}" + (f", {counts.completed} of {counts.total} done" if counts else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--provider", default=os.environ.get("ANYBATCH_PROVIDER", "local"))
    parser.add_argument("--model", default=os.environ.get("ANYBATCH_MODEL"))
    parser.add_argument("--output", type=Path, default=Path("out/plain_script"), help="the job's folder")
    options = parser.parse_args()
    model = options.model or MODELS.get(options.provider, "gpt-4o-mini")

    requests = build_requests(
        TABLE, QUESTION, model=model, id_column="operation_id", system=SYSTEM, response_format=ANSWER
    )
    with Client(options.provider) as client:
        report = client.run(Job(input=requests, output=options.output), on_progress=show)
    print(f"{report.rows} rows, {report.usage.total_tokens:,} tokens, {report.duration_s:.0f} s")
    print("  " + ", ".join(f"{count} {outcome}" for outcome, count in report.counts.items() if count))

    joined = options.output / "joined.csv"
    columns = ["operation_id", "service", "operation", "category", "summary", "outcome", "error"]
    with joined.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(join_results(TABLE, report, id_column="operation_id", parse="json"))

    with joined.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for row in itertools.islice(rows, 3):
            print(f"  {row['operation_id']}: {row['category']}: {row['summary']}")
        print(f"  categories of the rest: {dict(Counter(row['category'] or 'none' for row in rows))}")
    print(f"results: {report.results}\njoined:  {joined}")


if __name__ == "__main__":
    main()
