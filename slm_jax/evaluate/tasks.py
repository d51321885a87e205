"""The tasks of one command: asked under each condition, as a table, with everything that one needs to trust it.

A condition says what stands behind BOS (MeCo, arXiv 2501.01956, section 3.3): nothing, a text, or a line with the host
that the questions are said to come from: one made for the task, another task's, or one that has nothing to do with any.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.evaluate.harness import Harness, Zoo, outermost, scored
from slm_jax.evaluate.lm_adapter import Answers
from slm_jax.evaluate.multiple_choice import Scored, measures
from slm_jax.evaluate.prefix import refuse_escaped_newline
from slm_jax.evaluate.suites import HOSTS, SUITES, UNCONDITIONAL, Column, Form, host_prefix
from slm_jax.evaluate.task_table import averages
from slm_jax.files import write_json, write_json_lines

CONDITIONS = ("none", "given", "right", "wrong", "unrelated")
RECORD = "record.json"


def columns_of(tasks: str, run_model_code: bool) -> list[Column]:
    """The columns that a list of suites and tasks, parted by commas, names. Of several suites, each column and each
    average bears the suite's name: they ask the same tasks in different ways.

    Raises:
      UserError: none, or the same twice.
    """
    columns: list[Column] = []
    named = [name for part in tasks.split(",") if (name := part.strip())]
    several = sum(name in SUITES for name in named) > 1
    for name in named:
        if name not in SUITES:
            columns.append(Column(name, (Form(name, ""),), group=""))
        else:
            columns += [_of_suite(name, column) if several else column for column in SUITES[name].columns]
    names = [column.name for column in columns]
    if not names or len(set(names)) < len(names):
        twice = f": it names {max(names, key=names.count)} twice" if names else ""
        raise UserError(f"evaluate.tasks takes tasks or suites ({', '.join(SUITES)}), parted by commas{twice}")
    return [_without_code(column) for column in columns] if not run_model_code else columns


def _of_suite(name: str, column: Column) -> Column:
    return dataclasses.replace(column, name=f"{name} {column.name}", group=f"{name} {column.group}", suite=name)


def _without_code(column: Column) -> Column:
    if not any(form.runs_code for form in column.forms):
        return column
    note = f"runs what the model wrote, without a sandbox: --run_model_code; {column.note}"
    return dataclasses.replace(column, forms=(), note=note)


def prefixes(
    columns: Sequence[Column], conditions: str | None, given: str | None, harness: Harness
) -> dict[str, dict[str, str]]:
    """Condition -> task -> what stands behind BOS.

    Raises:
      UserError: an unknown condition; a host that is not known.
    """
    names = [name.strip() for name in (conditions or ("none" if given is None else "given")).split(",")]
    for name in names:
        if name not in CONDITIONS:
            raise UserError(f"evaluate.conditions: {name!r} is unknown: known are {', '.join(CONDITIONS)}")
    refuse_escaped_newline("evaluate.prefix", given or "")
    if ("given" in names) != (given is not None):
        raise UserError("evaluate.prefix and the condition 'given' belong together: name both, or none of them")
    tasks = list(dict.fromkeys(form.task for column in columns for form in column.forms))
    hosts, found = {**HOSTS, **harness.hosts}, {}
    for name in names:
        if name in ("right", "wrong") and (missing := [task for task in tasks if task not in hosts]):
            raise UserError(
                f"evaluate.conditions: no host is known for task {missing[0]}: set "
                f"Harness.hosts = {{{missing[0]!r}: 'www.example.org'}}"
            )
        found[name] = {task: _prefix(name, task, hosts, given, harness) for task in tasks}
    return found


def _prefix(condition: str, task: str, hosts: Mapping[str, str], given: str | None, harness: Harness) -> str:
    if condition in ("none", "given"):
        return given or "" if condition == "given" else ""
    if condition == "unrelated":
        return host_prefix(harness.unrelated)
    if condition == "right":
        return host_prefix(hosts[task])
    different = list(dict.fromkeys(hosts.values()))  # the next one of the table, so that it is the same every time
    return host_prefix(different[(different.index(hosts[task]) + 1) % len(different)])


def run_tasks(
    answers: Answers,
    zoo: Zoo,
    columns: Sequence[Column],
    behind_bos: Mapping[str, Mapping[str, str]],
    harness: Harness,
    output: Path,
) -> dict[str, Any]:
    """Asks all forms of all columns under each condition, writes lm_eval's results beside ours, and returns ours."""
    forms = [(column, form) for column in columns for form in column.forms]
    loaded = [zoo.load(form) for _, form in forms]  # before anything is computed
    found: dict[str, dict[str, Any]] = {}
    for condition, prefix_of in behind_bos.items():
        found[condition] = {column.name: {} for column in columns}
        for number, ((column, form), tasks) in enumerate(zip(forms, loaded, strict=True), 1):
            title = " ".join(dict.fromkeys((column.name, form.task, form.label))).strip()
            print(f"evaluate: {number} of {len(forms)}, {title}; behind BOS: {condition}", flush=True)
            with answers.recorded(prefix_of[form.task]) as asked:
                result = _result(answers, zoo, form, tasks, harness, output / condition / column.suite)
            about = {"prefix": prefix_of[form.task], **dataclasses.asdict(asked)}
            found[condition][column.name][form.label or form.task] = result | {"asked": about}
    best = {
        condition: {name: best_form(forms) for name, forms in results.items()} for condition, results in found.items()
    }
    return {
        "columns": list(columns),
        "results": found,
        "best": best,
        "averages": {condition: averages(columns, values) for condition, values in best.items()},
    }


