"""`analyze dynamics`: from score columns, or a run's checkpoints, to classes, numbers, figures and text."""

import json
import re
import shutil
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.analyze.columns import read_rows
from slm_jax.analyze.dynamics import (
    CLASSES,
    FALLING,
    HIGH,
    LOW,
    NO_CLASS,
    RISING,
    analyze_dynamics,
    class_counts,
    class_means,
    classify,
    fit_lines,
    most_fluctuating,
)
from slm_jax.analyze.page import one_line, visible
from slm_jax.analyze.passages import context, segments, varied
from slm_jax.data.corpus import Corpus
from slm_jax.data.token_text import TokenText

HOSTILE = ["<script>alert(1)</script>", "</div>", "&amp;", '" onmouseover="x', "a\x00b", "日本語", "😀", "שלום", "\nx"]
FIGURES = {"classes", "classes_by_source", "fluctuating_hh", "fluctuating_ll"}


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Corpus:
    """A corpus with the columns of three checkpoints, no model's: the loss of a token follows from its id alone."""
    path = tmp_path_factory.mktemp("held") / "held"
    corpus = toy.write_corpus(path, seed=3, rows=24, sequence_length=48, words=[*toy.WORDS, *HOSTILE])
    kind = corpus.read(np.arange(24))["tokens"] % 4
    of_class = np.array([[[5.0, 6.5, 5.0], [2.0, 2.2, 2.5], [4.0, 3.0, 1.0], [1.0, 0.5, 1.0]]])
    for number, step in enumerate((0, 10, 20)):
        toy.write_score(corpus, f"causal-{step}", of_class[0, kind, number].astype(np.float32), step)
    return corpus


