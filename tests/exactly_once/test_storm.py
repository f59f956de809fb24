"""Attempts are killed with SIGKILL at random points, again and again, while answers are cut, lost and
malformed at random: in the end no row is lost, and none is paid for twice.

    ANYBATCH_STORM_KILLS=300 ANYBATCH_STORM_SEED=7 pytest -m deployment tests/exactly_once/test_storm.py -s

The kills are those over all four providers. Time is part of it: a seed gives a like storm, not the same one.
"""

from __future__ import annotations

import json
import os
import random as randomness
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

from tests.exactly_once.storm import SPOILED, Keeper, Remote, World, landed, open_world, strike_of
from tests.exactly_once.weather import gust_of

NAMES = ("local", "openai", "mistral", "anthropic")
KILLS = int(os.environ.get("ANYBATCH_STORM_KILLS", "80"))
SEED = os.environ.get("ANYBATCH_STORM_SEED") or str(randomness.randrange(10**6))
MOST_ATTEMPTS = 150  # at one job
# How an attempt may end: a later one makes it good. All else is a defect.
PASSING = {
    "CreateOutcomeUnknownError", "IncompleteListingError", "OrphanError", "RateLimitError", "ServerError",
    "TransportError",
}  # fmt: skip


class Storm:
    """Jobs at one provider, one after the other, and what they came to."""

    def __init__(self, name: str, home: Path, keeper: Keeper, kills: int) -> None:
        self.name, self.home, self.keeper, self.wanted = name, home, keeper, kills
        self.random = Random(f"{SEED} {name}")
        self.kills = self.jobs = self.attempts = self.requests = self.orphans = self.rows = 0
        self.ends: Counter[str] = Counter()
        self.spoiled: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        return self.kills >= self.wanted

    def job(self) -> None:
        """One job, from its first attempt until it has landed; then all is looked through."""
        self.jobs += 1
        home = self.home / f"job-{self.jobs}"
        world = open_world(self.name, home, self.random, self.spoiled, self.keeper.kill)
        with closing(world):
            for _ in range(self.random.randrange(1, 3) if world.has_draft else 0):
                self.attempt(world, draft=True)
            enough, policy = self.kills + self.random.randrange(3, 10), "fail"
            for _ in range(MOST_ATTEMPTS):
                how, error = self.attempt(world, policy=policy, struck=self.kills < enough)
                policy = "fail"
                if how == "0":
                    break
                if error is not None and error["type"] == "OrphanError":
                    assert isinstance(world, Remote)
                    self.orphans += 1
                    # A person answers for one attempt. In that, a create that is lost would be repeated.
                    policy = "resubmit" if world.do_as_told(error["text"]) else "fail"
            else:
                pytest.fail(f"job {self.jobs} has not landed after {MOST_ATTEMPTS} attempts")
            check(world)
            self.requests += world.requests()
            self.rows += len(world.rows)

    def attempt(
        self, world: World, *, draft: bool = False, policy: str = "fail", struck: bool = True
    ) -> tuple[str, dict[str, str] | None]:
        """One process, killed or not: how it ended, and the error it ended in."""
        self.attempts += 1
        strike, at, seconds = strike_of(self.random) if struck and not self.is_over else (None, 0, None)
        gust = gust_of(self.random)
        calm = {"create"} if policy == "resubmit" else set()
        told = world.home / "error.json"
        told.unlink(missing_ok=True)
        order = {
            "provider": world.name, "key": world.key, "api_base": world.api_base, "root": f"{world.home}/",
            "verb": "submit" if draft else "run", "job": world.terms(draft=draft, on_orphan=policy),
            "driver": self.random.choice(("sync", "sync", "async")), "error": str(told), "at": at,
            "seed": self.random.random(), "seen": str(world.home / SPOILED), "calm": sorted(calm),
            "strike": strike and asdict(strike), "gust": gust and asdict(gust),
        }  # fmt: skip
        world.brew(strike, gust, calm)
        self.keeper.start(order)
        timer = threading.Timer(seconds or 0.0, self.keeper.kill)
        if seconds is not None:
            timer.start()
        how = self.keeper.ended()
        timer.cancel()
        world.brew(None, None, calm)
        world.settle()
        self.kills += how == "SIGKILL"
        error = json.loads(told.read_text()) if how == "1" else None
        self.ends[error["type"] if error else how] += 1
        assert how in ("0", "1", "SIGKILL"), how
        assert error is None or error["type"] in PASSING, error["trace"]
        return how, error


def check(world: World) -> None:
    """The landed job, and the provider's own record of it."""
    job = world.job()
    report, bought = job.report(), world.record()
    assert report is not None
    # Every batch there ever was is in the report, once; but those of other input, which were called off.
    assert [batch for batch in bought if batch.runs] == []
    ours = [batch for batch in bought if not batch.is_draft]
    assert sorted(batch.id for batch in ours) == sorted(batch.id for batch in report.batches)
    assert not any("succeeded" in batch.fates.values() for batch in bought if batch.is_draft)
    # Each row was bought as often as its outcomes require.
    purchases: defaultdict[str, list[str]] = defaultdict(list)
    for batch in ours:
        for row, fate in batch.fates.items():
            purchases[row].append(fate)
    assert sorted(purchases) == sorted(world.rows)
    for row in world.rows:
        world.check_purchases(row, purchases[row])
    # It landed once, in the order of the input, with the best of its outcomes and its own answer.
    lines = landed(world.home / "out")
    assert [line["custom_id"] for line in lines] == world.rows
    for line in lines:
        outcomes = ["failed" if one == "refused" else one for one in purchases[line["custom_id"]]]
        expected = "succeeded" if "succeeded" in outcomes else outcomes[-1]
        assert line["outcome"] == expected, f"{line['custom_id']} was {outcomes}, and landed as {line}"
        if expected == "succeeded":
            answer = line["response"]["body"]["choices"][0]["message"]["content"]
            begins = world.answer(line["custom_id"])
            assert answer == begins or answer.startswith(f"{begins} ["), (answer, begins)
    assert {outcome: count for outcome, count in report.counts.items() if count} == Counter(
        line["outcome"] for line in lines
    )
    assert (report.rows, report.unexpected) == (len(world.rows), 0)
    # To ask for it again costs nothing, and nothing is left lying about.
    before = world.requests()
    with world.client() as client:
        assert client.run(job, timeout=10) == report
    assert world.requests() == before, "a landed job needs no request"
    assert world.record() == bought
    names = {path.name for path in (world.home / "out").iterdir()} - {".lock", "requests.jsonl"}
    ids = {f"ids-{number}.jsonl" for number in range(2, report.rounds + 1)}
    assert names == {"job.json", "ids.jsonl", "results.jsonl", "report.json", *ids}


@pytest.mark.deployment
@pytest.mark.parametrize("name", NAMES)
def test_storm(name: str, tmp_path: Path) -> None:
    share = KILLS // len(NAMES) + (NAMES.index(name) < KILLS % len(NAMES))
    began = time.monotonic()
    with Keeper(tmp_path) as keeper:
        storm = Storm(name, tmp_path, keeper, share)
        try:
            while not storm.is_over:
                storm.job()
        finally:
            told = {
                "seed": SEED, "kills": storm.kills, "jobs": storm.jobs, "rows": storm.rows,
                "attempts": storm.attempts, "requests": storm.requests or "inside", "orphans": storm.orphans,
                "spoiled": sum(storm.spoiled.values()), "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
            print(f"\nstorm over {name}: {told}\n  ends: {dict(storm.ends.most_common())}")
            print(f"  spoiled: {dict(sorted(storm.spoiled.items()))}")
    assert storm.kills == share
