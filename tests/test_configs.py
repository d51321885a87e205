"""The run files of the papers: each builds its plan, the plan has the paper's numbers, and the files fit together.

No corpus is there and no model is made: a stand-in says how many tokens a corpus has, as far as the papers tell.
"""

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gin
import numpy as np
import pytest

from slm_jax import config
from slm_jax.__main__ import STAGES
from slm_jax.data.corpus import Corpus
from slm_jax.data.sources import SCHEMAS
from slm_jax.files import to_json
from slm_jax.mesh import MeshConfig
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.train.phases import Phase
from slm_jax.train.plan import Plan
from slm_jax.train.resume import check_same_rows

RUNS = Path(__file__).parents[1] / "configs" / "runs"
PAPERS = ("rho1", "meco", "continual")

# Models that come from elsewhere.
GIVEN = {f"runs/rho1/{name}" for name in ("math_1b/tinyllama", "math_7b/mistral", "weak_to_strong/llama2_7b")}

# Billions of tokens of each corpus: arXiv 2404.07965 §3.1; arXiv 2501.01956, the release; arXiv 2403.08763 §5.
CORPORA = {
    "rho1/math_1b/open_web_math": 14,
    "rho1/math_1b/clean": 0.5,
    "rho1/math_7b/open_web_math": 14,
    "rho1/math_7b/clean": 0.5,
    "rho1/general_1b/slimpajama": 60,
    "rho1/general_1b/starcoder": 30,
    "rho1/general_1b/clean": 1.9,
    "rho1/self_reference/proof_pile_2": 55,
    "rho1/tora/trajectories": 0.0353,  # 69,000 of about 512 tokens
    "meco/dclm_with_url": 270,
    "meco/dclm_with_full_url": 270,
    "meco/dclm_with_suffix": 270,
    "meco/dclm_with_hash": 270,
    "meco/dclm_cooldown": 89,
    "meco/dclm_plain": 359,
    "continual/pile": 330,
    "continual/slimpajama": 303,
    "continual/german": 195.43,
}

# Parameters: the papers, or their models' public configurations.
TINYLLAMA, MISTRAL, LLAMA2 = 1_100_048_384, 7_241_732_096, 6_738_415_616
MECO_600M, MECO_1_6B, MECO_3B, MECO_8B = 665_371_648, 1_639_024_640, 3_606_752_256, 8_030_261_248
NEOX_405M, NEOX_10B = 405_334_016, 9_642_249_216

RHO1 = "arXiv 2404.07965"
MECO = "arXiv 2501.01956, appendix A"
CONTINUAL = "arXiv 2403.08763, Table 14"


class Paper(NamedTuple):
    """What a paper says of a run. billions: of tokens, as it rounds them; peak, last: learning rates under the last
    schedule of the run; kept: share of the tokens that trains in the end, of each selection where several are combined.
    """

    source: str
    parameters: int
    steps: int
    billions: float
    peak: float
    last: float
    kept: float | tuple[float, ...] = 1.0


