"""What the families add to a Llama: how many parameters, split how, decayed or not, and in the filtered gradient."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh as mesh_lib
from slm_jax.data.batches import make_batch
from slm_jax.files import to_json
from slm_jax.models import forward
from slm_jax.models.layers import rotary_angles, rotate, scaled_frequencies
from slm_jax.models.model_config import FUNCTION_FIELDS, SIZES, ModelConfig, RopeScaling
from slm_jax.score.token_loss import batch_loss, predicted
from slm_jax.train.filtered_gradient import filtered_vjp
from slm_jax.train.optimizer import decay_mask

LLAMA = ModelConfig(
    61, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, init_std=0.2, max_length=64
)
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
FAMILIES = {
    "llama": LLAMA,
    "llama 3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(original_max_length=16)),
    "qwen 2": dataclasses.replace(LLAMA, attention_bias=True, tied_head=True),
    "qwen 3": dataclasses.replace(LLAMA, query_key_norm=True, head_dim=12),
    "gpt neox": dataclasses.replace(
        LLAMA, norm="layer", mlp="gelu", parallel_residual=True, rotary_share=0.25, num_kv_heads=4, **BIASES
    ),
    "all at once": dataclasses.replace(
        LLAMA, norm="layer", query_key_norm=True, parallel_residual=True, rotary_share=0.5, sliding_window=9, **BIASES
    ),
}


def _paths(tree):
    return {mesh_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count_equals_the_tree(name):
    leaves = jax.tree.leaves(forward.param_shapes(FAMILIES[name]))
    assert sum(leaf.size for leaf in leaves) == FAMILIES[name].parameter_count()
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


# As published (arXiv 2501.01956, 2403.08763, model cards); Pythia's by 12 h^2 L + 13 h L + 2 h + 2 V h.
COUNTS = {
    "tinyllama_1_1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "mistral_7b": 7_241_732_096,
    "llama3_8b": 8_030_261_248,
    "meco_600m": 665_371_648,
    "meco_1_6b": 1_639_024_640,
    "meco_3b": 3_606_752_256,
    "meco_8b": 8_030_261_248,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "continual_405m": 405_334_016,
    "continual_10b": 9_642_249_216,
}


@pytest.mark.parametrize("size", [name for name in SIZES if name not in ("demo", "small")])
def test_named_sizes_have_the_parameters_of_the_public_models(size):
    """Every public size is listed here; its tree has that many parameters, each with a rule on a mesh."""
    assert SIZES[size].parameter_count() == COUNTS[size]
    shapes = forward.param_shapes(SIZES[size])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[size]
    for path, leaf in _paths(shapes).items():
        spec = mesh_lib.partition_spec(path, len(leaf.shape))
        assert leaf.size < 1_000_000 or {"fsdp", "model"} <= set(spec), f"{path} is replicated"


def test_projections_into_the_stream_start_as_told():
    """GPT-NeoX: sqrt(2 / 5 h), and 2 / (L sqrt(h)) for what goes back into the stream (small_init, wang_init)."""
    config = dataclasses.replace(SIZES["pythia_70m"], vocab_size=64, num_layers=1)
    params = jax.jit(lambda: forward.init_params(config, jax.random.key(0)))()
    into, back = (2 / (5 * 512)) ** 0.5, 2 / (6 * 512**0.5)
    deviations = {path: float(x.std()) for path, x in _paths(params).items() if path.endswith("kernel")}
    for path, deviation in deviations.items():
        expected = back if path in ("layers/attention/out/kernel", "layers/mlp/down/kernel") else into
        assert deviation == pytest.approx(expected, rel=0.02), path


def test_biases_and_norms_are_not_decayed():
    mask = _paths(decay_mask(forward.param_shapes(FAMILIES["all at once"])))
    assert {path for path, decayed in mask.items() if not decayed} == {
        "final_norm/bias",
        "final_norm/scale",
        *(f"layers/{norm}/{part}" for norm in ("attention_norm", "mlp_norm") for part in ("scale", "bias")),
        *(f"layers/attention/{norm}/{part}" for norm in ("query_norm", "key_norm") for part in ("scale", "bias")),
        *(f"layers/attention/{projection}/bias" for projection in ("query", "key", "value", "out")),
        *(f"layers/mlp/{projection}/bias" for projection in ("gate", "up", "down")),
    }


def test_with_every_token_chosen_filtered_is_exact():
    """Empty places of the rows have biases for keys and values, which nothing may read."""
    model = FAMILIES["all at once"]
    rng = np.random.default_rng(0)
    segments = np.ones((2, 24), np.int32)
    segments[:, 11:], segments[1, 20:] = 2, 0
    batch = make_batch(rng.integers(0, 61, segments.shape), segments, segments > 0)
    batch = jax.tree.map(jnp.asarray, batch)
    params = forward.init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    weights = predicted(batch.segment_ids).astype(jnp.float32)
    found = jax.jit(lambda params: filtered_vjp(params, model, batch, segments.size)[1](weights)[0])(params)
    exact = jax.jit(lambda params: jax.vjp(lambda p: batch_loss(p, model, batch), params)[1](weights)[0])(params)
    for path, expected in _paths(exact).items():
        scale = float(jnp.abs(expected).max())
        assert scale > 1e-3, f"{path} has no gradient"
        np.testing.assert_allclose(_paths(found)[path] / scale, expected / scale, atol=1e-5, err_msg=path)


def test_a_share_of_the_features_turns():
    """The first of a head's features as those of a smaller head; the others as they were."""
    model = dataclasses.replace(LLAMA, head_dim=16, rotary_share=0.25)
    whole = dataclasses.replace(LLAMA, head_dim=4)
    x, positions = jax.random.normal(jax.random.key(0), (1, 5, 2, 16)), jnp.arange(5)[None]
    turned = rotate(x, rotary_angles(positions, model))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], rotary_angles(positions, whole)))


def test_rotary_scaling_by_hand():
    """5 turns within the original length stay, 2 are mixed by (2 - 1) / (4 - 1), half a turn becomes 8 times slower."""
    scaling = RopeScaling(original_max_length=1000)
    turns = jnp.array([5.0, 2.0, 0.5])
    scaled = scaled_frequencies(turns * 2 * math.pi / 1000, scaling) * 1000 / (2 * math.pi)
    np.testing.assert_allclose(scaled, [5.0, 2.0 * (1 / 3 + 2 / 3 / 8), 0.5 / 8], rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_back_from_json(name):
    assert ModelConfig.from_json(json.loads(json.dumps(to_json(FAMILIES[name])))) == FAMILIES[name]


def test_a_config_without_the_newer_fields_is_a_llama():
    """What runs of the past have written stays readable, and means what it did."""
    written = {name: value for name, value in to_json(LLAMA).items() if name in FUNCTION_FIELDS[:8]}
    assert ModelConfig.from_json(written) == dataclasses.replace(LLAMA, init_std=0.02, max_length=2048)
