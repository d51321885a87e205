"""The page of reports: its numbers are there, its text cannot run, and it needs nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path

import browser as browsers
import numpy as np
import pytest

from slm_jax.analyze.plots import Line, Point, curves, pareto
from slm_jax.analyze.report import Arm, ArmRun, Passage, Report, ShownToken, arm_figures, mean_line, write_report
from slm_jax.analyze.tables import Cell, Table

EVALUATIONS = {"step": [0, 50, 100], "target/loss": [6.0, 5.0, 4.2], "general/loss": [6.5, None, 5.4]}
TRAINING = {
    "step": list(range(1, 101)),
    "loss": [7.0] * 100,
    "selected_share/web": np.linspace(0.5, 0.9, 100).tolist(),
    "selected_share/web/noise": np.linspace(0.5, 0.2, 100).tolist(),
}
CAUSAL = Arm("causal", [ArmRun(EVALUATIONS, {"step": TRAINING["step"], "loss": TRAINING["loss"]}, (0.0, 9e12))])
LOWER = EVALUATIONS | {"target/loss": [6.0, 4.5, 3.9], "general/loss": [6.5, 6.2, 5.9]}
SELECTIVE = Arm("selective", [ArmRun(LOWER, TRAINING, (3e12, 9e12)), ArmRun(EVALUATIONS, TRAINING, (3e12, 9e12))])
MEASURES = ("target/loss", "general/loss")
TABLE = Table("Results", ["run", "loss"], [("causal", [Cell("4.172", value=4.172)])], file="results")


def token(text: str, **changes) -> ShownToken:
    return ShownToken(**{"text": text, "loss": 2.5, "reference": 1.0, "kept": True, **changes})


def passage(*tokens: ShownToken, source: str = "stories") -> Passage:
    return Passage(source, "https://farm.example/1?a=1&b=<2>", tokens, "selective")


def rendered(folder: Path, **changes) -> str:
    report = Report(title="slm_jax: causal", heading="Which tokens train", intro=["Losses in nats."], table=TABLE)
    write_report(folder, report._replace(**changes))
    return (folder / "report.html").read_text(encoding="utf-8")


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


def test_parts_are_in_their_order_and_those_without_content_are_left_out(tmp_path: Path):
    findings = [("better", "selective is better than causal.")]
    facts = {"causal": [("model", "2 layers")]}
    details = [TABLE._replace(title="By source", file="by_source")]
    page = rendered(tmp_path / "full", passages=[passage(token("a"))] * 2, findings=findings, facts=facts,
                    details=details, figures=arm_figures([CAUSAL, SELECTIVE], MEASURES))  # fmt: skip
    body = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    headings = re.findall(r"<(?:h1|h2|summary)>([^<]*)<", body)
    assert headings == [
        "Which tokens train", "Tokens that train", "1 more passage", "Results", "Findings", "Figures", "By source",
        "How the runs were made"]  # fmt: skip
    bare = re.findall(r"<(?:h1|h2|summary)>([^<]*)<", rendered(tmp_path / "bare"))
    assert bare == ["Which tokens train", "Results"] and "<svg" not in rendered(tmp_path / "bare")
    assert (tmp_path / "full" / "tables" / "by_source.csv").read_text() == TABLE.csv()


def test_figures_of_arms(tmp_path: Path):
    """Target against general, both over the operations spent, and what was selected from each source."""
    figures = arm_figures([CAUSAL, SELECTIVE], MEASURES)
    assert [figure.title for figure in figures] == [
        "Target loss against general loss", "Target loss over TFLOP", "General loss over TFLOP",
        "Selected by source, selective"]  # fmt: skip
    against, target = figures[0].hover, figures[1].hover
    assert not against["together"] and [line["name"] for line in against["lines"]] == ["causal", "selective"]
    # The mean of 3.9 and 4.2 against the mean of 5.9 and 5.4.
    assert against["lines"][1]["points"][0][2:] == ["target loss 4.05", "5.65"]
    # Scoring is spent before the first step; a third of the way is 0 of 9 TFLOP, 4.5 of 9, 9 of 9.
    assert [point[2] for point in target["lines"][0]["points"]] == ["TFLOP 0", "TFLOP 4.5", "TFLOP 9"]
    assert [point[2] for point in target["lines"][1]["points"]] == ["TFLOP 3", "TFLOP 7.5", "TFLOP 12"]
    sources = figures[3].hover["lines"]
    assert [line["name"] for line in sources] == ["web", "web/noise"]
    width, height = figures[0].hover["size"]
    assert all(
        0 < x < width and 0 < y < height for f in figures for line in f.hover["lines"] for x, y, *_ in line["points"]
    )
    unknown = Arm("gone", [CAUSAL.runs[0]._replace(flops=None)])
    assert [figure.title for figure in arm_figures([unknown], MEASURES)] == []


def test_a_mean_over_seeds_is_as_long_as_the_longest(tmp_path: Path):
    """A seed that lacks a step is read off between its points; one that ends early does not shorten the others."""
    line = mean_line("a", [([0, 10, 20], [6.0, 4.0, 3.0]), ([0, 20, 30], [6.0, 5.0, None]), ([0, 30], [6.0, 2.0])], 0)
    assert line is not None and line.x == [0, 10, 20, 30]
    assert line.y == pytest.approx([6.0, (4 + 5.5 + 14 / 3) / 3, (3 + 5 + 10 / 3) / 3, 2.0])
    assert line.low is not None and line.low[2] == 3.0 and mean_line("none", [([0], [None])], 0) is None


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
    assert page.scripts == plain.scripts and len(page.scripts) == 2
    allowed = {"class", "style", "data-v"}
    assert all(set(attrs) <= allowed for tag, attrs in page.tags if "data-v" in attrs)


def test_names_stay_names(tmp_path: Path):
    """They start no element, and no direction override in them reverses what follows."""
    hostile = "<script>x</script>$a$\u202egpj"
    arms = [CAUSAL._replace(name=hostile), SELECTIVE._replace(name="b\u2067")]
    table = TABLE._replace(rows=[(hostile, [Cell("1")])], headings=["run", hostile])
    source = rendered(tmp_path, title=hostile, heading=hostile, intro=[hostile], table=table,
                      findings=[("note", hostile)], facts={hostile: [(hostile, hostile)]},
                      passages=[passage(token("a"), source=hostile)], figures=arm_figures(arms, MEASURES))  # fmt: skip
    assert len(Page(source).scripts) == 2
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(source)
    assert "<title>&lt;script&gt;x&lt;/script&gt;$a$⟨U+202E⟩gpj</title>" in source


def test_nothing_comes_from_elsewhere(tmp_path: Path):
    figures = arm_figures([CAUSAL, SELECTIVE], MEASURES)
    source = rendered(tmp_path, passages=(passage(token("a")),), figures=figures)
    shown = re.sub(r">[^<]*<", "><", source)  # the passage's own address is shown as text
    assert "://" not in shown and "farm.example" in source
    page = Page(source)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    loads = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href", "xlink:href") if attrs.get(name)]
    assert all(target.startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,")) for target in loads)
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
        token("first", kept=None, loss=None, reference=None),
        token(" clean"),
        token(" <Apr12 1:24>", noise=True, kept=False),
        token(" low", loss=0.5, reference=None),
    )
    source = rendered(tmp_path, passages=(passage(*tokens),))
    spans = [attrs for tag, attrs in Page(source).tags if tag == "span" and "data-v" in attrs]
    assert [span["data-v"] for span in spans] == [
        "takes no part|–|–|–",
        "kept|2.50|1.00|+1.50",
        "dropped, noise|2.50|1.00|+1.50",
        "kept|0.50|–|–",
    ]
    assert [span["class"] for span in spans] == ["out", "kept", "dropped noise", "kept"]
    assert [span["style"] for span in spans] == ["--s:0.00", "--s:1.00", "--s:1.00", "--s:0.00"]
    assert "100% of the other tokens and 0% of the noise" in source and "injected noise" in source
    assert "injected noise" not in rendered(tmp_path, passages=(passage(token("a")),))


def test_the_same_input_gives_the_same_page(tmp_path: Path):
    pages = []
    for name in ("a", "b"):
        figures = arm_figures([CAUSAL, SELECTIVE], MEASURES)
        pages.append(rendered(tmp_path / name, passages=[passage(token("a"))], figures=figures))
    assert pages[0] == pages[1]


@pytest.mark.parametrize("values", [[], [1.0], [None, None, 2.0], [float("nan")] * 3])
def test_a_curve_without_two_points_is_not_drawn(values: list):
    assert curves("nothing", "", [Line("a", list(range(len(values))), values, 0)]) is None


def test_a_scatter_plot_needs_two_arms():
    assert pareto("one", "", [Point("a", [(1.0, 2.0)], 0), Point("none", [], 1)], ("x", "y")) is None


def test_curves_take_numpy_and_mark_labels():
    figure = curves("Loss & <steps>", "", [Line("a <b>", np.arange(5), np.arange(5.0), 0)], smooth=True)
    assert figure is not None and figure.inline.startswith('<svg role="img" aria-label="Loss &amp; &lt;steps&gt;"')
    assert "a &lt;b&gt;" in figure.inline and "currentColor" in figure.inline and "http" not in figure.inline
    assert figure.svg.startswith("<?xml") and "currentColor" not in figure.svg and figure.png.startswith(b"\x89PNG")


def test_many_lines_are_named_in_a_legend():
    """All names are there, those too that begin with what Matplotlib leaves out of legends."""
    figure = curves("many", "", [Line(f"_run {i} $x$", range(5), np.arange(5.0) + i, i) for i in range(14)])
    assert figure is not None
    for svg in (figure.inline, figure.svg):
        assert all(f"run {i} $x$" in svg for i in range(14))


def test_a_band_surrounds_a_line():
    low, high = [1.0, 2.0, 3.0], [2.0, 3.0, 4.0]
    lines = [Line("a", range(3), [1.5, 2.5, 3.5], 0), Line("a", range(3), [1.5, 2.5, 3.5], 0, low, high)]
    plain, banded = (curves("a", "", [line]) for line in lines)
    assert plain and banded and "FillBetween" not in plain.inline and "FillBetween" in banded.inline


def test_in_a_browser(tmp_path: Path):
    """Pointing shows values of tokens and curves; nothing is wider than a telephone; paper shows what is folded."""
    figures = arm_figures([CAUSAL, SELECTIVE], MEASURES)
    details = [TABLE._replace(title="By source", file="by_source")]
    rendered(tmp_path, passages=[passage(*(token(f" word{i}") for i in range(30)))], figures=figures, details=details)
    with browsers.chromium(tmp_path / "profile") as driver:
        driver.get((tmp_path / "report.html").as_uri())
        one = lambda selector: driver.find_element("css selector", selector)  # noqa: E731
        point = """const box = arguments[0].getBoundingClientRect();
        arguments[0].dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + arguments[1] * box.width,
          clientY: box.top + arguments[2] * box.height, bubbles: true }));"""
        driver.execute_script(point, one('[data-figure="target_loss_over_tflop"] svg'), 0.9, 0.5)
        assert one('[data-figure="target_loss_over_tflop"] .hover').text == "TFLOP 12: causal 4.2, selective 4.05"
        driver.execute_script(point, one('[data-figure="target_loss_against_general_loss"] svg'), 0.2, 0.2)
        words = one('[data-figure="target_loss_against_general_loss"] .hover').text
        assert words == "selective: target loss 4.05, general loss 5.65"
        one(".text span").click()
        assert one("#readout").text.split("\n")[1::2] == ["␣word0", "kept", "2.50", "1.00", "+1.50"]
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        )
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        driver.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert one("details table").is_displayed() and not one("#readout").is_displayed()
        assert browsers.complaints(driver) == []


def test_figures_whose_names_differ_only_in_signs_have_their_own_files(tmp_path: Path):
    lines = [Line("a", range(3), [1.0, 2.0, 3.0], 0)]
    figures = [curves(title, "", lines) for title in ("a-1", "a 1", "a 1")]
    page = rendered(tmp_path, figures=figures[:2], more_figures=figures[2:])
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3
    assert all(page.count(f'data-figure="{name}"') == 1 for name in ("a_1", "a_1_", "a_1__"))
