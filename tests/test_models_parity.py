"""Every family against Hugging Face's implementation on torch: documents packed in a row here, each alone there."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import mesh
from slm_jax.data.batches import make_batch
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.models import forward
from slm_jax.models.config import ModelConfig, RopeScaling
from slm_jax.score.token_loss import batch_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

# Our module -> theirs; {} is the number of the layer.
LLAMA = {
    "embed": "model.embed_tokens",
    "layers/attention_norm": "model.layers.{}.input_layernorm",
    "layers/attention/query": "model.layers.{}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{}.self_attn.v_proj",
    "layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
    "layers/attention/out": "model.layers.{}.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
GPT_NEOX = {
    "embed": "gpt_neox.embed_in",
    "layers/attention_norm": "gpt_neox.layers.{}.input_layernorm",
    "layers/attention/query": "gpt_neox.layers.{}.attention.query",
    "layers/attention/key": "gpt_neox.layers.{}.attention.key",
    "layers/attention/value": "gpt_neox.layers.{}.attention.value",
    "layers/attention/out": "gpt_neox.layers.{}.attention.dense",
    "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",  # in files: embed_out
}
NEOX_FIELDS = {
    **{"norm": "layer", "mlp": "gelu", "parallel_residual": True, "rotary_share": 0.25},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
}
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=64)

# Their kind of model, our fields, and their settings where fields do not say it.
FAMILIES = {
    "llama 2": ("Llama", {}, {}),
    "llama 3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": SCALING}, {}),
    "llama with biases": (
        "Llama",
        {"attention_bias": True, "output_bias": True, "mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}, {"sliding_window": 5}),
    "qwen 2": ("Qwen2", {"attention_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6}, {}),
    "qwen 2, tied": ("Qwen2", {"attention_bias": True, "tied_head": True}, {}),
    "qwen 3": ("Qwen3", {"query_key_norm": True, "head_dim": 24, "norm_eps": 1e-6}, {}),
    "gpt neox": ("GPTNeoX", NEOX_FIELDS, {}),
    "gpt neox, one after the other": (
        "GPTNeoX",
        NEOX_FIELDS | {"parallel_residual": False, "rotary_share": 0.5},
        {"use_parallel_residual": False},
    ),
}


def _our_config(name, kind, fields):
    """A small random shape with the family's fields."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    heads = int(rng.choice([2, 4]))
    kv_heads = heads if kind == "GPTNeoX" else int(rng.choice([1, 2]))
    dim = int(rng.choice([32, 48]))
    shape = {"embed_dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim // heads}
    shape |= {"mlp_dim": int(rng.choice([40, 64])), "vocab_size": int(rng.integers(50, 70)), "num_layers": 2}
    return ModelConfig(**(shape | {"max_length": 128} | fields))


def _their_model(kind, config, settings):
    """With the shape of ours, and random values everywhere: biases and norms too."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= dataclasses.asdict(config.rope_scaling) | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_max_length")
    if kind == "GPTNeoX":
        settings = settings | {"layer_norm_eps": config.norm_eps}
        rope["partial_rotary_factor"] = config.rotary_share
    else:
        settings = settings | {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
        settings["rms_norm_eps"] = config.norm_eps
    theirs = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=config.tied_head,
        rope_parameters=rope,
        attn_implementation="eager",
        **settings,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _tensors(model, config, of):
    """Name -> array of each parameter. GPT-NeoX keeps query, key and value of a head together: here they are apart."""
    found = {}
    for name, parameter in model.named_parameters():
        array = of(parameter).detach().numpy()
        if "query_key_value" in name:
            parts = array.reshape(config.num_heads, 3, config.head_dim, *array.shape[1:])
            for number, part in enumerate(("query", "key", "value")):
                found[name.replace("query_key_value", part)] = parts[:, number].reshape(-1, *array.shape[1:])
        else:
            found[name] = array
    return found


def _as_ours(tensors, config, table):
    """Their arrays in our tree; every one of them has a place."""
    left = dict(tensors)

    def leaf(path, shape):
        module, _, name = mesh.path_name(path).rpartition("/")
        suffix = "bias" if name == "bias" else "weight"
        number = config.num_layers if module.startswith("layers/") else 1
        arrays = [left.pop(f"{table[module].format(layer)}.{suffix}") for layer in range(number)]
        # A matrix of theirs is [out, in].
        arrays = [array.T if name == "kernel" else array for array in arrays]
        return jnp.asarray(np.stack(arrays).reshape(shape.shape))

    params = jax.tree_util.tree_map_with_path(leaf, forward.param_shapes(config))
    assert not left, f"nothing of ours is {sorted(left)}"
    return params


@pytest.mark.parametrize("name", ["llama 3", "mistral", "gpt neox"])
def test_greedy_continuations_are_those_of_transformers(name):
    """Of prompts of several lengths, which share a batch here and are alone there."""
    kind, fields, settings = FAMILIES[name]
    config = _our_config(name, kind, fields)
    model, table = _their_model(kind, config, settings), GPT_NEOX if kind == "GPTNeoX" else LLAMA
    params = _as_ours(_tensors(model, config, lambda parameter: parameter), config, table)
    vocabulary, devices = ByteVocabulary(), mesh.make_mesh(devices=jax.devices()[:1])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, config.vocab_size, length).tolist() for length in (1, 4, 19, 8)]
    ours = Generator(params, config, vocabulary, devices).continue_ids(prompts, Sampling(max_new_tokens=24))
    for prompt, continuation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": vocabulary.eos_id, "pad_token_id": 0}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert continuation.tokens == theirs[0, len(prompt) :].tolist()
    assert len({token for continuation in ours for token in continuation.tokens}) > 5


@functools.partial(jax.jit, static_argnums=1)
def _logits_and_gradient(params, config, batch):
    hidden = forward.hidden_states(params, config, batch.tokens, batch.positions, batch.segment_ids)
    gradient = jax.grad(lambda params: jnp.sum(batch_loss(params, config, batch)))(params)
    return forward.logits(params, config, hidden), gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(name):
    kind, fields, settings = FAMILIES[name]
    config = _our_config(name, kind, fields)
    model, table = _their_model(kind, config, settings), GPT_NEOX if kind == "GPTNeoX" else LLAMA
    rng = np.random.default_rng(0)
    lengths = rng.permutation([13, 9])
    segments = np.repeat([1, 2, 0], [*lengths, 2])[None]
    tokens = rng.integers(0, config.vocab_size, segments.shape)
    batch = jax.tree.map(jnp.asarray, make_batch(tokens, segments, segments > 0))
    params = _as_ours(_tensors(model, config, lambda parameter: parameter), config, table)
    logits, gradient = _logits_and_gradient(params, config, batch)

    total = torch.zeros(())
    for document in (1, 2):
        here = segments == document
        ids = torch.from_numpy(tokens[here])
        theirs = model(input_ids=ids[None]).logits[0]
        np.testing.assert_allclose(logits[here], theirs.detach(), atol=1e-4)
        total = total + torch.nn.functional.cross_entropy(theirs[:-1], ids[1:], reduction="sum")
    total.backward()

    def close(path, ours, theirs):
        scale = np.abs(theirs).max()
        assert scale > 1e-3, f"{mesh.path_name(path)} has no gradient there"
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-3, err_msg=mesh.path_name(path))

    expected = _as_ours(_tensors(model, config, lambda parameter: parameter.grad), config, table)
    jax.tree_util.tree_map_with_path(close, gradient, expected)
