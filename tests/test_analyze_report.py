"""The report: its numbers are there, its text cannot run, and it needs nothing from elsewhere."""

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slm_jax.analyze.curves import Line, curve_svg, drawing
from slm_jax.analyze.report import write_report


def run_summary(target: float | None, general: float | None, trained: int) -> dict:
    return {
        "target_loss": target,
        "target_bits_per_byte": 2.748,
        "general_loss": general,
        "tokens_seen": 614400,
        "tokens_trained": trained,
        "steps": 150,
        "seconds": 61.2,
    }


SUMMARY = {
    "runs": {
        "causal": run_summary(4.172, 5.430, 614400),
        "selective": run_summary(3.927, 5.980, 368640),
        "random": run_summary(4.298, 5.560, 368640),
    },
    "steps_to_causal_target_loss": {"selective": 97, "random": None},
    "selection": {"noise_selected_share": 0.37, "clean_selected_share": 0.89},
    "corpus": {"rows": 2400, "sources": {"general": 0.43}},
    "reference": {"target_loss": 3.381},
}
CURVES = {
    name: {
        "steps": [50, 100, 150],
        "target_loss": [6.0, 5.0, 4.2],
        "general_loss": [6.5, None, 5.4],
        "train_steps": list(range(60)),
        "loss": [7.0] * 60,
        "selected_loss": [6.0] * 60 if name == "selective" else [None] * 60,
        "unselected_loss": [7.5] * 60 if name == "selective" else [None] * 60,
    }
    for name in SUMMARY["runs"]
}


def token(text: str, **changes) -> dict:
    values = {
        "text": text,
        "loss": 2.5,
        "ref_loss": 1.0,
        "excess": 1.5,
        "selected": 0.75,
        "valid": True,
        "noise": False,
    }
    return values | changes


def passage(*tokens: dict) -> dict:
    return {"title": "A story", "url": "https://farm.example/1?a=1&b=<2>", "source": "stories", "tokens": list(tokens)}


def rendered(tmp_path: Path, summary: dict = SUMMARY, curves: dict = CURVES, passages: tuple = ()) -> str:
    path = tmp_path / "run" / "report.html"
    write_report(path, summary, curves, passages)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects the tags, the text of tokens as a browser would show it, and the scripts."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.into: list[str] | None = None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script" or (tag == "span" and "data-v" in dict(attrs)):
            self.into = self.scripts if tag == "script" else self.tokens
            self.into.append("")

    def handle_endtag(self, tag):
        if tag in ("script", "span"):
            self.into = None

    def handle_data(self, data):
        if self.into is not None:
            self.into[-1] += data


def test_numbers_and_plain_words(tmp_path: Path):
    page = rendered(tmp_path)
    for number in (
        "4.172",
        "3.927",
        "−0.245",
        "5.980",
        "+0.550",
        "614,400",
        "368,640",
        "2.748",
        "89 %",
        "37 %",
        "0.43",
    ):
        assert number in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("&#39;", "'")
    assert "better selective is better than causal on the target text" in text
    assert "worse selective is worse than causal on general text" in text
    assert "selective reaches causal's final target loss at step 97 of 150: causal takes 1.55 times as many" in text
    assert "random does not reach causal's final target loss" in text
    assert "stands at 3.381 on the target text, lower than selective's 3.927" in text
    assert page.count("<svg") == 3


def test_continual_runs_are_compared_with_their_own_causal_run(tmp_path: Path):
    summary = copy.deepcopy(SUMMARY)
    summary["runs"]["continual_causal"] = run_summary(3.434, 4.238, 614400)
    summary["runs"]["continual_selective"] = run_summary(3.256, 4.904, 368640)
    summary["steps_to_continual_causal_target_loss"] = {"continual_selective": 60}
    page = rendered(tmp_path, summary).replace("&#39;", "'")
    assert "continual_selective is better than continual_causal on the target text" in page
    assert "continual_selective reaches continual_causal's final target loss at step 60 of 150" in page
    assert "continual_causal is" not in page


def test_the_mixed_control_is_compared_with_causal(tmp_path: Path):
    """Its crossing is that of causal's loss, and so is every difference: no run is compared with itself."""
    summary = copy.deepcopy(SUMMARY)
    summary["runs"]["mixed_causal"] = summary["runs"]["selective"] | {"target_loss": 1.25}
    summary["runs"]["mixed_selective"] = summary["runs"]["selective"] | {"target_loss": 1.125}
    summary["steps_to_causal_target_loss"] |= {"mixed_causal": 60, "mixed_selective": 50}
    text = rendered(tmp_path, summary).replace("&#39;", "'")
    for name in ("mixed_causal", "mixed_selective"):
        assert f"{name} is better than causal on the target text" in text
        assert f"{name} reaches causal's final target loss" in text
    assert "mixed_causal's final" not in text


def test_text_never_runs(tmp_path: Path):
    hostile = [
        "<script>alert(1)</script>",
        "</script>",
        "</div>",
        '" onmouseover="alert(1)',
        "<!--",
        "{{ 7*7 }}",
        "&amp;",
    ]
    plain = Page(rendered(tmp_path, passages=(passage(token("a")),)))
    page = Page(rendered(tmp_path, passages=(passage(*(token(text) for text in hostile)),)))
    assert page.tokens == hostile
    assert page.scripts == plain.scripts and len(page.scripts) == 1
    allowed = {"class", "style", "data-v"}
    assert all(set(attrs) <= allowed for tag, attrs in page.tags if "data-v" in attrs)


