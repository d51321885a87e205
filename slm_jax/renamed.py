"""Names of earlier versions: settings, which are refused with the new name, and keys of saved files, which are read."""

from typing import Any

# Old gin name -> new gin name. A binding to an old name is refused with the new one.
SETTINGS = {
    "Draw": "MixtureComponent",
    "Draw.share": "MixtureComponent.weight",
    "Leg": "SchedulePart",
    "Schedule.legs": "Schedule.parts",
    "Combined": "CombinedSelection",
    "Phase.batch_rows": "Phase.batch_size",
    "Phase.toward_start": "Phase.l2_to_init",
    "train.initial": "train.init_from",
    "train.initial_step": "train.init_step",
    "train.inherit": "train.init_mode",
    "train.micro_batches": "train.gradient_accumulation_steps",
    "train.max_unusable": "train.max_nonfinite_scores",
    "prepare.row_length": "prepare.sequence_length",
    "compile.row_length": "compile.sequence_length",
    "score.batch_rows": "score.batch_size",
    "score.without_prefix": "score.strip_metadata",
    "score.other_vocabulary": "score.cross_tokenizer",
    "score.from_file": "score.external_logprobs",
    "HeldOut.batch_rows": "HeldOut.batch_size",
    "Harness.batch_rows": "Harness.batch_size",
    "Samples.batch_rows": "Samples.batch_size",
    "generate.batch_rows": "generate.batch_size",
    "analyze_inspect.batch_rows": "analyze_inspect.batch_size",
    "analyze_selection.batch_rows": "analyze_selection.batch_size",
    "solve": "evaluate_math",
    "solve.batch_rows": "evaluate_math.batch_size",
}

# Old key -> new key, wherever it occurs in the JSON of a corpus or a run.
SAVED_KEYS = {
    "row_length": "sequence_length",
    "batch_rows": "batch_size",
    "micro_batches": "gradient_accumulation_steps",
    "max_unusable": "max_nonfinite_scores",
    "unusable_scores": "nonfinite_scores",
    "toward_start": "l2_to_init",
    "initial": "init_from",
    "initial_step": "init_step",
    "legs": "parts",
}


def new_setting(name: str) -> str | None:
    """The name that replaced a setting `CONFIGURABLE.PARAMETER` or a configurable; None where it is not an old one."""
    if name in SETTINGS:
        return SETTINGS[name]
    configurable, _, parameter = name.partition(".")
    return f"{SETTINGS[configurable]}.{parameter}" if parameter and configurable in SETTINGS else None


def with_new_keys(value: Any) -> Any:
    """JSON read from a corpus or a run of any version, with the keys of this one."""
    if isinstance(value, dict):
        keys = SAVED_KEYS
        if "share" in value and "corpus" in value:  # a component of a mixture; "share" elsewhere is something else
            keys = keys | {"share": "weight"}
        return {keys.get(key, key): with_new_keys(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_new_keys(item) for item in value]
    return value
