"""Stage `demo`: the main job. Text to reference to column to three models on the same batches, then a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config import print_unused
from slm_jax.configurable import Count, Seed, configurable
from slm_jax.demo.corpora import write_demo_corpora
from slm_jax.demo.jobs import Job, lanes_here, run_jobs
from slm_jax.demo.summary import write_summary
from slm_jax.errors import UserError


class Stage(NamedTuple):
    """A gin file of a recipe, the stage it configures, the gin files whose results it reads, and its train.seed there
    (to which other seeds of the demo add)."""

    name: str
    stage: str
    after: tuple[str, ...] = ()
    seed: int = 0


# A recipe is a folder with these gin files; those that a recipe lacks are left out.
HELD_OUT = ("target", "general")
STAGES = (
    Stage("crawl", "prepare"),  # trains the vocabulary
    Stage("clean", "prepare", ("crawl",)),
    Stage("target", "prepare", ("crawl",)),
    Stage("general", "prepare", ("crawl",)),
    Stage("reference", "train", ("clean", *HELD_OUT), seed=100),
    Stage("causal", "train", ("crawl", *HELD_OUT)),
    Stage("score", "score", ("crawl", "reference")),
    Stage("selective", "train", ("score", *HELD_OUT)),
    Stage("random", "train", ("crawl", *HELD_OUT)),
    Stage("base_text", "prepare", ("crawl",)),
    Stage("base", "train", ("base_text", *HELD_OUT)),
    Stage("score_clean", "score", ("clean", "reference")),
    Stage("filtered", "train", ("score", *HELD_OUT)),
    Stage("selective_short", "train", ("score", *HELD_OUT)),
    Stage("mixed_causal", "train", ("crawl", "clean", *HELD_OUT)),
    Stage("mixed_selective", "train", ("score", "score_clean", *HELD_OUT)),
    Stage("continual_causal", "train", ("crawl", "base", *HELD_OUT)),
    Stage("continual_selective", "train", ("score", "base", *HELD_OUT)),
    Stage("continual_random", "train", ("crawl", "base", *HELD_OUT)),
    Stage("score_base_text", "score", ("base_text", "reference")),
    Stage("continual_causal_replay", "train", ("crawl", "base", *HELD_OUT)),
    Stage("continual_selective_replay", "train", ("score", "score_base_text", "base", *HELD_OUT)),
)
CONFIGS = Path(__file__).parents[2] / "configs" / "runs"


@configurable
def demo(
    recipe: str = "demo",
    data: str | None = None,
    stages: Sequence[str] = (),
    seed: Seed = 0,
    size: Count = 4000,
    overrides: Sequence[str] = (),
) -> None:
    """Shows selective language modeling at work: `summary.json` and `report.html` in `runs/<recipe>`.

    Every stage is a command of its own, logged to `runs/<recipe>/logs/`; what is finished is not done again.

    Args:
      recipe: folder of `configs/runs/` with one gin file per stage; `demo` generates its corpora.
      data: folder with the data sets, for recipes on real text; None is the recipe's own Source.directory.
      stages: what to run (names of gin files), with all they read; by default everything the recipe has.
      seed: other seeds train other models, in `runs/<recipe>/seed<N>`, on the same corpora.
      size: documents of the generated crawl.
      overrides: gin bindings that every stage gets, such as 'Phase.steps = 20'.
    """
    print_unused()
    folder = CONFIGS / recipe
    if not (folder / f"{STAGES[0].name}.gin").exists():
        known = ", ".join(sorted(path.parent.name for path in CONFIGS.glob(f"*/{STAGES[0].name}.gin"))) or "none"
        raise UserError("recipe-not-found", f"no recipe {recipe!r} in {CONFIGS}: known are {known}")
    if data is not None and not Path(data).is_dir():
        raise UserError("demo-data", f"demo.data {data} is not a folder: name the one that holds the data sets")
    chosen = _with_inputs(folder, stages)
    root = Path("runs") / recipe
    here = root if seed == 0 else root / f"seed{seed}"
    lanes, environment = lanes_here()
    print(f"demo: {recipe}, {len(chosen)} stages, {lanes} at a time, each logged to {here}/logs -> {here}/report.html")
    if recipe == "demo":
        write_demo_corpora(root / "text", seed=0, size=size)
    common = [*overrides, *([f"Source.directory = {str(data)!r}"] if data else [])]
    run_jobs([_job(folder, stage, chosen, here, seed, common) for stage in chosen], lanes, environment)
    summary = write_summary(here, [stage.name for stage in chosen if stage.stage == "train"])
    _print(summary, here)


def _with_inputs(folder: Path, names: Sequence[str]) -> list[Stage]:
    """The named stages and all they read, in the order of STAGES."""
    available = {stage.name: stage for stage in STAGES if (folder / f"{stage.name}.gin").is_file()}
    wanted, more = set(), list(names) or list(available)
    while more:
        name = more.pop()
        if name not in available:
            raise UserError(
                "recipe-stage", f"recipe {folder.name} has no stage {name!r}: it has {', '.join(available)}"
            )
        if name not in wanted:
            wanted.add(name)
            more += available[name].after
    return [stage for stage in STAGES if stage.name in wanted]


def _job(folder: Path, stage: Stage, chosen: Sequence[Stage], here: Path, seed: int, common: Sequence[str]) -> Job:
    """The command of a stage. Models of other seeds get their own directories, columns and references; the base model
    of continual runs is one, as the corpora are."""
    bindings = list(common)
    root = here.parent if seed and stage.name == "base" else here
    if seed and stage.stage == "train" and stage.name != "base":
        bindings += [f"train.run_dir = {str(here / stage.name)!r}", f"train.seed = {stage.seed + seed}"]
        bindings += [f"Selection.reference = 'reference{seed}'"]
    if seed and stage.stage == "score":
        bindings += [f"score.reference = {str(here / 'reference')!r}", f"score.name = 'reference{seed}'"]
    names = {other.name for other in chosen}
    return Job(
        name=stage.name,
        command=(stage.stage, f"--gin_file={folder / stage.name}.gin", *(f"--gin.{binding}" for binding in bindings)),
        log=here / "logs" / f"{stage.name}.log",
        after=tuple(name for name in stage.after if name in names),
        run_dir=root / stage.name if stage.stage == "train" else None,
    )


def _print(summary: dict[str, Any], here: Path) -> None:
    """The result in a few lines."""
    for name, run in summary["runs"].items():
        print(f"  {name:20} target loss {run['target_loss']:.4f}  general loss {run['general_loss']:.4f}")
    for baseline in ("causal", "continual_causal"):
        for name, step in summary.get(f"steps_to_{baseline}_target_loss", {}).items():
            what = f"{baseline}'s final target loss"
            print(f"  {name} reaches {what} at step {step}" if step else f"  {name} does not reach {what}")
    if share := summary.get("selection"):
        print(
            f"  kept: {share['clean_selected_share']:.0%} of clean, {share['noise_selected_share']:.0%} of noise tokens"
        )
    print(f"demo: done; open {here}/report.html")