def test_run_names_and_titles_are_escaped(tmp_path: Path):
    summary = copy.deepcopy(SUMMARY)
    summary["runs"]["<script>x</script>$a$"] = summary["runs"]["random"]
    curves = CURVES | {"<script>x</script>$a$": CURVES["random"]}
    page = Page(rendered(tmp_path, summary, curves, ({**passage(token("a")), "title": "</h3><script>y"},)))
    assert len(page.scripts) == 1


def test_nothing_comes_from_elsewhere(tmp_path: Path):
    source = rendered(tmp_path, passages=(passage(token("a")),))
    shown = re.sub(r">[^<]*<", "><", source)  # the passage's own address is shown as text
    assert "://" not in shown and "farm.example" in source
    page = Page(source)
    assert not {"link", "img", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    loads = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href", "xlink:href") if attrs.get(name)]
    assert all(target.startswith("#") for target in loads)
    assert "@import" not in source and "@font-face" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))


def test_text_of_every_script_and_its_white_space_stay(tmp_path: Path):
    texts = ["\n", "  two", "\tمرحبا", " 日本語", "👩‍👩‍👧", "a\n\nb", "", "́"]
    page = Page(rendered(tmp_path, passages=(passage(*(token(text) for text in texts)),)))
    assert page.tokens == texts


def test_control_characters_become_visible(tmp_path: Path):
    page = Page(rendered(tmp_path, passages=(passage(token("a\x00b\r\x1b"), token("\ud800")),)))
    assert page.tokens == ["a␀b␍␛", "\\ud800"]


def test_tokens_carry_their_numbers_and_marks(tmp_path: Path):
    tokens = (
        token("first", valid=False, loss=None, ref_loss=None, excess=None, selected=None),
        token(" clean"),
        token(" <Apr12 1:24>", noise=True, selected=0.25),
        token(" unknown", noise=None),
    )
    page = Page(rendered(tmp_path, passages=(passage(*tokens),)))
    spans = [attrs for tag, attrs in page.tags if tag == "span" and "data-v" in attrs]
    assert [span["data-v"] for span in spans] == [
        "takes no part|–|–|–",
        "75 %|2.50|1.00|+1.50",
        "25 %|2.50|1.00|+1.50",
        "75 %|2.50|1.00|+1.50",
    ]
    assert [span.get("class") for span in spans] == ["skip", None, "noise", None]
    assert [span["style"] for span in spans] == ["--s:0.00", "--s:0.75", "--s:0.25", "--s:0.75"]


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    nothing = {"runs": {"causal": dict.fromkeys(SUMMARY["runs"]["causal"]), "selective": {}}}
    page = rendered(tmp_path, nothing, {}, ())
    assert "–" in page and "<svg" not in page and "<script" not in page
    partly = copy.deepcopy(SUMMARY)
    partly["runs"]["selective"]["target_loss"] = float("nan")
    partly["runs"]["random"]["general_loss"] = None
    partly["selection"] = {"noise_selected_share": None, "clean_selected_share": None}
    partly["steps_to_causal_target_loss"] = None
    partly["reference"] = None
    page = rendered(tmp_path, partly, {"causal": {"steps": [], "target_loss": []}}, ())
    assert "nan" not in page.lower() and "selective is better than causal on the target text" not in page
    assert "selective is worse than causal on general text" in page


def test_the_same_input_gives_the_same_page(tmp_path: Path):
    assert rendered(tmp_path / "a") == rendered(tmp_path / "b")


@pytest.mark.parametrize("values", [[], [1.0], [None, None, 2.0], [float("nan")] * 3])
def test_a_curve_without_two_points_is_not_drawn(values: list):
    assert curve_svg("nothing", [Line("a", list(range(len(values))), values, 0)]) == ""


def test_curves_take_numpy_and_mark_labels():
    svg = curve_svg("Loss & <steps>", [Line("a <b>", np.arange(5), np.arange(5.0), 0)], reached=2.0, smooth=True)
    assert svg.startswith('<svg role="img" aria-label="Loss &amp; &lt;steps&gt;"')
    assert "a &lt;b&gt;" in svg and "currentColor" in svg and "http" not in svg


def test_many_lines_are_named_in_a_legend():
    """Their names are all there, and told apart from those that begin with what Matplotlib leaves out."""
    lines = [Line(f"_run {i} $x$", range(5), np.arange(5.0) + i, i) for i in range(14)]
    drawn = drawing("many", lines)
    assert drawn is not None
    for svg in (drawn.inline, drawn.svg):
        assert all(f"run {i} $x$" in svg for i in range(14))
    assert drawn.svg.startswith("<?xml") and drawn.png.startswith(b"\x89PNG") and drawing("none", []) is None


def test_a_band_stands_around_a_line():
    low, high = [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]
    plain = curve_svg("a", [Line("a", range(3), [1.5, 2.5, 3.5], 0)])
    assert "FillBetween" not in plain and "FillBetween" in curve_svg(
        "a", [Line("a", range(3), [1.5, 2.5, 3.5], 0, low, high)]
    )
