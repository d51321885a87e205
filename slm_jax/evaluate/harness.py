"""lm-evaluation-harness (lm_eval) on our models: its own tasks, and those of the user's files.

lm_eval supplies questions, few-shot examples and metrics, evaluate/lm_adapter.py the answers. It is imported inside
functions, so that nothing else needs it.
"""

import dataclasses
import difflib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from slm_jax.configurable import Count, Natural, OneOf, configurable
from slm_jax.data import readers
from slm_jax.data.conversations import TEMPLATES, Template
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Sampling
from slm_jax.evaluate.lm_adapter import LMAdapter
from slm_jax.evaluate.multiple_choice import Scored
from slm_jax.evaluate.suites import Form

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
BOOTSTRAP = 1000  # resamples for the standard error of metrics that are not means
SAMPLING_SEED = 0  # of the questions drawn where a suite takes only some
MAX_NEW_TOKENS = 256  # lm_eval's own default


@configurable
@dataclasses.dataclass(frozen=True)
class Harness:
    """How tasks of lm-evaluation-harness are run.

    Attributes:
      limit: questions per task, from the first; None takes all.
      shots: few-shot examples before each question; None as the task or suite says.
      batch_tokens: tokens in a batch of log-likelihoods.
      batch_size: texts generated at a time.
      chat: template of the messages, as in Source.template; None uses none.
      hosts: task -> the host that fits it, in addition to those of MeCo's ten tasks.
      unrelated: a host that fits no task.
    """

    limit: Count | None = None
    shots: Natural | None = None
    batch_tokens: Count = 16384
    batch_size: Count = 16
    chat: Annotated[str, OneOf(TEMPLATES)] | None = None
    hosts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unrelated: str = "boards.4chan.org"


