"""The command line: what it prints, and one clean sentence for what a user can get wrong."""

import json
from dataclasses import replace

import pytest

from anybatch.cli import main
from anybatch.providers import local


@pytest.fixture(autouse=True)
def frequent_looks(monkeypatch):
    """The provider is looked at ten times as often as in life."""
    traits = replace(local._DIALECT.traits, poll_seconds=(0.1, 0.5))
    monkeypatch.setattr(local, "_DIALECT", replace(local._DIALECT, traits=traits))


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("anybatch 0.")


def test_run_and_status(tmp_path, capsys, requests):
    (tmp_path / "in.jsonl").write_bytes(requests(12, "local:echo?delay=0.5&fail=0.3"))
    job = [str(tmp_path / "in.jsonl"), str(tmp_path / "out")]
    where = ["--provider", "local", "--api-base", f"sqlite://{tmp_path}/x.db", "--metadata", "team=a"]
    assert main(["run", *job, *where]) == 0
    told = capsys.readouterr().out
    assert "completed" in told
    assert "12 rows in" in told
    landed = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in landed] == [f"row-{number}" for number in range(12)]
    assert main(["status", job[1]]) == 0
    assert capsys.readouterr().out in told
    assert main(["run", *job, *where]) == 0  # again, at no cost
    assert capsys.readouterr().out in told


def test_a_job_of_which_no_row_succeeded_is_a_failure(tmp_path, capsys, requests):
    (tmp_path / "in.jsonl").write_bytes(requests(3, "local:echo?delay=0.2&fail=1"))
    job = ["run", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--provider", "local"]
    for _ in range(2):
        assert main([*job, "--api-base", f"sqlite://{tmp_path}/x.db"]) == 3
        told = capsys.readouterr()
        assert "3 failed" in told.out
        assert "results: " in told.out
        assert told.err == ""


def test_a_job_s_policies(tmp_path, capsys, requests):
    source = tmp_path / "in.jsonl"
    source.write_bytes(requests(2, "local:echo?delay=0.2"))
    job = ["run", str(source), str(tmp_path / "out"), "--provider", "local"]
    job += ["--api-base", f"sqlite://{tmp_path}/x.db", "--on-orphan", "resubmit", "--max-rounds", "2"]
    assert main(job) == 0
    first = batches(capsys)
    assert len(first) == 1
    assert main([*job, "--restart", "again"]) == 0
    second = batches(capsys)
    assert len(second) == 1
    assert first != second
    assert main([*job, "--restart", "again"]) == 0
    assert batches(capsys) == set()  # this one has been restarted

    source.write_bytes(requests(3, "local:echo?delay=0.2"))
    assert main([*job, "--on-changed", "fail"]) == 1
    assert "on_changed='cancel_and_resubmit' would cancel those" in capsys.readouterr().err
    assert main([*job, "--on-changed", "cancel_and_resubmit"]) == 0
    assert "3 succeeded" in capsys.readouterr().out


def batches(capsys):
    """The batches whose progress was told."""
    return {word for word in capsys.readouterr().out.split() if word.startswith("batch_")}


def test_the_model_of_all_lines(tmp_path, capsys, requests):
    lines = [json.loads(line) for line in requests(2).splitlines()]
    for line in lines:
        del line["body"]["model"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = ["run", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--provider", "local"]
    job += ["--api-base", f"sqlite://{tmp_path}/x.db"]
    assert main(job) == 2
    assert "must name the model" in capsys.readouterr().err
    assert main([*job, "--model", "local:echo?delay=0.2"]) == 0
    assert "2 succeeded" in capsys.readouterr().out


def test_status_of_a_job_under_way(tmp_path, capsys, requests):
    (tmp_path / "in.jsonl").write_bytes(requests(2, "local:echo?delay=60"))
    job = ["run", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--provider", "local"]
    assert main([*job, "--api-base", f"sqlite://{tmp_path}/x.db", "--timeout", "0"]) == 1
    assert "deadline" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "not landed" in told
    assert "batch_" in told


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["status", "{tmp}/none"], 2, "no job is on record"),
        (["run", "{tmp}/none", "{tmp}/out", "--provider", "local", "--api-base", "{tmp}/x.db"], 2, "none"),
        (["run", "{tmp}/bad", "{tmp}/out", "--provider", "local", "--api-base", "{tmp}/x.db"], 2, "line 1"),
        (["run", "{tmp}/bad", "{tmp}/out", "--provider", "locla"], 2, "locla"),
        (
            ["run", "{tmp}/bad", "{tmp}/out", "--provider", "local", "--api-base", "http://x"],
            2,
            "SQLite file",
        ),
        (
            ["run", "{tmp}/bad", "{tmp}/o", "--provider", "local", "--api-base", "{tmp}/bad/x.db"],
            2,
            "Cannot open",
        ),
        (["run", "{tmp}/bad", "{tmp}/out", "--provider", "local", "--metadata", "x"], 2, "KEY=VALUE"),
        (["run", "{tmp}/bad", "{tmp}/out", "--provider", "local", "--max-rounds", "0"], 2, "max_rounds"),
        (["serve", "--port", "99999"], 2, "--port"),
        (["serve", "--upstream", "localhost"], 2, "--upstream"),
        (["serve", "--upstream", "http://x", "--concurrency", "0"], 2, "--concurrency"),
        (["serve", "--api-key-env", "NOT_SET_AT_ALL"], 2, "NOT_SET_AT_ALL"),
        (["serve", "--db", "{tmp}/bad/x.db"], 1, "Cannot open"),
        (["serve", "--db", "{tmp}/x.db", "--host", "192.0.2.1"], 1, "address"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, code, expected):
    (tmp_path / "bad").write_text("{broken\n")
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == code
    told = capsys.readouterr().err
    assert told.startswith("anybatch: ")
    assert expected in told
    assert "Traceback" not in told