def _result(
    answers: Answers, zoo: Zoo, form: Form, loaded: dict[str, Any], harness: Harness, folder: Path
) -> dict[str, Any]:
    """One form's value, and what it rests on."""
    results = zoo.ask(answers, loaded, form, harness)
    likelihoods = _likelihoods(loaded, results)
    if form.metric == UNCONDITIONAL:
        alone = dataclasses.replace(form, shots=0, changes={**form.changes, "doc_to_text": "Answer:"})
        again = zoo.load(alone)
        without = zoo.ask(answers, again, alone, dataclasses.replace(harness, shots=None))
        values = {UNCONDITIONAL: unconditional(likelihoods, _likelihoods(again, without))}
    else:
        values = _values(loaded, results)
    metric = form.metric or next(iter(values))
    name = f"{form.task}_{form.label}".rstrip("_").replace("/", "_")
    processes.on_first(lambda: _write(folder, name, results))
    finer = measures(list(likelihoods.values())) if likelihoods else {}
    return {
        **values[metric],
        "metric": metric,
        "values": values,
        "shots": results["n-shot"],
        "questions": {task: count["effective"] for task, count in results["n-samples"].items()},
        "metrics": results["results"],
        "choices": {measure: each._asdict() for measure, each in finer.items()},
        "files": [str(folder / f"{name}.json"), str(folder / f"{name}.samples.jsonl")],
    }


def _likelihoods(loaded: dict[str, Any], results: Mapping[str, Any]) -> dict[tuple[str, int], Scored]:
    """(task, number of the question) -> likelihoods, of the multiple-choice tasks among them."""
    return {
        (name, sample["doc_id"]): found
        for name, task in loaded["tasks"].items()
        if task.OUTPUT_TYPE == "multiple_choice"
        for sample in results["samples"][name]
        if (found := scored(task, sample))
    }


def _values(loaded: dict[str, Any], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each metric of what was named; of a tag, or of a group that has none itself, the mean of its tasks'."""
    names = [name for name in outermost(loaded) if _numbers(results, name)] or list(loaded["tasks"])
    found = {}
    for metric in _numbers(results, names[0]):
        name, _, behind = metric.partition(",")
        each = [results["results"][task][metric] for task in names if metric in results["results"][task]]
        error = results["results"][names[0]].get(f"{name}_stderr,{behind}") if len(names) == 1 else None
        found[metric] = {"value": sum(each) / len(each), "stderr": error if isinstance(error, float) else None}
    return found


def _numbers(results: Mapping[str, Any], task: str) -> list[str]:
    """Metrics of a task or group, with their filters."""
    found = results["results"].get(task, {})
    names = [name for name in found if "," in name and "_stderr," not in name]
    return [name for name in names if isinstance(found[name], (int, float))]


def unconditional(asked: Mapping[Any, Scored], alone: Mapping[Any, Scored]) -> dict[str, Any]:
    """Accuracy of log p(choice | question) - log p(choice | "Answer:") (OLMES, arXiv 2406.08446)."""
    gains = [
        question._replace(totals=np.subtract(question.totals, alone[place].totals).tolist())
        for place, question in asked.items()
    ]
    mean, stderr = measures(gains)["accuracy"]
    return {"value": mean, "stderr": stderr}


def _write(folder: Path, name: str, results: dict[str, Any]) -> None:
    """lm_eval's results as it writes them itself: one file of numbers, one of questions and answers."""
    samples = [sample | {"task": task} for task, each in results["samples"].items() for sample in each]
    write_json_lines(folder / f"{name}.samples.jsonl", samples)
    write_json(folder / f"{name}.json", {key: value for key, value in results.items() if key != "samples"})


def best_form(forms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The form with the highest value, and what it is called; None where a column has none."""
    if not forms:
        return None
    label = max(forms, key=lambda label: forms[label]["value"])
    return {"form": label, **{name: forms[label][name] for name in ("value", "stderr", "metric", "values", "choices")}}
