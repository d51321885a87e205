"""Hugging Face's config.json and our ModelConfig, both ways.

Every key of a config.json is read: it is understood, known to have no effect on what the model computes, or refused.
Missing keys have the defaults of transformers. Rotary settings have two spellings: `rope_theta` and `rope_scaling`
(GPT-NeoX: `rotary_emb_base` and `rotary_pct`), and since transformers 5 all of them in `rope_parameters`. Both are
read, both are written.
"""

from typing import Any

from slm_jax.errors import UserError
from slm_jax.models.model_config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
_SIZES = {  # our names of the sizes that every config.json has
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
}
MAX_SIZE = 10_000_000  # of any number that shapes an array
_SCALING = {  # their names of RopeScaling's fields
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}
# Keys without effect on the logits of a forward pass: training, generation, bookkeeping.
_WITHOUT_EFFECT = frozenset(
    """
    architectures transformers_version _name_or_path _attn_implementation_autoset tokenizer_class torchscript
    initializer_range attention_dropout hidden_dropout classifier_dropout use_cache pretraining_tp use_bfloat16
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate chunk_size_feed_forward
    id2label label2id problem_type finetuning_task task_specific_params prefix is_decoder is_llama_config
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences
    encoder_no_repeat_ngram_size bad_words_ids exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens remove_invalid_values unsloth_fixed unsloth_version
    """.split()
)
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object",
          list: "a list", type(None): "null"}  # fmt: skip


class _Keys:
    """The keys of a config.json that have not been read yet."""

    def __init__(self, settings: dict[str, Any], where: str):
        self.left, self.where = dict(settings), where

    def take(self, name: str, *kinds: type, default: Any = None, required: bool = False) -> Any:
        """The value of a key, which must be of one of the kinds; the default where the key is missing."""
        if name not in self.left and not required:
            return default
        value = self.left.pop(name, None)
        kind = type(value)
        if kind not in kinds and not (kind is int and float in kinds):
            takes = " or ".join(_KINDS[kind] for kind in kinds)
            raise UserError(
                "config-setting", f"{self.where}: {name} is {value!r}, must be {takes}: take the whole config.json"
            )
        return value

    def size(self, name: str, required: bool = True) -> int | None:
        """A key whose value is a size; None where it is missing or null and not required."""
        value = self.take(name, int, *(() if required else (type(None),)), required=required)
        if value is not None and not 1 <= value <= MAX_SIZE:
            raise UserError("config-setting", f"{self.where}: {name} is {value}, must be from 1 to {MAX_SIZE:,}")
        return value

    def refuse(self, what: str, remedy: str) -> UserError:
        return UserError("config-unsupported", f"{self.where}: {what}: {remedy}")


