"""Attention over packed rows: causal, within a segment, one function with a backend per platform.

`xla` runs anywhere and is what the others are tested against; `splash` is the TPU kernel of jax.experimental.pallas;
`cudnn` is NVIDIA's flash attention behind jax.nn.dot_product_attention. Neither kernel holds [L, L] logits in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from slm_jax.chips import chip_of
from slm_jax.errors import UserError
from slm_jax.mesh import BATCH, P

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
SPLASH_BLOCKS = (512, 256, 128)  # tokens; larger blocks keep the matrix unit busy, 512 fits the memory of every TPU
MASKED = -1e30  # finite, so that a logit times 0 stays 0


def attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None = None,
    backend: str = "xla",
) -> Float[Array, "B L H K"]:
    """Softmax attention with G key-value heads, each read by H / G neighbouring query heads; softmax in float32.

    Query t reads key s where both are of one segment, s <= t and, with a window, t - window < s: itself and the
    window - 1 tokens before it, as in Mistral and in Hugging Face's `sliding_window`. Padding (0) reads padding only.

    Args:
      window: tokens that a query reads at most; the whole segment before it if None.
      backend: 'auto', 'xla', 'splash' or 'cudnn', see `chosen_backend`.

    Raises:
      UserError: the backend cannot compute this on the devices at hand.
    """
    chosen = chosen_backend(backend, query.shape[1], query.shape[3], query.dtype)
    if chosen == "xla":
        return xla_attention(query, key, value, segment_ids, window)
    kernel = functools.partial(splash_attention if chosen == "splash" else cudnn_attention, window=window)
    return per_device(kernel, query, key, value, segment_ids)


def chosen_backend(setting: str, length: int, head_dim: int, dtype: DTypeLike) -> str:
    """The backend for rows of `length` tokens: what the setting names, or for 'auto' the platform's kernel.

    Where the kernel cannot, 'auto' says so once and takes 'xla'.

    Raises:
      UserError: the named backend cannot.
    """
    here = platform()
    kernel = KERNELS.get(here) if setting == "auto" else setting
    if kernel is None or kernel == "xla":
        return "xla"
    reason = unable(kernel, here, length, head_dim, dtype)
    if reason is None:
        return kernel
    if setting != "auto":
        raise UserError(f"attention {kernel!r} {reason}, or take model.attention = 'auto'")
    _say_once(f"attention: 'xla', since {kernel!r} {reason}")
    return "xla"


def platform() -> str:
    """What is compiled for: the devices of the mesh that is set, which may be those of another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def unable(kernel: str, here: str, length: int, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why a kernel cannot compute attention on this platform, and the remedy; None if it can."""
    if KERNELS.get(here) != kernel:
        wanted = next(name for name, theirs in KERNELS.items() if theirs == kernel)
        return f"is a kernel for {wanted.upper()}s, the devices are of platform {here}: start it there"
    if kernel == "splash":
        if length % SPLASH_BLOCKS[-1]:
            return (
                f"takes rows of a multiple of 128 tokens, not {length}: prepare the corpus with such a sequence_length"
            )
        return None
    capability = gpu_capability()
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return "needs an NVIDIA GPU of compute capability 8.0 or later: start it on one"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype)}: set model.compute_dtype = 'bfloat16'"
    if head_dim % 8 or head_dim > largest:
        return f"takes a head_dim that is a multiple of 8 up to {largest}, not {head_dim}: choose such a model"
    if length % 2:
        return f"takes rows of an even length, not {length}: prepare the corpus with such a sequence_length"
    return None


def gpu_capability() -> float:
    """Compute capability of the GPU that is compiled for, 0 for one that is not NVIDIA's."""
    if jax.default_backend() != "gpu":  # it is not here
        device = jax.sharding.get_abstract_mesh().abstract_device
        chip = chip_of(device.device_kind) if device else None
        # What is new in 9.0 (longer heads) JAX allows only where it finds a GPU that can.
        return min(chip.compute_capability, 8.9) if chip else 0.0
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability)
    except ValueError:
        return 0.0


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)


def per_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Calls a kernel, which knows of one device only, on each device's rows and heads of the mesh that is set.

    `arrays` are query, key, value and segment ids.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    heads = P(*BATCH, None, "model", None)
    return jax.shard_map(kernel, in_specs=(heads, heads, heads, BATCH), out_specs=heads, check_vma=False)(*arrays)


