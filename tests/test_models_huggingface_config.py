"""config.json of the public models says what the named sizes say; what cannot be expressed is refused by name."""

import dataclasses
import json
import math

import pytest
import toy

from slm_jax.models.huggingface_config import family, read_config, write_config
from slm_jax.models.model_config import FUNCTION_FIELDS, SIZES, ModelConfig, RopeScaling

# As they were published, in the older spelling of rotary settings; without what says nothing of the function.
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 32000,
}
LLAMA_3 = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = LLAMA_3 | {
    "model_type": "mistral",
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
QWEN_2 = {  # 2.5, 0.5B
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = QWEN_2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "num_key_value_heads": 7}
LLAMA_31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "size, there",
    [("tinyllama_1_1b", LLAMA), ("llama3_8b", LLAMA_3), ("mistral_7b", MISTRAL), ("pythia_70m", PYTHIA)],
)
def test_the_public_models_are_the_named_sizes(size, there):
    model = read_config(there, "config.json")
    for name in (*FUNCTION_FIELDS, "max_length"):
        assert getattr(model, name) == getattr(SIZES[size], name), name
    assert model.compute_dtype == ("float32" if there["torch_dtype"] == "float32" else "bfloat16")


def test_qwen():
    model = read_config(QWEN_2, "config.json")
    assert (model.attention_bias, model.output_bias, model.tied_head) == (True, False, True)
    assert model.sliding_window is None and model.head_dim == 64 and model.rope_theta == 1e6
    model = read_config(QWEN_3, "config.json")
    assert (model.attention_bias, model.query_key_norm, model.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    "there, window",
    [
        (MISTRAL | {"sliding_window": None}, None),
        (MISTRAL, 4096),
        (QWEN_2, None),
        (QWEN_2 | {"use_sliding_window": True}, None),  # from layer 24 of 24 on
        (QWEN_2 | {"use_sliding_window": True, "max_window_layers": 0}, 32768),
        (QWEN_2 | {"layer_types": ["full_attention"] * 24}, None),
        (QWEN_2 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 24}, 32768),
        (QWEN_3, None),
    ],
)
def test_a_sliding_window_is_of_all_layers_or_of_none(there, window):
    assert read_config(there, "config.json").sliding_window == window


@pytest.mark.parametrize(
    "there",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA_31_SCALING},
        {"rope_theta": 5e5, "rope_scaling": {k.replace("rope_", ""): v for k, v in LLAMA_31_SCALING.items()}},
        {"rope_parameters": LLAMA_31_SCALING | {"rope_theta": 5e5}},
    ],
    ids=["older", "oldest", "newer"],
)
def test_rotary_scaling_in_every_spelling(there):
    model = read_config({name: value for name, value in LLAMA_3.items() if name != "rope_theta"} | there, "config.json")
    assert model.rope_theta == 5e5 and model.rope_scaling == RopeScaling()


