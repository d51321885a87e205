"""Stage `analyze report`: training runs side by side. It computes nothing anew and reads what the runs wrote."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slm_jax import config as config_lib
from slm_jax.analyze.page import one_line
from slm_jax.analyze.plots import Figure, Line, curves
from slm_jax.analyze.report import Arm, ArmRun, Report, arm_figures, heading, mean_line, over_steps, write_report
from slm_jax.analyze.runs import Group, Run, group_seeds, read_run, short_names, turns
from slm_jax.analyze.selected_tokens import passages_of_run
from slm_jax.analyze.tables import NOTHING, Cell, Table, kind_of, number
from slm_jax.configurable import configurable
from slm_jax.errors import UserError
from slm_jax.score.selection import in_words, selection_of
from slm_jax.score.weighting import weighting_in_words

OTHER_STEPS = " †"  # marks differences between runs of different numbers of steps
MOST_TURNS = 8  # of a learning rate that are listed


@configurable
def analyze_report(runs: Sequence[str] = (), output: str = "report") -> None:
    """Compares training runs: `slm-jax analyze report RUN [RUN ...]`.

    Runs that differ only in their seed are shown together, as a mean with lowest and highest: those with equal
    settings, and those of one name and plan under seed folders (`a/x`, `a/seed1/x`). Differences are to the first run
    named. Unfinished and resumed runs are included and marked, and so are comparisons between different numbers of
    steps.

    Args:
      runs: run directories, given after the stage.
      output: folder for report.html, which needs no other file, tables/*.md and *.csv, figures/*.svg and *.png.
    """
    if not runs:
        raise UserError("report-no-runs", "no runs to compare: name run directories after `analyze report`")
    config_lib.print_unused()
    read = [read_run(run) for run in dict.fromkeys(runs)]
    groups = group_seeds(read)
    print(f"report: {', '.join(group.label for group in groups)} -> {output}/report.html")

    # ---- The first two evaluators give the axes of the figures.
    arms = [Arm(group.label, [_arm_run(run) for run in group.runs]) for group in groups]
    measures = list(dict.fromkeys(name for run in read for row in run.rows for name in row if name.endswith("/loss")))
    names = [one_line(name) for name in short_names([run.path for run in read])]
    details = [_plans(groups), _by_source(groups)]
    if len(read) > len(groups):
        alone = [Group(name, [run]) for name, run in zip(names, read, strict=True)]
        details.append(_results(alone, "Every run", "every_run", compared=False))
    passages = next((found for run in read if run.selective_phase() and (found := passages_of_run(run.path))), [])
    write_report(
        output,
        Report(
            title=f"slm_jax: {', '.join(group.name for group in groups)}",
            heading=f"{len(read)} training run{'s' * (len(read) > 1)}",
            intro=list(_intro(groups, dict(zip(names, read, strict=True)))),
            table=_results(groups, "Results", "results"),
            passages=passages,
            figures=arm_figures(arms, measures[:2]),
            details=[table for table in details if table.rows],
            more_figures=[figure for figure in _more_figures(groups, arms, measures[2:]) if figure],
            facts={group.label: list(_facts(group)) for group in groups},
        ),
    )
    print(f"report: done; open {output}/report.html")


def _arm_run(run: Run) -> ArmRun:
    training, scoring, _ = run.flops()
    return ArmRun.of_rows(run.rows, None if training is None or scoring is None else (scoring, training))


def _intro(groups: Sequence[Group], runs: Mapping[str, Run]) -> Iterator[str]:
    """How to read the numbers, and whatever makes them less comparable than they look."""
    words = ["Losses are in nats per token; lower is better."]
    if len(groups) > 1:
        words.append(f"Small numbers are differences to {groups[0].name}.")
    if any(len(group.runs) > 1 for group in groups):
        words.append("Runs that differ only in their seed are shown as their mean, with the lowest and the highest.")
    yield " ".join(words)
    if len({group.runs[0].done for group in groups}) > 1:
        steps = ", ".join(f"{group.name} {group.runs[0].done:,}" for group in groups)
        yield f"The runs differ in their number of steps ({steps}). Differences between unequal numbers are marked †."
    if unfinished := [f"{name} ({run.state()})" for name, run in runs.items() if not run.finished]:
        yield f"Not finished: {', '.join(unfinished)}."
    for name, run in runs.items():
        if rise := run.unplanned_rise():
            step, low, high = rise
            yield (
                f"{name}: the learning rate had fallen to {low:.3g} at step {step:,} and rose again to {high:.3g}, "
                "which its settings do not ask for. The run was extended, or its settings changed between starts."
            )
        if run.damaged:
            lines = f"{run.damaged} damaged line{'s' * (run.damaged > 1)}"
            yield f"{name}: {lines} in metrics.jsonl, so that its curves lack these steps."


# ---- Tables


class Measure(NamedTuple):
    """A column: what a run says, how many digits are shown, whether it is compared with the first group."""

    heading: str
    of: Callable[[Run], float | None]
    digits: int
    compared: bool = False
    unit: float = 1.0


def _results(groups: Sequence[Group], title: str, file: str, compared: bool = True) -> Table:
    """The last values of the evaluators, the training loss, and what the runs cost."""
    evaluated = [run.evaluations() for group in groups for run in group.runs]
    # `target/loss` and `target/bits_per_byte`, but not `target/loss/web`
    names = dict.fromkeys(name for found in evaluated for name in found if name.split(" (")[0].count("/") == 1)
    measures = [
        *(Measure(heading(name), _evaluation(name), 3, compared and "/loss" in name) for name in names),
        Measure("training loss", lambda run: run.training_losses().get(""), 3, compared),
        Measure("steps", lambda run: run.done, 0),
        *(
            Measure(name.replace("_", " "), lambda run, name=name: run.counters().get(name), 0)
            for name in ("tokens_seen", "tokens_trained", "seconds")
        ),
        Measure("TFLOP training", lambda run: run.flops().training, 3, unit=1e12),
        Measure("TFLOP scoring", lambda run: run.flops().scoring, 3, unit=1e12),
        Measure("TFLOP reference", lambda run: run.flops().reference, 3, unit=1e12),
    ]
    shown = [measure for measure in measures if any(group.numbers(measure.of) for group in groups)]
    rows = [(group.label, [_cell(group, groups[0], measure) for measure in shown]) for group in groups]
    note = (
        "Training loss: all tokens of the batches, selected or not, over the last tenth of the logged steps. Tokens: "
        "those that have a loss. Seconds: training steps with compilation, without evaluations; of an unfinished run "
        "up to its last checkpoint. FLOP follow from the shape of the model, without recomputation. Scoring: one "
        "forward pass of the reference over the rows that were selected from, each row once. Reference: its training. "
        f"{NOTHING}: unknown, because a corpus or a reference is no longer there."
    )
    return Table(title, ["run", *(measure.heading for measure in shown)], rows, note if compared else "", file)


def _evaluation(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.evaluations().get(name)


def _cell(group: Group, baseline: Group, measure: Measure) -> Cell:
    """The mean over a group's seeds, their range, and the difference to the baseline's mean."""
    numbers = [value / measure.unit for value in group.numbers(measure.of)]
    if not numbers:
        return Cell(NOTHING)
    mean = float(np.mean(numbers))
    cell = Cell(number(mean, measure.digits), value=mean)
    if len(numbers) > 1:
        spread = (min(numbers), max(numbers))
        low, high = (number(value, measure.digits) for value in spread)
        cell = cell._replace(spread=spread, range=f"{low} to {high}" if low != high else "")
    there = [value / measure.unit for value in baseline.numbers(measure.of)]
    if measure.compared and group is not baseline and there:
        change = mean - float(np.mean(there))
        unequal = OTHER_STEPS if group.runs[0].done != baseline.runs[0].done else ""
        cell = cell._replace(change=number(change, measure.digits, signed=True) + unequal, kind=kind_of(change))
    return cell


def _by_source(groups: Sequence[Group]) -> Table:
    """A line for each source, a column for each group: training losses, then every evaluator's."""
    runs = [run for group in groups for run in group.runs]
    training = dict.fromkeys(name for run in runs for name in run.training_losses() if name)
    evaluated = dict.fromkeys(name for run in runs for name in run.evaluations() if "/loss/" in name)
    lines: dict[str, Callable[[Run], float | None]] = {
        f"training, {name}": lambda run, name=name: run.training_losses().get(name) for name in training
    }
    lines |= {name.replace("/loss/", ", "): _evaluation(name) for name in evaluated}
    rows = [
        (one_line(name), [_cell(group, groups[0], Measure(name, of, 3, compared=True)) for group in groups])
        for name, of in lines.items()
    ]
    return Table("Losses by source", ["source", *(group.label for group in groups)], rows, file="losses_by_source")


def _plans(groups: Sequence[Group]) -> Table:
    """A line for each phase of each group."""
    rows = []
    for group in groups:
        run, phases = group.runs[0], group.runs[0].settings["phases"]
        for index, phase in enumerate(phases):
            first = sum(before["steps"] for before in phases[:index])
            words = (
                ", ".join(str(run.seed) for run in group.runs),
                "; ".join(dict.fromkeys(run.state() for run in group.runs)),
                f"{phase['steps']:,} of {phase['batch_size']} rows",
                mixture_in_words(phase),
                objective_in_words(phase),
                _rate_as_used(run, first, first + phase["steps"]),
            )
            name = group.name if len(phases) == 1 else f"{group.name}, phase {index}"
            rows.append((name, [Cell(one_line(word)) for word in words]))
    headings = ["run", "seed", "state", "steps", "rows from", "trains on", "learning rate as used"]
    return Table("Settings", headings, rows, file="settings", words=True)


# ---- Figures


def _more_figures(groups: Sequence[Group], arms: Sequence[Arm], measures: Sequence[str]) -> Iterator[Figure | None]:
    axes = ("step", "nats per token")
    several = any(len(group.runs) > 1 for group in groups)
    over_seeds = " Mean over seeds." if several else ""
    for name in measures:
        caption = "Loss of the evaluator." + (" Mean over seeds; band: lowest to highest." if several else "")
        yield over_steps(arms, name, heading(name), caption, axes, smooth=False)
    smooth = "Loss on the tokens of the batches: faint per step, bold a running mean." + over_seeds
    yield over_steps(arms, "loss", "Training loss", smooth, axes, smooth=True)
    for group in groups:
        parts: list[Line] = []
        for field, label, colour in (
            ("selected_loss", "selected", 3),
            ("unselected_loss", "unselected", 4),
            ("loss", "all", 5),
        ):
            line = mean_line(label, [run.curve(field) for run in group.runs], colour)
            parts += [line] if line else []
        if parts and parts[0].label == "selected":
            yield curves(f"Selected and unselected, {group.name}", smooth, parts, axes, smooth=True)
    yield over_steps(arms, "learning_rate", "Learning rate", "As it was used.", ("step", "learning rate"), smooth=False)


# ---- Settings in words


def objective_in_words(phase: Mapping[str, Any]) -> str:
    """What a phase trains on: `60% by excess, per batch, ...`."""
    selection = selection_of(phase["selection"])
    parts = [in_words(selection) if selection else "all tokens"]
    parts += weighting_in_words(phase)
    if phase.get("keep_ratio") and phase["selection"].get("threshold") is None:
        parts.append(f"ratio {schedule_in_words(phase['keep_ratio'])}")
    if phase.get("reset_optimizer"):
        parts.append("optimizer state reset")
    if phase.get("l2_to_init"):
        parts.append(f"L2 penalty {phase['l2_to_init']:g} towards the parameters at the start of the phase")
    return ", ".join(parts)


def mixture_in_words(phase: Mapping[str, Any]) -> str:
    """Corpora with their weights: `70 % crawl + 30 % clean (replay, in order)`."""
    components = phase["mixture"]
    names = [component["corpus"] for component in components]
    names = short_names(names) if len(names) > 1 else names
    fixed = [c["weight"] for c in components if isinstance(c["weight"], int | float)]
    total = 1.0 if len(fixed) < len(components) else sum(fixed)
    parts = []
    for name, component in zip(names, components, strict=True):
        weight = component["weight"]
        if isinstance(weight, Mapping):
            words = schedule_in_words(weight)
        else:
            words = "the rest" if weight is None else f"{100 * weight / total:.4g} %"
        replay = f" (replay, {component['replay'].replace('_', ' ')})" if component.get("replay") else ""
        parts.append(f"{words} {name}{replay}")
    return " + ".join(parts)


def schedule_in_words(value: Mapping[str, Any]) -> str:
    """`0 to 0.003 linear over 5 %, to 0.0003 cosine over the rest`."""
    parts = []
    for part in value["parts"]:
        steps = part["steps"]
        length = "the rest" if steps is None else f"{100 * steps:.4g} %" if steps < 1 else f"{steps:,} steps"
        parts.append(f"to {part['to']:.4g} {part['shape']} over {length}")
    start = value.get("start")
    return ("from the value reached " if start is None else f"{start:.4g} ") + ", ".join(parts)


def _rate_as_used(run: Run, first: int, last: int) -> str:
    """The logged learning rate of the steps after `first` up to `last`: where it starts, turns and ends."""
    steps, rates = run.curve("learning_rate")
    mine = (steps > first) & (steps <= last)
    steps, rates = steps[mine], rates[mine]
    if len(rates) and np.ptp(rates) == 0:
        return f"{rates[0]:.3g} throughout"
    words = [f"{rates[i]:.3g} at step {steps[i]:,.0f}" for i in turns(rates)]
    if len(words) > MOST_TURNS:
        words[MOST_TURNS // 2 : -MOST_TURNS // 2] = ["…"]
    return ", ".join(words) or NOTHING


def _facts(group: Group) -> Iterator[tuple[str, str]]:
    """What else to know of the runs; what is the same for all seeds is written once."""
    found = [dict(_facts_of_run(run)) for run in group.runs]
    for name in found[0]:
        yield name, one_line("; ".join(dict.fromkeys(facts[name] for facts in found)))


def _facts_of_run(run: Run) -> Iterator[tuple[str, str]]:
    settings, identity, model = run.settings, run.identity, run.settings["model"]
    origin = identity.get("init_from") or "random parameters"
    if identity.get("init_from"):
        origin += f", step {identity.get('init_step')}"
        if identity.get("whole_state"):
            origin += ", with its optimizer state: a branch, whose counts include that run's steps"
    yield "directory", run.path
    yield "model", "{num_layers} layers of {embed_dim}, {num_heads} heads, vocabulary {vocab_size}".format_map(model)
    yield "starts from", origin
    schedule = settings.get("schedule")
    yield "learning rate as set", schedule_in_words(schedule) if schedule else "by phase"
    yield "vocabulary", identity["vocabulary_hash"][:12]
    for name, of in (
        ("devices", lambda start: f"{start.get('num_devices')} x {start.get('device_kind')}"),
        ("commit", lambda start: str(start.get("commit"))),
        ("jax", lambda start: str((start.get("versions") or {}).get("jax"))),
    ):
        yield name, ", ".join(sorted({of(start) for start in run.starts})) or NOTHING
