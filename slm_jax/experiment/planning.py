"""Expands a recipe into tasks, for each variant and seed, with their settings and costs."""

import contextlib
import dataclasses
import graphlib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gin

from slm_jax import config as config_lib
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.experiment.recipe import Arm, Recipe, SharedStage, statements
from slm_jax.files import write_text
from slm_jax.models.model_config import model_config
from slm_jax.train.phases import Phase

# Stage -> the setting that says where its product goes; for a score column, the setting of its name.
PRODUCTS = {
    "prepare": "prepare.corpus",
    "train": "train.run_dir",
    "score": "score.name",
    "import": "import.target",
    "experiment world": "experiment_world.output",
    "experiment label": "experiment_label.name",
    "experiment filter": "experiment_filter.output",
}
COLUMNS = ("score", "experiment label")  # whose product is a score column
SHARED_SEED = 100  # added to the seed of references and base models, so that no two runs start from equal parameters


@dataclass(frozen=True)
class Task:
    """A shared stage or an arm, of one variant and one seed where it is repeated over them.

    text: its gin file. product: a directory, or the name of a column. after: names of the tasks that it reads.
    digest: of all settings that its result depends on.
    """

    name: str
    item: SharedStage | Arm
    variant: str
    seed: int | None
    product: str
    text: str
    after: tuple[str, ...]
    digest: str

    @property
    def stage(self) -> str:
        return self.item.stage if isinstance(self.item, SharedStage) else "train"


def expand(recipe: Recipe, work: Path, overrides: Sequence[str] = (), data: str | None = None) -> dict[str, Task]:
    """All tasks of a recipe by name, those that others read first; arms of the first seed before those of the next.

    Args:
      recipe: the recipe.
      work: folder of what it makes.
      overrides: gin bindings for every task.
      data: Source.directory of every task that does not set its own; results do not depend on it.

    Raises:
      UserError: shared stages that read each other, or a stage that is unknown.
    """
    order = graphlib.TopologicalSorter({stage.name: recipe.reads(stage) for stage in recipe.shared})
    try:
        names = list(order.static_order())
    except graphlib.CycleError as error:
        raise UserError(
            "experiment-circular", f"recipe {recipe.name}: shared stages read each other: {' -> '.join(error.args[1])}"
        ) from None
    tasks: dict[str, Task] = {}

    def add(item: SharedStage | Arm, variant: str, seed: int | None) -> None:
        reads = {name: tasks[_name(recipe, recipe.stage(name), variant, seed)] for name in recipe.reads(item)}
        stage = item.stage if isinstance(item, SharedStage) else "train"
        if stage not in PRODUCTS:
            raise UserError(
                "experiment-unknown-stage",
                f"shared stage {item.name}: {stage!r} is unknown: known are {', '.join(PRODUCTS)}",
            )
        task_name = _name(recipe, item, variant, seed)
        product = _column(recipe, item, variant, seed) if stage in COLUMNS else str(work / task_name)
        varied = isinstance(item, Arm) or "variant" in item.per
        texts = [*recipe.common(stage), recipe.variants[variant] if varied else "", item.settings]
        own_seed = (seed or 0) + (SHARED_SEED if isinstance(item, SharedStage) else 0)
        settings = statements(*texts, *overrides)
        digest = [settings, own_seed if stage == "train" else None, *(task.digest for task in reads.values())]
        macros = {name: task.product for name, task in reads.items()} | {item.name: product, "seed": own_seed}
        about = [f"# slm-jax {stage}", *(f"{name} = {value!r}" for name, value in macros.items())]
        about += [f"Source.directory = {str(data)!r}"] if data else []
        ends = [f"{PRODUCTS[stage]} = {product!r}", *(["train.seed = %seed"] if stage == "train" else []), *overrides]
        tasks[task_name] = Task(
            name=task_name,
            item=item,
            variant=variant,
            seed=seed,
            product=product,
            text="\n".join([*about, *statements(*texts), *ends, ""]),
            after=tuple(task.name for task in reads.values()),
            digest=hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:16],
        )

    all_seeds = sorted(set[int]().union(recipe.seeds, *map(recipe.seeds_of, recipe.arms)))
    for item in map(recipe.stage, names):
        repeated = recipe.dimensions(item)
        variants = recipe.variants if "variant" in repeated else [next(iter(recipe.variants))]
        for variant, seed in itertools.product(variants, all_seeds if "seed" in repeated else [None]):
            add(item, variant, seed)
    for seed, variant, arm in itertools.product(all_seeds, recipe.variants, recipe.arms):
        if seed in recipe.seeds_of(arm) and variant in recipe.variants_of(arm.name):
            add(arm, variant, seed)
    return tasks


