"""The inspector: its numbers are the model's, its text is the corpus', and nothing in the text can run."""

import base64
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import browser as browsers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.analyze.inspector import analyze_inspect, selected_tokens
from slm_jax.analyze.inspector_page import Column, Model, Rows, inspector_page
from slm_jax.data.batches import make_batch
from slm_jax.data.corpus import Corpus, CorpusWriter
from slm_jax.data.store import Store
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.evaluate.predictions import predict_rows
from slm_jax.models import forward
from slm_jax.score.reference import load_model
from slm_jax.score.selection import Selection
from slm_jax.score.token_loss import predicted

ROW_LENGTH = 64
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
    tokens = np.stack([np.pad(row, (0, ROW_LENGTH - len(row))) for row in rows]).astype(np.uint16)
    names = list(dict.fromkeys(name for name, _ in texts))
    loss_mask = (tokens > 0) & (tokens != vocabulary.bos_id)
    loss_mask[-1, :6] = False
    writer = CorpusWriter(Store(path), len(rows), ROW_LENGTH, vocabulary)
    source_ids = np.repeat([0, *(names.index(name) for name, _ in texts)], ROW_LENGTH).reshape(tokens.shape)
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


@pytest.fixture(scope="module")
def made(tmp_path_factory, reference, shell) -> Made:
    folder = tmp_path_factory.mktemp("inspector")
    corpus = write_rows(folder / "corpus", [*TEXTS.items(), *(("filler", f"{i} hens and 12 ducks") for i in range(12))])
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
        np.save(run / "token_losses" / "trace" / f"{step}.npy", np.full((KEPT, ROW_LENGTH), step, np.float32))
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


def test_the_command_says_what_it_shows(made):
    tokens = int((made.corpus.read(np.arange(KEPT))["segment_ids"] > 0).sum())
    first, last = made.output.splitlines()[0], made.output.splitlines()[-1]
    assert first == f"inspect: {KEPT} rows of corpus ({tokens:,} tokens), run, late, early -> page.html"
    assert last.startswith("inspect: done; open page.html (")


def test_the_page_holds_text_and_numbers_as_they_are(made):
    """Losses of the model, of columns and kept ones in the order of steps; documents as their texts, each token at its
    place in them."""
    data, block = data_of(made.page.read_text()), made.corpus.read(np.arange(KEPT))
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
    early = made.corpus.read(np.arange(KEPT), ["scores/early/loss"])["scores/early/loss"][inside]
    found = unpacked(other["columns"][0]["loss"])
    assert (found[seen] == early[seen]).all() and np.isnan(found[~seen]).all()
    assert (unpacked(run["columns"][1]["loss"])[seen] == 5).all()
    with toy.one_device():
        mesh = mesh_lib.make_mesh()
        model = load_model(str(made.run), mesh, 3)
    with jax.set_mesh(mesh):
        losses = predict_rows(model, block["tokens"], block["segment_ids"], mesh, 8, 3)
    np.testing.assert_allclose(unpacked(run["columns"][0]["loss"])[seen], losses.loss[inside][seen], rtol=1e-4)
    top = run["columns"][0]["top"]
    likeliest = [data["pieces"][i] for i in unpacked(top["piece"])[::3]]
    vocabulary = made.corpus.vocabulary()
    assert likeliest == [vocabulary.piece(i) if i < 259 else "<259>" for i in losses.tokens[inside][:, 0]]


def test_selected_is_the_share_of_these_rows(made):
    data, block = data_of(made.page.read_text()), made.corpus.read(np.arange(KEPT))
    counts, reference = unpacked(data["tokens"]["counts"]) > 0, unpacked(data["reference"])
    inside = block["segment_ids"] > 0
    assert counts.sum() == (block["loss_mask"] & np.asarray(predicted(block["segment_ids"].astype(np.int32)))).sum()
    for column in (column for model in data["models"] for column in model["columns"]):
        selected, loss = unpacked(column["selected"]) > 0, unpacked(column["loss"])
        assert selected.sum() == int(0.6 * counts.sum() + 0.5) and not selected[~counts].any()
        excess = (loss - reference)[counts]
        assert excess[selected[counts]].min() >= excess[~selected[counts]].max()
    assert "The rows of this page are the batch" in data["selection"] and inside.sum() == len(counts)