class TaskLoader:
    """Loads lm_eval's tasks by name, and those of a folder of the user's own.

    run_model_code: whether tasks may run code written by the model.

    Raises:
      UserError: lm_eval is not installed; the folder does not exist.
    """

    def __init__(self, include_path: str | None, offline: bool, run_model_code: bool):
        self.run_model_code = run_model_code
        if offline:
            os.environ.update(dict.fromkeys(OFFLINE, "1"))  # read when lm_eval's libraries are first imported
        if run_model_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # JAX must not be forked
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "harness-not-installed", "evaluate.tasks needs lm-evaluation-harness: pip install lm_eval"
            ) from error
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(
                "harness-folder-not-found",
                f"evaluate.include_path {include_path} is not a folder: name the one with your tasks' YAML files",
            )
        self._folder, self._new_manager = include_path, TaskManager
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        self._with_defaults = False

    def check(self, names: Sequence[str]) -> None:
        """Refuses names that are no task, group or tag. lm_eval's own are indexed only when needed: there are many."""
        if not set(names) <= set(self._manager.all_tasks) and not self._with_defaults:
            self._manager = self._new_manager(include_path=self._folder, include_defaults=True)
            self._with_defaults = True
        unknown = [name for name in names if name not in self._manager.all_tasks]
        if not unknown:
            return
        # lm_eval skips files that are not YAML, so that their tasks are missing.
        import yaml  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

        for path in sorted(Path(self._folder).glob("**/*.yaml")) if self._folder else ():
            try:
                yaml.compose(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                mark = getattr(error, "problem_mark", None)
                where = f"{path}:{mark.line + 1}" if mark else str(path)
                reason = getattr(error, "problem", None) or str(error).splitlines()[0]
                raise UserError(
                    "harness-invalid-yaml", f"{where} is not YAML ({reason}): fix it, or move it out of --include_path"
                ) from error
        nearest = difflib.get_close_matches(unknown[0], self._manager.all_tasks, 1)
        meant = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UserError(
            "harness-unknown-task",
            f"evaluate.tasks: no task {unknown[0]!r}: {meant}Put your own tasks into --include_path",
        )

    def load(self, form: Form) -> dict[str, Any]:
        """Name -> task of lm_eval, and its groups, with the form's changes.

        Raises:
          UserError: its data are unavailable or unreadable; it runs code written by the model, and may not.
        """
        from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
        from jinja2 import TemplateError  # pyright: ignore[reportMissingImports]
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED  # pyright: ignore[reportMissingImports]

        # Some tasks shuffle their choices as they are loaded.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        spec: Any = form.task
        if form.changes:
            spec = {"group": f"{form.task}_{form.label}", "task": [{"task": form.task, **form.changes}]}
        try:
            loaded = {**self._manager.load([spec])}
        except (OSError, ImportError, ValueError, StopIteration, DatasetsError, TemplateError) as error:
            if isinstance(error, (ValueError, StopIteration, DatasetsError)):
                self._check_data(form.task)
            cause = error.__cause__ if isinstance(error, DatasetsError) else None
            reason = next(iter(str(cause or error).splitlines()), type(error).__name__)
            offline = " (evaluate.offline)" if os.environ.get(OFFLINE[0]) == "1" else ""
            raise UserError(
                "harness-task-not-loaded",
                f"task {form.task} cannot be loaded{offline}: {reason}; lm_eval's own tasks download their data, put "
                "tasks on your own files into --include_path",
            ) from error
        if not self.run_model_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise UserError(
                "harness-runs-model-code",
                f"task {form.task} runs code written by the model, without a sandbox: set --run_model_code to allow it",
            )
        return loaded

    def _check_data(self, name: str) -> None:
        """Refuses JSON lines of the user's own that are damaged or empty: those of the task, or of all tasks in the
        folder where it is a group or tag."""
        index = self._manager.task_index
        settings_of = {name: index[name].cfg or {}}
        if not settings_of[name].get("dataset_path") and self._folder:
            folder = Path(self._folder).resolve()
            own = {
                n: entry
                for n, entry in index.items()
                if entry.yaml_path and folder in entry.yaml_path.resolve().parents
            }
            settings_of = {n: entry.cfg or {} for n, entry in own.items()}
        remedy = "write one question per line, as a JSON object"
        for task, settings in settings_of.items():
            files = (settings.get("dataset_kwargs") or {}).get("data_files") or {}
            named = files.values() if isinstance(files, dict) else [files]
            for path in [path for each in named for path in ([each] if isinstance(each, str) else each)]:
                if settings.get("dataset_path") != "json" or not os.path.isfile(path):
                    continue
                number = 0
                for number, record in enumerate(readers.records(path, ()), 1):  # noqa: B007
                    if record.fields is None:
                        raise UserError("record-invalid", f"task {task}: {record.place} is {record.problem}: {remedy}")
                if not number:
                    raise UserError("no-records", f"task {task}: {path} is empty: {remedy}")


def evaluate_task(adapter: LMAdapter, loaded: dict[str, Any], form: Form, harness: Harness) -> dict[str, Any]:
    """Runs what `TaskLoader.load` has loaded; returns the numbers of lm_eval's simple_evaluate, and each sample."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import handle_non_serializable  # pyright: ignore[reportMissingImports]

    shots = form.shots if harness.shots is None else harness.shots
    chosen: dict[str, list[int]] | None = None if form.sampled is None and harness.limit is None else {}
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")  # a task that says 0 means it
        if own is None or (own != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        if chosen is not None:
            numbers = list(range(len(task.eval_docs)))
            if form.sampled is not None and len(numbers) > form.sampled:
                numbers = sorted(random.Random(SAMPLING_SEED).sample(numbers, form.sampled))
            chosen[name] = numbers[: harness.limit]
    found = evaluate(
        lm_eval_model(adapter, harness.chat),
        loaded,
        samples=chosen,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=harness.chat is not None,
        fewshot_as_multiturn=harness.chat is not None,
        confirm_run_unsafe_code=True,  # `load` has asked
    )
    about = {"model": "slm_jax", "fewshot_seed": DEFAULT_OTHER_SEED, "bootstrap_iters": BOOTSTRAP}
    return json.loads(json.dumps({**(found or {}), "config": about}, default=handle_non_serializable))


def lm_eval_model(adapter: LMAdapter, chat: str | None = None) -> Any:
    """The model as lm_eval wants it: a subclass of its `LM`."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]

    class Ours(LM):
        @property
        def tokenizer_name(self) -> str:
            return f"{adapter.vocabulary.content_hash}/{chat}"

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return adapter.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return adapter.rolling([text for (text,) in (request.args for request in requests)])

        def generate_until(self, requests: list[Any]) -> list[str]:
            each = [(text, normalize_gen_kwargs(how, MAX_NEW_TOKENS)) for text, how in (r.args for r in requests)]
            return adapter.generate([(text, sampling_of({**settings})) for text, settings in each])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_text(TEMPLATES[chat or ""], chat_history, add_generation_prompt)

    return Ours()


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """A task's generation_kwargs, as lm_eval normalizes them.

    Raises:
      UserError: a setting that is not supported.
    """
    known = {"until", "do_sample", "temperature", "max_gen_toks", "top_k", "top_p", "num_beams"}
    unknown = sorted(set(settings) - known)
    if unknown or settings.get("num_beams", 1) != 1:
        raise UserError(
            "task-unknown-generation-setting",
            f"a task generates with {', '.join(unknown) or 'num_beams'}, which is not supported: supported are "
            f"{', '.join(sorted(known - {'num_beams'}))}; change generation_kwargs in a copy of its YAML",
        )
    temperature = float(settings.get("temperature") or 0.0)
    drawn = {name: settings[name] for name in ("top_k", "top_p") if temperature and settings.get(name)}
    stop = tuple(text for text in settings["until"] if text)
    return Sampling(settings["max_gen_toks"], temperature, stop=stop, **drawn)


def chat_text(template: Template, messages: Sequence[Mapping[str, str]], answer_next: bool) -> str:
    """Messages of a chat as they were written for training: with the opening of a response where one comes next, else
    without the closing of the last message, which is continued.

    Text has no EOS: the EOS after earlier responses in training is missing here.
    """
    text = template.between.join(
        template.opens[message["role"]] + message["content"] + template.closes for message in messages
    )
    return text + template.between + template.opens["assistant"] if answer_next else text.removesuffix(template.closes)


def outermost(loaded: dict[str, Any]) -> list[str]:
    """Names of the groups and tasks that are in no other group."""
    inside = {name for names in loaded["group_map"].values() for name in names}
    return [name for name in (*loaded["groups"], *loaded["tasks"]) if name not in inside]


def scored(task: Any, sample: Mapping[str, Any]) -> Scored | None:
    """A logged sample of a multiple-choice task as likelihoods; None unless exactly one choice is right (in
    TruthfulQA's mc2 several may be)."""
    choices, doc = task.doc_to_choice(sample["doc"]), sample["doc"]
    if "mc2_targets" in doc and task.config.process_results is not None:  # mc1 has the same docs, and lm_eval's rule
        return None
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(choices) < 2:
        return None
    totals = [float(total) for total, _ in sample["filtered_resps"]]
    return Scored(totals[: len(choices)], [len(choice) for choice in choices], gold)
