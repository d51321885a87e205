"""Jobs: order, failure, termination, and curves' crossings."""

import sys

import pytest

from slm_jax.demo import jobs as jobs_module
from slm_jax.demo.jobs import Job, lanes_here, run_jobs
from slm_jax.demo.pipeline import CONFIGS, STAGES, _with_inputs
from slm_jax.demo.summary import steps_to
from slm_jax.errors import UserError


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Jobs whose commands are lines of Python, run in place of `python -m slm_jax`."""
    file = tmp_path / "run.py"
    file.write_text("import sys\nexec(sys.argv[1])\n")
    monkeypatch.setattr(jobs_module, "COMMAND", [sys.executable, str(file)])

    def job(name: str, code: str, after: tuple[str, ...] = ()) -> Job:
        return Job(name, (code,), tmp_path / "logs" / f"{name}.log", after)

    return job


def test_jobs_run_after_what_they_read(script, tmp_path):
    """With three lanes free, each still waits for its inputs."""
    note = "open({!r}, 'a').write({!r})"
    order = tmp_path / "order"
    slow = "import time; time.sleep(0.3); " + note.format(str(order), "a")
    run_jobs(
        [
            script("c", note.format(str(order), "c"), ("b",)),
            script("b", note.format(str(order), "b"), ("a",)),
            script("a", slow),
        ],
        3,
        {},
    )
    assert order.read_text() == "abc"


def test_a_failing_job_stops_the_others_and_is_named(script, tmp_path):
    """The other job would write its mark after a minute: it is ended, not waited for."""
    mark = tmp_path / "mark"
    long = f"import time; time.sleep(60); open({str(mark)!r}, 'w')"
    with pytest.raises(UserError, match=r"the stage short failed: no hens left \(all of it: .*short.log\)"):
        run_jobs([script("long", long), script("short", "sys.exit('no hens left')")], 2, {})
    assert not mark.exists(), "the failure was reported when the other job had ended"


def test_a_train_job_that_was_terminated_is_not_done(script, tmp_path):
    """`train` exits 0 when it is preempted; without its summary the stages after it must not run."""
    job = Job("train", ("pass",), tmp_path / "train.log", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="the stage train failed"):
        run_jobs([job], 1, {})


def test_flags_of_xla_that_are_set_stay(monkeypatch):
    """Before ours: XLA reads none behind the last of them."""
    flags = jobs_module.ONE_CORE["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    assert lanes_here()[1]["XLA_FLAGS"] == f"--xla_force_host_platform_device_count=1 {flags}"
    monkeypatch.delenv("XLA_FLAGS")
    assert lanes_here()[1]["XLA_FLAGS"] == flags


def test_stages_bring_what_they_read():
    names = [stage.name for stage in _with_inputs(CONFIGS / "math_web", ["selective"])]
    assert names == ["crawl", "clean", "target", "general", "reference", "score", "selective"]
    assert len(_with_inputs(CONFIGS / "math_web", [])) == len(STAGES)
    with pytest.raises(UserError, match="has no stage 'selektive'"):
        _with_inputs(CONFIGS / "math_web", ["selektive"])


def test_steps_to_a_loss():
    curve = {"steps": [0, 10, 20, 30], "target_loss": [5.0, 4.0, 3.0, 3.5]}
    assert steps_to(curve, 3.5) == 15
    assert steps_to(curve, 3.0) == 20
    assert steps_to(curve, 2.9) is None
