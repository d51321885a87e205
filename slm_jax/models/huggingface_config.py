"""Hugging Face's config.json and our ModelConfig, both ways.

Rotary settings have two spellings: `rope_theta` with `rope_scaling` (GPT-NeoX: `rotary_emb_base` and `rotary_pct`), and
since transformers 5 all of it in `rope_parameters`. Either is read, both are written.
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
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
# Sizes that the others of a family do not determine.
_MORE_SIZES = {
    "mistral": ("num_key_value_heads",),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
# What would be another function, and is not one of ours.
_MUST_NOT_SAY = ("quantization_config", "num_experts", "num_local_experts", "n_routed_experts")
_SCALING = {  # their names of RopeScaling's fields
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}


def read_config(settings: dict[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of a config.json; `where` is what an error calls it.

    It computes in bfloat16 where the weights are bfloat16 or float16.

    Raises:
      UserError: a setting is missing, or says what a ModelConfig cannot; names setting and value.
    """
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}: no such model here")
    for name in _MUST_NOT_SAY:
        if settings.get(name):
            raise UserError(f"{where}: {name} = {settings[name]}: dense models with unquantized weights only")
    for name in (*_SIZES, *_MORE_SIZES.get(kind, ())):
        if not isinstance(settings.get(name), int):
            raise UserError(f"{where}: {name} is {settings.get(name)!r}, must be a number: take the whole config.json")
    heads, dim = settings["num_attention_heads"], settings["hidden_size"]
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    fields = {
        "vocab_size": settings["vocab_size"],
        "num_layers": settings["num_hidden_layers"],
        "embed_dim": dim,
        "num_heads": heads,
        "num_kv_heads": settings.get("num_key_value_heads") or heads,
        "head_dim": settings.get("head_dim") or dim // heads,
        "mlp_dim": settings["intermediate_size"],
        "max_length": settings["max_position_embeddings"],
        "sliding_window": _window(settings, where),
        "tied_head": settings.get("tie_word_embeddings", False),
        "compute_dtype": "bfloat16" if dtype in ("bfloat16", "float16") else "float32",
        **_rotary(settings, kind == "gpt_neox", where),
        **_block(settings, kind, where),
    }
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _block(settings: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Norms, activation and biases."""
    neox = kind == "gpt_neox"
    wanted, given = "gelu" if neox else "silu", settings.get("hidden_act")
    if given not in (None, wanted):
        raise UserError(f"{where}: hidden_act {given!r}: {kind} has {wanted!r} here and nothing else")
    biased = settings.get("attention_bias", neox)
    fields: dict[str, Any] = {"attention_bias": biased, "output_bias": biased}
    if neox:
        parallel = settings.get("use_parallel_residual", True)
        fields |= {"norm": "layer", "mlp": "gelu", "mlp_bias": True, "parallel_residual": parallel}
        return fields | {"norm_eps": settings.get("layer_norm_eps", 1e-5)}
    if kind == "qwen2":
        fields = {"attention_bias": True}
    if kind == "qwen3":
        fields["query_key_norm"] = True
    if kind == "llama":
        fields["mlp_bias"] = settings.get("mlp_bias", False)
    return fields | {"norm_eps": settings.get("rms_norm_eps", 1e-6)}


def _rotary(settings: dict[str, Any], neox: bool, where: str) -> dict[str, Any]:
    old = settings.get("rope_scaling") or {}
    new = settings.get("rope_parameters") or {}
    named = "rope_parameters" if new else "rope_scaling"
    rope = old | new
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: {named} differs between layers ({', '.join(rope)}): one for all layers only")
    theta = rope.get("rope_theta", settings.get("rope_theta", settings.get("rotary_emb_base", 10000.0)))
    share = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if share is None:
        share = settings.get("rotary_pct", 0.25) if neox else 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: {named} of type {kind!r}: 'default' and 'llama3' are known")
    fields: dict[str, Any] = {"rope_theta": float(theta), "rotary_share": float(share)}
    if kind == "llama3":
        if missing := [theirs for theirs in _SCALING.values() if theirs not in rope]:
            raise UserError(f"{where}: {named} of type 'llama3' lacks {', '.join(missing)}: take the whole config.json")
        scaling = {ours: rope[theirs] for ours, theirs in _SCALING.items()}
        fields["rope_scaling"] = RopeScaling(**scaling)
    return fields


def _window(settings: dict[str, Any], where: str) -> int | None:
    """The sliding window, which all layers have or none: Qwen2 names one also where it does not use it."""
    window, layers = settings.get("sliding_window"), settings["num_hidden_layers"]
    if settings["model_type"] in ("llama", "gpt_neox") or window is None:
        return None
    kinds = settings.get("layer_types")
    if kinds is None and settings["model_type"].startswith("qwen"):
        first = settings.get("max_window_layers", layers) if settings.get("use_sliding_window", False) else layers
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    sliding = [kind == "sliding_attention" for kind in kinds or ["sliding_attention"]]
    if any(sliding) and not all(sliding):
        raise UserError(
            f"{where}: sliding_window {window} in {sum(sliding)} of {layers} layers (layer_types, max_window_layers): "
            "all layers have it here, or none"
        )
    return window if all(sliding) else None


def family(model: ModelConfig) -> str:
    """The model_type that can express a model.

    Raises:
      UserError: none can; names the fields in which the nearest one differs.
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
            f"no architecture of transformers that is known here has this model's {', '.join(differing[kind])}: "
            f"{kind} comes nearest"
        )
    return kind


def write_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights are saved in `dtype`.

    Raises:
      UserError: as `family`.
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
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.max_length,
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