def test_a_selection_by_threshold_or_at_random_needs_no_more(made):
    block = made.corpus.read(np.arange(4))
    loss = np.linspace(0, 8, 4 * ROW_LENGTH, dtype=np.float32).reshape(4, ROW_LENGTH)
    chosen = selected_tokens(Selection(score="loss", threshold=4.0), loss, {}, block["loss_mask"])
    assert (chosen == (block["loss_mask"] & (loss > 4))).all()
    chosen = selected_tokens(Selection(score="random", ratio=0.5), loss, {}, block["loss_mask"])
    assert chosen.sum() == int(block["loss_mask"].sum() / 2 + 0.5)


def test_text_never_runs_and_nothing_comes_from_elsewhere(made):
    page = made.page.read_text(encoding="utf-8")
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
    "settings, message",
    [
        ({"runs": []}, "nothing to look at: name runs behind `analyze inspect`"),
        ({"columns": ["lost"]}, "has no score 'lost' (it has early, late, reference)"),
        ({"kept": "nothing"}, "has no evaluator 'nothing' that keeps tokens (it has trace): see HeldOut.keep_tokens"),
        ({"steps": [4]}, "has no checkpoint of step 4: it has 3, 6"),
        ({"first_row": 100}, "analyze_inspect.first_row is 100, and corpus"),
        ({"batch_rows": 3}, "analyze_inspect: a batch of 3 rows does not split"),
        ({"selection": Selection(reference="lost")}, "has no score 'lost'"),
        ({"rows": 0}, "rows is 0: it takes a whole number from 1 on"),
    ],
)
def test_mistakes_are_one_line(settings, message, made, tmp_path):
    given = {"runs": [str(made.run)], "output": str(tmp_path / "page.html"), **settings}
    assert message in toy.refusal(analyze_inspect, made.corpus.path, **given)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browsers.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Window:
    """The page in a browser, and what a person does with it."""

    def __init__(self, driver, path: Path):
        self.driver = driver
        driver.get(path.as_uri())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def keys(self, *keys: str) -> None:
        """To whatever has the keyboard."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def point_at(self, element: Any) -> None:
        actions = importlib.import_module("selenium.webdriver").ActionChains
        actions(self.driver).move_to_element(element).perform()

    def shows(self, name: str) -> list[str]:
        """The cells of a line of the table about the current token."""
        rows = {row.text.split()[0]: row for row in self.all("#token tbody tr")}
        return [cell.text for cell in rows[name].find_elements("css selector", "td")]

    def unit(self, document: int, place: int, side: int = 0) -> Any:
        """The element of a document's unit, brought into the window."""
        script = """const [number, place, side] = arguments, doc = documents[number];
        doc.article.scrollIntoView({ block: 'center' });
        draw(doc);
        return doc.texts[side].spans[place];"""
        return self.run(script, document, place, side)


@pytest.fixture
def window(chromium, made):
    window = Window(chromium, made.page)
    yield window
    assert browsers.complaints(chromium) == []


def test_texts_stand_in_the_page_as_they_are(window):
    """Drawn or not; what looks like markup is text, and the page has no element that came from it."""
    assert window.one("h1").text == "Tokens of corpus"
    script = "return documents.map((doc) => doc.texts.map((text) => text.textContent))"
    wanted = {f"{name}:{row}": text for row, (name, text) in enumerate(TEXTS.items(), 1)}
    for _ in range(2):
        texts = dict(zip(window.run("return documents.map((doc) => doc.id)"), window.run(script), strict=True))
        assert {name: texts[name] for name in wanted} == {name: [text, text] for name, text in wanted.items()}
        window.run("documents.forEach(draw)")
    assert len(window.all("script")) == 2 and not window.all("img, iframe")
    assert window.run("return document.querySelectorAll('.text *:not(.u)').length") == 0


