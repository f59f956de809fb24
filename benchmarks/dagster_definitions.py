"""What 200 batch assets cost to define and load, next to as many plain pairs of assets.

The two kinds are loaded in turn, each time in a new process, and the median of their CPU times counts, which
other work on the machine changes little. Both have the same graph: a submit asset, and a multi-asset with a
check that depends on it.
"""

# No `from __future__ import annotations`: Dagster reads the annotations of the assets below.
import statistics
import subprocess
import sys
import time
from typing import Any

import dagster as dg

ASSETS = 200
ROUNDS = 5


def plain(number: int) -> list[Any]:
    name = f"texts_{number}"

    @dg.asset(name=f"{name}_batch")
    def submit(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
        return dg.MaterializeResult()

    @dg.multi_asset(
        name=name,
        outs={name: dg.AssetOut(is_required=False)},
        deps=[f"{name}_batch"],
        check_specs=[dg.AssetCheckSpec("error_rate", asset=name)],
        can_subset=True,
    )
    def collect(context: dg.AssetExecutionContext) -> Any:
        yield dg.MaterializeResult(asset_key=name)

    return [submit, collect]


def batch(number: int) -> list[Any]:
    from anybatch_dagster import batch_asset

    @batch_asset(name=f"texts_{number}")
    def texts() -> Any:
        yield {}

    return texts


def load(kind: str) -> float:
    """CPU seconds to define and load them all, imports not counted."""
    from anybatch_dagster import BatchResource, build_batch_sensor

    make = {"plain": plain, "batch": batch}[kind]
    make(ASSETS)  # whatever is loaded on first use
    began = time.process_time()
    assets = [asset for number in range(ASSETS) for asset in make(number)]
    more = {"sensors": [build_batch_sensor()], "resources": {"anybatch": BatchResource(provider="local")}}
    definitions = dg.Definitions(assets=assets, **(more if kind == "batch" else {}))
    repository = definitions.get_repository_def()
    repository.load_all_definitions()
    return time.process_time() - began


def main() -> None:
    seconds: dict[str, list[float]] = {"plain": [], "batch": []}
    for _ in range(ROUNDS):
        for kind, found in seconds.items():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dagster_definitions", kind]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(float(output.split()[-1]))
    plain_s, batch_s = (statistics.median(found) for found in seconds.values())
    print(f"{ASSETS} plain pairs  {plain_s * 1000:6.0f} ms")
    print(f"{ASSETS} batch assets {batch_s * 1000:6.0f} ms: {(batch_s - plain_s) * 1000:+.0f} ms")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(load(sys.argv[1]))
    else:
        main()
