"""Jobs of an experiment: order, failure, termination, a limit of time."""

import sys
import time

import pytest

from slm_jax.experiment import jobs as jobs_module
from slm_jax.experiment.jobs import Job, lanes_here, run_jobs


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Jobs whose commands are lines of Python, run in place of `python -m slm_jax`."""
    file = tmp_path / "run.py"
    file.write_text("import sys\nexec(sys.argv[1])\n")
    monkeypatch.setattr(jobs_module, "COMMAND", [sys.executable, "-S", str(file)])

    def job(name: str, code: str, after: tuple[str, ...] = (), **more) -> Job:
        return Job(name, (code,), tmp_path / "logs" / f"{name}.log", after, **more)

    return job


def test_jobs_run_after_what_they_read(script, tmp_path):
    """With three lanes free, each still waits for its inputs; those that are not among the jobs are there already."""
    note = "open({!r}, 'a').write({!r})"
    order, done = tmp_path / "order", []
    slow = "import time; time.sleep(0.3); " + note.format(str(order), "a")
    jobs = [
        script("c", note.format(str(order), "c"), ("b",)),
        script("b", note.format(str(order), "b"), ("a", "made before")),
        script("a", slow),
    ]
    assert run_jobs(jobs, 3, {}, lambda job, seconds: done.append(job.name)) == {}
    assert order.read_text() == "abc" and done == ["a", "b", "c"]


def test_what_reads_a_failed_job_is_left_out_and_the_rest_goes_on(script, tmp_path):
    mark = tmp_path / "mark"
    jobs = [
        script("bad", "sys.exit('no hens left')"),
        script("reader", "pass", ("bad",)),
        script("reader of reader", "pass", ("reader",)),
        script("good", f"open({str(mark)!r}, 'w')"),
    ]
    failed = run_jobs(jobs, 1, {})
    assert failed == {"bad": "no hens left", "reader": "it reads bad", "reader of reader": "it reads reader"}
    assert mark.exists()


def test_a_train_job_that_was_terminated_is_not_done(script, tmp_path):
    """`train` exits with 0 when it is preempted; without its summary what reads it must not run."""
    failed = run_jobs([script("train", "print('saved')", run_dir=tmp_path / "run", steps=3)], 1, {})
    assert failed == {"train": "saved"}


def test_at_the_deadline_what_runs_is_stopped_and_nothing_is_started(script):
    begun = time.monotonic()
    jobs = [script("long", "import time; time.sleep(60)"), script("next", "pass")]
    failed = run_jobs(jobs, 1, {}, deadline=begun + 0.5)
    assert failed == {"long": "out of time", "next": "out of time"} and time.monotonic() - begun < 30


def test_flags_of_xla_that_are_set_stay(monkeypatch):
    """Before ours: XLA reads nothing after the last of them."""
    flags = jobs_module.ONE_CORE["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    assert lanes_here()[1]["XLA_FLAGS"] == f"--xla_force_host_platform_device_count=1 {flags}"
    monkeypatch.delenv("XLA_FLAGS")
    assert lanes_here()[1]["XLA_FLAGS"] == flags