@pytest.fixture(scope="module")
def analyzed(held, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("analyzed") / "dynamics"
    analyze_dynamics(held.path, columns="causal-*", output=str(folder), examples=3, documents=6)
    return folder


def test_what_is_written_is_what_the_losses_say(held, analyzed):
    record = json.loads((analyzed / "dynamics.json").read_text())
    rows = read_rows(held.path, None)
    kinds = rows.tokens % 4
    classes = np.load(analyzed / "classes.npy", allow_pickle=False)
    np.testing.assert_array_equal(classes, np.where(rows.valid, kinds, -1))
    assert [about["step"] for about in record["checkpoints"]] == [0, 10, 20]
    assert record["tokens"] == rows.valid.sum() and record["without_class"] == 0
    for kind, name in enumerate(CLASSES):
        about = record["classes"][name]
        assert about["tokens"] == (kinds[rows.valid] == kind).sum()
        assert about["share"] == pytest.approx(about["tokens"] / record["tokens"])
    assert record["classes"]["H→L"]["mean_loss"] == pytest.approx([4.0, 3.0, 1.0])
    assert record["classes"]["H→H"]["deviation_median"] == pytest.approx(np.sqrt(0.5))
    assert sum(about["tokens"] for about in record["by_source"].values()) == record["tokens"]
    assert record["fingerprint"] == held.fingerprint


def test_examples_stand_in_their_text(held, analyzed):
    record = json.loads((analyzed / "dynamics.json").read_text())
    rows, vocabulary = read_rows(held.path, None), held.vocabulary()
    for name in ("H→H", "L→L"):
        examples = record["fluctuating"][name]
        assert len(examples) == 3
        for about in examples:
            token = int(rows.tokens[about["row"], about["place"]])
            assert CLASSES[token % 4] == name
            assert len(about["losses"]) == 3 and about["token"]
            around = about["before"] + about["token"] + about["after"]
            inside = rows.segment_ids[about["row"]] == rows.segment_ids[about["row"], about["place"]]
            whole = visible(vocabulary.decode(rows.tokens[about["row"], inside].tolist()))
            assert around.replace("\ufffd", "").replace("</s>", "") in whole


def test_figures_are_whole_and_need_nothing_from_elsewhere(analyzed):
    assert {path.stem for path in analyzed.glob("*.png")} == {path.stem for path in analyzed.glob("*.svg")} == FIGURES
    assert not list(analyzed.glob("*.partial"))
    for path in analyzed.glob("*.svg"):
        root = xml.etree.ElementTree.fromstring(path.read_bytes())
        links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
    for path in analyzed.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and len(path.read_bytes()) > 5000


class Page(HTMLParser):
    """Tags, and the text of the spans of tokens, by class."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.tokens, self.attributes = set(), [], set()
        self.in_text, self.mark = 0, None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.in_text = values.get("class") == "text" if tag == "div" else self.in_text
        if tag == "span" and self.in_text:
            self.tokens.append((values["class"], "", values.get("title", "")))
            self.mark = values["class"]

    def handle_endtag(self, tag):
        self.mark = None if tag == "span" else self.mark
        self.in_text = False if tag == "div" else self.in_text

    def handle_data(self, data):
        if self.mark is not None:
            mark, text, title = self.tokens[-1]
            self.tokens[-1] = (mark, text + data, title)


def test_text_stays_text(held, analyzed):
    """Nothing of the corpus becomes a tag, an attribute or a script; every token is shaded by its class."""
    source = (analyzed / "text.html").read_text()
    page = Page(source)
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "p", "ul", "li", "label", "input", "span",
        "article", "header", "div", "bdi"}  # fmt: skip
    assert not any(name.startswith("on") for name in page.attributes) and "src" not in page.attributes
    assert "default-src &#39;none&#39;; script-src &#39;none&#39;" in source and "\x00" not in source
    text = "".join(text for _, text, _ in page.tokens)
    assert all(word in text for word in ("<script>alert(1)</script>", "日本語", "😀", "שלום", "a\u2400b"))
    marks = {"hh": "H→H", "lh": "L→H", "hl": "H→L", "ll": "L→L"}
    for mark, _, title in page.tokens:
        mark = mark.split()[0]
        assert title.startswith(f"{marks[mark]}: line ") if mark in marks else (mark == "none" and not title)


def test_the_text_around_a_token_ends_with_its_document(held):
    rows, vocabulary = read_rows(held.path, None), held.vocabulary()
    row, reader = 0, TokenText(vocabulary)
    for place in np.flatnonzero(rows.valid[row])[:20].tolist():
        before, own, after = context(rows, reader, row, place, width=100)
        inside = rows.segment_ids[row] == rows.segment_ids[row, place]
        document = visible(vocabulary.decode(rows.tokens[row, inside].tolist()))
        if rows.tokens[row, place] > vocabulary.eos_id and "\ufffd" not in own:
            assert before + own + after == document or own in document
    assert one_line("a\nb\tc\x07") == "a↵b⇥c␇"


def test_named_columns_thresholds_and_rows(held, tmp_path):
    record = analyze_dynamics(
        held.path, columns="causal-20,causal-0", rows=5, rise=9.0, fall=1.5, high=1.0, output=str(tmp_path / "out")
    )
    assert [about["name"] for about in record["checkpoints"]] == ["causal-20", "causal-0"]  # as named
    assert record["high"] == 1.0 and np.load(tmp_path / "out" / "classes.npy").shape == (5, 48)
    assert record["classes"]["H→L"]["tokens"] == record["classes"]["L→H"]["tokens"] == 0
    assert record["classes"]["L→L"]["share"] == pytest.approx(record["by_source"]["a"]["L→L"], abs=0.2)


def test_a_run_s_checkpoints_are_scored_where_that_is_asked_for(corpus_copy, reference, shell, tmp_path):
    """As a command. The columns are those of the stage `score`, and a second call scores nothing."""
    arguments = ["analyze", "dynamics", f"--corpus={corpus_copy.path}", f"--run={reference}", "--output=out"]
    code, _, errors = shell(*arguments, folder=tmp_path)
    assert code == 1 and "lacks the losses of 2 of the 2 checkpoints" in errors and "--score_missing" in errors
    code, output, _ = shell(*arguments, "--score_missing", folder=tmp_path)
    assert code == 0 and output.count("score: done") == 2
    assert re.search(r"\d+ tokens, 2 checkpoints: H→H [\d.]+%", output)
    again = Corpus.open(corpus_copy.path)
    assert again.score_names() == ["run-3", "run-6"] and again.score("run-6").reference["step"] == 6
    rows = np.arange(again.num_rows)
    losses = [again.read(rows, [f"scores/run-{step}/loss"])[f"scores/run-{step}/loss"] for step in (3, 6)]
    valid = read_rows(again.path, None).valid
    classes = np.load(tmp_path / "out" / "classes.npy", allow_pickle=False)
    assert ((losses[1] - losses[0] < -0.2)[valid] == (classes == CLASSES.index("H→L"))[valid]).mean() > 0.999
    code, output, _ = shell(*arguments, "--score_missing", folder=tmp_path)
    assert code == 0 and "score:" not in output

    # Another run in a folder of the same name: the columns are not its own.
    other = tmp_path / "other" / reference.name
    shutil.copytree(reference, other)
    shutil.rmtree(other / "checkpoints" / "6")
    (other / "checkpoints" / "3").rename(other / "checkpoints" / "6")
    arguments[3] = f"--run={other}"
    code, _, errors = shell(*arguments, "--score_missing", folder=tmp_path)
    assert code == 1 and f"score 'run-6' of {again.path} was made by step 6 of {reference}, which is another" in errors


@pytest.fixture(scope="module")
def traced(corpus, tmp_path_factory) -> Path:
    """A run that stored the losses of 4 rows at steps 0, 2 and 4, and kept one checkpoint."""
    from slm_jax.evaluate.perplexity import HeldOut

    run = tmp_path_factory.mktemp("traced") / "run"
    corpus = Corpus.open(shutil.copytree(corpus.path, run.parent / "corpus"))
    evaluators = [HeldOut("trace", corpus.path, rows=4, keep_tokens=True)]
    phases = [toy.phase(corpus, steps=4)]
    toy.train_here(run, phases, evaluators=evaluators, evaluate_every=2, checkpoint_every=4, keep_checkpoints=1)
    return run


def test_losses_stored_in_training_serve_as_well(traced):
    record = analyze_dynamics(run=str(traced), trace="trace")
    assert [about["step"] for about in record["checkpoints"]] == [0, 2, 4] and record["rows"] == 4
    assert record["classes"]["H→L"]["share"] > 0.5 and record["corpus"] == str(traced.parent / "corpus")
    assert (traced / "dynamics" / "text.html").exists()


def test_where_a_run_began_is_its_step_0(traced, corpus_copy, reference, tmp_path):
    """The run that it started from is scored as step 0 where its own checkpoint 0 is gone."""
    run = tmp_path / "branch"
    phases = [toy.phase(corpus_copy, steps=2)]
    toy.train_here(run, phases, init_from=str(reference), init_step=3, checkpoint_every=2, keep_checkpoints=1)
    shutil.rmtree(run / "checkpoints" / "0", ignore_errors=True)
    with toy.one_device():
        record = analyze_dynamics(corpus_copy.path, str(run), score_missing=True)
    assert [about["name"] for about in record["checkpoints"]] == ["branch-0", "branch-2"]
    about = Corpus.open(corpus_copy.path).score("branch-0").reference
    assert about["run"] == str(reference) and about["step"] == 3


def test_refusals(held, traced, reference, tmp_path):
    run = str(reference)

    def refused(code: str, *arguments, **settings) -> str:
        return toy.refused(code, analyze_dynamics, *arguments, **{"output": str(tmp_path / "none"), **settings})

    assert "analyze_dynamics.corpus" in refused("dynamics-needs-corpus", run=run)
    refused("dynamics-run-or-columns", held.path)
    refused("dynamics-run-or-columns", held.path, run, columns="causal-*")
    assert "causal-0" in (line := refused("columns-unmatched", held.path, columns="other-*")) and "'other-*'" in line
    assert "causal-0,causal-0" in refused("columns-repeated", held.path, columns="causal-0,causal-0")
    assert "causal-10" in refused("dynamics-one-checkpoint", held.path, columns="causal-10")
    line = refused("checkpoint-not-found", held.path, run, steps=[5])
    assert run in line and "step 5" in line and "3, 6" in line
    assert "'other'" in refused("kept-losses-not-found", run=str(traced), trace="other")
    assert "'trace'" in refused("kept-losses-not-found", run=run, trace="trace")
    assert "analyze_dynamics.run" in refused("dynamics-trace-of-run", held.path, trace="trace")
    assert "gs://bucket/x" in refused(
        "output-not-local", held.path, columns="causal-*", output="gs://bucket/x"
    ).replace("gs:/b", "gs://b")

    def message(*arguments, **settings) -> str:  # of other modules
        return toy.refusal(analyze_dynamics, *arguments, **{"output": str(tmp_path / "none"), **settings})

    assert "has no score 'other'" in message(held.path, columns="causal-0,other")
    assert "analyze_dynamics.rows is 0" in message(held.path, columns="causal-*", rows=0)
    assert str(tmp_path / "nowhere") in message(str(tmp_path / "nowhere"), run)
    assert str(tmp_path) in message(held.path, str(tmp_path))
    assert not (tmp_path / "none").exists()


def test_a_model_counts_once_and_a_column_without_numbers_is_no_class(held, tmp_path):
    corpus = Corpus.open(shutil.copytree(held.path, tmp_path / "held"))
    shutil.copytree(Path(corpus.path) / "scores" / "causal-0", Path(corpus.path) / "scores" / "causal-5")
    output = str(tmp_path / "out")
    line = toy.refused("columns-of-one-model", analyze_dynamics, corpus.path, columns="causal-*", output=output)
    assert "'causal-0' and 'causal-5'" in line
    toy.write_score(corpus, "other-30", np.full((24, 48), np.nan, np.float32), 30)
    columns = "causal-0,other-30"
    line = toy.refused("dynamics-no-finite-loss", analyze_dynamics, corpus.path, columns=columns, output=output)
    assert corpus.path in line


def test_documents_are_shown_in_turn_from_the_sources(tmp_path):
    """With their addresses; short ones only where long ones do not suffice; only those of the rows that were read."""
    texts = [("a", "long " * 8), ("b", "also long " * 6), ("a", "short"), ("a", "another long one " * 3)]
    records = [{"text": text, "url": f"https://{i}.org", "source": name} for i, (name, text) in enumerate(texts)]
    corpus = toy.write_documents(tmp_path / "corpus", records, 64, "split")
    rows = read_rows(corpus.path, None)
    found = segments(rows)
    assert sum(segment.length for segment in found) == (rows.segment_ids > 0).sum()
    begun = {segment.url: segment.source for segment in found if segment.url}
    assert begun == {record["url"]: record["source"] for record in records}
    first, second, *_ = shown_first = varied(found, 9, least_tokens=20)
    assert {first.source, second.source} == {"a", "b"} and len(shown_first) == len(found)
    lengths = [segment.length for segment in shown_first if segment.source == "a"]
    assert [length >= 20 for length in lengths] == sorted((length >= 20 for length in lengths), reverse=True)
    assert {segment.row for segment in segments(read_rows(corpus.path, 1))} == {0}


# ---- Lines and classes


def kinds(losses, **thresholds) -> list[str]:
    losses = np.array(losses, float).T
    found, _ = classify(losses, fit_lines(losses), **thresholds)
    return [CLASSES[kind] if kind != NO_CLASS else "none" for kind in found]


def test_the_worked_check_of_the_paper():
    """l = 1.0, 0.9, 0.8, 0.7: a = -0.1, n = 3, ΔL = -0.3, so H→L."""
    losses = np.array([[1.0], [0.9], [0.8], [0.7]])
    lines = fit_lines(losses)
    np.testing.assert_allclose(lines.change, [-0.3], rtol=1e-12)
    np.testing.assert_allclose(lines.mean - lines.change / 2, [1.0], rtol=1e-12)  # L_start = b
    np.testing.assert_allclose(lines.variance, [0.0], atol=1e-24)
    assert kinds([[1.0, 0.9, 0.8, 0.7]]) == ["H→L"]


def test_a_line_is_that_of_numpy():
    losses = np.random.default_rng(0).normal(3, 1, (7, 50))
    lines = fit_lines(losses.astype(np.float32))
    slope, start = np.polyfit(np.arange(7), losses, 1)
    np.testing.assert_allclose(lines.change, slope * 6, atol=1e-5)
    np.testing.assert_allclose(lines.mean - lines.change / 2, start, atol=1e-5)
    residual = losses - (start + slope * np.arange(7)[:, None])
    np.testing.assert_allclose(lines.variance, np.mean(residual**2, axis=0), atol=1e-5)


def test_a_change_of_exactly_the_threshold_is_no_change():
    """The band is closed: -0.2 <= ΔL <= 0.2."""
    up, down = [0.0, 0.1, 0.2], [0.2, 0.1, 0.0]
    assert kinds([up, down, [5.0, 5.0, 5.0]]) == ["L→L", "L→L", "H→H"]
    past = np.nextafter(0.2, 1)
    assert kinds([[0.0, past / 2, past], [past, past / 2, 0.0]], high=9.0) == ["L→H", "H→L"]
    assert kinds([[1.0, 1.5], [1.5, 1.0]], rise=0.5, fall=0.5) == ["H→H", "L→L"]
    assert kinds([[1.0, 1.5], [1.5, 1.0]], rise=0.5, fall=0.25) == ["H→H", "H→L"]


def test_a_last_loss_equal_to_the_mean_is_low():
    """l_n <= L_mean is L→L; L_mean is of the last losses of all tokens, those that moved among them."""
    assert kinds([[2.0, 2.0], [2.0, 2.0]]) == ["L→L", "L→L"]
    assert kinds([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]]) == ["L→L", "H→H", "L→L"]
    assert kinds([[2.0, 2.0], [9.0, 1.0]]) == ["H→H", "H→L"]  # the mean is 1.5
    assert kinds([[2.0, 2.0], [9.0, 1.0]], high=2.0) == ["L→L", "H→L"]


def test_the_last_loss_decides_not_the_end_of_the_line():
    """ΔL is 0 for both; only the first has its last loss above the mean, though its line ends below."""
    assert kinds([[3.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]]) == ["H→H", "L→L"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_without_a_finite_loss_has_no_class_and_moves_no_other(bad):
    rest = [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [2.0, 2.5, 3.0], [4.0, 3.0, 2.0]]
    for place in range(3):
        token = [9.0, 9.0, 9.0]
        token[place] = bad
        assert kinds([*rest, token]) == [*kinds(rest), "none"]
    assert kinds([[bad, bad]]) == ["none"]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_order_of_the_tokens_changes_nothing(checkpoints, tokens, seed):
    """Multiples of 0.1, so that changes of just the threshold and losses of just the mean are common."""
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 6, (checkpoints, tokens)).astype(np.float32) * np.float32(0.1)
    losses[rng.random(losses.shape) < 0.02] = np.nan
    order = rng.permutation(tokens)
    lines, mixed = fit_lines(losses), fit_lines(losses[:, order])
    found, divides = classify(losses, lines)
    again, same = classify(losses[:, order], mixed)
    np.testing.assert_array_equal(found[order], again)
    assert divides == same or np.isnan([divides, same]).all()
    np.testing.assert_array_equal(lines.variance[order], mixed.variance)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_every_token_is_of_the_class_that_the_rule_names(checkpoints, seed):
    """Against the rule spelled out token by token, in exact steps of a quarter."""
    rng = np.random.default_rng(seed)
    losses = rng.integers(0, 12, (checkpoints, 30)) / 4.0
    change, _ = fit_lines(losses).change, None
    found, divides = classify(losses, fit_lines(losses), rise=0.25, fall=0.25)
    assert divides == pytest.approx(losses[-1].mean(), abs=1e-12)
    for token in range(30):
        moved = RISING if change[token] > 0.25 else FALLING if change[token] < -0.25 else None
        assert found[token] == (moved if moved is not None else HIGH if losses[-1, token] > divides else LOW)
    assert sum(class_counts(found)) == 30


def test_the_mean_of_a_class_and_the_tokens_that_fluctuate_most():
    losses = np.array([[5.0, 5.0, 5.0, 1.0, 0.0], [5.0, 7.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 1.0, np.nan]])
    lines = fit_lines(losses)
    found, _ = classify(losses, lines)
    assert found.tolist() == [HIGH, HIGH, HIGH, LOW, NO_CLASS]
    means = class_means(losses, found)
    np.testing.assert_allclose(means[HIGH], [5.0, 14 / 3, 5.0])
    np.testing.assert_allclose(means[LOW], [1.0, 1.0, 1.0])
    assert np.isnan(means[[RISING, FALLING]]).all()
    ids = np.array([7, 7, 8, 9, 9])
    assert most_fluctuating(found, lines.variance, HIGH, ids, 9).tolist() == [2, 1]  # 0 is the id of 1
    assert most_fluctuating(found, lines.variance, HIGH, ids, 1).tolist() == [2]
    assert most_fluctuating(found, lines.variance, RISING, ids, 3).tolist() == []