def read_config(settings: dict[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of a config.json; `where` names it in messages.

    It computes in bfloat16 if the weights are bfloat16 or float16.

    Raises:
      UserError: a setting is missing or of a wrong type, or changes the model in a way that a ModelConfig cannot
        express; the message names setting and value.
    """
    keys = _Keys(settings, where)
    kind = keys.left.pop("model_type", None)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError("config-family", f"{where}: model_type is {kind!r}: take a model of {', '.join(ARCHITECTURES)}")
    neox = kind == "gpt_neox"
    fields: dict[str, Any] = {ours: keys.size(theirs) for theirs, ours in _SIZES.items()}
    dim, heads = fields["embed_dim"], fields["num_heads"]
    fields |= {"num_kv_heads": heads, "head_dim": dim // heads, **_rotary(keys, neox)}
    fields["sliding_window"] = _window(keys, kind, fields["num_layers"])
    fields["tied_head"] = keys.take("tie_word_embeddings", bool, default=False)

    # Heads, norms, activation and biases, by family.
    activation = "gelu" if neox else "silu"
    if (given := keys.take("hidden_act", str, default=activation)) != activation:
        raise keys.refuse(f"hidden_act {given!r}", f"{kind} is supported with {activation!r} only")
    if neox:
        biased = keys.take("attention_bias", bool, default=True)
        fields |= {"norm": "layer", "mlp": "gelu", "attention_bias": biased, "output_bias": biased, "mlp_bias": True}
        fields["parallel_residual"] = keys.take("use_parallel_residual", bool, default=True)
        fields["norm_eps"] = keys.take("layer_norm_eps", float, default=1e-5)
    else:
        # transformers has defaults for these sizes too, but a config.json without them is not whole.
        if kind != "llama" and "num_key_value_heads" not in keys.left:
            keys.size("num_key_value_heads")
        fields["num_kv_heads"] = keys.size("num_key_value_heads", required=False) or heads
        fields["head_dim"] = keys.size("head_dim", required=kind == "qwen3") or dim // heads
        fields["norm_eps"] = keys.take("rms_norm_eps", float, default=1e-6)
    if kind in ("llama", "qwen3"):
        biased = keys.take("attention_bias", bool, default=False)
        fields |= {"attention_bias": biased, "output_bias": biased}
    if kind == "llama":
        fields["mlp_bias"] = keys.take("mlp_bias", bool, default=False)
    if kind == "qwen2":
        fields["attention_bias"] = True
    fields["query_key_norm"] = kind == "qwen3"

    dtypes = [keys.take(name, str, type(None)) for name in ("dtype", "torch_dtype")]
    dtype = dtypes[0] or dtypes[1]
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise keys.refuse(f"dtype {dtype!r}", "take weights in float32, bfloat16 or float16")
    fields["compute_dtype"] = "bfloat16" if dtype in ("bfloat16", "float16") else "float32"

    # transformers ignores what it does not know, so a key that is false, empty or 0 turns nothing on.
    for name, value in keys.left.items():
        if value and name not in _WITHOUT_EFFECT:
            said = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
            raise keys.refuse(
                f"{name} = {said}",
                f"not known for {kind}; if it does not change what the model computes, delete it from the file",
            )
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(error.code, f"{where}: {error}") from error


def _rotary(keys: _Keys, neox: bool) -> dict[str, Any]:
    """The rotary fields, from all spellings, which must agree."""
    theta_names, share_names = ["rope_theta"], ["partial_rotary_factor"]
    if neox:
        theta_names.append("rotary_emb_base")
        share_names.append("rotary_pct")
    said = [("rope_theta", keys.take(name, float, type(None))) for name in theta_names]
    said += [("partial_rotary_factor", keys.take(name, float, type(None))) for name in share_names]
    for name in ("rope_scaling", "rope_parameters"):
        said += (keys.take(name, dict, type(None)) or {}).items()
    rope: dict[str, Any] = {}
    for name, value in said:
        name = "rope_type" if name == "type" else name
        if value is None:
            continue
        if rope.setdefault(name, value) != value:
            raise keys.refuse(f"{name} is {rope[name]!r} and {value!r}", "keep one of the two")

    scaled = rope.get("rope_type", "default") != "default"
    if scaled and rope["rope_type"] != "llama3":
        raise keys.refuse(f"rotary embedding of type {rope['rope_type']!r}", "take 'default' or 'llama3'")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *(_SCALING.values() if scaled else ())}
    if unknown := sorted(set(rope) - known):
        what = f"{unknown[0]} = {rope[unknown[0]]!r} of a rotary embedding of type {rope.get('rope_type', 'default')!r}"
        raise keys.refuse(what, "not known for this type")
    values = _Keys(rope, f"{keys.where}, rotary embedding")
    theta = values.take("rope_theta", float, default=10000.0)
    share = values.take("partial_rotary_factor", float, default=0.25 if neox else 1.0)
    if share != 1 and not neox:
        raise keys.refuse(f"partial_rotary_factor {share}", "only gpt_neox has it")
    fields: dict[str, Any] = {"rope_theta": float(theta), "rotary_share": float(share)}
    if scaled:
        scaling = {ours: values.take(theirs, float, required=True) for ours, theirs in _SCALING.items()}
        try:
            fields["rope_scaling"] = RopeScaling(**scaling)
        except UserError as error:
            raise UserError(error.code, f"{keys.where}: {error}") from error
    return fields


def _window(keys: _Keys, kind: str, num_layers: int) -> int | None:
    """The sliding window, which all layers have or none; Qwen names one even where it does not use it."""
    if kind == "mistral":
        return keys.take("sliding_window", int, type(None), default=4096)
    if not kind.startswith("qwen"):
        return None
    used = keys.take("use_sliding_window", bool, default=False)
    window = keys.take("sliding_window", int, type(None), default=4096)
    first = keys.take("max_window_layers", int, default=28)
    kinds = keys.take("layer_types", list, type(None))
    window = window if used else None
    if kinds is None:
        sliding = [window is not None and layer >= first for layer in range(num_layers)]
    else:
        sliding = [kind == "sliding_attention" for kind in kinds]
        if len(kinds) != num_layers or not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
            raise keys.refuse(
                "layer_types", f"take full_attention or sliding_attention for each of {num_layers} layers"
            )
    if any(sliding) and (window is None or not all(sliding)):
        raise keys.refuse(
            f"sliding_window {window} in {sum(sliding)} of {num_layers} layers (use_sliding_window, max_window_layers, "
            "layer_types)",
            "take a model whose layers all have it, or none",
        )
    return window if any(sliding) else None


def family(model: ModelConfig) -> str:
    """The model_type of transformers that expresses a model.

    Raises:
      UserError: none does; the message names the fields in which the nearest one differs.
    """
    llama = {"norm": "rms", "mlp": "swiglu", "parallel_residual": False, "rotary_share": 1.0}
    plain, biased = {"query_key_norm": False}, {"output_bias": model.attention_bias}
    needs: dict[str, dict[str, Any]] = {
        "llama": llama | plain | biased | {"sliding_window": None},
        "mistral": llama | plain | {"attention_bias": False, "output_bias": False, "mlp_bias": False},
        "qwen2": llama | plain | {"attention_bias": True, "output_bias": False, "mlp_bias": False},
        "qwen3": llama | biased | {"query_key_norm": True, "mlp_bias": False},
        "gpt_neox": plain
        | biased
        | {"norm": "layer", "mlp": "gelu", "mlp_bias": True, "sliding_window": None}
        | {"num_kv_heads": model.num_heads, "head_dim": model.embed_dim // model.num_heads},
    }
    differing = {
        kind: [f"{name} = {getattr(model, name)} (not {value})" for name, value in fields.items()
               if getattr(model, name) != value]
        for kind, fields in needs.items()
    }  # fmt: skip
    kind = min(differing, key=lambda kind: len(differing[kind]))
    if differing[kind]:
        raise UserError(
            "export-family",
            f"no supported family of transformers has this model's {', '.join(differing[kind])}: the nearest is {kind}",
        )
    return kind


def write_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights are saved in `dtype`.

    Raises:
      UserError: no family expresses the model, see `family`.
    """
    kind = family(model)
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {theirs: getattr(model.rope_scaling, ours) for ours, theirs in _SCALING.items()}
        rope["rope_type"] = "llama3"
    settings = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
        "rope_scaling": rope if model.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
    }
    if kind == "gpt_neox":
        settings["rope_parameters"]["partial_rotary_factor"] = model.rotary_share
        return settings | {
            "hidden_act": "gelu",
            "layer_norm_eps": model.norm_eps,
            "use_parallel_residual": model.parallel_residual,
            "attention_bias": model.attention_bias,
            "rotary_pct": model.rotary_share,
            "rotary_emb_base": model.rope_theta,
        }
    settings |= {
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rope_theta": model.rope_theta,
    }
    if kind in ("llama", "qwen3"):
        settings["attention_bias"] = model.attention_bias
    if kind == "llama":
        settings["mlp_bias"] = model.mlp_bias
    else:
        settings["sliding_window"] = model.sliding_window
    if kind.startswith("qwen"):
        slides = model.sliding_window is not None
        settings |= {"use_sliding_window": slides, "max_window_layers": 0 if slides else model.num_layers}
    return settings
