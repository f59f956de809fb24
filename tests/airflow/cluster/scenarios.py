"""Tests that run side by side: each waits for Airflow most of its time.

    @scenario
    def test_something(cluster: Cluster) -> None:
        with Job(cluster, "plain", "something") as job:
            …

All scenarios that were selected begin when the cluster is up, each in a thread of its own; the test of that
name waits for its end.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .cluster import Cluster

    Body = Callable[[Cluster], None]

LIMIT = 420  # seconds that a scenario may take


def scenario(body: Body) -> Callable[..., None]:
    """The test that waits for this scenario."""

    def test(running: Scenarios) -> None:
        running.result(body)

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.scenario = body  # type: ignore[attr-defined]
    return test


def calm(body: Body) -> Body:
    """A scenario that needs each triggerer to do its work; `Scenarios.storm` comes after it."""
    body.needs_calm = True  # type: ignore[attr-defined]
    return body


class Scenarios:
    """The scenarios under way."""

    def __init__(self, cluster: Cluster, bodies: Iterable[Body]) -> None:
        self._cluster = cluster
        self._pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="scenario")
        self._futures: dict[Body, Future[None]] = {}
        # Those that need calm first: the others wait for them.
        for body in sorted(bodies, key=lambda one: not hasattr(one, "needs_calm")):
            self._futures[body] = self._pool.submit(self._run, body)
            if hasattr(body, "needs_calm"):
                cluster.calm.append(self._futures[body])

    def _run(self, body: Body) -> None:
        body(self._cluster)

    def result(self, body: Body) -> None:
        self._futures[body].result(LIMIT)

    def end(self) -> None:
        """Return when no thread runs any more."""
        self._cluster.stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def selected(items: Iterable[Any]) -> list[Body]:
    """The scenarios among pytest's items."""
    return [item.obj.scenario for item in items if hasattr(getattr(item, "obj", None), "scenario")]
