"""Every setting is checked against its annotation: wrong types, values out of range and unknown choices, generated."""

import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
import pytest

from slm_jax import config
from slm_jax.__main__ import STAGES
from slm_jax.configurable import Above, AtLeast, AtMost, Below, OneOf
from slm_jax.data.mixture import MixtureComponent
from slm_jax.declarations import declarations
from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig
from slm_jax.score.selection import Selection
from slm_jax.train.optimizer import OptimizerConfig, make_optimizer
from slm_jax.train.phases import Phase
from slm_jax.train.schedules import Schedule, SchedulePart

for module in STAGES.values():
    importlib.import_module(module)

# One value of each kind, and the types for which it is right.
VALUES = (
    ("x", str),
    (3, int, float),
    (0.5, float),
    (True, bool),
    (None, types.NoneType),
    ({"a": "b"}, Mapping, dict),
    (object(),),
    ([object()],),
    (Selection,),
)


def leaves(annotation):
    """(type, marks) of each type that a setting, or an item of it, may have."""
    arguments = typing.get_args(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind is typing.Annotated:
        return [(kind, arguments[1:]) for kind, _ in leaves(arguments[0])]
    if kind in (typing.Union, types.UnionType, Sequence):
        return [leaf for argument in arguments for leaf in leaves(argument)]
    return [(kind, ())]


def surface() -> Iterator[tuple[str, Any, str, list[tuple[Any, tuple[Any, ...]]]]]:
    for name, declaration in declarations().items():
        entry = gin.config._REGISTRY.get_match(declaration.selector)  # pyright: ignore[reportAttributeAccessIssue]
        owner = ModelConfig if name == "model" else entry.wrapped
        hints = typing.get_type_hints(owner, include_extras=True)
        for setting in inspect.signature(owner).parameters:
            yield name, owner, setting, leaves(hints[setting])


def wrong_values() -> Iterator[tuple[Any, str, Any, str]]:
    """(configurable, setting, value, code) of everything that must be refused."""
    for _, owner, setting, kinds in surface():
        for value, *right in VALUES:
            if not {kind for kind, _ in kinds} & {*right}:
                yield owner, setting, value, "setting-type"
        for kind, marks in kinds:
            if kind is float:
                yield owner, setting, math.nan, "setting-out-of-range"
            step = 1 if kind is int else 0.25
            for mark in marks:
                if isinstance(mark, OneOf):
                    yield owner, setting, "no such", "setting-unknown-value"
                else:
                    outside = {AtLeast: -step, Above: 0, AtMost: step, Below: 0}[type(mark)]
                    yield owner, setting, mark.limit + outside, "setting-out-of-range"
        if kinds[0][0] is str and inspect.signature(owner).parameters[setting].default is inspect.Parameter.empty:
            yield owner, setting, "", "setting-empty"


def refused_otherwise():
    """How many values were tried, and those that were not refused as they should be."""
    tried, found = list(wrong_values()), []
    for owner, setting, value, code in tried:
        try:
            owner(**{setting: value})
            problem = "accepted"
        except UserError as error:
            line = str(error).splitlines()[0]
            problem = "" if error.code == code and f".{setting} " in line and len(line) < 700 else repr(error)
        except Exception as error:
            problem = repr(error)
        if problem:
            found.append(f"{owner.__name__}.{setting} = {value!r}, {code}: {problem}")
    return len(tried), found


def fitted():
    """Values that fit, and what became of them."""
    half, weights = Schedule(SchedulePart(0.5)), (150, None, Schedule([SchedulePart(1)]))  # pyright: ignore
    return {
        "mixture": Phase(steps=np.int64(3), mixture=MixtureComponent("a")).mixture,  # pyright: ignore
        "parts": half.parts,
        "references": Selection(reference=["a", "b"]).references,
        "weights": tuple(MixtureComponent("a", weight=weight).weight for weight in weights),
    }


def test_every_wrong_value_is_refused_in_one_line_that_names_the_setting(shell):
    count, found = shell.call(refused_otherwise)
    assert count > 1500 and not found, "\n".join(found)


def test_every_number_has_a_range():
    free = {"threshold", "offset", "high", "at_most", "at_least"}  # bounds on quantities that may have any sign
    for name, _, setting, kinds in surface():
        for kind, marks in kinds:
            assert kind not in (int, float) or marks or setting in free, f"{name}.{setting} has no range"


def test_what_fits_passes_and_one_item_stands_for_a_list_of_one(shell):
    assert shell.call(fitted) == {
        "mixture": (MixtureComponent("a"),),
        "parts": (SchedulePart(0.5),),
        "references": ("a", "b"),
        "weights": (150, None, Schedule((SchedulePart(1.0),))),
    }


def test_clipping_is_turned_off_by_none_alone():
    gradient = {"kernel": np.full(3, 100.0, np.float32)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=None, weight_decay=0.0))
    state: Any = optimizer.update(gradient, optimizer.init(gradient), gradient)[1]  # of clipping, Adam, decay
    np.testing.assert_allclose(state[1].mu["kernel"], 0.1 * gradient["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    "binding, code",
    [
        ("train.dry_run='x'", "setting-type"),
        ("train.seed=2**80", None),
        ("train.seed=4294967296", "setting-out-of-range"),
        ("train.keep_checkpoints=0", "setting-out-of-range"),
        ("train.checkpoint_every=-3", "setting-out-of-range"),
        ("train.run_dir=''", "setting-empty"),
        ("train.model=5", "setting-type"),
        ("train.phases=@Phase", "setting-type"),
        ("train.evaluators=[1]", "setting-type"),
        ("OptimizerConfig.clip_norm=0", "setting-out-of-range"),
        ("OptimizerConfig.b1=1.0", "setting-out-of-range"),
        ("Selection.ratio='0.6'", "setting-type"),
        ("MixtureComponent.epochs='2'", "setting-type"),
        ("model.num_layers=0", "setting-out-of-range"),
        ("cosine_schedule.peak='1e-3'", "setting-type"),
    ],
)
def test_the_command_ends_with_code_2_and_one_line(tmp_path, shell, binding, code):
    given = ["train.run_dir='run'", "MixtureComponent.corpus='corpus'", "Phase.steps=1", "Phase.selection=@Selection()"]
    given += ["train.optimizer=@OptimizerConfig()", "train.dry_run=True", "train.phases=[@Phase()]", binding]
    exit_code, _, errors = shell("train", *(f"--gin.{setting}" for setting in given), folder=tmp_path)
    line = errors.strip()
    assert exit_code == 2 and "\n" not in line
    assert code is None or (f"[{code}]" in line and binding.split("=")[0] in line)


def test_a_setting_that_nothing_reads_is_named(capsys):
    given = ["trian/OptimizerConfig.b1=0.3", "used/OptimizerConfig.b1=0.3", "half=0.5", "other=1", "Phase.steps=3"]
    config.load([], [*given, "OptimizerConfig.b2=%half", "OptimizerConfig.ema=0.0"])
    with gin.config_scope("used"):
        assert gin.get_configurable("OptimizerConfig")().b1 == 0.3
    config.print_unused()
    gin.clear_config()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["trian/OptimizerConfig.b1", "other", "Phase.steps"]


def test_settings_of_files_that_nothing_reads_are_named(tmp_path, capsys):
    """Of a file that others include only the configurables: their settings may be meant for another stage."""
    shared = "prepare.seed = 1\nPhase.steps = 3\nPhase.batch_size = 4\nb = 2\nOptimizerConfig.ema = 0.0\n"
    (tmp_path / "shared.gin").write_text(shared)
    text = "include 'shared.gin'\ntrian/OptimizerConfig.b1 = 0.3\nOptimizerConfig:\n  b2 = %half\n"
    (tmp_path / "run.gin").write_text(text + "half = 0.5\nPhase.steps = 1\n")
    config.load([str(tmp_path / "run.gin")])
    gin.get_configurable("OptimizerConfig")()
    config.print_unused()
    gin.clear_config()
    run, included = sorted(capsys.readouterr().out.splitlines())
    assert run.startswith(f"{tmp_path}/run.gin: ") and run.endswith(
        ": trian/OptimizerConfig.b1 (line 2), Phase.steps (line 6)"
    )
    assert "shared.gin" in included and included.endswith(" prepare, Phase, b")
