"""What a run was, in words, from its run.json."""

from collections.abc import Mapping
from typing import Any

from slm_jax.analyze.runs import Run, short_names
from slm_jax.score.selection import Selection, selection_of


def objective(phase: Mapping[str, Any]) -> str:
    """Which tokens train: `60 % by excess of reference, per batch`."""
    chosen = selection_of(phase["selection"])
    if chosen is None:
        parts = ["all tokens"]
    else:
        both = " and " if isinstance(chosen, Selection) or chosen.keeps == "intersection" else " or "
        parts = [both.join(_chosen(part, phase) for part in chosen.parts)]
        if chosen.gradient != "exact":
            parts.append(f"{chosen.gradient} gradient")
    if phase.get("reset_optimizer"):
        parts.append("moments forgotten")
    if phase.get("l2_to_init"):
        parts.append(f"pulled back by {phase['l2_to_init']:g}")
    return ", ".join(parts)


def _chosen(selection: Selection, phase: Mapping[str, Any]) -> str:
    amount = f"{100 * selection.ratio:.4g} %"
    if selection.threshold is not None:
        amount = f"above {selection.threshold:g}"
    elif phase.get("keep_ratio"):
        amount = f"up to {amount}, {schedule(phase['keep_ratio'])}"
    column = f", column {', '.join(selection.references)}" if selection.columns() else ""
    return f"{amount} by {selection.score}, per {selection.scope}{column}"


def mixture(phase: Mapping[str, Any]) -> str:
    """Corpora with their shares of the rows: `70 % crawl + 30 % clean (replay, in order)`."""
    draws = phase["mixture"]
    names = short_names([draw["corpus"] for draw in draws]) if len(draws) > 1 else [draws[0]["corpus"]]
    fixed = [draw["weight"] for draw in draws if isinstance(draw["weight"], int | float)]
    total = 1.0 if len(fixed) < len(draws) else sum(fixed)
    parts = []
    for name, draw in zip(names, draws, strict=True):
        share = draw["weight"]
        if isinstance(share, Mapping):
            words = schedule(share)
        else:
            words = "the rest" if share is None else f"{100 * share / total:.4g} %"
        replay = f" (replay, {draw['replay'].replace('_', ' ')})" if draw.get("replay") else ""
        parts.append(f"{words} {name}{replay}")
    return " + ".join(parts)


def schedule(value: Mapping[str, Any] | None) -> str:
    """`0 to 0.003 linear over 5 %, to 0.0003 cosine over the rest`; "" for none."""
    if not value:
        return ""
    start = value.get("start")
    legs = []
    for leg in value["parts"]:
        steps = leg["steps"]
        length = "the rest" if steps is None else f"{100 * steps:.4g} %" if steps < 1 else f"{steps:,} steps"
        legs.append(f"to {leg['to']:.4g} {leg['shape']} over {length}")
    return ("from where it was " if start is None else f"{start:.4g} ") + ", ".join(legs)


def facts(run: Run) -> dict[str, Any]:
    """What else to know of a run: model, start, machine, versions."""
    settings, first = run.settings, run.starts[0] if run.starts else {}
    model, identity = settings["model"], run.identity
    start = identity.get("init_from") or "random parameters"
    if identity.get("init_from"):
        start += f", step {identity.get('init_step')}"
        start += ", with its state: a branch, whose numbers count that run's steps too" * bool(
            identity.get("whole_state")
        )
    shape = "{num_layers} layers of {embed_dim}, {num_heads} heads, vocabulary {vocab_size}".format_map(model)
    devices = {f"{s.get('num_devices')} x {s.get('device_kind')}" for s in run.starts}
    commits = {str(s.get("commit")) for s in run.starts}
    return {
        "state": run.state(),
        "seed": run.seed,
        "model": shape,
        "starts from": start,
        "learning rate": schedule(settings.get("schedule")) or "as the phases say",
        "vocabulary": identity["vocabulary_hash"][:12],
        "devices": ", ".join(sorted(devices)),
        "commit": ", ".join(sorted(commits)),
        "jax": (first.get("versions") or {}).get("jax"),
    }
