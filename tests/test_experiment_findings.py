"""What results say: differences, costs, the share of the oracle's gain, verdicts; and the three files of the report."""

import dataclasses
import json

import pytest

from slm_jax.experiment import findings
from slm_jax.experiment.experiment_report import write_report
from slm_jax.experiment.recipe import Arm, Recipe, Threshold
from slm_jax.experiment.results import selection_quality

CLAIMS = (
    Threshold("recovers half", "selective", "target/loss", "recovered", at_least=0.5, name="half"),
    Threshold("is better in every seed", "selective", "target/loss", at_most=-0.45, seeds="every", name="every"),
    Threshold("is better on average", "selective", "target/loss", at_most=-0.44, name="mean"),
    Threshold("surely better", "selective", "target/loss", at_most=0.0, seeds="interval", name="sure"),
    Threshold("keeps little noise", "selective", "selected/planted", "value", at_most=0.3, name="noise"),
    Threshold("is better than random", "selective", "target/loss", against="random", at_most=0.0, name="random"),
)
RECIPE = Recipe(
    "toy",
    "Does selection <help>?",
    [Arm(name=name) for name in ("causal", "selective", "random", "oracle")],
    sources=["generated"],
    evidence="It says nothing of pigs.",
    seeds=[0, 1],
    oracle="oracle",
    thresholds=CLAIMS,
)


WRITTEN = {"prompt": "Two", "text": " hens & pigs [id AB-1234]."}


def result(arm: str, seed: int, target: float, general: float = 3.0, scoring: float = 0.0) -> dict:
    """A run of 100 steps whose loss falls in a straight line from 4 to `target`."""
    chosen = {"crawl/stories": (0.8, 0.75), "crawl/stories/noise": (0.2, 0.25)} if arm == "selective" else {}
    return {
        "arm": arm,
        "variant": "",
        "seed": seed,
        "commit": "abc",
        "device": "cpu",
        "parameters": 10,
        "steps": 100,
        "tokens_seen": 1000,
        "tokens_trained": 600,
        "train_seconds": 1.0,
        "flops": {"training": 1e12, "scoring": scoring, "reference": scoring},
        "final": {"target/loss": target, "general/loss": general},
        "evaluations": {
            "step": [0, 50, 100],
            "tokens": [0, 500, 1000],
            "target/loss": [4.0, (4 + target) / 2, target],
            "general/loss": [4.0, 3.5, general],
        },
        "training": {"step": [1, 100], "loss": [4.0, 3.0]},
        "selected": {name: {"selected": share, "of_tokens": part} for name, (share, part) in chosen.items()},
        "samples": {"texts": {"texts": 2, "noisy": 0.5, "shown": [WRITTEN]}},
    }


RESULTS = [
    *(result("causal", seed, loss) for seed, loss in enumerate((3.0, 2.8))),
    *(result("selective", seed, loss, 2.9, scoring=2e11) for seed, loss in enumerate((2.5, 2.4))),
    *(result("oracle", seed, loss) for seed, loss in enumerate((2.0, 2.2))),
]


@pytest.fixture
def by():
    return findings.grouped(RECIPE, RESULTS)


def test_differences_are_paired_by_seed(by):
    found = findings.difference(by[""]["selective"], by[""]["causal"], "target/loss")
    assert found is not None and found.each == pytest.approx((-0.5, -0.4)) and found.mean == pytest.approx(-0.45)
    only = findings.difference({1: by[""]["selective"][1]}, by[""]["causal"], "target/loss")
    assert only is not None and only.each == pytest.approx((-0.4,)) and only.t is None


def test_equal_cost_charges_scoring_and_reference(by):
    """Where causal ends, at 1 TFLOP, selective has paid 0.2 for scoring and is at step 80, with a reference at 60."""
    first = {0: by[""]["selective"][0]}
    found = findings.equal_cost(first, by[""]["causal"], "target/loss", with_reference=False)
    assert found is not None and found.mean == pytest.approx(4 - 1.5 * 0.8 - 3.0)
    found = findings.equal_cost(first, by[""]["causal"], "target/loss", with_reference=True)
    assert found is not None and found.mean == pytest.approx(4 - 1.5 * 0.6 - 3.0)
    dear = {0: result("selective", 0, 2.5, scoring=2e12)}
    assert findings.equal_cost(dear, by[""]["causal"], "target/loss", True) is None
    unknown = {0: result("selective", 0, 2.5) | {"flops": {"training": 1e12, "scoring": None, "reference": None}}}
    assert findings.equal_cost(unknown, by[""]["causal"], "target/loss", True) is None


def test_tokens_to_the_end_of_the_baseline(by):
    assert findings.crossings(by[""]["selective"], by[""]["causal"], "target/loss") == pytest.approx([2 / 3, 0.75])
    assert findings.crossings(by[""]["causal"], by[""]["oracle"], "target/loss") == [None, None]


def test_verdicts_say_met_only_with_all_seeds(by):
    verdicts = {t.name: findings.verdict(RECIPE, by, t) for t in RECIPE.thresholds}
    met = {name: found.met for name, found in verdicts.items()}
    assert met == {"half": True, "every": False, "mean": True, "sure": False, "noise": True, "random": None}
    assert verdicts["half"].values[""].mean == pytest.approx(0.45 / 0.8)
    assert verdicts["noise"].values[""].mean == pytest.approx(0.2)
    fewer = findings.grouped(RECIPE, [each for each in RESULTS if each["seed"] == 0])
    assert findings.verdict(RECIPE, fewer, CLAIMS[2]).met is None