RUN_FILES = {
    "rho1/math_1b/reference": Paper(f"{RHO1} §3.1", TINYLLAMA, 1431, 1.5, 5e-5, 5e-6),
    "rho1/math_1b/causal": Paper(f"{RHO1} §3.1", TINYLLAMA, 14306, 15, 8e-5, 8e-6),
    "rho1/math_1b/selective": Paper(f"{RHO1} §3.1", TINYLLAMA, 14306, 15, 8e-5, 8e-6, 0.6),
    "rho1/math_1b/ratio_sweep": Paper(f"{RHO1}, Figure 9", TINYLLAMA, 4769, 5, 8e-5, 8e-6, 0.4),
    "rho1/math_7b/reference": Paper(f"{RHO1} §3.1", MISTRAL, 1431, 1.5, 1e-5, 1e-6),
    "rho1/math_7b/causal": Paper(f"{RHO1} §3.1", MISTRAL, 14306, 15, 2e-5, 2e-6),
    "rho1/math_7b/selective": Paper(f"{RHO1} §3.1", MISTRAL, 14306, 15, 2e-5, 2e-6, 0.7),
    "rho1/general_1b/reference": Paper(f"{RHO1} §3.1", TINYLLAMA, 5436, 5.7, 5e-5, 5e-6),
    "rho1/general_1b/causal": Paper(f"{RHO1} §3.1", TINYLLAMA, 76294, 80, 1e-4, 1e-5),
    "rho1/general_1b/selective": Paper(f"{RHO1} §3.1", TINYLLAMA, 76294, 80, 1e-4, 1e-5, 0.6),
    "rho1/self_reference/reference_loss": Paper(f"{RHO1}, Table 3", TINYLLAMA, 14306, 15, 8e-5, 8e-6, 0.7),
    "rho1/self_reference/entropy": Paper(f"{RHO1}, Table 3", TINYLLAMA, 14306, 15, 8e-5, 8e-6, 0.7),
    "rho1/self_reference/intersection": Paper(f"{RHO1}, Table 4", TINYLLAMA, 14306, 15, 8e-5, 8e-6, (0.7, 0.7)),
    "rho1/self_reference/union": Paper(f"{RHO1}, Table 4", TINYLLAMA, 14306, 15, 8e-5, 8e-6, (0.6, 0.7)),
    "rho1/self_reference/proof_pile_2_causal": Paper(f"{RHO1}, Table 3", TINYLLAMA, 49592, 52, 8e-5, 8e-6),
    "rho1/self_reference/proof_pile_2_intersection": Paper(
        f"{RHO1}, Table 3", TINYLLAMA, 49592, 52, 8e-5, 8e-6, (0.8, 0.8)
    ),
    "rho1/tora/selective": Paper("microsoft/ToRA", TINYLLAMA, 1617, 0.106, 2e-5, 0.0),
    "rho1/tora/causal": Paper("microsoft/ToRA", TINYLLAMA, 1617, 0.106, 2e-5, 0.0),
    "rho1/weak_to_strong/causal": Paper(f"{RHO1}, Table 5", LLAMA2, 14306, 15, 2e-5, 2e-6),
    "rho1/weak_to_strong/selective": Paper(f"{RHO1}, Table 5", LLAMA2, 14306, 15, 2e-5, 2e-6, 0.7),
    "meco/600m/standard": Paper(MECO, MECO_600M, 40000, 160, 3e-3, 3e-4),
    "meco/600m/meco": Paper(MECO, MECO_600M, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/standard": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/meco": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/no_cooldown": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/mixed": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/cooldown_20": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/cooldown_30": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/full_url": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/suffix": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/1_6b/hashed": Paper(MECO, MECO_1_6B, 40000, 160, 3e-3, 3e-4),
    "meco/3b/standard": Paper(MECO, MECO_3B, 40000, 160, 3e-3, 3e-4),
    "meco/3b/meco": Paper(MECO, MECO_3B, 40000, 160, 3e-3, 3e-4),
    "meco/8b/standard": Paper(MECO, MECO_8B, 20000, 80, 5e-4, 5e-5),
    "meco/8b/meco": Paper(MECO, MECO_8B, 20000, 80, 5e-4, 5e-5),
    "continual/405m/pile": Paper(CONTINUAL, NEOX_405M, 132366, 300, 3e-4, 3e-5),
    "continual/405m/slimpajama_no_replay": Paper(CONTINUAL, NEOX_405M, 264732, 600, 3e-4, 3e-5),
    "continual/405m/slimpajama_replay": Paper(CONTINUAL, NEOX_405M, 264732, 600, 3e-4, 3e-5),
    "continual/405m/slimpajama_union": Paper(CONTINUAL, NEOX_405M, 264732, 600, 3e-4, 3e-5),
    "continual/405m/german_no_replay": Paper(CONTINUAL, NEOX_405M, 218801, 500, 3e-4, 3e-5),
    "continual/405m/german_replay": Paper(CONTINUAL, NEOX_405M, 218801, 500, 3e-4, 3e-5),
    "continual/405m/german_union": Paper(CONTINUAL, NEOX_405M, 218801, 500, 3e-4, 3e-5),
    "continual/405m/rewarming": Paper("arXiv 2403.08763 §6", NEOX_405M, 264732, 600, 1.5e-4, 1.5e-5),
    "continual/405m/rewarming_pile": Paper("arXiv 2403.08763 §6", NEOX_405M, 264732, 600, 3e-4, 3e-5),
    "continual/405m/constant": Paper("arXiv 2403.08763 §6", NEOX_405M, 264732, 600, 3e-5, 3e-5),
    "continual/405m/splits_cosine": Paper("arXiv 2403.08763 §7", NEOX_405M, 132366, 300, 3e-4, 3e-5),
    "continual/405m/splits_infinite_cosine": Paper(CONTINUAL, NEOX_405M, 132366, 300, 1.65e-4, 3e-5),
    "continual/405m/splits_infinite_inverse_sqrt": Paper(CONTINUAL, NEOX_405M, 132366, 300, 1.65e-4, 3e-5),
    "continual/405m/splits_annealed": Paper(CONTINUAL, NEOX_405M, 44122, 100, 1.65e-4, 3e-5),
    "continual/10b/pile": Paper(CONTINUAL, NEOX_10B, 132366, 300, 1.2e-4, 1.2e-5),
    "continual/10b/slimpajama_no_replay": Paper(CONTINUAL, NEOX_10B, 264732, 600, 1.2e-4, 1.2e-5),
    "continual/10b/slimpajama_replay": Paper(CONTINUAL, NEOX_10B, 264732, 600, 1.2e-4, 1.2e-5),
    "continual/10b/slimpajama_union": Paper(CONTINUAL, NEOX_10B, 264732, 600, 1.2e-4, 1.2e-5),
}


class FarCorpus(Corpus):
    """What a plan asks of a corpus."""

    def __init__(self, path: str, sequence_length: int):
        billions = CORPORA.get(path.removeprefix("runs/"), 1000)
        self.path, self.num_rows, self.sequence_length = path, int(billions * 1e9) // sequence_length, sequence_length
        self.vocabulary_hash, self.vocab_size, self.source_names = "one for all", 2048, ("text",)

    def score(self, name: str) -> Any:
        return SimpleNamespace(statistics=("loss", "entropy"), reference={"fingerprint": name})


class Run(NamedTuple):
    """A plan. rates: learning rate of every step, that of the t-th at t; shares: of each draw when each phase begins;
    settings: of the stage `train`."""

    phases: tuple[Phase, ...]
    first_steps: list[int]
    sequence_length: int
    rates: np.ndarray
    shares: list[np.ndarray]
    model: ModelConfig
    settings: dict[str, Any]

    @property
    def steps(self) -> int:
        return self.first_steps[-1]

    @property
    def corpora(self) -> set[str]:
        return {draw.corpus for phase in self.phases for draw in phase.mixture}


def _load(name: str, *changes: str) -> None:
    for module in STAGES.values():
        importlib.import_module(module)
    config.load([str(RUNS / f"{name}.gin")], list(changes))


def _run(name: str, *changes: str) -> Run:
    """The run of a file, with settings changed as on the command line."""
    _load(name, *changes)
    sequence_length = gin.query_parameter("prepare.sequence_length")
    assert gin.get_bindings("compile").get("sequence_length", sequence_length) == sequence_length
    settings = gin.get_bindings("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corpus, "open", lambda path: FarCorpus(path, sequence_length))
        plan = Plan(settings.get("phases") or [gin.get_configurable("Phase")()], 0, settings.get("schedule"))
    rates = np.asarray(plan.learning_rate(np.arange(plan.total_steps + 1)))
    shares = [plan.shares(number)[0] for number in range(len(plan.phases))]
    model = settings.get("model") or model_config()
    return Run(plan.phases, plan.first_steps.tolist(), sequence_length, rates, shares, model, settings)


def _stages(name: str) -> dict[str, Any]:
    """stage -> its settings in a file; and the one source that it prepares, with its vocabulary."""
    _load(name)
    found: dict[str, Any] = {stage: gin.get_bindings(stage) for stage in ("prepare", "score")}
    if found["prepare"].get("corpus"):
        found |= {part: gin.get_configurable(part)() for part in ("Source", "VocabularyConfig")}
    return found


@pytest.fixture(scope="module")
def planned(shell) -> Callable[..., Run]:
    """Made in the process of `shell`: gin gives what a dataclass needs later than the type checks here look for it."""
    return functools.cache(functools.partial(shell.call, _run))


@pytest.fixture(scope="module")
def stages(shell) -> Callable[[str], dict[str, Any]]:
    return functools.cache(functools.partial(shell.call, _stages))


def files(stage: str, *folders: str) -> list[str]:
    """Names of the files that begin with a command of the stage; a file may be for two."""
    found = sorted(path for folder in folders for path in (RUNS / folder).rglob("*.gin"))
    begins = re.compile(rf"# slm-jax {stage} ", re.MULTILINE)
    return [str(path.relative_to(RUNS).with_suffix("")) for path in found if begins.search(path.read_text())]


def text(name: str) -> str:
    return (RUNS / f"{name}.gin").read_text()


def changes(name: str) -> list[list[str]]:
    """The settings that the comments of a file say to change, those of a line together."""
    lines = [line for line in text(name).splitlines() if line.startswith("#")]
    found = [re.findall(r'--gin\.([\w./]+=(?:"[^"]*"|[^\s"]+))', line) for line in lines]
    return [[setting.replace('"', "") for setting in line] for line in found if line]


def test_every_run_of_the_papers_is_in_the_table():
    assert set(files("train", *PAPERS)) == set(RUN_FILES)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_has_the_numbers_of_its_paper(name, planned):
    paper, run = RUN_FILES[name], planned(name)
    assert run.model.parameter_count() == paper.parameters
    assert run.steps == paper.steps
    rows = sum(phase.num_steps * phase.batch_size for phase in run.phases)
    assert rows * run.sequence_length / 1e9 == pytest.approx(paper.billions, rel=0.05)
    last = max(number for number, phase in enumerate(run.phases) if number == 0 or phase.schedule)
    ruled = run.rates[run.first_steps[last] + 1 :]
    assert ruled.max() == pytest.approx(paper.peak, rel=1e-3)
    assert ruled[-1] == pytest.approx(paper.last, rel=1e-4)
    selection = run.phases[-1].selection
    kept = tuple(part.ratio for part in selection.parts) if selection else (1.0,)
    assert kept == (paper.kept if isinstance(paper.kept, tuple) else (paper.kept,))


@pytest.mark.parametrize("name", RUN_FILES)
def test_its_pod_can_split_it(name, planned):
    """Batches over data and fsdp, parameters over fsdp and model, in whole pieces."""
    run, model = planned(name), planned(name).model
    mesh: MeshConfig = run.settings["mesh"]
    shards = mesh.fsdp * max(mesh.data, 1)
    for phase in run.phases:
        assert phase.batch_size % (shards * run.settings["gradient_accumulation_steps"]) == 0
    assert all(evaluator.batch_size % shards == 0 for evaluator in run.settings.get("evaluators", ()))
    assert model.embed_dim % mesh.fsdp == 0 and run.sequence_length <= model.max_length
    split = (model.padded_vocab_size, model.num_heads, model.num_kv_heads, model.mlp_dim)
    assert all(size % mesh.model == 0 for size in split)


@pytest.mark.parametrize("name", files("train", "math_web"))
def test_the_small_recipes_build_their_plans(name, planned):
    assert planned(name).steps in range(100, 301)


@pytest.mark.parametrize("name", [name for name in files("train", *PAPERS) if changes(name)])
def test_what_a_comment_says_to_change_changes_the_run(name, planned):
    for together in changes(name):
        was, now = planned(name), planned(name, *together)
        assert now.phases != was.phases or now.settings != was.settings, together


def test_what_a_comment_gives_the_command_is_taken_by_it():
    """--run_dir=, --corpus= and the like."""
    for module in STAGES.values():
        importlib.import_module(module)
    for stage in ("prepare", "train", "score"):
        known = {*config.text_settings(stage), *config.text_settings("compile"), "gin_file"}
        for name in files(stage, *PAPERS):
            assert set(re.findall(r"--(\w+)=", text(name))) <= known, name


@pytest.mark.parametrize("paper", PAPERS)
def test_the_files_of_a_paper_fit_together(paper, planned, stages):
    """Whatever a run reads is written by a file that is there: corpora, score columns, models to start from."""
    corpora, columns, vocabularies, largest = set(), set(), set(), 0
    for name in files("prepare", paper):
        prepare, vocabulary = stages(name)["prepare"], stages(name)["VocabularyConfig"]
        corpora |= {prepare["corpus"], prepare.get("plain"), *re.findall(r"--corpus=(\S+)", text(name))}
        vocabularies.add(vocabulary.path)
        largest = max(largest, 0 if vocabulary.path else vocabulary.size)
    assert all(path is None or path in corpora or path.endswith(".model") for path in vocabularies)
    for name in files("score", paper):
        score = stages(name)["score"]
        scored = {score["corpus"], *re.findall(r"--corpus=(\S+)", text(name))}
        made = [f"scores/{score.get('name', 'reference')}/{s}" for s in score.get("statistics", ("loss",))]
        columns |= {(corpus, column) for corpus in scored for column in made}
        assert scored <= corpora and score["reference"].removeprefix("runs/") in RUN_FILES
        assert score["batch_size"] % score["mesh"].fsdp == 0
    for name in files("train", paper):
        run = planned(name)
        assert run.settings["run_dir"].startswith(f"runs/{name.rsplit('/', 1)[0]}/")
        assert run.corpora | {evaluator.corpus for evaluator in run.settings.get("evaluators", ())} <= corpora
        for phase in run.phases:
            assert {(draw.corpus, column) for draw in phase.mixture for column in phase.score_columns} <= columns
        assert run.model.vocab_size is not None and run.model.vocab_size >= largest
        start = run.settings.get("init_from")
        assert start is None or start in GIVEN or start.removeprefix("runs/") in RUN_FILES


@pytest.mark.parametrize("name", files("prepare", *PAPERS))
def test_what_is_prepared_can_be_read_as_its_schema_says(name, stages):
    found = stages(name)
    assert found["Source"].schema in SCHEMAS
    assert not found["prepare"].get("metadata") or found["Source"].fields().url, "without URLs there is no metadata"


@pytest.mark.parametrize("keeps, shares", [("intersection", (0.7, 0.7)), ("union", (0.6, 0.7))])
def test_self_reference_combines_the_likely_and_the_certain(keeps, shares, planned):
    """Rho-1 §3.4: both scores of one reference, low first; every pair of shares of Table 4 can be set."""
    selection = planned(f"rho1/self_reference/{keeps}").phases[0].selection
    assert selection.keeps == keeps and [part.score for part in selection.parts] == ["reference", "entropy"]
    assert selection.columns() == ("scores/self/loss", "scores/self/entropy")
    others = changes(f"rho1/self_reference/{keeps}")
    assert len(others) == {"intersection": 4, "union": 5}[keeps]
    for together in others:
        changed = planned(f"rho1/self_reference/{keeps}", *together).phases[0].selection
        assert tuple(part.ratio for part in changed.parts) == tuple(
            float(setting.split("=")[1]) for setting in together
        )
    assert tuple(part.ratio for part in selection.parts) == shares


def test_fine_tuning_has_toras_settings_and_template(planned, stages):
    """microsoft/ToRA: 3 epochs of 69,000, linear over 3 % and down to 0, no weight decay; loss on solutions only."""
    run, source = planned("rho1/tora/selective"), stages("rho1/tora/trajectories")["Source"]
    (draw,) = run.phases[0].mixture
    rows = FarCorpus(draw.corpus, run.sequence_length).num_rows
    assert run.steps * run.phases[0].batch_size / rows == pytest.approx(3, abs=0.01)
    warmup = round(0.03 * run.steps)
    np.testing.assert_allclose(run.rates[: warmup + 1], 2e-5 * np.arange(warmup + 1) / warmup, rtol=1e-4)
    middle = (warmup + run.steps) // 2
    assert run.rates[middle] == pytest.approx(1e-5, rel=1e-2)
    assert source.fields().text == "question" and source.template == "tora"
    assert stages("rho1/tora/trajectories")["prepare"]["packing"] == "whole"


@pytest.mark.parametrize("size", ["600m", "1_6b", "3b", "8b"])
def test_meco_is_two_phases_under_the_schedule_of_its_baseline(size, planned, stages):
    """And nothing is forgotten between them; the cooldown's corpus has none of the documents before it."""
    run, prepare = planned(f"meco/{size}/meco"), stages("meco/dclm")["prepare"]
    cooldown = run.phases[1]
    assert cooldown.num_steps / run.steps == (0.125 if size == "8b" else 0.1)
    assert not cooldown.reset_optimizer and cooldown.schedule is None
    assert [phase.mixture[0].corpus for phase in run.phases] == [prepare["corpus"], prepare["plain"]]
    np.testing.assert_array_equal(run.rates, planned(f"meco/{size}/standard").rates)


@pytest.mark.parametrize(
    "name, shares",
    [
        ("meco", {"with_url": 0.9, "cooldown": 0.1}),
        ("mixed", {"with_url": 0.9, "cooldown": 0.1}),
        ("no_cooldown", {"with_url": 1.0}),
        ("cooldown_20", {"with_url": 0.8, "cooldown": 0.2}),
        ("cooldown_30", {"with_url": 0.7, "cooldown": 0.3}),
        ("full_url", {"with_full_url": 0.9, "cooldown": 0.1}),
        ("suffix", {"with_suffix": 0.9, "cooldown": 0.1}),
        ("hashed", {"with_hash": 0.9, "cooldown": 0.1}),
    ],
)
def test_mecos_ablations_take_their_share_of_each_corpus(name, shares, planned):
    run, found = planned(f"meco/1_6b/{name}"), {}
    for phase, drawn in zip(run.phases, run.shares, strict=True):
        for draw, share in zip(phase.mixture, drawn, strict=True):
            found[draw.corpus.removeprefix("runs/meco/dclm_")] = share * phase.num_steps / run.steps
    assert found == pytest.approx(shares)


@pytest.mark.parametrize(
    "name, form, hashed", [("full_url", "url", False), ("suffix", "suffix", False), ("hashed", "host", True)]
)
def test_mecos_forms_of_metadata_are_prepared_as_they_are_drawn(name, form, hashed, planned, stages):
    prepare = stages(f"meco/1_6b/{name}")["prepare"]
    assert (prepare["metadata"].form, prepare["metadata"].hashed) == (form, hashed)
    drawn = [phase.mixture[0].corpus for phase in planned(f"meco/1_6b/{name}").phases]
    assert drawn == [prepare["corpus"], prepare["plain"]]


@pytest.mark.parametrize("name", [name for name in RUN_FILES if re.search("_replay|rewarming|constant|annealed", name)])
def test_a_continual_run_goes_on_with_the_run_that_it_names(name, planned):
    """It has that run's phases up to where it takes over, so its state and place in the data can be inherited."""
    run = planned(name)
    before = planned(run.settings["init_from"].removeprefix("runs/"))
    done = run.settings.get("init_step", before.steps)
    assert run.settings["init_mode"] == "state" and run.model == before.model
    assert done in before.first_steps, "no checkpoint stays there"
    was, now = (to_json(each.phases) for each in (before, run))
    check_same_rows(was, now, done, "the run before", "choose another")
    assert run.first_steps[-2] == done, "one phase comes after"
    assert run.phases[-1].reset_optimizer == ("annealed" not in name)


@pytest.mark.parametrize("size, peak", [("405m", 3e-4), ("10b", 1.2e-4)])
def test_rewarming_is_linear_over_one_percent_then_a_cosine(size, peak, planned):
    """arXiv 2403.08763 Eq 1 and 2, on the new data's own steps."""
    rate, steps = planned(f"continual/{size}/slimpajama_replay").rates, 132366
    again, warmup = rate[steps:], round(0.01 * steps)
    np.testing.assert_allclose(again[1 : warmup + 1], peak * np.arange(1, warmup + 1) / warmup, rtol=1e-4)
    middle = (warmup + steps) // 2
    np.testing.assert_allclose(again[[warmup, middle, steps]], [peak, 0.55 * peak, 0.1 * peak], rtol=1e-3)
    np.testing.assert_allclose(rate[1:steps], again[1:-1], rtol=1e-4)  # pre-training was ruled alike


@pytest.mark.parametrize(
    "data, share, shares",
    [("slimpajama", 0.05, (0.005, 0.01, 0.05, 0.1, 0.5)), ("german", 0.25, (0.01, 0.05, 0.1, 0.25, 0.5))],
)
def test_replay_is_compute_equivalent_and_in_the_first_order(data, share, shares, planned):
    """As many steps as without; every share that the paper tries is there for the settings that the file names."""
    name = f"continual/405m/{data}_replay"
    run, without = planned(name), planned(f"continual/405m/{data}_no_replay")
    assert run.first_steps == without.first_steps
    assert [draw.replay for draw in run.phases[1].mixture] == [None, "in_order"]
    assert [draw.replay for draw in without.phases[1].mixture] == [None]
    np.testing.assert_allclose(run.shares[1], [1 - share, share])
    for other in shares:
        changed = planned(name, f"replay/MixtureComponent.weight={other}")
        np.testing.assert_allclose(changed.shares[1], [1 - other, other])


@pytest.mark.parametrize("shape, middle", [("cosine", 2.325e-4), ("inverse_sqrt", 1.85630e-4)])
def test_the_infinite_schedules_at_the_papers_points(shape, middle, planned):
    """arXiv 2403.08763 §7: constant from 60 % of the first split until the anneal, across the boundaries of splits."""
    run, split = planned(f"continual/405m/splits_infinite_{shape}"), 132366 // 3
    warmup, cooled, anneal = round(0.01 * split), round(0.6 * split), round(0.15 * split)
    points = run.rates[[warmup, (warmup + cooled) // 2, cooled]]
    np.testing.assert_allclose(points, [3e-4, middle, 1.65e-4], rtol=1e-4)
    np.testing.assert_allclose(run.rates[cooled:-anneal], 1.65e-4, rtol=1e-5)
    np.testing.assert_allclose(run.rates[[-1 - anneal // 2, -1]], [7.03562e-5, 3e-5], rtol=1e-4)
    assert {split, 2 * split, 3 * split} <= set(run.first_steps)
    annealed = planned("continual/405m/splits_annealed").rates
    np.testing.assert_allclose(annealed[-anneal:], run.rates[-anneal:], rtol=1e-4)


# Those of 10b are what differs from continual/common.gin.
SHARED = [path for paper in PAPERS for path in (RUNS / paper).rglob("common.gin") if path.parent.name != "10b"]


@pytest.mark.parametrize("path", sorted(SHARED), ids=lambda path: path.parent.name)
def test_a_recipe_names_its_steps_with_time_and_disk(path):
    """In the header of the shared file: what to download, and each stage's command with its disk and time."""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Steps, time and disk" in header and ("hf download" in header or "after ../" in header)
    steps = [line for line in header.splitlines() if line.startswith(("#   slm-jax prepare", "#   slm-jax train"))]
    assert len(steps) >= 1 and all(re.search(r": [\d.]+ [GT]B.*, .*\w", line) for line in steps), steps
