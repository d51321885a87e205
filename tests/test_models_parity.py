"""Every family against Hugging Face's implementation on torch, imported and exported: documents packed in a row here,
each alone there."""

import dataclasses
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm_jax import mesh
from slm_jax.convert.export_model import export_model
from slm_jax.convert.import_model import import_model
from slm_jax.data.batches import make_batch
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.models import forward
from slm_jax.models.huggingface import tensors, to_ours
from slm_jax.models.huggingface_config import read_config
from slm_jax.models.model_config import FUNCTION_FIELDS, ModelConfig, RopeScaling
from slm_jax.models.trained_model import load_model
from slm_jax.score.token_loss import batch_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

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
    "qwen 2, sliding": (
        "Qwen2",
        {"attention_bias": True, "sliding_window": 6},
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen 2, not sliding": ("Qwen2", {"attention_bias": True}, {"use_sliding_window": False, "sliding_window": 6}),
    "qwen 3": ("Qwen3", {"query_key_norm": True, "head_dim": 24, "norm_eps": 1e-6}, {}),
    "gpt neox": ("GPTNeoX", NEOX_FIELDS, {}),
    "gpt neox, one after the other": (
        "GPTNeoX",
        NEOX_FIELDS | {"parallel_residual": False, "rotary_share": 0.5},
        {"use_parallel_residual": False},
    ),
}


def _our_config(name, kind, fields):
    """A small random shape with the family's fields; one of two, so that the programs of one family serve the next."""
    rng = np.random.default_rng(1 + zlib.crc32(name.encode()) % 2)
    heads = int(rng.choice([2, 4]))
    kv_heads = heads if kind == "GPTNeoX" else int(rng.choice([1, 2]))
    dim = int(rng.choice([32, 48]))
    shape = {"embed_dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim // heads}
    shape |= {"mlp_dim": int(rng.choice([40, 64])), "vocab_size": int(rng.integers(260, 280)), "num_layers": 2}
    return ModelConfig(**(shape | {"max_length": 128, "vocab_multiple": 2} | fields))


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


def _as_ours(model, config, of):
    """What `of` gives of each of their parameters, in our tree."""
    names = {"lm_head.weight": "embed_out.weight"} if config.norm == "layer" else {}  # in files
    left = {names.get(name, name): of(parameter).detach().numpy() for name, parameter in model.named_parameters()}
    places = {(path, tensor.layer): tensor for tensor in tensors(config) for path in tensor.paths}

    def leaf(key_path, shape):
        path = mesh.path_name(key_path)
        layers = range(config.num_layers) if path.startswith("layers/") else [None]
        of_layer = shape.shape[1:] if layers != [None] else shape.shape
        arrays = []
        for layer in layers:
            tensor = places[path, layer]
            assert left[tensor.name].shape == tensor.shape
            arrays.append(to_ours(left[tensor.name], tensor, path, of_layer))
        return np.stack(arrays).reshape(shape.shape)

    assert left.keys() == {tensor.name for tensor in places.values()}
    return jax.tree_util.tree_map_with_path(leaf, forward.param_shapes(dataclasses.replace(config, vocab_multiple=1)))


SIZES = {"vocab_size": 270, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 30}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "kind, more",
    [
        *(("llama", {}), ("llama", {"head_dim": None, "num_key_value_heads": None}), ("llama", {"head_dim": 16})),
        *(("mistral", {"num_key_value_heads": 2}), ("mistral", {"num_key_value_heads": 4, "sliding_window": None})),
        *(("qwen2", {"num_key_value_heads": 2}), ("qwen2", {"num_key_value_heads": 2, "sliding_window": 8})),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": None}),
        ("qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 30}),
        *(
            ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
            ("qwen3", {"num_key_value_heads": None, "head_dim": 8}),
        ),
        *(("gpt_neox", {}), ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20000})),
        ("llama", {"rope_theta": 5e5}),
    ],
)
def test_missing_keys_have_the_defaults_of_transformers(kind, more):
    ours = read_config(SIZES | more | {"model_type": kind}, "x")
    theirs = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    kv_heads = getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (kv_heads, head_dim)
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_eps", None))
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rotary_share == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    slides = set(getattr(theirs, "layer_types", ["sliding_attention"])) == {"sliding_attention"}
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) if slides else None)
    assert ours.attention_bias == getattr(theirs, "attention_bias", kind == "qwen2")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", kind == "gpt_neox")
    assert ours.parallel_residual == getattr(theirs, "use_parallel_residual", False)


