"""Jobs: their order, kept results, and what a failing one leaves behind."""

import json
from pathlib import Path

import pytest

from common.reproduction.jobs import Job, run_jobs


def test_jobs_run_after_what_they_need_and_are_kept(tmp_path: Path):
    kept = []
    jobs = [
        Job("second", "json:loads", {"s": '{"a": 2}'}, needs=("first",)),
        Job("first", "json:loads", {"s": '{"a": 1}'}),
    ]
    order = []

    def report(job: Job, result: dict, seconds: float, was_kept: bool) -> None:
        order.append(job.name)
        kept.append(was_kept)

    results = run_jobs(jobs, tmp_path, revision="x", processes=0, report=report)
    assert results == {"first": {"a": 1}, "second": {"a": 2}}
    assert order == ["first", "second"]
    (tmp_path / "first.json").write_text('{"fingerprint": "cut o')
    run_jobs(jobs, tmp_path, revision="x", processes=0, report=report)
    run_jobs(jobs, tmp_path, revision="other sources", processes=0, report=report)
    assert kept == [False, False, True, False, False, False]


def test_failing_job_keeps_what_is_finished_and_leaves_no_process(tmp_path: Path):
    jobs = [Job("good", "json:loads", {"s": "{}"}), Job("bad", "json:loads", {"s": "{"}, needs=("good",))]
    with pytest.raises(json.JSONDecodeError):
        run_jobs(jobs, tmp_path, revision="x", processes=1)
    assert (tmp_path / "good.json").exists()
    assert not (tmp_path / "bad.json").exists()
