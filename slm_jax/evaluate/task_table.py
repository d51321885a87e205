"""Results of tasks as a table: columns of a suite down, conditions across."""

from collections.abc import Mapping, Sequence
from typing import Any

from slm_jax.evaluate.suites import Column

FINER = {
    "margin_per_character": "log p of the right choice minus that of the best wrong one, nats per character",
    "gold_loss_per_character": "-log p of the right choice, nats per character",
}


def averages(columns: Sequence[Column], best: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Plain means over the columns of each group: of those that were measured, with how many are missing."""
    found = {}
    for group in dict.fromkeys(column.group for column in columns if column.group):
        mine = [best[column.name] for column in columns if column.group == group]
        there = [value["value"] for value in mine if value]
        mean = sum(there) / len(there) if there else None
        found[group] = {"mean": mean, "columns": len(there), "missing": len(mine) - len(there)}
    return found


def table(record: Mapping[str, Any]) -> str:
    """Values with their standard errors, averages, the finer measures of multiple choice, notes, and what was cut."""
    columns, best, conditions = record["columns"], record["best"], list(record["best"])
    rows: list[tuple[str, list[str]]] = [("", conditions)]
    for column in columns:
        rows += _rows(column, [best[condition][column.name] for condition in conditions])
    for group, first in record["averages"][conditions[0]].items():
        missing = f" without {first['missing']} of {first['columns'] + first['missing']}" if first["missing"] else ""
        means = [record["averages"][condition][group]["mean"] for condition in conditions]
        rows.append((group + missing, ["-" if mean is None else f"{mean:.4f}" for mean in means]))
    chosen = [column.name for column in columns if (best[conditions[0]][column.name] or {}).get("choices")]
    for measure, words in FINER.items() if chosen else ():
        rows.append((f"{words}:", []))
        for name in chosen:
            rows.append((name, [_number(best[condition][name]["choices"][measure]) for condition in conditions]))
    width = max(len(name) for name, cells in rows if cells) + 2
    lines = [f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells) if cells else name for name, cells in rows]
    lines += [f"{column.name}: {column.note}" for column in columns if column.note]
    return "\n".join(lines + _cut(record["results"]))


def _rows(column: Column, found: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, list[str]]]:
    """A column of a suite as one row; a task by its own name with all its metrics."""
    if column.group:
        return [(column.name, [_number(value) if value else "-" for value in found])]
    each = [value["values"] for value in found if value]
    return [
        (f"{column.name} {metric.removesuffix(',none')}", [_number(values[metric]) for values in each])
        for metric in each[0]
    ]


def _number(value: Mapping[str, Any]) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
    return f"{value.get('value', value.get('mean')):.4f}{error}"


def _cut(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What did not fit into what the model reads."""
    return [
        f"{name} {label}, behind BOS {condition}: {result['asked']['truncated']:,} of "
        f"{result['asked']['requests']:,} texts lost {result['asked']['dropped_tokens']:,} tokens on their left"
        for condition, columns in results.items()
        for name, forms in columns.items()
        for label, result in forms.items()
        if result["asked"]["truncated"]
    ]
