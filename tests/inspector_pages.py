"""What the tests of the inspector look at: a corpus of hard texts, a run on it, and the page of both."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import toy

from slm_jax.data.corpus import Corpus, CorpusWriter
from slm_jax.data.store import Store
from slm_jax.data.vocabulary import ByteVocabulary

SEQUENCE_LENGTH = 64
KEPT = 18  # rows, of the 20 there are
TEXTS = {
    "hostile": "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "signs": "<!-- \u2028 \u2029 &amp; {{ 7*7 }} \x01 \x7f ]]> %} ${x} \\u003c",
    "rtl": "שלום עולם، مرحبا 123 (ok)\nسطر",
    "cjk": "東京は日本。한국 漢字かな",
    "family": "a 👩‍👩‍👧‍👦 b",
    "emoji": "flag 🇩🇪 e\u0301 \U0001d49c नमस्ते",
    "plain": "The farm has 12 hens.\n\n\tTwo  spaces.\nThe end",
}


def write_rows(path: Path, texts: list[tuple[str, str]]) -> Corpus:
    """One document a row; the first row is the end of one that begins elsewhere, within a character. The last document
    carries no loss on its first five letters, as if they were metadata."""
    vocabulary = ByteVocabulary()
    rows = [vocabulary.encode("日本 ends here")[1:]]
    rows += [[vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id] for _, text in texts]
    tokens = np.stack([np.pad(row, (0, SEQUENCE_LENGTH - len(row))) for row in rows]).astype(np.uint16)
    names = list(dict.fromkeys(name for name, _ in texts))
    loss_mask = (tokens > 0) & (tokens != vocabulary.bos_id)
    loss_mask[-1, :6] = False
    writer = CorpusWriter(Store(path), len(rows), SEQUENCE_LENGTH, vocabulary)
    source_ids = np.repeat([0, *(names.index(name) for name, _ in texts)], SEQUENCE_LENGTH).reshape(tokens.shape)
    segment_ids = (tokens > 0).astype(np.uint16)
    columns = {"segment_ids": segment_ids, "loss_mask": loss_mask, "source_ids": source_ids.astype(np.uint8)}
    writer.write({"tokens": tokens, **columns})
    about = [
        {"id": f"{name}:{row}", "source": name, "url": f"https://farm.example/{name}", "row": row, "start": 0}
        for row, (name, _) in enumerate(texts, 1)
    ]
    return writer.finish(pyarrow.Table.from_pylist(about), names, {"settings": {}})


class Made(NamedTuple):
    """A corpus of TEXTS and fillers, a run with checkpoints 3 and 6 and losses kept at 3 and 5, the page of both, and
    what the command said."""

    corpus: Corpus
    run: Path
    page: Path
    output: str


def make(folder: Path, reference: Path, shell: toy.Shell) -> Made:
    corpus = write_rows(folder / "corpus", [*TEXTS.items(), *(("filler", f"{i} hens and 12 ducks") for i in range(12))])
    rng = np.random.default_rng(0)
    for name, run, step in (("reference", "clean", 9), ("late", "other", 2), ("early", "other", 1)):
        loss = rng.uniform(3, 6, (corpus.num_rows, SEQUENCE_LENGTH)).astype(np.float32)
        corpus.create_score(name, reference={"run": run, "step": step}).write(0, {"loss": loss})
    run = shutil.copytree(reference, folder / "run")
    about = json.loads((run / "run.json").read_text())
    about["settings"]["evaluators"] = [{"name": "trace", "corpus": corpus.path, "keep_tokens": True}]
    (run / "run.json").write_text(json.dumps(about))
    (run / "token_losses" / "trace").mkdir(parents=True)
    for step in (3, 5):
        np.save(run / "token_losses" / "trace" / f"{step}.npy", np.full((KEPT, SEQUENCE_LENGTH), step, np.float32))
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
