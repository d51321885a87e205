"""Stages `init` and `run`: an experiment on your own text. `init` writes the recipe, `run` goes from text to report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from slm_jax.chips import chip_of
from slm_jax.configurable import NotNegative, Positive, configurable
from slm_jax.data.sources import Source
from slm_jax.errors import UserError
from slm_jax.experiment.run_experiment import ASSUMED_FLOPS, experiment
from slm_jax.files import write_text
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.train.schedules import peak_by_size

BATCH_TOKENS = 4096  # of the smallest size; larger ones take more
EPOCHS = 4  # more passes over a text teach little (Muennighoff et al., arXiv 2305.16264)
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. (arXiv 2203.15556)
CHARACTERS_PER_TOKEN = 3.5
UNPACKED = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}  # characters per byte of a file
EFFICIENCY = 0.3  # assumed fraction of an accelerator's peak FLOP/s
RUNS = 3.7  # total cost in arms: three arms, a reference on less text, scoring without a backward pass


@dataclass(frozen=True)
class Choice:
    """The settings that `init` chooses for data and machine."""

    size: str
    model: ModelConfig
    vocabulary: int
    length: int
    batch_size: int
    steps: int
    peak: float
    megabytes: float


@configurable
def init(
    folder: str,
    noisy: Sequence[str],
    clean: Sequence[str],
    heldout: Sequence[str] = (),
    minutes: Positive = 30.0,
    python: bool = False,
) -> None:
    """Writes FOLDER/recipe.gin: selective training on your text against causal and random training, for `slm-jax run`.

    Sizes and learning rate follow from the amount of text and this machine; the file can be edited.

    Args:
      folder: where to write; its last part names the experiment.
      noisy: files or globs of the text to train on (.jsonl, .parquet, .txt, .gz, .zst).
      clean: files or globs of the target text, which trains the reference.
      heldout: files or globs of target text to measure on; by default a held-out tenth of the clean documents.
      minutes: how long the whole experiment may take.
      python: write FOLDER/run.py instead, a script with the same runs.
    """
    target = Path(folder) / ("run.py" if python else "recipe.gin")
    if target.exists():
        raise UserError("init-exists", f"{target} exists: edit it, remove it, or take another folder")
    # Absolute paths, since the experiment may be run from any folder.
    files = {name: _paths(name, given) for name, given in (("noisy", noisy), ("clean", clean), ("heldout", heldout))}
    choice = choose(sum(map(_characters, files["noisy"])), minutes * 60 * _flops_per_second())
    write_text(target, _script(folder, files, choice) if python else _recipe(folder, files, choice))
    tokens = choice.steps * choice.batch_size * choice.length
    print(
        f"init: {target}\n"
        f"  model {choice.size}, {choice.model.parameter_count():,} parameters with {choice.vocabulary} ids; "
        f"{choice.steps} steps of {choice.batch_size} x {choice.length} tokens, {tokens:,} a run; "
        f"peak learning rate {choice.peak:g}\n"
        f"  about {_memory(choice) / 1e9:.1f} GB of memory; at most about {minutes:g} minutes in all",
        flush=True,
    )
    if python:
        print(f"  next: python {target}")
        return
    run(folder, dry_run=True)
    print(f"  next: slm-jax run {folder}")


@configurable
def run(folder: str, budget_s: NotNegative | None = None, overrides: Sequence[str] = (), dry_run: bool = False) -> None:
    """Runs FOLDER/recipe.gin from text to report; after an interruption, the same command continues.

    Args:
      folder: the folder that `init` wrote.
      budget_s: seconds after which running jobs are stopped and no more are started; the next call continues.
      overrides: gin bindings for every job, such as 'Phase.steps = 20'.
      dry_run: print the plan and stop.
    """
    recipe = Path(folder) / "recipe.gin"
    if not recipe.is_file():
        raise UserError("run-no-recipe", f"{recipe} does not exist: write it with slm-jax init {folder} --noisy=FILES")
    experiment(
        str(recipe),
        results=str(Path(folder) / "results"),
        work=str(Path(folder) / "work"),
        budget_s=budget_s,
        overrides=overrides,
        dry_run=dry_run,
    )


def choose(characters: float, flops: float) -> Choice:
    """Sizes for this many characters of noisy text and this many floating point operations for the whole experiment.

    The largest size for which the budget allows 20 tokens per parameter and the text has half of that within 4 epochs;
    at least `demo`.
    """
    vocabulary = next(size for size, most in VOCABULARIES if characters < most)
    available = EPOCHS * characters / CHARACTERS_PER_TOKEN
    found = None
    for size in ("demo", "small", "pythia_160m", "pythia_410m", "pythia_1b"):
        model = model_config(size, vocab_size=vocabulary)
        length = 256 if size == "demo" else 1024
        affordable = flops / RUNS / model.flops_per_token(length)
        enough = TOKENS_PER_PARAMETER * model.parameter_count()
        if found and (affordable < enough or available < enough / 2):
            break
        tokens = min(available, affordable, 5 * enough)
        batch_size = max(16, round(BATCH_TOKENS * math.sqrt(enough / 25e6) / length))
        steps = max(20, int(tokens / (batch_size * length)))
        peak = peak_by_size(model.parameter_count())
        found = Choice(size, model, vocabulary, length, batch_size, steps, peak, characters / 1e6)
    assert found
    return found


# (size of the vocabulary, upper limit of the text's characters for this size).
VOCABULARIES = ((320, 1e5), (512, 3e5), (1024, 1e6), (2048, 2e7), (8192, 1e9), (32000, math.inf))


def _paths(name: str, files: Sequence[str]) -> list[str]:
    return [str(Path(path).resolve()) for path in Source(name, files).paths()] if files else []


def _characters(path: str) -> float:
    return Path(path).stat().st_size * UNPACKED.get(Path(path).suffix, 1.0)


def _flops_per_second() -> float:
    devices = jax.devices()
    chip = chip_of(devices[0].device_kind)
    return chip.peak_flops * EFFICIENCY * len(devices) if chip else 2 * ASSUMED_FLOPS


def _memory(choice: Choice) -> float:
    """Bytes of one run: parameters, two moments and gradients in float32, and activations with rematerialization."""
    tokens = choice.batch_size * choice.length
    width, layers = choice.model.embed_dim, choice.model.num_layers
    return 16 * choice.model.parameter_count() + 4 * tokens * (width * (layers + 20) + choice.vocabulary / 4)


def _recipe(folder: str, files: dict[str, list[str]], choice: Choice) -> str:
    held = f"Source.files = {files['heldout']!r}" if files["heldout"] else f"Source.files = {files['clean']!r}"
    part = "" if files["heldout"] else "\n    Source.part = '9/10'"
    rest = "" if files["heldout"] else "\n    Source.part = '0-8/10'"
    return f"""# slm-jax run {folder}
