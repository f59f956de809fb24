"""What `import anybatch` costs, next to `import httpx, pydantic`: new interpreters, in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys

LIMIT = 1.3
RUNS = 9
PAIRS = {
    "import anybatch": ("import httpx, pydantic", LIMIT),
    # pydantic and anybatch load their parts on first use. This line loads these parts; it has no limit, since
    # anybatch's include tenacity, asyncio and SQLite.
    "from anybatch import Client": ("import httpx; from pydantic import BaseModel, SecretStr", float("inf")),
}


def seconds(statement: str) -> float:
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def run() -> bool:
    """Print a table, and return whether the first line is within the limit."""
    print(f"import: median of {RUNS} fresh interpreters")
    print(f"  {'':30}{'seconds':>10}{'baseline':>10}{'ratio':>8}")
    good = True
    for ours, (baseline, limit) in PAIRS.items():
        times = [(seconds(ours), seconds(baseline)) for _ in range(RUNS)]
        mine, base = (statistics.median(column) for column in zip(*times, strict=True))
        ok = mine / base <= limit
        good &= ok
        print(f"  {ours:30}{mine:10.3f}{base:10.3f}{mine / base:7.2f}x{'' if ok else '   ABOVE THE LIMIT'}")
    print(f"  limit of the first: {LIMIT:g}x httpx and pydantic together")
    return good


if __name__ == "__main__":
    sys.exit(0 if run() else 1)
