"""Every setting that gin may bind is explained, for `--help` and the settings page."""

import importlib
import inspect
import subprocess
import sys
import typing

import gin
import pytest

from slm_jax import settings
from slm_jax.__main__ import STAGES
from slm_jax.configurable import takes_text
from slm_jax.declarations import declarations, table


@pytest.mark.parametrize("name", declarations())
def test_every_setting_has_a_sentence(name):
    """A line `NAME: what it does.` under `Args:` of the function, or `Attributes:` of the dataclass."""
    found = settings.settings_of(name)
    missing = [setting.name for setting in found if not setting.sentence]
    assert not missing, f"the docstring of {name} has no sentence for {', '.join(missing)}"
    assert settings.summary(name) and {setting.name for setting in found} >= set(
        settings.sentences(declarations()[name].doc)
    ) - {"changes"}


@pytest.mark.parametrize("name", declarations())
def test_the_source_says_what_importing_it_does(name):
    """Names, annotations, defaults and docstrings that are read without importing are those of the object itself."""
    declaration = declarations()[name]
    importlib.import_module(declaration.module)
    entry = gin.config._REGISTRY.get_match(declaration.selector)  # pyright: ignore[reportAttributeAccessIssue]
    real = inspect.signature(entry.wrapped)
    fields = inspect.signature(real.return_annotation).parameters if entry.allowlist else {}
    parameters = dict(fields) | {p.name: p for p in real.parameters.values() if p.kind is not p.VAR_KEYWORD}
    takes = typing.get_type_hints(entry.wrapped, include_extras=True)
    takes |= typing.get_type_hints(real.return_annotation, include_extras=True) if entry.allowlist else {}
    assert declaration.doc == inspect.cleandoc(entry.wrapped.__doc__) and {*declaration.parameters} == {*parameters}
    for setting, parameter in declaration.parameters.items():
        assert takes_text(parameter.annotation) == takes_text(takes[setting]), setting
        if parameter.default is not ...:
            assert repr(parameter.default) == repr(parameters[setting].default), setting


def test_every_configurable_is_declared():
    for module in {declaration.module for declaration in declarations().values()}:
        importlib.import_module(module)
    registry = gin.config._REGISTRY.items()  # pyright: ignore[reportAttributeAccessIssue]
    registered = {name for name, entry in registry if (entry.module or "").startswith("slm_jax")}
    assert registered == {declaration.selector for declaration in declarations().values()}
    for stage, module in STAGES.items():
        assert declarations()[stage.replace(" ", "_")].module == module


def test_reading_settings_imports_no_jax():
    """In a fresh process: the names, a gin file with references, a bad value, and the help of a stage."""
    code = """
import sys
from slm_jax import config, settings
from slm_jax.__main__ import main
config.load([], ["train.phases=[@Phase()]", "Phase.selection=@Selection()", "Selection.ratio=0.4"])
assert main(["train", "--help"]) == 0 and main(["train", "--run_dir=r", "--gin.Selection.ratio=1.5"]) == 2
print({"jax", "numpy", "flax", "tensorflow"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_an_expression_that_only_python_evaluates_is_shown_as_text():
    assert "'excess'" in map(repr, table("SCORES", "slm_jax.score.selection"))
    assert table("FORMS", "slm_jax.data.prepare") == ()


def test_a_sentence_ends_where_the_next_entry_begins():
    doc = """Something.

        first: not an entry, since it is in no section.

        Attributes:
          first: one line
            and another: with a colon.
          second: `b`, more.

        Raises:
          UserError: never.
        """

    assert settings.sentences(doc) == {"first": "one line and another: with a colon.", "second": "`b`, more."}


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
