"""The findings of the demo's report, favourable or not."""

import copy
import re
from pathlib import Path

from slm_jax.demo.summary import write_demo_report


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


def rendered(folder: Path, summary: dict = SUMMARY) -> str:
    write_demo_report(folder, summary, {}, ())
    return (folder / "report.html").read_text(encoding="utf-8")


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
        "0.43",
    ):
        assert number in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("&#39;", "'")
    assert "better selective is better than causal on the target text" in text
    assert "worse selective is worse than causal on general text" in text
    assert "selective reaches causal's final target loss at step 97 of 150: causal takes 1.55 times as many" in text
    assert "random does not reach causal's final target loss" in text
    assert "has a loss of 3.381 on the target text, lower than selective's 3.927" in text


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


def test_what_was_not_measured_is_left_out(tmp_path: Path):
    nothing = {"runs": {"causal": dict.fromkeys(SUMMARY["runs"]["causal"]), "selective": {}}}
    page = rendered(tmp_path, nothing)
    assert "–" in page and "<svg" not in page
    partly = copy.deepcopy(SUMMARY)
    partly["runs"]["selective"]["target_loss"] = float("nan")
    partly["runs"]["random"]["general_loss"] = None
    partly["steps_to_causal_target_loss"] = None
    partly["reference"] = None
    page = rendered(tmp_path, partly)
    assert ">nan" not in page and "selective is better than causal on the target text" not in page
    assert "selective is worse than causal on general text" in page
