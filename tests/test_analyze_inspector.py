"""The inspector: its numbers are the model's, its text is the corpus', and nothing in the text can run."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import browser as browsers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.analyze.inspector import analyze_inspect, selected_tokens
from slm_jax.analyze.inspector_page import Column, Model, Rows, inspector_page, page_data
from slm_jax.data.batches import make_batch
from slm_jax.data.corpus import Corpus
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.evaluate.predictions import Predictions, predict_rows
from slm_jax.models import forward
from slm_jax.score.reference import load_model
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import predicted

ROW_LENGTH = 64
TEXTS = {
    "hostile": "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "signs": "<!-- \u2028 \u2029 &amp; {{ 7*7 }} \x01 \x7f ]]> %} ${x} \\u003c",
    "rtl": "שלום עולם، مرحبا 123 (ok)\nسطر",
    "cjk": "東京は日本。한국 漢字かな",
    "family": "a 👩‍👩‍👧‍👦 b",
    "emoji": "flag 🇩🇪 e\u0301 \U0001d49c नमस्ते",
    "plain": "The farm has 12 hens.\n\n\tTwo  spaces.\nThe end",
}


class Made(NamedTuple):
    """A corpus of TEXTS and fillers, a run with checkpoints 3 and 6 and losses kept at 3 and 5, the page of both, and
    what the command said."""

    corpus: Corpus
    run: Path
    page: Path
    output: str


@pytest.fixture(scope="module")
def made(tmp_path_factory, reference, shell) -> Made:
    folder = tmp_path_factory.mktemp("inspector")
    texts = [(name, text) for name, text in TEXTS.items()]
    texts += [("filler", f"{' '.join(toy.WORDS[i % 9 : i % 9 + 4])} number {i}") for i in range(40)]
    records = [{"text": text, "url": f"https://farm.example/{name}", "source": f"web/{name}"} for name, text in texts]
    corpus = toy.write_documents(folder / "corpus", records, ROW_LENGTH)
    rng = np.random.default_rng(0)
    for name, run, step in (("reference", "clean", 9), ("late", "other", 2), ("early", "other", 1)):
        loss = rng.uniform(3, 6, (corpus.num_rows, ROW_LENGTH)).astype(np.float32)
        corpus.create_score(name, reference={"run": run, "step": step}).write(0, {"loss": loss})
    run = shutil.copytree(reference, folder / "run")
    about = json.loads((run / "run.json").read_text())
    about["settings"]["evaluators"] = [{"name": "trace", "corpus": corpus.path, "keep_tokens": True}]
    (run / "run.json").write_text(json.dumps(about))
    (run / "token_losses" / "trace").mkdir(parents=True)
    for step in (3, 5):
        np.save(run / "token_losses" / "trace" / f"{step}.npy", np.full((20, ROW_LENGTH), step, np.float32))
    command = ["analyze", "inspect", "run", "--corpus=corpus", "--output=page.html", "--kept=trace"]
    command += ["--gin.analyze_inspect.columns=['late','early']", "--gin.analyze_inspect.predictions=3"]
    code, output, errors = shell(*command, folder=folder)
    assert code == 0, errors
    return Made(corpus, run, folder / "page.html", output)


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def unpacked(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), np.dtype(packed["type"].lower()).newbyteorder("<"))


def test_predictions_are_the_softmax_of_the_logits(made):
    """On eight devices, in batches that the rows do not fill."""
    mesh = mesh_lib.make_mesh()
    block = made.corpus.read(np.arange(5))
    with jax.set_mesh(mesh):
        model = load_model(str(made.run), mesh, 6)
        found = predict_rows(model, block["tokens"], block["segment_ids"], mesh, 8, 4)
    one = load_model(str(made.run), mesh_lib.make_mesh(devices=jax.devices()[:1]))
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