def test_every_key_that_transformers_knows_is_read():
    """A config.json with all keys and defaults of the library is read; a key that none of it explains is refused."""
    for kind, more in (("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("gpt_neox", {})):
        there = json.loads(transformers.AutoConfig.for_model(kind, **SIZES, **more).to_json_string(use_diff=False))
        there["num_key_value_heads"] = 4 if kind != "gpt_neox" else None
        read_config(there, "x")
        assert "strange" in toy.refused("config-unsupported", read_config, there | {"strange": 1}, "x")


@pytest.mark.parametrize("name", ["llama 3", "mistral", "gpt neox"])
def test_greedy_continuations_are_those_of_transformers(name):
    """Of prompts of several lengths, which share a batch here and are alone there."""
    kind, fields, settings = FAMILIES[name]
    vocabulary, devices = ByteVocabulary(), mesh.make_mesh(devices=jax.devices()[:1])
    config = dataclasses.replace(_our_config(name, kind, fields), vocab_size=vocabulary.size, vocab_multiple=1)
    model = _their_model(kind, config, settings)
    params = jax.tree.map(jnp.asarray, _as_ours(model, config, lambda parameter: parameter))
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


@pytest.fixture
def one_device():
    with toy.one_device():
        yield


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("one_device")
def test_imported_and_exported_models_are_those_of_transformers(name, tmp_path):
    kind, fields, settings = FAMILIES[name]
    config = _our_config(name, kind, fields)
    model = _their_model(kind, config, settings)
    model.save_pretrained(tmp_path / "theirs")
    ByteVocabulary().save(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "ours"), vocab_multiple=2)
    imported = load_model(str(tmp_path / "ours"), mesh.make_mesh())
    for field in (*FUNCTION_FIELDS, "max_length"):
        assert getattr(imported.config, field) == getattr(config, field), field
    _same_logits_and_gradients(model, imported.params, config)

    # To the bit: theirs again, and ours again.
    export_model(str(tmp_path / "ours"), str(tmp_path / "back"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back) is type(model)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    import_model(str(tmp_path / "back"), str(tmp_path / "again"), vocab_multiple=2)
    again = load_model(str(tmp_path / "again"), mesh.make_mesh())
    assert again.config == imported.config and again.vocabulary_hash == imported.vocabulary_hash
    jax.tree.map(np.testing.assert_array_equal, again.params, imported.params)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 2


def _same_logits_and_gradients(model, params, config):
    rng = np.random.default_rng(0)
    lengths = rng.permutation([13, 9])
    segments = np.repeat([1, 2, 0], [*lengths, 2])[None]
    tokens = rng.integers(0, config.vocab_size, segments.shape)
    batch = jax.tree.map(jnp.asarray, make_batch(tokens, segments, segments > 0))
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
        axis = {"embed": 0, "head": 1}.get(path[0].key)
        if axis is not None:  # what pads the vocabulary is not theirs
            ours, padding = np.split(ours, [config.vocab_size], axis)
            assert not padding.any()
        scale = np.abs(theirs).max()
        assert scale > 1e-3, f"{mesh.path_name(path)} has no gradient there"
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-3, err_msg=mesh.path_name(path))

    expected = _as_ours(model, config, lambda parameter: parameter.grad)
    jax.tree_util.tree_map_with_path(close, gradient, expected)
