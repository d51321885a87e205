"""The tasks of one command: run under each condition, as a table, with everything that one needs to trust it.

A condition says what comes after BOS (MeCo, arXiv 2501.01956, section 3.3): nothing, a text, or a line with the host
that the questions are said to come from: one made for the task, another task's, or one unrelated to any task.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax import processes
from slm_jax.errors import UserError
from slm_jax.evaluate.harness import Harness, TaskLoader, evaluate_task, outermost, scored
from slm_jax.evaluate.lm_adapter import LMAdapter
from slm_jax.evaluate.multiple_choice import Scored, measures
from slm_jax.evaluate.prefix import refuse_escaped_newline
from slm_jax.evaluate.suites import HOSTS, SUITES, UNCONDITIONAL, Column, Form, host_prefix
from slm_jax.files import write_json, write_json_lines

CONDITIONS = ("none", "given", "right", "wrong", "unrelated")
RECORD = "record.json"
FINER = {
    "margin_per_character": "log p of the right choice minus that of the best wrong one, nats per character",
    "gold_loss_per_character": "-log p of the right choice, nats per character",
}


def columns_of(tasks: str, run_model_code: bool) -> list[Column]:
    """The columns named by a comma-separated list of suites and tasks. With several suites, each column and each
    average is prefixed with its suite's name, because they run the same tasks in different ways.

    Raises:
      UserError: nothing is named, or something twice.
    """
    columns: list[Column] = []
    named = [name for part in tasks.split(",") if (name := part.strip())]
    several = sum(name in SUITES for name in named) > 1
    for name in named:
        if name not in SUITES:
            columns.append(Column(name, (Form(name, ""),), group=""))
            continue
        for column in SUITES[name].columns:
            if several:
                of_suite = {"name": f"{name} {column.name}", "group": f"{name} {column.group}", "suite": name}
                column = dataclasses.replace(column, **of_suite)
            if not run_model_code and any(form.runs_code for form in column.forms):
                note = f"runs code written by the model, without a sandbox: --run_model_code; {column.note}"
                column = dataclasses.replace(column, forms=(), note=note)
            columns.append(column)
    names = [column.name for column in columns]
    if not names or len(set(names)) < len(names):
        twice = f", each once: {max(names, key=names.count)} is named twice" if names else ""
        raise UserError(
            "tasks-invalid-list", f"evaluate.tasks: name tasks or suites ({', '.join(SUITES)}), comma-separated{twice}"
        )
    return columns


def prefixes(
    columns: Sequence[Column], conditions: str | None, given: str | None, harness: Harness
) -> dict[str, dict[str, str]]:
    """Condition -> task -> text after BOS.

    Raises:
      UserError: an unknown condition; a task without a host.
    """
    names = [name.strip() for name in (conditions or ("none" if given is None else "given")).split(",")]
    for name in names:
        if name not in CONDITIONS:
            raise UserError(
                "tasks-unknown-condition",
                f"evaluate.conditions: {name!r} is unknown: known are {', '.join(CONDITIONS)}",
            )
    refuse_escaped_newline("evaluate.prefix", given or "")
    if ("given" in names) != (given is not None):
        raise UserError(
            "tasks-prefix-without-condition",
            "evaluate.prefix and the condition 'given' belong together: set both, or neither",
        )
    tasks = list(dict.fromkeys(form.task for column in columns for form in column.forms))
    hosts, found = {**HOSTS, **harness.hosts}, {}
    different = list(dict.fromkeys(hosts.values()))
    following = dict(zip(different, [*different[1:], *different[:1]], strict=True))  # another host, always the same
    text_of: dict[str, Callable[[str], str]] = {
        "none": lambda task: "",
        "given": lambda task: given or "",
        "right": lambda task: host_prefix(hosts[task]),
        "wrong": lambda task: host_prefix(following[hosts[task]]),
        "unrelated": lambda task: host_prefix(harness.unrelated),
    }
    for name in names:
        if name in ("right", "wrong") and (missing := [task for task in tasks if task not in hosts]):
            raise UserError(
                "tasks-unknown-host",
                f"evaluate.conditions: no host is known for task {missing[0]}: set "
                f"Harness.hosts = {{{missing[0]!r}: 'www.example.org'}}",
            )
        found[name] = {task: text_of[name](task) for task in tasks}
    return found


def run_tasks(
    adapter: LMAdapter,
    loader: TaskLoader,
    columns: Sequence[Column],
    after_bos: Mapping[str, Mapping[str, str]],
    harness: Harness,
    output: Path,
) -> dict[str, Any]:
    """Runs all forms of all columns under each condition, writes lm_eval's results to `output`, and returns ours."""
    forms = [(column, form) for column in columns for form in column.forms]
    loaded = [loader.load(form) for _, form in forms]  # before anything is computed
    found: dict[str, dict[str, Any]] = {}
    for condition, prefix_of in after_bos.items():
        found[condition] = {column.name: {} for column in columns}
        for number, ((column, form), tasks) in enumerate(zip(forms, loaded, strict=True), 1):
            title = " ".join(dict.fromkeys((column.name, form.task, form.label))).strip()
            print(f"evaluate: {number} of {len(forms)}, {title}; after BOS: {condition}", flush=True)
            with adapter.recorded(prefix_of[form.task]) as stats:
                result = _run_form(adapter, loader, form, tasks, harness, output / condition / column.suite)
            asked = {"prefix": prefix_of[form.task], **dataclasses.asdict(stats)}
            found[condition][column.name][form.label or form.task] = result | {"asked": asked}
    best = {
        condition: {name: best_form(forms) for name, forms in results.items()} for condition, results in found.items()
    }
    return {
        "columns": list(columns),
        "results": found,
        "best": best,
        "averages": {condition: averages(columns, values) for condition, values in best.items()},
    }