def test_a_policy_stops_what_is_not_the_pages_own(window):
    """Even a script that got into the page would not run."""
    window.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);")
    assert window.run("return window.ran ?? 0") == 0
    assert "Content Security Policy" in browsers.complaints(window.driver)[0]


def test_sliding_goes_through_the_checkpoints(window, made):
    data = data_of(made.page.read_text())
    counts = unpacked(data["tokens"]["counts"]) > 0
    slider = window.one("#step-left")
    assert slider.get_attribute("aria-valuetext") == "step 6, 3 of 3"
    shades = []
    for at, column in reversed(list(enumerate(data["models"][0]["columns"]))):
        assert window.one("#place-left").text == f"step {column['step']}" and slider.get_attribute("value") == str(at)
        loss, reference = (
            x[counts].mean(dtype=np.float64) for x in (unpacked(column["loss"]), unpacked(data["reference"]))
        )
        total = f"{counts.sum()} tokens · loss {loss:.2f} · excess {loss - reference:+.2f} · selected 60 %"
        assert window.one("#totals-left").text == total.replace("-", "−")
        shades.append(window.run("return documents[1].texts[0].spans.map((span) => span.className).join()"))
        slider.send_keys("\ue012")  # left
    assert len(set(shades)) == 3
    window.one("#model-right").send_keys("other")
    assert window.one("#place-right").text == "step 2"


def test_pointing_shows_the_numbers_of_both_sides(window, made):
    data = data_of(made.page.read_text())
    at = data["documents"][1]["first"] + 3
    window.point_at(window.unit(1, 3))
    losses = [unpacked(model["columns"][-1]["loss"])[at] for model in data["models"]]
    reference = unpacked(data["reference"])[at]
    assert window.one("#token .piece").text == "s" and "id 118 · token 4 of" in window.one("#token").text
    assert "hostile" in window.one("#token").text
    assert window.shows("loss") == [f"{loss:.2f}" for loss in losses]
    assert window.shows("reference") == [f"{reference:.2f}"] * 2
    assert window.shows("excess") == [f"{loss - reference:+.2f}".replace("-", "−") for loss in losses]
    chosen = [unpacked(model["columns"][-1]["selected"])[at] for model in data["models"]]
    assert window.shows("selected") == ["yes" if yes else "no" for yes in chosen]
    top = data["models"][0]["columns"][-1]["top"]
    wanted = [data["pieces"][i].replace(" ", "␣") for i in unpacked(top["piece"])[3 * at : 3 * at + 3]]
    assert [item.text for item in window.all("#token .top bdi")] == wanted
    assert "Not computed: these losses were read." in window.one("#token").text
    assert window.all("#token svg[aria-label]") and window.all(".u.twin")
    window.unit(1, 5).click()  # holds it
    window.point_at(window.unit(1, 9))
    assert "token 6 of" in window.one("#token").text and "held" in window.one("#token").text


def test_the_keyboard_reaches_every_token_and_is_told_its_numbers(window):
    window.run("documents[7].article.scrollIntoView({ block: 'center' }); draw(documents[7]);")
    window.run("documents[7].texts[0].spans[0].focus()")
    at = lambda: window.run("return state.current - documents[7].first")  # noqa: E731
    assert at() == 0
    right, left, down, up, end, home = "\ue014", "\ue012", "\ue015", "\ue013", "\ue010", "\ue011"
    window.keys(right, right, right, left)
    assert at() == 2 and window.one("#spoken").get_attribute("textContent").startswith("h: run, step 6: loss ")
    assert "excess" in window.one("#spoken").get_attribute("textContent")
    window.keys(home, down)  # the second line is empty: its line end
    assert window.run("return piece(state.current)") == "<0x0A>"
    window.keys(up, end)
    assert at() == window.run("return documents[7].last - documents[7].first - 1")
    window.keys(right)
    assert window.run("return documentOf(state.current) === documents[8]")
    window.keys(left, "\ue007")  # Enter
    focused = window.driver.switch_to.active_element
    assert focused.get_attribute("aria-selected") == "true" and focused.get_attribute("role") == "option"
    assert window.one("#spoken").get_attribute("textContent").endswith("; held")
    window.keys("\ue00c")  # Escape
    assert focused.get_attribute("aria-selected") == "false"
    window.keys(",")
    assert window.one("#place-left").text == "step 5"
    window.keys(".", "/")
    assert window.one("#place-left").text == "step 6"
    assert window.driver.switch_to.active_element.get_attribute("id") == "query"


