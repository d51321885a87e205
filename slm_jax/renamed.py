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

# Name of a setting in other programs -> its name here, for messages.
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "max_lr", "peak_lr"), "cosine_schedule.peak"),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "warmup_ratio"), "cosine_schedule.warmup"),
    **dict.fromkeys(("min_lr", "min_lr_ratio"), "cosine_schedule.final"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "train.schedule"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size"), "Phase.batch_size"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "train_steps", "iterations", "max_iters"), "Phase.steps"),
    **dict.fromkeys(("max_tokens", "num_tokens", "total_tokens"), "Phase.tokens"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "MixtureComponent.epochs"),
    **dict.fromkeys(
        ("seq_len", "seq_length", "sequence_length", "max_seq_len", "max_seq_length", "block_size", "context_length"),
        "prepare.sequence_length",
    ),
    **dict.fromkeys(("vocab_size", "vocabulary_size"), "VocabularyConfig.size"),
    **dict.fromkeys(("data", "dataset", "train_data", "train_files", "data_path"), "MixtureComponent.corpus"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "output"), "train.run_dir"),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint", "pretrained", "model_name_or_path"), "train.init_from"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("eval_every", "eval_steps", "eval_interval"), "train.evaluate_every"),
    **dict.fromkeys(("save_every", "save_steps", "save_interval"), "train.checkpoint_every"),
    **dict.fromkeys(("beta1", "adam_beta1"), "OptimizerConfig.b1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "OptimizerConfig.b2"),
    **dict.fromkeys(("wd", "weight_decay"), "OptimizerConfig.weight_decay"),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip_grad"), "OptimizerConfig.clip_norm"),
    **dict.fromkeys(("n_layers", "n_layer", "layers", "num_hidden_layers", "depth"), "model.num_layers"),
    **dict.fromkeys(("n_heads", "n_head", "heads", "num_attention_heads"), "model.num_heads"),
    **dict.fromkeys(("d_model", "n_embd", "hidden_size", "dim", "width"), "model.embed_dim"),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), "model.mlp_dim"),
    **dict.fromkeys(("dtype", "precision", "bf16", "fp16"), "model.compute_dtype"),
    **dict.fromkeys(("keep_ratio", "select_ratio", "selection_ratio"), "Selection.ratio"),
    **{name: f"Sampling.{name}" for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
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