# Selective training on your own text, against causal and random training on the same rows, with two held-out texts.
# Written by `slm-jax init` for {choice.megabytes:,.1f} million characters of noisy text; edit it as you like.
Recipe.name = {Path(folder).name!r}
Recipe.question = 'Does training on the tokens that the reference knows better help on the clean text?'
Recipe.measures = ['held/loss', 'noisy_held/loss']
Recipe.seeds = [0]  # more seeds give intervals: [0, 1, 2]

# Settings by stage, as in a gin file; `%noisy` is the product of the stage `noisy` below.
Recipe.settings = {{
    'prepare': \"\"\"
        prepare.sequence_length = {choice.length}
        VocabularyConfig.path = %noisy
    \"\"\",
    'train': \"\"\"
        # `slm-jax help sizes` lists the sizes; a larger one needs a smaller learning rate.
        model.size = {choice.size!r}
        cosine_schedule.peak = {choice.peak:g}
        cosine_schedule.warmup = 0.05
        Phase.steps = {choice.steps}
        Phase.batch_size = {choice.batch_size}
        # The fraction of tokens to train on, for the arms that select.
        Selection.ratio = 0.6
        MixtureComponent.corpus = %noisy
        MixtureComponent.epochs = {4 * EPOCHS}
        train.evaluate_every = {max(1, choice.steps // 10)}
        train.evaluators = [@held/HeldOut(), @noisy_held/HeldOut()]
        HeldOut.rows = 128
        held/HeldOut.name = 'held'
        held/HeldOut.corpus = %held
        noisy_held/HeldOut.name = 'noisy_held'
        noisy_held/HeldOut.corpus = %noisy_held
    \"\"\",
}}
Recipe.shared = [
    @noisy/SharedStage(), @noisy_held/SharedStage(), @clean/SharedStage(), @held/SharedStage(),
    @reference/SharedStage(), @score/SharedStage()]
noisy/SharedStage.stage = 'prepare'
noisy/SharedStage.settings = \"\"\"
    Source.name = 'noisy'
    Source.files = {files["noisy"]!r}
    Source.part = '1-49/50'
    VocabularyConfig.path = None
    VocabularyConfig.size = {choice.vocabulary}
\"\"\"
noisy_held/SharedStage.stage = 'prepare'
noisy_held/SharedStage.settings = \"\"\"
    Source.name = 'noisy_held'
    Source.files = {files["noisy"]!r}
    Source.part = '0/50'
\"\"\"
clean/SharedStage.stage = 'prepare'
clean/SharedStage.settings = \"\"\"
    Source.name = 'clean'
    Source.files = {files["clean"]!r}{rest}
\"\"\"
held/SharedStage.stage = 'prepare'
held/SharedStage.settings = \"\"\"
    Source.name = 'held'
    {held}{part}
\"\"\"
# The reference: trained on the clean text, it scores every token of the noisy text once.
reference/SharedStage.stage = 'train'
reference/SharedStage.per = ['seed']
reference/SharedStage.settings = "MixtureComponent.corpus = %clean"
score/SharedStage.stage = 'score'
score/SharedStage.settings = \"\"\"
    score.corpus = %noisy
    score.reference = %reference
\"\"\"

Recipe.arms = [@causal/Arm(), @selective/Arm(), @random/Arm()]
selective/Arm.settings = \"\"\"
    Phase.selection = @Selection()
    Selection.reference = %score
\"\"\"
random/Arm.settings = \"\"\"
    Phase.selection = @Selection()
    Selection.score = 'random'
\"\"\"
"""


def _script(folder: str, files: dict[str, list[str]], choice: Choice) -> str:
    held = repr(files["heldout"]) if files["heldout"] else f"{files['clean']!r}, part='9/10'"
    clean = repr(files["clean"]) + ("" if files["heldout"] else ", part='0-8/10'")
    return f'''"""Selective training on your own text, against causal and random training; run again to continue."""

import slm_jax as slm

SOURCES = [
    slm.Source("noisy", {files["noisy"]!r}),
    slm.Source("clean", {clean}),
    slm.Source("held", {held}),
]
MODEL, SCHEDULE = slm.model_config({choice.size!r}), slm.cosine_schedule(peak={choice.peak:g}, warmup=0.05)


def train(name, corpus, selection=None):
    mixture = [slm.MixtureComponent(f"{folder}/{{corpus}}", epochs={4 * EPOCHS})]
    phase = slm.Phase({choice.steps}, mixture=mixture, batch_size={choice.batch_size}, selection=selection)
    held = slm.HeldOut("held", "{folder}/held", rows=128)
    slm.train(f"{folder}/{{name}}", MODEL, [phase], SCHEDULE, evaluators=[held])


if __name__ == "__main__":  # prepare starts processes that import this file
    vocabulary = slm.VocabularyConfig(size={choice.vocabulary})
    for source in SOURCES:
        slm.prepare(f"{folder}/{{source.name}}", [source], vocabulary, sequence_length={choice.length})
        vocabulary = slm.VocabularyConfig(path="{folder}/noisy")
    train("reference", "clean")
    slm.score("{folder}/noisy", reference="{folder}/reference")
    train("causal", "noisy")
    train("selective", "noisy", slm.Selection("excess", ratio=0.6))
    train("random", "noisy", slm.Selection("random", ratio=0.6))
    slm.analyze_report([f"{folder}/{{name}}" for name in ("causal", "selective", "random")], "{folder}/report")
'''
