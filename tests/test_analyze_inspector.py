"""The inspector: its numbers are the model's, its text is the corpus', and nothing in the text can run."""

import base64
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from inspector_pages import KEPT, TEXTS, data_of, unpacked

from slm_jax import mesh as mesh_lib
from slm_jax.analyze.inspector import analyze_inspect, predict_rows
from slm_jax.data.batches import make_batch
from slm_jax.models import forward
from slm_jax.models.trained_model import load_model
from slm_jax.score.selection import CombinedSelection, Selection
from slm_jax.score.token_loss import predicted


def test_predictions_are_the_softmax_of_the_logits(inspected):
    """On eight devices, in batches that the rows do not fill."""
    mesh = mesh_lib.make_mesh()
    block = inspected.corpus.read(np.arange(5))
    with jax.set_mesh(mesh):
        model = load_model(str(inspected.run), mesh, 6)
        found = predict_rows(model, block["tokens"], block["segment_ids"], mesh, 8, 4)
    one = load_model(str(inspected.run), mesh_lib.make_mesh(devices=jax.devices()[:1]))
    batch = make_batch(block["tokens"], block["segment_ids"], block["loss_mask"])
    tokens, positions, segments = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    hidden = forward.hidden_states(one.params, one.config, tokens, positions, segments)
    shares = np.asarray(jax.nn.softmax(forward.logits(one.params, one.config, hidden), axis=-1))
    seen = np.asarray(predicted(batch.segment_ids))
    before = np.roll(shares, 1, axis=1)  # what the token before predicts
    own = np.take_along_axis(before, batch.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.loss[seen], -np.log(own[seen]), rtol=1e-4)
    np.testing.assert_allclose(found.probabilities[seen], np.sort(before, axis=-1)[..., :-5:-1][seen], rtol=1e-4)
    chosen = np.take_along_axis(before, found.tokens.astype(np.int64), axis=-1)
    np.testing.assert_allclose(chosen[seen], found.probabilities[seen], rtol=1e-4)
    assert (found.loss[~seen] == 0).all() and found.tokens.max() < toy.MODEL.vocab_size


def test_the_command_says_what_it_shows(inspected):
    tokens = int((inspected.corpus.read(np.arange(KEPT))["segment_ids"] > 0).sum())
    first, last = inspected.output.splitlines()[0], inspected.output.splitlines()[-1]
    assert first == f"inspect: {KEPT} rows of corpus ({tokens:,} tokens), run, late, early -> page.html"
    assert last.startswith("inspect: done; open page.html (")


def test_the_page_holds_text_and_numbers_as_they_are(inspected):
    """Losses of the model, of columns and kept ones in the order of steps; documents as their texts, each token at its
    place in them."""
    data, block = data_of(inspected.page.read_text()), inspected.corpus.read(np.arange(KEPT))
    texts = dict(enumerate(["\ufffd\ufffd本 ends here", *TEXTS.values()]))
    assert {doc["row"]: doc["text"] for doc in data["documents"][: len(texts)]} == texts
    assert [doc["id"] for doc in data["documents"][:3]] == ["", "hostile:1", "signs:2"]
    assert data["documents"][1]["url"] == "https://farm.example/hostile"
    inside = block["segment_ids"] > 0
    ids, begin, end = (unpacked(data["tokens"][name]) for name in ("id", "begin", "end"))
    assert (ids == block["tokens"][inside]).all()
    for doc in data["documents"]:
        units = doc["text"].encode("utf-16-le")
        places = slice(doc["first"], doc["last"])
        for token, first, last in zip(ids[places], begin[places], end[places], strict=True):
            character = units[2 * first : 2 * last].decode("utf-16-le")
            assert (
                (token < 3 and character == "") or bytes([token - 3]) in character.encode() or character[0] == "\ufffd"
            )
    seen = np.asarray(predicted(block["segment_ids"].astype(np.int32)))[inside]
    run, other = data["models"]
    assert [(c["step"], c["origin"].split()[0]) for c in run["columns"]] == [
        (3, "computed"),
        (5, "kept"),
        (6, "computed"),
    ]
    assert [(c["step"], c["origin"]) for c in other["columns"]] == [(1, "score column early"), (2, "score column late")]
    early = inspected.corpus.read(np.arange(KEPT), ["scores/early/loss"])["scores/early/loss"][inside]
    found = unpacked(other["columns"][0]["loss"])
    assert (found[seen] == early[seen]).all() and np.isnan(found[~seen]).all()
    assert (unpacked(run["columns"][1]["loss"])[seen] == 5).all()
    with toy.one_device():
        mesh = mesh_lib.make_mesh()
        model = load_model(str(inspected.run), mesh, 3)
    with jax.set_mesh(mesh):
        losses = predict_rows(model, block["tokens"], block["segment_ids"], mesh, 8, 3)
    np.testing.assert_allclose(unpacked(run["columns"][0]["loss"])[seen], losses.loss[inside][seen], rtol=1e-4)
    top = run["columns"][0]["top"]
    likeliest = [data["pieces"][i] for i in unpacked(top["piece"])[::3]]
    vocabulary = inspected.corpus.vocabulary()
    assert likeliest == [vocabulary.piece(i) if i < 259 else "<259>" for i in losses.tokens[inside][:, 0]]