def test_the_arrow_keys_follow_the_direction_of_the_text(window):
    window.run("documents[3].article.scrollIntoView({ block: 'center' }); draw(documents[3]);")
    window.run("documents[3].texts[0].spans[0].focus()")
    window.keys("\ue012", "\ue012")  # to the left, which is forwards here
    assert window.run("return state.current - documents[3].first") == 2
    assert window.run("return getComputedStyle(documents[3].texts[0]).direction") == "rtl"
    assert "to left" in window.run("return documents[3].texts[0].spans[1].style.backgroundImage")


def test_a_character_of_several_tokens_is_one_and_keeps_their_numbers(window):
    family = "👩‍👩‍👧‍👦"
    units = window.run("return documents[5].texts[0].spans.map((span) => span.textContent)")
    assert units == ["", *"a ", family, *" b", ""]
    element = window.unit(5, 3)
    assert element.get_attribute("style").count("var(") == len(family.encode())
    window.point_at(element)
    parts = window.all(".parts button")
    assert len(parts) == len(family.encode()) and parts[0].text == "<0xF0>"
    assert "One of the tokens of" in window.one("#token").text
    first = window.shows("loss")
    parts[4].click()
    assert "token 8 of" in window.one("#token").text and window.shows("loss") != first
    element.click()
    window.run("arguments[0].focus()", element)
    window.keys("\ue014")
    assert "token 9 of" in window.one("#token").text


def test_tokens_that_take_no_part_and_control_tokens_are_marked(window):
    last = window.run("return documents.length - 1")
    window.run("goTo(documents[arguments[0]].first, { focus: false })", 0)
    assert "The first token of its segment" in window.one("#token").text
    assert window.one("#d0").text == "(begins in another row)"
    assert window.unit(1, 0).get_attribute("aria-label") == "<s>"
    assert window.run("return getComputedStyle(arguments[0], '::before').content", window.unit(1, 0)) == '"<s>"'
    assert "out" in window.unit(1, 0).get_attribute("class").split()
    assert "out" not in window.unit(last, 8).get_attribute("class").split()


def test_search_jumps_and_does_not_mind_case(window):
    window.one("#query").send_keys("ALERT(")
    assert window.one("#found").text == "2 found"
    window.one("#query").send_keys("\ue007")
    assert window.one("#found").text == "1 of 2"
    marked = window.run("return [...document.querySelectorAll('.u.now')].map((span) => span.textContent).join('')")
    assert marked == "alert(" * 2  # on both sides
    assert window.run("return documentOf(state.current) === documents[1]")
    window.one("#later").click()
    assert window.one("#found").text == "2 of 2" and len(window.all(".u.find")) == 4 * len("alert(")
    window.one("#query").send_keys("nowhere")
    assert window.one("#found").text == "0 found" and not window.all(".u.find")
    window.run("document.getElementById('query').value = ''")
    window.one("#query").send_keys("日本。")
    assert window.one("#found").text == "1 found"


def test_the_highest_come_first_and_are_jumped_to(window, made):
    data = data_of(made.page.read_text())
    counts = unpacked(data["tokens"]["counts"]) > 0
    excess = unpacked(data["models"][0]["columns"][-1]["loss"]) - unpacked(data["reference"])
    order = np.argsort(-np.where(counts, excess, -np.inf), kind="stable")[:50]
    assert window.run("return top50.list.map(({ token }) => token)") == order.tolist()
    buttons = window.all("#highest button")
    assert buttons[0].text.startswith(f"{excess[order[0]]:+.2f}")
    buttons[2].click()
    assert window.run("return state.current") == order[2] and buttons[2].get_attribute("aria-current") == "true"
    where = window.run("return document.querySelector('.u.held').getBoundingClientRect().top")
    assert 0 < where < 900
    window.keys("x")
    assert window.run("return state.current") == order[3]