def readable(
    segment_ids: Int[Array, "B L"], window: int | None, queries: slice = slice(None), keys: slice = slice(None)
) -> Bool[Array, "B T S"]:
    """Whether query t may read key s, for the queries and keys of two slices."""
    position = jnp.arange(segment_ids.shape[1])
    distance = position[queries, None] - position[keys]
    reach = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (segment_ids[:, queries, None] == segment_ids[:, None, keys]) & reach


def xla_attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    window: int | None,
) -> Float[Array, "B L H K"]:
    """Attention in four blocks of queries, so that three eighths of the logits, all in the future, are not computed.

    Heads stand before positions and a group's query heads are one matrix: on CPU that halves the time (the products
    become large), and it holds fewer logits anywhere.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    size = max(64, -(-length // 4))  # rows of few tokens gain nothing and compile longer

    def block(start: int) -> Float[Array, "B G R T K"]:
        queries = slice(start, start + size)
        keys = slice(0 if window is None else max(0, start - window + 1), start + size)
        mask = readable(segment_ids, window, queries, keys)
        return read(query[:, :, :, queries], key[:, :, keys], value[:, :, keys], mask)

    out = jnp.concatenate([block(start) for start in range(0, length, size)], axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def read(
    query: Float[Array, "*B G R T K"],
    key: Float[Array, "*B G S K"],
    value: Float[Array, "*B G S K"],
    mask: Bool[Array, "*B T S"],
) -> Float[Array, "*B G R T K"]:
    """T queries of R heads over S keys and values that these heads share; 0 weight where the mask is False."""
    logits = jnp.einsum("...qk,...sk->...qs", _flatten(query), key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*query.shape[:-1], -1)
    weights = _masked_softmax(logits, mask[..., None, None, :, :], 1 / math.sqrt(query.shape[-1])).astype(value.dtype)
    out = jnp.einsum("...qs,...sk->...qk", _flatten(weights), value, preferred_element_type=jnp.float32)
    return out.reshape(query.shape).astype(query.dtype)


def _flatten(x: Float[Array, "*B R T X"]) -> Float[Array, "*B RT X"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _masked_softmax(logits: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """softmax(scale * logits) over the last axis where the mask allows, 0 elsewhere.

    With the derivative written out, the weights alone are kept for the backward pass.
    """
    return jax.nn.softmax(jnp.where(mask, scale * logits, MASKED), axis=-1)


@_masked_softmax.defjvp
def _masked_softmax_jvp(
    scale: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(*primals, scale)
    change = weights * (scale * tangents[0])
    return weights, change - weights * jnp.sum(change, axis=-1, keepdims=True)


def splash_attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    window: int | None,
) -> Float[Array, "B L H K"]:
    """The TPU kernel, interpreted (and slow) on other platforms; key-value heads are read in place, not repeated.

    Blocks of keys in the future or before the window are skipped; segments are masked within blocks.
    """
    length, heads = query.shape[1:3]
    size = next(size for size in SPLASH_BLOCKS if length % size == 0)
    within = (length, length)
    mask = splash.CausalMask(within) if window is None else splash.LocalMask(within, (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            *(size, size, size),  # forward: queries, keys and values, those of one product
            *(size, size, size),  # gradients of keys and values: likewise
            *(size, size),  # gradients of queries
        ),
        interpret=platform() != "tpu",
    )

    def row(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
        query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
        out = kernel(query, key, value, splash.SegmentIds(segment_ids, segment_ids))
        assert isinstance(out, jax.Array)
        return out.swapaxes(0, 1)

    scaled = (query.astype(jnp.float32) / math.sqrt(query.shape[3])).astype(query.dtype)
    return jax.vmap(row)(scaled, key, value, segment_ids.astype(jnp.int32))


def cudnn_attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B L G K"],
    value: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"],
    window: int | None,
) -> Float[Array, "B L H K"]:
    """NVIDIA's kernel. Segments go in as a mask, 2 bytes for each of a row's L x L pairs of tokens, once for all heads.

    The kernel's own packed layout would need no mask, but no public function of JAX passes it; nor does one leave out
    the mask's gradient, which the backward kernel writes and nobody reads.
    """
    mask = readable(segment_ids, window)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")
