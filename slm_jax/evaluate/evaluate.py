"""Stage `evaluate`: evaluators, and tasks of lm-evaluation-harness, on a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.configurable import Natural, configurable
from slm_jax.data.conversations import ChatVocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.harness import Harness, TaskLoader
from slm_jax.evaluate.lm_adapter import LMAdapter
from slm_jax.evaluate.multiple_choice import MultipleChoice
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.evaluate.samples import Samples
from slm_jax.evaluate.tasks import RECORD, columns_of, prefixes, run_tasks, table
from slm_jax.files import write_json, write_json_lines
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models.trained_model import load_model, run_vocabulary
from slm_jax.run_directory import RunDirectory

Evaluator = HeldOut | MultipleChoice | Samples
REQUESTS = "requests.jsonl"


@configurable
def evaluate(
    run: str,
    evaluators: Sequence[Evaluator] = (),
    output: str | None = None,
    step: Natural | None = None,
    mesh: MeshConfig | None = None,
    tasks: str | None = None,
    prefix: str | None = None,
    conditions: str | None = None,
    include_path: str | None = None,
    harness: Harness | None = None,
    offline: bool = False,
    run_model_code: bool = False,
) -> dict[str, Any]:
    """Evaluates a checkpoint: with evaluators on local files, or on tasks of lm-evaluation-harness.

    With `tasks`, the numbers equal those of lm_eval's own Hugging Face model class, set to put BOS before each text.
    Every answer is kept in `<run>/evaluate/requests.jsonl`, so that the same command never repeats a request, even
    after a kill.

    Args:
      run: model directory: a train run, or an imported model.
      evaluators: HeldOut, MultipleChoice or Samples; one HeldOut by default, if no tasks are named.
      output: where to write the result; by default `<run>/evaluate/<step>.json`, and for tasks the folder
        `<run>/evaluate/<step>/<tasks>`: record.json, and for each condition lm_eval's own results and samples.
      step: checkpoint; None takes the last.
      mesh: how devices share the work.
      tasks: tasks, groups and tags of lm_eval, and the suites meco, rho1_general and continual, separated by commas.
      prefix: text placed after BOS and before the few-shot examples, such as "URL: en.wikipedia.org" and an empty
        line.
      conditions: prefixes to compare: none, given (`prefix`), right (the task's host: MeCo's, or Harness.hosts), wrong
        (another task's), unrelated (Harness.unrelated).
      include_path: folder with your own tasks, as YAML files of lm_eval.
      harness: how tasks are run.
      offline: download nothing; use what lm_eval's libraries have in their cache.
      run_model_code: also measure tasks that run code written by the model; nothing protects this machine from it.
    """
    if tasks is None:
        return _run_evaluators(run, evaluators, output, step, mesh)
    if evaluators:
        raise UserError(
            "settings-exclusive", "evaluate.evaluators and evaluate.tasks exclude each other: run them as two commands"
        )

    # ---- Checks, before the model is loaded: tasks and prefixes, then the devices
    harness = harness or Harness()
    columns = columns_of(tasks, run_model_code)
    after_bos = prefixes(columns, conditions, prefix, harness)
    loader = TaskLoader(include_path, offline, run_model_code)
    loader.check([form.task for column in columns for form in column.forms])
    devices = mesh_lib.make_mesh(mesh)
    mesh_lib.check_batch(devices, harness.batch_size, "Harness.batch_size")
    config_lib.print_unused()

    # ---- The model as lm_eval calls it, with the answers that earlier commands kept
    model = load_model(run, devices, step)
    vocabulary = run_vocabulary(run, model.vocabulary_hash)
    vocabulary = ChatVocabulary(vocabulary) if harness.chat else vocabulary
    where = RunDirectory(run).evaluate
    folder = Path(output or where / str(model.step) / tasks.replace(",", "+").replace("/", "_"))
    print(f"evaluate: step {model.step} of {run} on {tasks} ({', '.join(after_bos)}) -> {folder}", flush=True)
    adapter = LMAdapter(model, vocabulary, devices, where / REQUESTS, harness.batch_tokens, harness.batch_size)
    record = {
        "run": run,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "tasks": tasks,
        "vocabulary_hash": model.vocabulary_hash,
        "bos_id": vocabulary.bos_id,
        "harness": harness,
        "include_path": include_path,
        **run_tasks(adapter, loader, columns, after_bos, harness, folder),
        "environment": config_lib.environment(("lm_eval", "datasets")),
    }
    processes.on_first(lambda: write_json(folder / RECORD, record))
    print(f"{table(record)}\nevaluate: done, {folder / RECORD}")
    return record


def _run_evaluators(
    run: str, evaluators: Sequence[Evaluator], output: str | None, step: int | None, mesh: MeshConfig | None
) -> dict[str, Any]:
    # One HeldOut where none is named; each name once.
    evaluators = evaluators or [HeldOut()]  # pyright: ignore[reportCallIssue] (gin gives the rest)
    names = [evaluator.name for evaluator in evaluators]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UserError(
            "evaluator-name-twice", f"evaluate.evaluators: two are called {twice!r}: give each its own name"
        )
    devices = mesh_lib.make_mesh(mesh)
    config_lib.print_unused()
    model = load_model(run, devices, step)
    output = output or str(RunDirectory(run).evaluate / f"{model.step}.json")
    print(f"evaluate: step {model.step} of {run} by {', '.join(names)} -> {output}")

    # Numbers and texts by name; per-token losses are for the training loop.
    results: dict[str, Any] = {}
    texts: dict[str, list[Any]] = {}
    with jax.set_mesh(devices), progress(len(evaluators), 0, "evaluate", "evaluator") as bar:
        for evaluator in evaluators:
            for name, value in evaluator.bind(model.config, model.vocabulary_hash, devices)(model.params):
                if isinstance(value, list):
                    texts[name] = value
                elif value is None or isinstance(value, float):
                    results[name] = value
            bar.update()

    held = [evaluator for evaluator in evaluators if isinstance(evaluator, HeldOut)]
    others = [evaluator for evaluator in evaluators if not isinstance(evaluator, HeldOut)]
    record = {
        "run": run,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "evaluators": list(evaluators),
        "corpora": {e.corpus: e.about(model.config, model.vocabulary_hash) for e in held},
        "prefixes": {e.name: about for e in held if (about := e.about_prefix(model.config))},
        "measured": {e.name: e.about(model.config, model.vocabulary_hash) for e in others},
        "results": results,
    }

    def write() -> None:
        write_json(output, record)
        for name, rows in texts.items():
            write_json_lines(f"{output.removesuffix('.json')}.{name.replace('/', '.')}.jsonl", rows)

    processes.on_first(write)
    for name, value in results.items():
        print(f"  {name}: {value:.4f}" if value is not None else f"  {name}: no token has a loss")
    return record
