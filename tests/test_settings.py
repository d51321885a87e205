"""Every setting that gin may bind is explained, for `--help` and the settings page."""

import dataclasses
import importlib

import pytest

from slm_jax import settings
from slm_jax.__main__ import STAGES

for module in STAGES.values():
    importlib.import_module(module)


@pytest.mark.parametrize("name", settings.configurables())
def test_every_setting_has_a_sentence(name):
    """A line `NAME: what it does.` under `Args:` of the function, or `Attributes:` of the dataclass."""
    found = settings.settings_of(name)
    missing = [setting.name for setting in found if not setting.sentence]
    assert not missing, f"the docstring of {name} has no sentence for {', '.join(missing)}"
    assert settings.summary(name) and {setting.name for setting in found} >= set(
        settings.sentences(settings.configurables()[name].wrapped)
    ) - {"changes"}


def test_a_sentence_ends_where_the_next_entry_begins():
    @dataclasses.dataclass
    class Mine:
        """Something.

        first: not an entry, since it is in no section.

        Attributes:
          first: one line
            and another: with a colon.
          second: `b`, more.

        Raises:
          UserError: never.
        """

    assert settings.sentences(Mine) == {"first": "one line and another: with a colon.", "second": "`b`, more."}


def test_types_and_allowed_values_are_those_of_the_annotation():
    found = {setting.name: setting for setting in settings.settings_of("train")}
    assert found["phases"].declaration == "phases: Sequence[Phase] = ()"
    assert found["run_dir"].declaration == "run_dir: str = (required)"
    assert found["init_from"].type == "str | None" and found["seed"].values == ("at least 0", "below 4294967296")
    assert settings.settings_of("Selection")[0].values[0] == "'excess'"
    size, *_ = settings.settings_of("model")
    assert "'demo'" in size.values and "'llama2_7b'" in size.values


@pytest.mark.parametrize(
    "stage, reached, not_reached",
    [
        ("prepare", {"Source", "VocabularyConfig", "Metadata"}, {"Selection", "model"}),
        ("train", {"model", "Phase", "MixtureComponent", "cosine_schedule", "HeldOut", "RopeScaling"}, {"Source"}),
        ("generate", {"Sampling", "MeshConfig"}, {"Phase"}),
    ],
)
def test_a_stage_reaches_what_its_settings_take(stage, reached, not_reached):
    found = settings.reached_by(stage)
    assert found[0] == stage and len(set(found)) == len(found)
    assert reached <= set(found) and not not_reached & set(found)