def test_rotary_share_in_both_spellings():
    newer = {name: value for name, value in PYTHIA.items() if not name.startswith("rotary")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    older = PYTHIA | {"rotary_emb_base": 20000, "rotary_pct": 0.5}
    assert read_config(newer, "x") == read_config(older, "x")
    assert (read_config(older, "x").rope_theta, read_config(older, "x").rotary_share) == (2e4, 0.5)


def without(there: dict, *names: str) -> dict:
    return {name: value for name, value in there.items() if name not in names}


@pytest.mark.parametrize(
    "code, there, named",
    [
        ("config-family", LLAMA | {"model_type": "gemma2"}, "'gemma2'"),
        ("config-family", LLAMA | {"model_type": "mixtral", "num_local_experts": 8}, "'mixtral'"),
        ("config-family", {}, "None"),
        ("config-family", LLAMA | {"model_type": ["llama"]}, "['llama']"),
        # What changes the function.
        ("config-unsupported", QWEN_3 | {"num_experts": 128}, "num_experts = 128"),
        ("config-unsupported", LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ("config-unsupported", LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("config-unsupported", PYTHIA | {"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ("config-unsupported", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ("config-unsupported", LLAMA | {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ("config-unsupported", LLAMA | {"rope_parameters": {"full_attention": {"factor": 2}}}, "full_attention"),
        ("config-unsupported", LLAMA | {"rope_scaling": {"factor": 2.0}}, "factor = 2.0"),
        ("config-unsupported", LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "500000.0"),
        ("config-unsupported", LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("config-unsupported", LLAMA | {"sliding_window": 128}, "sliding_window = 128"),
        ("config-unsupported", LLAMA | {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
        ("config-unsupported", LLAMA | {"torch_dtype": "float64"}, "'float64'"),
        ("config-unsupported", LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("config-unsupported", MISTRAL | {"attention_bias": True}, "attention_bias"),
        ("config-unsupported", PYTHIA | {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("config-unsupported", QWEN_2 | {"use_sliding_window": True, "max_window_layers": 20}, "4 of 24 layers"),
        ("config-unsupported", QWEN_2 | {"layer_types": ["full_attention", "sliding_attention"] * 12}, "12 of 24"),
        ("config-unsupported", QWEN_2 | {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window"),
        ("config-unsupported", QWEN_2 | {"layer_types": ["full_attention"]}, "24 layers"),
        # What is missing or of a wrong type.
        ("config-setting", without(LLAMA, "vocab_size"), "vocab_size is None"),
        ("config-setting", without(QWEN_3, "head_dim"), "head_dim is None"),
        ("config-setting", without(MISTRAL, "num_key_value_heads"), "num_key_value_heads is None"),
        ("config-setting", LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ("config-setting", LLAMA | {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("config-setting", LLAMA | {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ("config-setting", LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ("config-setting", LLAMA | {"attention_bias": 0}, "attention_bias is 0"),
        ("config-setting", LLAMA | {"num_hidden_layers": "22"}, "num_hidden_layers is '22'"),
        ("config-setting", LLAMA | {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("config-setting", LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("config-setting", LLAMA | {"hidden_size": 0}, "hidden_size is 0"),
        ("config-setting", LLAMA | {"hidden_size": 2048.0}, "hidden_size is 2048.0"),
        ("config-setting", LLAMA | {"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ("config-setting", LLAMA | {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"),
        ("config-setting", LLAMA | {"hidden_act": None}, "hidden_act is None"),
        ("config-setting", LLAMA | {"torch_dtype": 16}, "torch_dtype is 16"),
        ("config-setting", MISTRAL | {"sliding_window": "4096"}, "sliding_window is '4096'"),
        # What no model can be.
        ("model-shape", LLAMA | {"num_key_value_heads": 5}, "num_kv_heads 5"),
        ("setting-out-of-range", LLAMA | {"rms_norm_eps": math.nan}, "norm_eps is nan"),
        ("setting-out-of-range", MISTRAL | {"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(code, there, named):
    line = toy.refused(code, read_config, there, "folder/config.json")
    assert line.startswith("folder/config.json") and named in line


def test_keys_without_effect_and_keys_that_turn_nothing_on_are_passed_over():
    more = {"bos_token_id": 1, "transformers_version": "4.40.0", "attention_dropout": 0.1, "temperature": 0.7}
    nothing = {"quantization_config": None, "num_experts": 0, "rope_interleaved": False, "pruned_heads": {}}
    assert read_config(LLAMA | more | nothing, "x") == read_config(LLAMA, "x")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"norm": "layer"}, "norm = layer"),
        ({"parallel_residual": True}, "parallel_residual = True"),
        ({"attention_bias": True, "mlp_bias": True}, "output_bias = False"),
        ({"query_key_norm": True, "mlp_bias": True}, "query_key_norm = True"),
        ({"sliding_window": 8, "attention_bias": True, "output_bias": True}, "sliding_window = 8"),
        ({"rotary_share": 0.5}, "rotary_share = 0.5"),
    ],
)
def test_a_model_of_no_family_is_refused_with_its_fields(change, named):
    line = toy.refused("export-family", family, dataclasses.replace(toy.MODEL, **change))
    assert named in line and "llama" in line


@pytest.mark.parametrize(
    "kind, change",
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "output_bias": True, "mlp_bias": True, "rope_scaling": RopeScaling()}),
        ("mistral", {"sliding_window": 9, "head_dim": 24}),
        ("qwen2", {"attention_bias": True, "tied_head": True}),
        ("qwen2", {"attention_bias": True, "sliding_window": 9}),
        ("qwen3", {"query_key_norm": True, "head_dim": 24}),
        ("qwen3", {"query_key_norm": True, "attention_bias": True, "output_bias": True, "sliding_window": 9}),
        ("gpt_neox", {"norm": "layer", "mlp": "gelu", "mlp_bias": True, "rotary_share": 0.25, "tied_head": True}),
    ],
)
def test_what_is_written_is_read_again(kind, change):
    model: ModelConfig = dataclasses.replace(toy.MODEL, **change)
    there = json.loads(json.dumps(write_config(model, "float32")))
    assert there["model_type"] == kind
    assert read_config(there, "x") == model
    older = {name: value for name, value in there.items() if name != "rope_parameters"}
    newer = {name: value for name, value in there.items() if name not in ("rope_theta", "rope_scaling", "rotary_pct")}
    assert read_config(older, "x") == model == read_config(newer, "x")
