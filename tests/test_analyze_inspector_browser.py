"""The page of the inspector in headless Chromium: what a person sees, points at, types and searches."""

import importlib
from pathlib import Path
from typing import Any

import browser as browsers
import numpy as np
import pytest
from inspector_pages import TEXTS, data_of, unpacked

from slm_jax.analyze.inspector_page import Column, Model, Rows, inspector_page
from slm_jax.data.vocabulary import ByteVocabulary


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
def window(chromium, inspected):
    window = Window(chromium, inspected.page)
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


def test_sliding_goes_through_the_checkpoints(window, inspected):
    data = data_of(inspected.page.read_text())
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


def test_pointing_shows_the_numbers_of_both_sides(window, inspected):
    data = data_of(inspected.page.read_text())
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
    assert "Not computed" in window.one("#token").text
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
    assert "First token of its segment" in window.one("#token").text
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


def test_the_highest_come_first_and_are_jumped_to(window, inspected):
    data = data_of(inspected.page.read_text())
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


def test_a_token_without_a_reference_loss_is_left_out_of_the_mean_excess(chromium, tmp_path):
    tokens = np.array([ByteVocabulary().encode("hens eat corn")])
    loss, reference = np.full(tokens.shape, 2.0, np.float32), np.full(tokens.shape, 0.5, np.float32)
    reference[0, 3] = np.nan
    corpus = Rows("few", np.arange(1), tokens, np.ones_like(tokens), tokens > 0, tokens * 0, ["a"], {},
                  ByteVocabulary(), reference, "")  # fmt: skip
    path = tmp_path / "few.html"
    path.write_text(inspector_page(corpus, [Model("one", [Column(1, "made up", loss)])]))
    assert "12 tokens · loss 2.00 · excess +1.50" in Window(chromium, path).one("body").text


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
