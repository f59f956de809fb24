"""Gives each component of the test cluster the host name that it would have on a machine of its own."""

from __future__ import annotations

import os


def name() -> str:
    return os.environ["CLUSTER_HOST"]