def _run_form(
    adapter: LMAdapter, loader: TaskLoader, form: Form, loaded: dict[str, Any], harness: Harness, folder: Path
) -> dict[str, Any]:
    """One form's value, and what it rests on; lm_eval's own results go into the folder."""
    results = evaluate_task(adapter, loaded, form, harness)
    likelihoods = _likelihoods(loaded, results)
    if form.metric == UNCONDITIONAL:
        alone = dataclasses.replace(form, shots=0, changes={**form.changes, "doc_to_text": "Answer:"})
        again = loader.load(alone)
        without = evaluate_task(adapter, again, alone, dataclasses.replace(harness, shots=None))
        values = {UNCONDITIONAL: unconditional(likelihoods, _likelihoods(again, without))}
    else:
        values = _values(loaded, results)

    # ---- lm_eval's own numbers and samples, as files
    metric = form.metric or next(iter(values))
    name = f"{form.task}_{form.label}".rstrip("_").replace("/", "_")
    files = [folder / f"{name}.json", folder / f"{name}.samples.jsonl"]

    def write() -> None:  # as lm_eval writes them itself: one file of numbers, one of questions and answers
        samples = [sample | {"task": task} for task, each in results["samples"].items() for sample in each]
        write_json_lines(files[1], samples)
        write_json(files[0], {key: value for key, value in results.items() if key != "samples"})

    processes.on_first(write)
    finer = measures(list(likelihoods.values())) if likelihoods else {}
    return {
        **values[metric],
        "metric": metric,
        "values": values,
        "shots": results["n-shot"],
        "questions": {task: count["effective"] for task, count in results["n-samples"].items()},
        "metrics": results["results"],
        "choices": {measure: each._asdict() for measure, each in finer.items()},
        "files": list(map(str, files)),
    }


def _likelihoods(loaded: dict[str, Any], results: Mapping[str, Any]) -> dict[tuple[str, int], Scored]:
    """(task, number of the question) -> likelihoods, of the multiple-choice tasks."""
    return {
        (name, sample["doc_id"]): found
        for name, task in loaded["tasks"].items()
        if task.OUTPUT_TYPE == "multiple_choice"
        for sample in results["samples"][name]
        if (found := scored(task, sample))
    }