def test_selected_is_the_share_of_these_rows(inspected):
    data, block = data_of(inspected.page.read_text()), inspected.corpus.read(np.arange(KEPT))
    counts, reference = unpacked(data["tokens"]["counts"]) > 0, unpacked(data["reference"])
    inside = block["segment_ids"] > 0
    assert counts.sum() == (block["loss_mask"] & np.asarray(predicted(block["segment_ids"].astype(np.int32)))).sum()
    for column in (column for model in data["models"] for column in model["columns"]):
        selected, loss = unpacked(column["selected"]) > 0, unpacked(column["loss"])
        assert selected.sum() == int(0.6 * counts.sum() + 0.5) and not selected[~counts].any()
        excess = (loss - reference)[counts]
        assert excess[selected[counts]].min() >= excess[~selected[counts]].max()
    assert "The rows of this page are the batch" in data["selection"] and inside.sum() == len(counts)


def test_several_references_and_what_two_selections_both_keep(inspected, tmp_path):
    parts = [Selection(ratio=0.6, reference=["early", "late"], combine="min"), Selection(score="loss", ratio=0.5)]
    page, path = tmp_path / "page.html", inspected.corpus.path
    analyze_inspect(path, columns=["reference"], selection=CombinedSelection(parts), output=str(page), rows=KEPT)
    data, block = data_of(page.read_text()), inspected.corpus.read(np.arange(KEPT))
    assert data["selection"].startswith(
        "Selection: 60% by excess (min of early, late) and 50% by loss (10% to 50% of all), per batch. The rows"
    )
    names = [f"scores/{name}/loss" for name in ("early", "late", "reference")]
    early, late, loss = (inspected.corpus.read(np.arange(KEPT), [name])[name].astype(np.float32) for name in names)
    lowest, counts = np.minimum(early, late), block["loss_mask"] & predicted(block["segment_ids"].astype(np.int32))
    inside = block["segment_ids"] > 0
    shown = unpacked(data["reference"])
    assert (shown[np.isfinite(shown)] == lowest[inside][np.isfinite(shown)]).all() and np.isfinite(shown).any()
    both = []
    for score, ratio in ((loss - lowest, 0.6), (loss, 0.5)):
        count = int(ratio * counts.sum() + 0.5)
        both.append(counts & (score >= np.sort(score[counts])[-count]))
    [column] = data["models"][0]["columns"]
    assert ((unpacked(column["selected"]) > 0) == (both[0] & both[1])[inside]).all()


def test_text_never_runs_and_nothing_comes_from_elsewhere(inspected):
    page = inspected.page.read_text(encoding="utf-8")
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="data">', "<script>"]
    assert page.isascii() or not set("\u2028\u2029") & set(page)
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert not set("<>&") & set(data) and data.isascii()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src &#39;sha256-{digest}&#39;" in policy and "default-src &#39;none&#39;" in policy
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "document.write" not in script
    shown = page.replace(data, "")
    assert set(re.findall(r"https?://[\w./]+", shown)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<(link|img|iframe|object)\b|@import|url\(", shown)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', shown)) == {"#documents", "#aside"}


@pytest.mark.parametrize(
    "settings, code, named",
    [
        ({"runs": []}, "inspect-nothing", "columns"),
        ({"kept": "nothing"}, "kept-losses-not-found", "'nothing'"),
        ({"steps": [4]}, "inspect-unknown-step", "step 4"),
        ({"first_row": 100}, "inspect-first-row", "100"),
        ({"columns": ["lost"]}, None, "'lost'"),
        ({"batch_size": 3}, None, "3 rows"),
        ({"selection": Selection(reference="lost")}, None, "'lost'"),
        ({"rows": 0}, None, "analyze_inspect.rows is 0"),
    ],
)
def test_refusals(settings, code, named, inspected, tmp_path):
    given = {"runs": [str(inspected.run)], "output": str(tmp_path / "page.html"), **settings}
    if code:
        assert named in toy.refused(code, analyze_inspect, inspected.corpus.path, **given)
    else:  # of other modules
        assert named in toy.refusal(analyze_inspect, inspected.corpus.path, **given)
    assert not list(tmp_path.iterdir())
