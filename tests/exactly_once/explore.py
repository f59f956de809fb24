"""Every interleaving of concurrent attempts at one job, tried out on the product's own flows.

`explore` visits every state that any order of steps can reach, by running the attempts anew for each path and
cutting off where a state was seen before. Killing an attempt is taking no further step of it, so each state
visited is also each place a process can die.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anybatch.jobs.ledger import Ledger
from tests.exactly_once.worlds import Step, Steps, World


@dataclass
class Findings:
    """What an exploration came to."""

    states: int = 0
    endings: int = 0
    most_batches: int = 0
    faults: list[str] = field(default_factory=list)


def explore(
    open_world: Callable[[], World],
    read: Callable[[World], Ledger | None],
    check: Callable[[World], None],
    *,
    faults: frozenset[str] = frozenset(),
    budget: int = 0,
    allowed: Callable[[World, Step], bool] = lambda world, step: True,
    alike: bool = False,
    most_failures: int = 1,
    most_states: int = 100_000,
) -> Findings:
    """Visit every state; `check` sees each state of ledger and provider once, in a world of its own.

    That there are more than `most_states` is a fault: attempts that do something again and again.

    Where all attempts are `alike`, so are the states in which they have changed their parts.
    """
    found = Findings()
    seen = Seen(alike)
    checked: set[Any] = set()
    paths: list[tuple[list[Step], Steps]] = [([], frozenset())]
    while paths and len(found.faults) < most_failures:
        path, asleep = paths.pop()
        world = _replayed(open_world, path)
        try:
            while True:
                ledger = read(world)
                possible = [step for step in world.steps(faults, budget) if allowed(world, step)]
                new, steps, asleep = seen.arrive(world, ledger, possible, asleep)
                if new:
                    found.most_batches = max(found.most_batches, len(world.fake.batches))
                    ends = all(attempt.ended for attempt in world.attempts.values())
                    found.endings += ends
                    shared = world.shared(ledger)
                    if ends or shared not in checked:
                        checked.add(shared)
                        now = world.clock.now  # the clock is the process's: all worlds set it
                        _check(open_world, path, check, found)
                        world.clock.now = now
                if len(seen.asleep) > most_states:
                    found.faults.append("\n  ".join([f"more than {most_states} states", *world.trace]))
                    paths.clear()
                    break
                if not steps:
                    break
                (first, asleep), *others = _with_sleepers(world, steps, asleep)
                paths += [([*path, step], left) for step, left in reversed(others)]
                world.step(first)
                path = [*path, first]
        finally:
            world.close()
    found.states = len(seen.asleep)
    return found


def _with_sleepers(world: World, steps: list[Step], asleep: Steps) -> list[tuple[Step, Steps]]:
    """Each step with those that need not be tried after it, since they were tried before it instead."""
    found = []
    for step in steps:
        found.append((step, frozenset(other for other in asleep if world.apart(step, other))))
        asleep |= {step}
    return found


class Seen:
    """The states that were visited, and which steps were asleep there each time.

    Where two attempts' steps touch nothing in common both orders come to the same state, and one of them is
    enough: the step that was tried first sleeps while the other's consequences are explored, until something
    touches what it touches. A later visit takes the steps that slept till then and are awake now (Godefroid,
    "Partial-Order Methods for the Verification of Concurrent Systems", sleep sets with state matching). Where
    the attempts are `alike`, a state counts as visited when its mirror image was.
    """

    def __init__(self, alike: bool) -> None:
        self.alike = alike
        self.asleep: dict[Any, Steps] = {}

    def arrive(
        self, world: World, ledger: Ledger | None, possible: list[Step], asleep: Steps
    ) -> tuple[bool, list[Step], Steps]:
        """Whether this state is new, the steps to take from here, and those that sleep."""
        state = world.state(ledger)
        if state in self.asleep:
            before = self.asleep[state]
            self.asleep[state] = before & asleep
            return False, [step for step in possible if step in before - asleep], before & asleep
        if self.alike and (image := world.mirrored(ledger)) in self.asleep:
            before = _mirrored(world, self.asleep[image])
            self.asleep[image] = _mirrored(world, before & asleep)
            return False, [step for step in possible if step in before - asleep], before & asleep
        self.asleep[state] = asleep
        return True, [step for step in possible if step not in asleep], asleep


def _mirrored(world: World, steps: Steps) -> Steps:
    names = list(world.attempts)
    other = dict(zip(names, reversed(names), strict=True))
    return frozenset((other.get(name, name), kind) for name, kind in steps)


def _replayed(open_world: Callable[[], World], path: list[Step]) -> World:
    world = open_world()
    for step in path:
        world.step(step)
    return world


def _check(
    open_world: Callable[[], World], path: list[Step], check: Callable[[World], None], found: Findings
) -> None:
    world = _replayed(open_world, path)
    try:
        check(world)
    except AssertionError as error:
        found.faults.append("\n  ".join([f"{error}", *world.trace]))
    finally:
        world.close()