def test_the_best_of_a_group_is_compared():
    """Two rates and two mixtures: each side is the arm or variant with the lowest mean over the seeds they share."""
    losses = {
        ("slow", "causal"): (3.0, 3.1),
        ("fast", "causal"): (2.8, 2.9),
        ("slow", "mixed_2"): (2.7, 2.9),
        ("slow", "mixed_10"): (2.9, 2.6),
        ("fast", "mixed_2"): (3.0, 3.0),
        ("fast", "mixed_10"): (3.0, 3.0),
    }
    claims = [
        Threshold("each", "mixtures", "target/loss", at_most=-0.2, name="each", seeds="every"),
        Threshold("best", "mixtures", "target/loss", at_most=-0.09, name="best", best_variant=True),
        Threshold("better than the mixture", "causal", "target/loss", against="mixtures", at_least=0.2, name="third"),
    ]
    recipe = Recipe(
        "toy",
        "?",
        [Arm(name=name) for name in ("causal", "mixed_2", "mixed_10")],
        variants={"slow": "", "fast": ""},
        groups={"mixtures": ["mixed_2", "mixed_10"]},
        seeds=[0, 1],
        thresholds=claims,
    )
    results = [
        result(arm, seed, loss) | {"variant": variant}
        for (variant, arm), pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    by = findings.grouped(recipe, results)
    each, best, third = (findings.verdict(recipe, by, claim) for claim in claims)
    assert each.met is False and best.met is True and third.met is False
    [(sides, found)] = best.values.items()
    assert sides == "slow mixed_10 against fast causal" and found.each == pytest.approx((0.1, -0.3))
    assert {"slow mixed_10 against slow causal", "fast mixed_2 against fast causal"} == {*each.values}
    one_missing = findings.grouped(recipe, results[:-1])  # the best is not known yet
    assert findings.verdict(recipe, one_missing, claims[1]).met is None


def test_tokens_by_schedules_of_their_own(tmp_path):
    """Runs of 250 and 500 tokens end at 3.4 and 2.6, so causal's 3.0 of 1000 tokens takes 375; 2.2 is never reached."""
    arms = [Arm(name=name) for name in ("causal", "short", "half")]
    claim = Threshold("takes 40 %", "lengths", "target/loss", "tokens", at_most=0.4, name="t")
    recipe = Recipe("toy", "?", arms, groups={"lengths": ["short", "half"]}, seeds=[0, 1], thresholds=[claim])
    results = [
        *(result("short", seed, 3.4) | {"tokens_seen": 250} for seed in (0, 1)),
        *(result("half", seed, 2.6) | {"tokens_seen": 500} for seed in (0, 1)),
        result("causal", 0, 3.0),
    ]
    first = findings.verdict(recipe, findings.grouped(recipe, results), claim)
    assert first.met is None and first.values["lengths against causal"].each == pytest.approx((0.375,))
    every = [*results, result("causal", 1, 3.0)]
    assert findings.verdict(recipe, findings.grouped(recipe, every), claim).met is True
    never = [*results, result("causal", 1, 2.2)]
    assert findings.verdict(recipe, findings.grouped(recipe, never), claim).met is False
    write_report(tmp_path, recipe, {str(n): each for n, each in enumerate(never)}, total=6)
    assert "38%, never" in (tmp_path / "results.md").read_text()


def test_quality_of_a_selection():
    found = selection_quality(RESULTS[2]["selected"], ["crawl/stories/noise"])
    assert found == pytest.approx({"precision": 0.6 / 0.65, "recall": 0.8, "planted": 0.2})
    assert selection_quality(RESULTS[2]["selected"], []) is None


def test_the_report_holds_numbers_verdicts_and_no_foreign_text(tmp_path):
    write_report(tmp_path, RECIPE, {str(n): each for n, each in enumerate(RESULTS)}, total=8)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["runs"] == 6 and summary["runs_planned"] == 8
    assert summary["variants"][""]["selective"]["recovered"]["mean"] == pytest.approx(0.45 / 0.8)
    assert [each["verdict"] for each in summary["verdicts"]].count("met") == 3
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "results.md").read_text()
    assert "<help>" not in page and "&lt;help&gt;" in page and 'src="http' not in page
    assert page.count("<b>Two</b> hens &amp; pigs <mark>[id AB-1234]</mark>.") == 3
    assert page.count("50 % of 4 samples hold noise") == 3 and "It says nothing of pigs." in page
    assert page.count("<svg") >= 3 and "is better on average" in page
    assert "6 of 8 runs" in text and "**not run**: is better than random" in text and "−0.450" in text


def test_a_recipe_without_oracle_or_general_text_reports_too(tmp_path):
    recipe = dataclasses.replace(RECIPE, oracle=None, thresholds=(), measures=["target/loss"])
    write_report(tmp_path, recipe, {"0": RESULTS[0]}, total=1)
    assert "All 1 runs are done" in (tmp_path / "results.md").read_text()
