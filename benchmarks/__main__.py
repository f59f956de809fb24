"""`make bench`: every benchmark, each next to its baseline, which the same run measures."""

from __future__ import annotations

import sys

from . import bulk, imports, waiting


def main() -> int:
    good = True
    for benchmark in (imports.run, bulk.run, lambda: bulk.run("scale"), lambda: waiting.main([]) == 0):
        good &= benchmark()
        print(flush=True)
    print("all within their limits" if good else "some are ABOVE their limits")
    return 0 if good else 1


sys.exit(main())