def _values(loaded: dict[str, Any], results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metric -> value and standard error of the named task or group; of a tag, or a group without metrics of its own,
    the mean over its tasks."""

    def metrics(task: str) -> list[str]:
        found = results["results"].get(task, {})
        names = [name for name in found if "," in name and "_stderr," not in name]
        return [name for name in names if isinstance(found[name], (int, float))]

    names = [name for name in outermost(loaded) if metrics(name)] or list(loaded["tasks"])
    found = {}
    for metric in metrics(names[0]):
        name, _, filter_name = metric.partition(",")
        each = [results["results"][task][metric] for task in names if metric in results["results"][task]]
        error = results["results"][names[0]].get(f"{name}_stderr,{filter_name}") if len(names) == 1 else None
        found[metric] = {"value": sum(each) / len(each), "stderr": error if isinstance(error, float) else None}
    return found


def unconditional(asked: Mapping[Any, Scored], alone: Mapping[Any, Scored]) -> dict[str, Any]:
    """Accuracy of log p(choice | question) - log p(choice | "Answer:") (OLMES, arXiv 2406.08446)."""
    gains = [
        question._replace(totals=np.subtract(question.totals, alone[place].totals).tolist())
        for place, question in asked.items()
    ]
    mean, stderr = measures(gains)["accuracy"]
    return {"value": mean, "stderr": stderr}


def best_form(forms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The form with the highest value, and its label; None for a column without forms."""
    if not forms:
        return None
    label = max(forms, key=lambda label: forms[label]["value"])
    return {"form": label, **{name: forms[label][name] for name in ("value", "stderr", "metric", "values", "choices")}}


def averages(columns: Sequence[Column], best: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Plain means over the measured columns of each group, with the number of columns that are missing."""
    found = {}
    for group in dict.fromkeys(column.group for column in columns if column.group):
        of_group = [best[column.name] for column in columns if column.group == group]
        measured = [value["value"] for value in of_group if value]
        mean = sum(measured) / len(measured) if measured else None
        found[group] = {"mean": mean, "columns": len(measured), "missing": len(of_group) - len(measured)}
    return found


def table(record: Mapping[str, Any]) -> str:
    """Columns of a suite down, conditions across: values with their standard errors, averages, the finer measures of
    multiple choice, notes, and how many texts were truncated."""

    def number(value: Mapping[str, Any]) -> str:
        error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
        return f"{value.get('value', value.get('mean')):.4f}{error}"

    # ---- A row for each column of a suite, or each metric of a task
    columns, best, conditions = record["columns"], record["best"], list(record["best"])
    rows: list[tuple[str, list[str]]] = [("", conditions)]
    for column in columns:
        found = [best[condition][column.name] for condition in conditions]
        if column.group:
            rows.append((column.name, [number(value) if value else "-" for value in found]))
        else:  # a task named by itself: all its metrics
            each = [value["values"] for value in found if value]
            for metric in each[0]:
                name = f"{column.name} {metric.removesuffix(',none')}"
                rows.append((name, [number(values[metric]) for values in each]))

    # ---- Averages, then the finer measures of multiple choice
    for group, first in record["averages"][conditions[0]].items():
        missing = f" without {first['missing']} of {first['columns'] + first['missing']}" if first["missing"] else ""
        means = [record["averages"][condition][group]["mean"] for condition in conditions]
        rows.append((group + missing, ["-" if mean is None else f"{mean:.4f}" for mean in means]))
    chosen = [column.name for column in columns if (best[conditions[0]][column.name] or {}).get("choices")]
    for measure, words in FINER.items() if chosen else ():
        rows.append((f"{words}:", []))
        for name in chosen:
            rows.append((name, [number(best[condition][name]["choices"][measure]) for condition in conditions]))

    # ---- As text, with notes and what was truncated
    width = max(len(name) for name, cells in rows if cells) + 2
    lines = [f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells) if cells else name for name, cells in rows]
    lines += [f"{column.name}: {column.note}" for column in columns if column.note]
    lines += [
        f"{name} {label}, after BOS {condition}: {result['asked']['truncated']:,} of "
        f"{result['asked']['requests']:,} texts lost {result['asked']['dropped_tokens']:,} tokens on their left"
        for condition, results in record["results"].items()
        for name, forms in results.items()
        for label, result in forms.items()
        if result["asked"]["truncated"]
    ]
    return "\n".join(lines)
