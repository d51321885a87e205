"""Train language models on the tokens that matter: selective, metadata-conditioned and continual training in JAX.

    import slm_jax as slm
    slm.train("runs/mine", phases=[slm.Phase(steps=100, mixture=[slm.MixtureComponent("runs/corpus")])])

Each name is imported when it is first used: `import slm_jax` imports neither JAX nor anything else.
"""

import importlib
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax.analyze.inspector import analyze_inspect as analyze_inspect
    from slm_jax.analyze.report_runs import analyze_report as analyze_report
    from slm_jax.convert.export_model import export_model as export_model
    from slm_jax.convert.import_model import import_model as import_model
    from slm_jax.data.corpus import Corpus as Corpus
    from slm_jax.data.metadata import Metadata as Metadata
    from slm_jax.data.mixture import MixtureComponent as MixtureComponent
    from slm_jax.data.prepare import prepare as prepare
    from slm_jax.data.sources import Source as Source
    from slm_jax.data.vocabularies import VocabularyConfig as VocabularyConfig
    from slm_jax.errors import UserError as UserError
    from slm_jax.evaluate.evaluate import evaluate as evaluate
    from slm_jax.evaluate.generate import generate as generate
    from slm_jax.evaluate.generation import Sampling as Sampling
    from slm_jax.evaluate.harness import Harness as Harness
    from slm_jax.evaluate.multiple_choice import MultipleChoice as MultipleChoice
    from slm_jax.evaluate.perplexity import HeldOut as HeldOut
    from slm_jax.evaluate.samples import Samples as Samples
    from slm_jax.experiment.recipe import Arm as Arm
    from slm_jax.experiment.recipe import Recipe as Recipe
    from slm_jax.experiment.recipe import SharedStage as SharedStage
    from slm_jax.experiment.recipe import Threshold as Threshold
    from slm_jax.mesh import MeshConfig as MeshConfig
    from slm_jax.models.model_config import ModelConfig as ModelConfig
    from slm_jax.models.model_config import model_config as model_config
    from slm_jax.run_directory import RunDirectory as RunDirectory
    from slm_jax.score.score_corpus import score as score
    from slm_jax.score.selection import CombinedSelection as CombinedSelection
    from slm_jax.score.selection import Selection as Selection
    from slm_jax.train.average import average as average
    from slm_jax.train.loop import train as train
    from slm_jax.train.optimizer import OptimizerConfig as OptimizerConfig
    from slm_jax.train.phases import Phase as Phase
    from slm_jax.train.schedules import Schedule as Schedule
    from slm_jax.train.schedules import SchedulePart as SchedulePart
    from slm_jax.train.schedules import anneal_schedule as anneal_schedule
    from slm_jax.train.schedules import constant_schedule as constant_schedule
    from slm_jax.train.schedules import cosine_schedule as cosine_schedule
    from slm_jax.train.schedules import infinite_schedule as infinite_schedule
    from slm_jax.train.schedules import wsd_schedule as wsd_schedule

# Module -> the public names that it holds; a test compares the table with the imports above.
_PUBLIC = {
    "analyze.inspector": ("analyze_inspect",),
    "analyze.report_runs": ("analyze_report",),
    "convert.export_model": ("export_model",),
    "convert.import_model": ("import_model",),
    "data.corpus": ("Corpus",),
    "data.metadata": ("Metadata",),
    "data.mixture": ("MixtureComponent",),
    "data.prepare": ("prepare",),
    "data.sources": ("Source",),
    "data.vocabularies": ("VocabularyConfig",),
    "errors": ("UserError",),
    "evaluate.evaluate": ("evaluate",),
    "evaluate.generate": ("generate",),
    "evaluate.generation": ("Sampling",),
    "evaluate.harness": ("Harness",),
    "evaluate.multiple_choice": ("MultipleChoice",),
    "evaluate.perplexity": ("HeldOut",),
    "evaluate.samples": ("Samples",),
    "experiment.recipe": ("Arm", "Recipe", "SharedStage", "Threshold"),
    "mesh": ("MeshConfig",),
    "models.model_config": ("ModelConfig", "model_config"),
    "run_directory": ("RunDirectory",),
    "score.score_corpus": ("score",),
    "score.selection": ("CombinedSelection", "Selection"),
    "train.average": ("average",),
    "train.loop": ("train",),
    "train.optimizer": ("OptimizerConfig",),
    "train.phases": ("Phase",),
    "train.schedules": (
        *("Schedule", "SchedulePart", "anneal_schedule", "constant_schedule", "cosine_schedule", "infinite_schedule"),
        "wsd_schedule",
    ),
}
_HOME = {name: f"slm_jax.{module}" for module, names in _PUBLIC.items() for name in names}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """PEP 562: looked up once, then an attribute like any other."""
    if name not in _HOME:
        raise AttributeError(f"module 'slm_jax' has no attribute {name!r}")
    if _HOME[name].split(".")[1] == name:  # train, score and evaluate are packages too, which can be called
        return importlib.import_module(f"slm_jax.{name}")
    found = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _StagePackage(types.ModuleType):
    """A package that can be called as the stage of its name: `slm.train(...)` is `slm_jax.train.loop.train(...)`."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._stage()(*positional, **named)

    def _stage(self) -> Any:
        name = self.__name__.split(".")[1]
        return getattr(importlib.import_module(_HOME[name]), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stage())


def callable_package(name: str) -> None:
    """Lets the packages `train`, `score` and `evaluate` be called."""
    sys.modules[name].__class__ = _StagePackage
