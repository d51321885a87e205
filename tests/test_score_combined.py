"""Several references, and what several selections choose together: against sets, on any device, through a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import params_fingerprint
from slm_jax.data.corpus import Corpus
from slm_jax.models.trained_model import load_model
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import (
    CombinedSelection,
    Selection,
    SelectionMask,
    competes_across_micro_batches,
    filtered_capacity,
    select_tokens,
    within_capacity,
)
from slm_jax.train import plan_summary
from slm_jax.train.phases import Phase
from slm_jax.train.plan import Plan
from slm_jax.train.resume import refuse_equal_reference
from slm_jax.train.schedules import Schedule, SchedulePart

jit_select_tokens = jax.jit(select_tokens, static_argnums=0)
KEY = jax.random.key(0)
LIKELY = Selection(score="reference", reference="self", ratio=0.7)
CERTAIN = Selection(score="entropy", reference="self", ratio=0.5)
NUMPY = {"mean": np.mean, "min": np.min, "max": np.max}


@pytest.mark.parametrize("combine", NUMPY)
@pytest.mark.parametrize("score, statistic", [("excess", "loss"), ("reference", "loss"), ("entropy", "entropy")])
def test_several_references_speak_as_one(combine, score, statistic):
    """Token by token, against numpy; a token that one of them has no number for is not usable."""
    rng = np.random.default_rng(0)
    loss, valid = rng.normal(3, 1, (4, 50)).astype(np.float32), np.ones((4, 50), bool)
    read = rng.normal(3, 1, (3, 4, 50)).astype(np.float32)
    read[1, 2, 7] = np.nan
    selection = Selection(score=score, reference=["a", "b", "c"], combine=combine, ratio=0.4)
    assert selection.columns() == tuple(f"scores/{name}/{statistic}" for name in "abc")
    chosen, usable, scores = jit_select_tokens(
        selection, loss, dict(zip(selection.columns(), read, strict=True)), valid, KEY
    )
    together = NUMPY[combine](read, axis=0)
    expected = loss - together if score == "excess" else -together
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert np.argwhere(~np.asarray(usable)).tolist() == [[2, 7]]
    assert chosen.sum() == round(0.4 * 199) and not chosen[2, 7]


def test_one_reference_is_the_same_as_a_list_of_it():
    loss, column = jnp.array([[3.0, 1, 2]]), {"scores/a/loss": jnp.array([[1.0, 2, 0.3]])}
    scores = [jit_select_tokens(Selection(reference=name), loss, column, loss > 0, KEY).scores for name in ("a", ["a"])]
    np.testing.assert_array_equal(*scores)


def _top(scores: np.ndarray, valid: np.ndarray, ratio: float) -> set[int]:
    """jax.lax.top_k is the oracle, as in test_score_selection."""
    count = int(valid.sum())
    kept = min(count, max(1, int(np.floor(count * ratio + 0.5))))
    return set(jax.lax.top_k(jnp.where(valid, scores, -jnp.inf).reshape(-1), kept)[1].tolist()) if kept else set()


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, (2, 4, 16), elements=st.sampled_from([0.5, 1.0, 2.0, 3.0, np.nan, np.inf])),
    hnp.arrays(bool, (4, 16)),
    st.sampled_from(["intersection", "union"]),
)
def test_sets_of_the_usable_tokens(read, valid, keeps):
    """Whatever the ties, masks and tokens without a score: the two sets, each of its own share, met or joined."""
    columns = {"scores/self/loss": read[0], "scores/self/entropy": read[1]}
    chosen, usable, _ = jit_select_tokens(
        CombinedSelection([LIKELY, CERTAIN], keeps), jnp.zeros((4, 16)), columns, valid, KEY
    )
    finite = valid & np.isfinite(read).all(axis=0)
    np.testing.assert_array_equal(usable, finite)
    likely, certain = _top(-read[0], finite, 0.7), _top(-read[1], finite, 0.5)
    expected = likely & certain if keeps == "intersection" else likely | certain
    assert set(np.flatnonzero(chosen).tolist()) == expected


def _columns(seed: int = 0, rows: int = 16) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    read = rng.normal(3, 1, (2, rows, 64)).astype(np.float32)
    return rng.normal(3, 1, (rows, 64)).astype(np.float32), {
        "scores/self/loss": read[0],
        "scores/self/entropy": read[1],
    }


@pytest.mark.parametrize("keeps", ["intersection", "union"])
def test_eight_devices_choose_as_one(keeps):
    (loss, columns), found = _columns(), []
    valid = np.random.default_rng(1).random(loss.shape) < 0.9
    for devices in (1, 8):
        with jax.set_mesh(mesh_lib.make_mesh(devices=jax.devices()[:devices])):
            found.append(
                jit_select_tokens(CombinedSelection([LIKELY, CERTAIN], keeps), loss, columns, valid, KEY).selected
            )
    np.testing.assert_array_equal(*found)


def test_each_random_part_draws_for_itself():
    """Two random halves have a quarter in common, not a half."""
    halves = [Selection("random", 0.5), Selection("random", 0.5)]
    chosen = jit_select_tokens(
        CombinedSelection(halves), jnp.zeros((4, 256)), {}, jnp.ones((4, 256), bool), KEY
    ).selected
    assert 200 < int(chosen.sum()) < 312


def test_the_room_of_a_filtered_backward():
    """An intersection fits where its smallest part does, a union where all parts do; more are dropped, and which."""
    parts = [
        Selection("reference", 0.3, reference="self", gradient="filtered"),
        Selection("entropy", 0.2, reference="self", gradient="filtered"),
    ]
    assert [filtered_capacity(part, (16, 64)) for part in parts] == [309, 206]
    assert filtered_capacity(CombinedSelection(parts), (16, 64)) == 206
    assert filtered_capacity(CombinedSelection(parts, "union"), (16, 64)) == 309 + 206
    assert filtered_capacity(CombinedSelection([*parts, *parts], "union"), (16, 64)) == 16 * 64
    loss, columns = _columns()
    valid = np.ones(loss.shape, bool)
    for keeps in ("intersection", "union"):
        whole = jit_select_tokens(CombinedSelection(parts, keeps), loss, columns, valid, KEY)
        kept = within_capacity(CombinedSelection(parts, keeps), whole.scores, whole.selected)
        np.testing.assert_array_equal(kept, whole.selected)
    small = [Selection("reference", 0.3, reference="self", gradient="filtered", capacity=0.1)] * 2
    assert filtered_capacity(CombinedSelection(small, "union"), (16, 64)) == 103
    kept = within_capacity(CombinedSelection(small, "union"), whole.scores, whole.selected)
    assert kept.sum() == 103
    low = -columns["scores/self/loss"]
    assert low[np.asarray(whole.selected & ~kept)].max() <= low[np.asarray(kept)].min()


@pytest.mark.parametrize(
    "scope, ahead", [("batch", True), ("device", True), ("sequence", False), ("micro_batch", False)]
)
def test_who_competes_across_micro_batches(scope, ahead):
    part = Selection(scope=scope)
    assert (
        competes_across_micro_batches(part) == competes_across_micro_batches(CombinedSelection([part, part])) == ahead
    )
    threshold = Selection(scope=scope, threshold=0.0)
    assert not competes_across_micro_batches(CombinedSelection([threshold, threshold]))
    assert competes_across_micro_batches(CombinedSelection([threshold, part])) == ahead


@pytest.mark.parametrize(
    "code, named, make",
    [
        ("selection-references", "('a', 'a')", lambda: Selection(reference=["a", "a"])),
        ("selection-references", "Selection.reference ()", lambda: Selection(reference=[])),
        ("selection-references", "'scores/web'", lambda: Selection(reference="scores/web")),
        ("setting-unknown-value", "'mean', 'min', 'max'", lambda: Selection(combine="median")),
        ("selection-parts", "CombinedSelection.parts has 1", lambda: CombinedSelection([Selection()])),
        ("setting-unknown-value", "'intersection', 'union'", lambda: CombinedSelection([LIKELY, CERTAIN], "xor")),
        (
            "selection-parts-differ",
            "differ in scope (batch, sequence)",
            lambda: CombinedSelection([Selection(), Selection(scope="sequence")]),
        ),
        (
            "selection-parts-differ",
            "differ in gradient (exact, filtered)",
            lambda: CombinedSelection([LIKELY, Selection(gradient="filtered")]),
        ),
        (
            "phase-keep-ratio",
            "Phase.keep_ratio",
            lambda: Phase(3, selection=CombinedSelection([LIKELY, CERTAIN]), keep_ratio=Schedule([SchedulePart(0.5)])),
        ),
    ],
)
def test_wrong_settings_are_refused(code, named, make):
    assert named in toy.refused(code, make)


def _with_column(corpus: Corpus, name: str, seed: int, fingerprint: str, statistics=("loss",)) -> None:
    values = np.random.default_rng(seed).normal(4, 1, (corpus.num_rows, corpus.sequence_length)).astype(np.float32)
    column = corpus.create_score(name, statistics, reference={"fingerprint": fingerprint})
    column.write(0, {statistic: np.roll(values, i) for i, statistic in enumerate(statistics)})


def test_a_run_by_an_intersection(corpus_copy, tmp_path, capsys):
    """Through plan, steps on eight devices in micro-batches, and metrics: what trains is what both keep."""
    both = CombinedSelection(
        [Selection("reference", 0.7, reference="self"), Selection("entropy", 0.7, reference="self")]
    )
    missing = toy.refusal(toy.train_here, tmp_path / "none", [toy.phase(corpus_copy, selection=both)])
    assert "has no score 'self' (it has none)" in missing
    _with_column(corpus_copy, "self", 0, "abc", ("loss", "entropy"))
    phases = [toy.phase(corpus_copy, steps=2, batch_size=16, selection=both)]
    plan = Plan(phases, 0)
    assert plan.references() == {f"{corpus_copy.path}/scores/self/{s}": "abc" for s in ("loss", "entropy")}
    toy.train(str(tmp_path / "run"), toy.MODEL, phases, toy.SCHEDULE, gradient_accumulation_steps=2)
    assert "70% by reference and 70% by entropy (40% to 70% of all), per batch" in capsys.readouterr().out
    either = CombinedSelection([*both.parts, Selection("loss", threshold=1.0)], "union")
    unions = Plan([*phases, toy.phase(corpus_copy, steps=2, selection=either)], 0)
    said = "70% by reference or 70% by entropy or above 1 by loss (70% to 100% of all), per batch"
    assert said in plan_summary.table(unions)
    plan_summary.draw(unions, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    for step, row in enumerate(RunDirectory(tmp_path / "run").metrics()):
        batch = plan.batch(step)
        valid = batch.loss_mask & (batch.positions > 0)
        likely, certain = (_top(-batch.scores[column], valid, 0.7) for column in both.columns())
        assert row["selected_share"] == pytest.approx(len(likely & certain) / valid.sum(), rel=1e-6)
        assert 0.4 < row["selected_share"] < 0.6  # independent scores: 49 %
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["phases"][0]["selection"]
    assert [part["score"] for part in recorded["parts"]] == ["reference", "entropy"]


def test_several_references_are_refused_where_all_are_the_model_itself(corpus_copy, reference):
    with toy.one_device():
        params = load_model(str(reference), mesh_lib.make_mesh()).params
    for name, fingerprint in (("a", params_fingerprint(params)), ("b", params_fingerprint(params)), ("c", "another")):
        _with_column(corpus_copy, name, ord(name), fingerprint)

    def plan(selection: Selection | CombinedSelection) -> Plan:
        return Plan([toy.phase(corpus_copy, selection=selection)], 0)

    code = "reference-is-initial-model"
    both = plan(Selection(reference=["a", "b"]))
    assert "column a, b of" in toy.refused(code, refuse_equal_reference, params, both)
    part = CombinedSelection([Selection(reference="b"), Selection("loss")])
    assert "column b of" in toy.refused(code, refuse_equal_reference, params, plan(part))
    refuse_equal_reference(params, one_is_another := plan(Selection(reference=["a", "c"], combine="max")))
    assert "60% by excess (max of a, c), per batch" in plan_summary.table(one_is_another)


def test_a_choice_is_hashable_and_compares(corpus):
    """As a setting of a compiled step: equal ones are one program."""
    assert (
        CombinedSelection([LIKELY, CERTAIN])
        == CombinedSelection((LIKELY, CERTAIN))
        != CombinedSelection([CERTAIN, LIKELY])
    )
    assert (
        len({CombinedSelection([LIKELY, CERTAIN]), CombinedSelection([LIKELY, CERTAIN]), Selection(reference=["a"])})
        == 2
    )
    assert SelectionMask._fields == ("selected", "usable", "scores")
