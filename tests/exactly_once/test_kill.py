"""The process is killed before and after each step; the next attempt makes it good, and pays once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exactly_once.forge import Forge, fresh
from tests.exactly_once.stage import FINDABLE, Stage
from tests.exactly_once.test_connections import STEPS, request_of

# Format, shards, and how many of the points the quick run takes: each second, and so on.
STRIDES = [("openai", 1, 2), ("openai", 3, 8), ("mistral", 1, 8), ("local", 1, 8)]


def sweep(forge: Forge, name: str, shards: int, home: Path, stride: int) -> None:
    """Kill attempts at each `stride`th point, each in a world of its own; let the next attempt finish."""
    with Stage(name, fresh(home, "undisturbed"), shards=shards) as stage:
        points = forge.points(stage, stage.job())
        stage.check(stage.run())
    assert len(points) > 30
    for number in range(1, len(points) + 1, stride):
        with Stage(name, fresh(home, f"killed-{number}"), shards=shards) as stage:
            how = forge.run(stage, stage.job(), at=number)
            # Time decides how often the local provider is polled; all else is the same in every run.
            assert how == "SIGKILL" or (name == "local" and number > len(points) - 30), points[number - 1]
            try:
                stage.check(stage.run())
            except AssertionError as error:
                error.add_note(f"killed before point {number}: {points[number - 1]}")
                raise


@pytest.mark.parametrize(("name", "shards", "stride"), STRIDES)
def test_killed_between_writes(forge: Forge, name: str, shards: int, stride: int, tmp_path: Path) -> None:
    sweep(forge, name, shards, tmp_path, stride)


@pytest.mark.deployment
@pytest.mark.parametrize(("name", "shards"), [(name, shards) for name, shards, _ in STRIDES])
def test_killed_between_any_two_writes(forge: Forge, name: str, shards: int, tmp_path: Path) -> None:
    sweep(forge, name, shards, tmp_path, 1)


@pytest.mark.parametrize("handled", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", FINDABLE)
def test_killed_while_a_request_is_out(
    forge: Forge, name: str, step: str, handled: bool, tmp_path: Path
) -> None:
    """Before the provider has dealt with the request, and after, when it has said nothing yet."""
    with Stage(name, tmp_path, failed=1) as stage:
        method, path, skip = request_of(stage, step)
        hold = stage.server.hold(method, path, handled=handled, skip=skip)
        process = forge.start(stage, stage.job())
        hold.wait()
        forge.kill(process)
        if handled:
            hold.release()
            stage.check(stage.run())
            return
        # The request is still under way when the next attempt begins.
        report = stage.run()
        hold.release()
        stage.server.wait_for(method, path)
        assert stage.run() == report