def test_a_source_alone_is_shown_and_counted(window):
    window.run("const s = document.getElementById('source'); s.value = '2'; s.dispatchEvent(new Event('change'));")
    shown = window.run("return documents.filter((doc) => !doc.article.hidden).map((doc) => doc.id)")
    assert shown == ["rtl:3"]
    letters = len(TEXTS["rtl"].encode()) + 1  # and EOS
    assert window.one("#totals-left").text.startswith(f"{letters} tokens")
    assert window.run("return top50.list.every(({ token }) => documentOf(token) === documents[3])")
    window.run("const s = document.getElementById('source'); s.value = ''; s.dispatchEvent(new Event('change'));")
    assert window.run("return documents.every((doc) => !doc.article.hidden)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_can_be_read(window, scheme):
    """Contrast of 4.5 between text and every shade (WCAG 2 AA), and shades that differ from their neighbours."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    script = """const box = document.createElement('span');
    document.querySelector('.text').append(box);
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const style = getComputedStyle(document.body), paper = rgb(style.backgroundColor), ink = rgb(style.color);
    return [ink, ...arguments[0].map((name) => {
      box.className = `u ${name}`;
      const [r, g, b, a = 1] = rgb(getComputedStyle(box).backgroundColor);
      return [r, g, b].map((x, i) => a * x + (1 - a) * paper[i]);
    })];"""
    names = [*(f"l{i}" for i in range(9)), *(f"e{i}" for i in range(9)), "k1"]
    ink, *shades = window.run(script, names)
    window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    light = [luminance(shade) + 0.05 for shade in shades]
    contrasts = [max(x, luminance(ink) + 0.05) / min(x, luminance(ink) + 0.05) for x in light]
    assert min(contrasts) >= 4.5, dict(zip(names, contrasts, strict=True))
    steps = np.diff(light[:9])
    assert (steps < 0).all() if scheme == "light" else (steps > 0).all()


def test_a_hundred_thousand_tokens(chromium, tmp_path):
    """Only what is near the window is drawn; the far end is reached, searched and shaded all the same."""
    rng, rows, length = np.random.default_rng(0), 200, 500
    segments = np.repeat([[1, 2]], length // 2, axis=1).repeat(rows, axis=0).reshape(rows, 2, -1)
    segment_ids = np.sort(segments.reshape(rows, length), axis=1)
    shape = (rows, length)
    tokens = rng.choice(np.array(ByteVocabulary().encode("hens eat corn")), shape)
    tokens[-1, -5:] = ByteVocabulary().encode("ducks")
    losses = [rng.uniform(0, 9, shape).astype(np.float32) for _ in range(5)]
    corpus = Rows("many", np.arange(rows), tokens, segment_ids, np.ones(shape, bool), tokens % 2, ["a", "b"], {},
                  ByteVocabulary(), losses[4], "some")  # fmt: skip
    columns = [Column(step, "made up", loss, None, loss > 4) for step, loss in enumerate(losses[:4])]
    path = tmp_path / "many.html"
    path.write_text(inspector_page(corpus, [Model("one", columns), Model("other", columns)]))
    window = Window(chromium, path)
    assert window.run("return tokens.id.length") == 100_000
    assert 0 < window.run("return document.querySelectorAll('.u').length") < 20_000
    window.one("#query").send_keys("ducks", "\ue007")
    assert window.one("#found").text == "1 of 1"
    assert window.run("return state.current") == 99_995
    place = window.run("return document.querySelector('.u.now').getBoundingClientRect().top")
    assert 0 < place < 900
    window.run("document.querySelector('input[value=selected]').click()")
    window.one("#step-left").send_keys("\ue012")
    shade = window.run("return documents.at(-1).texts[0].spans.at(-1).className").split()
    assert f"k{int(losses[2][-1, -1] > 4)}" in shade
    assert browsers.complaints(chromium) == []