def _name(recipe: Recipe, item: SharedStage | Arm, variant: str, seed: int | None) -> str:
    """VARIANT/seedN/NAME, without what the item is not repeated over."""
    repeated = recipe.dimensions(item)
    parts = [variant] if "variant" in repeated and variant else []
    return "/".join([*parts, *([f"seed{seed}"] if "seed" in repeated else []), item.name])


def _column(recipe: Recipe, item: SharedStage | Arm, variant: str, seed: int | None) -> str:
    """Name of a score column: a corpus that is not repeated holds those of all its references."""
    assert isinstance(item, SharedStage)
    models = [recipe.stage(name) for name in recipe.reads(item)]
    repeated = {name for model in models if model.stage == "train" for name in recipe.dimensions(model)}
    parts = [variant] if "variant" in repeated and variant else []
    return "-".join([item.column or item.name, *parts, *([f"seed{seed}"] if "seed" in repeated else [])])


def needed(tasks: Mapping[str, Task], arms: Sequence[str]) -> list[Task]:
    """The named tasks and all that they read, in the order of `tasks`."""
    wanted: set[str] = set()
    more = list(arms)
    while more:
        name = more.pop()
        if name not in wanted:
            wanted.add(name)
            more += tasks[name].after
    return [task for task in tasks.values() if task.name in wanted]


@dataclass(frozen=True)
class Cost:
    """Of a train task: its steps, positions of all rows, and floating point operations without scoring."""

    steps: int
    tokens: int
    flops: float


def train_costs(tasks: Sequence[Task], folder: Path) -> dict[str, Cost]:
    """Cost of each train task from its settings. Loads each gin file, which clears earlier bindings.

    Row length and vocabulary are those of the corpus or, while it is not there, of the first `prepare` that sets them.
    """
    planned = {"length": 1024, "vocabulary": 32000}
    for task in reversed(tasks):
        if task.stage == "prepare":
            config_lib.load([str(gin_file(folder, task))])
            found = {"length": gin.get_bindings("prepare").get("sequence_length")}
            found["vocabulary"] = gin.get_bindings("VocabularyConfig").get("size")
            planned |= {name: value for name, value in found.items() if value is not None}
    costs: dict[tuple[str, str], Cost] = {}
    for task in tasks:
        key = (task.item.name, task.variant)
        if task.stage == "train" and key not in costs:
            config_lib.load([str(gin_file(folder, task))])
            costs[key] = _train_cost(**planned)
    gin.clear_config()
    return {task.name: costs[task.item.name, task.variant] for task in tasks if task.stage == "train"}


def _train_cost(length: int, vocabulary: int) -> Cost:
    settings = gin.get_bindings("train")
    phases: list[Phase] = settings.get("phases") or [gin.get_configurable(Phase)()]
    with contextlib.suppress(UserError):  # not prepared yet
        corpus = Corpus.open(phases[0].mixture[0].corpus)
        length, vocabulary = corpus.sequence_length, corpus.vocab_size
    model = settings.get("model") or model_config()
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=vocabulary)
    steps, tokens, flops = 0, 0, 0.0
    for phase in (phase.resolved(length) for phase in phases):
        positions = phase.num_steps * phase.batch_size * length
        kept = phase.selection.ratio if phase.selection and phase.selection.gradient == "filtered" else 1.0
        steps, tokens = steps + phase.num_steps, tokens + positions
        flops += model.flops_per_token(length) * positions * (1 + 2 * kept) / 3
    return Cost(steps, tokens, flops)


def gin_file(folder: Path, task: Task) -> Path:
    return folder / "gin" / f"{task.name}.gin"


def write_gin_files(tasks: Sequence[Task], folder: Path) -> None:
    for task in tasks:
        write_text(gin_file(folder, task), task.text)
