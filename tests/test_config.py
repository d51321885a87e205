"""The configuration surface is frozen, what a recipe names exists, and later settings win."""

import json
from pathlib import Path

import gin
import pytest
import toy

from slm_jax import config
from slm_jax.__main__ import STAGES

RECIPES = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def nothing_bound():
    """What a test bound is gone after it."""
    yield
    gin.clear_config()


def test_the_configuration_surface_is_frozen(golden):
    """A new setting, or another default, is a decision: each is one more thing to know and to keep."""
    surface = json.loads(json.dumps(config.surface()))
    frozen = golden("gin_surface", surface)
    changed = [
        f"{owner}.{name}: {frozen.get(owner, {}).get(name, 'not there')} -> {surface.get(owner, {}).get(name, 'gone')}"
        for owner in sorted(surface | frozen)
        for name in sorted(surface.get(owner, {}) | frozen.get(owner, {}))
        if surface.get(owner, {}).get(name) != frozen.get(owner, {}).get(name)
    ]
    assert not changed, (
        "The settings that gin may bind are not those of tests/golden/gin_surface.json:\n  "
        + "\n  ".join(changed)
        + "\n"
        "If that was not the intention, undo it: saved config.gin files and commands of users break. If a setting is "
        "meant to come, go or change its default, say so in CHANGELOG.md and write the new surface with\n"
        "  python -m pytest tests/test_config.py --update-golden"
    )


def test_every_configurable_is_frozen_with_its_required_settings_marked():
    surface = config.surface()
    assert {stage.replace(" ", "_") for stage in STAGES} <= set(surface)
    assert surface["train"]["run_dir"] == surface["MixtureComponent"]["corpus"] == "(required)"
    assert surface["train"]["seed"] == "0" and "num_layers" in surface["model"]


@pytest.mark.parametrize("path", sorted((RECIPES / "runs").rglob("*.gin")), ids=lambda path: "/".join(path.parts[-2:]))
def test_recipes_name_what_exists(path, monkeypatch, tmp_path, caplog):
    """From any working directory, and where `configs` looks like a package; every one opens with what it is, and how
    to run it unless it is included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(RECIPES.parent)
    config.load([str(path)])
    assert not caplog.text
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    if path.name != "common.gin":
        stage = first.removeprefix("# slm-jax ").split(" --")[0]
        assert stage in STAGES and first.endswith(f"--gin_file={path.relative_to(RECIPES.parent)}")


def test_later_bindings_override_earlier_ones(tmp_path):
    (tmp_path / "one.gin").write_text("train.seed = 1\ntrain.log_every = 1\n")
    (tmp_path / "two.gin").write_text("include 'one.gin'\ntrain.seed = 2\n")
    files = [str(tmp_path / "two.gin")]
    config.load(files, ["train.log_every=5"])
    assert gin.query_parameter("train.seed") == 2 and gin.query_parameter("train.log_every") == 5
    config.load([])  # nothing stays of what was loaded before
    with pytest.raises(ValueError):
        gin.query_parameter("train.seed")


@pytest.mark.parametrize(
    "code, text, named",
    [
        ("gin-syntax", "train.seed = ", "line 2"),
        ("gin-syntax", "train.phases = [@Phase(), @MixtureComponent(]", "line 2"),
        ("gin-error", "include 'nowhere.gin'", "nowhere.gin"),
        ("gin-unknown-name", "train.seeds = 1", "'train.seeds': did you mean 'seed'?"),
        ("gin-unknown-name", "train.learning_rate = 1", "did you mean 'cosine_schedule.peak'?"),
        ("gin-unknown-name", "train.batch_size = 1", "did you mean 'Phase.batch_size'?"),
        ("gin-unknown-name", "train.xyzzy = 1", "known names are allow_equal_reference, checkpoint_every"),
        ("gin-renamed", "train.inherit = 'state'", "'train.init_mode'"),
        ("gin-renamed", "one/Draw.share = 0.5", "'MixtureComponent"),
        ("gin-renamed", "solve.run = 'r'", "'evaluate_math"),
        ("gin-import", "import nothing_of_that_name", "line 2: 'import nothing_of_that_name'"),
        ("gin-import", "from __gin__ import dynamic_registration", "--allow_gin_imports"),
        ("gin-includes-itself", "include 'a.gin'", "a.gin includes itself"),
        ("gin-unknown-macro", "train.seed = %SEED", "macro %SEED has no value"),
        ("gin-unknown-macro", "# %SEED\ntrain.seed = %SEED", "line 3"),
        ("gin-syntax", "train.phases = [@Phase(),", "a.gin: it ends inside"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(code, text, named, tmp_path):
    (tmp_path / "a.gin").write_text("train.log_every = 1\n" + text + "\n")
    line = toy.refused(code, config.load, [str(tmp_path / "a.gin")])
    assert named in line and ("a.gin" in line or "nowhere.gin" in line)


def test_imports_run_only_where_they_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "gin_test_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "b.gin").write_text("import gin_test_module\n")
    (tmp_path / "a.gin").write_text("include 'b.gin'\ntrain.seed = 1\n")
    file = str(tmp_path / "a.gin")
    assert "b.gin, line 1" in toy.refused("gin-import", config.load, [file])
    toy.refused("gin-import", config.load, [], ["train.seed=1\nimport gin_test_module"])
    assert not (tmp_path / "ran").exists()
    config.load([file], allow_imports=True)
    assert (tmp_path / "ran").exists() and gin.query_parameter("train.seed") == 1
    toy.refused("gin-import", config.load, [file])  # the permission ends with its load


def test_two_files_that_include_each_other_are_refused(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text("include 'a.gin'\n")
    line = toy.refused("gin-includes-itself", config.load, [str(tmp_path / "a.gin")])
    assert "a.gin" in line and "\n" not in line
    (tmp_path / "c.gin").write_text("train.seed = 3\n")  # one file twice, in a row, is no circle
    (tmp_path / "d.gin").write_text("include 'c.gin'\ninclude 'c.gin'\n")
    config.load([str(tmp_path / "d.gin")])
    assert gin.query_parameter("train.seed") == 3


def test_gin_files_are_utf_8(tmp_path):
    (tmp_path / "a.gin").write_bytes(b"\xef\xbb\xbftrain.seed = 3  # \xc3\xa4\n")
    config.load([str(tmp_path / "a.gin")])
    assert gin.query_parameter("train.seed") == 3
    for content, line in ((b"train.seed = 3\n# \xe4\n", 2), ("train.seed = 3\n".encode("utf-16"), 1)):
        (tmp_path / "b.gin").write_bytes(content)
        assert f"b.gin, line {line} is not UTF-8" in toy.refused(
            "gin-not-utf-8", config.load, [str(tmp_path / "b.gin")]
        )
