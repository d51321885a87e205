"""Causal attention within the segments of packed rows: one function, with one backend for each platform.

`xla` runs anywhere, and the others are tested against it; `splash` is the TPU kernel of jax.experimental.pallas;
`cudnn` is NVIDIA's flash attention, called through jax.nn.dot_product_attention. Neither kernel holds [L, L] logits.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from slm_jax.chips import chip_of
from slm_jax.errors import UserError
from slm_jax.mesh import BATCH, P

KERNELS = {"tpu": "splash", "gpu": "cudnn"}
SPLASH_BLOCKS = (512, 256, 128)  # tokens; larger blocks keep the matrix unit busy, 512 fits the memory of every TPU
MASKED = -1e30  # finite, so that a logit times 0 stays 0

# B rows of L tokens, H query heads and G key-value heads of K features.
Queries = Float[Array, "B L H K"]
Keys = Float[Array, "B L G K"]  # and values
Segments = Int[Array, "B L"]


def attention(
    query: Queries, key: Keys, value: Keys, segment_ids: Segments, *, window: int | None = None, backend: str = "xla"
) -> Queries:
    """Softmax attention with G key-value heads, each read by H / G neighbouring query heads; softmax in float32.

    Query t reads key s if both are in one segment, s <= t and, with a window, t - window < s: itself and the window - 1
    tokens before it, as in Mistral and in Hugging Face's `sliding_window`. Padding (segment 0) reads only padding.

    Args:
      window: maximum number of tokens that a query reads; None for all earlier tokens of its segment.
      backend: 'auto', 'xla', 'splash' or 'cudnn', see `chosen_backend`.

    Raises:
      UserError: the named backend cannot compute this on these devices.
    """
    chosen = chosen_backend(backend, query.shape[1], query.shape[3], query.dtype)
    if chosen == "xla":
        return xla_attention(query, key, value, segment_ids, window)
    kernel = functools.partial(splash_attention if chosen == "splash" else cudnn_attention, window=window)
    return per_device(kernel, query, key, value, segment_ids)


def chosen_backend(setting: str, length: int, head_dim: int, dtype: DTypeLike) -> str:
    """The backend for rows of `length` tokens: the one named, or for 'auto' the kernel of the platform.

    Where the kernel does not support the shape, 'auto' prints the reason once and takes 'xla'.

    Raises:
      UserError: the named backend does not support the platform or the shape.
    """
    kernel = KERNELS.get(platform()) if setting == "auto" else setting
    if kernel is None or kernel == "xla":
        return "xla"
    reason = why_unsupported(kernel, platform(), length, head_dim, dtype)
    if reason is None:
        return kernel
    if setting != "auto":
        raise UserError("attention-unsupported", f"attention {kernel!r} {reason}, or set model.attention = 'auto'")
    _print_once(f"attention: 'xla', since {kernel!r} {reason}")
    return "xla"


def platform() -> str:
    """The platform to compile for: that of the mesh that is set, whose devices may be those of another machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def why_unsupported(kernel: str, here: str, length: int, head_dim: int, dtype: DTypeLike) -> str | None:
    """Why a kernel cannot compute attention on this platform, and the remedy; None if it can."""
    if KERNELS.get(here) != kernel:
        wanted = next(name for name, theirs in KERNELS.items() if theirs == kernel)
        return f"is a kernel for {wanted.upper()}s, these devices are of platform {here}: run on a {wanted.upper()}"
    if kernel == "splash":
        if length % SPLASH_BLOCKS[-1]:
            return f"takes rows of a multiple of 128 tokens, not {length}: choose such a sequence_length"
        return None
    capability = gpu_capability()
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return "needs an NVIDIA GPU of compute capability 8.0 or later: run on one"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype)}: set model.compute_dtype = 'bfloat16'"
    if head_dim % 8 or head_dim > largest:
        return f"takes a head_dim that is a multiple of 8 up to {largest}, not {head_dim}: choose such a model"
    if length % 2:
        return f"takes rows of an even length, not {length}: choose such a sequence_length"
    return None


def gpu_capability() -> float:
    """Compute capability of the GPU to compile for, 0 for one that is not NVIDIA's."""
    if jax.default_backend() != "gpu":  # compiling for another machine
        device = jax.sharding.get_abstract_mesh().abstract_device
        chip = chip_of(device.device_kind) if device else None
        # JAX allows what is new in 9.0 (larger heads) only where it finds such a GPU.
        return min(chip.compute_capability, 8.9) if chip else 0.0
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability)
    except ValueError:
        return 0.0


@functools.cache
def _print_once(line: str) -> None:
    print(line, flush=True)


def per_device(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Calls a kernel for one device on each device's rows and heads of the mesh that is set.

    `arrays` are query, key, value and segment ids.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    heads = P(*BATCH, None, "model", None)
    return jax.shard_map(kernel, in_specs=(heads, heads, heads, BATCH), out_specs=heads, check_vma=False)(*arrays)


def in_reach(
    query_position: Int[Array, "*B T"], key_position: Int[Array, "S"], window: int | None
) -> Bool[Array, "*B T S"]:
    """Whether a key lies at a query's own position or before it and, with a window, no further back than that."""
    distance = query_position[..., :, None] - key_position
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def may_read(
    query_position: Int[Array, "*B T"],
    query_segment: Int[Array, "B T"],
    key_position: Int[Array, "S"],
    key_segment: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Whether a query may read a key: of the same segment, and in reach. Positions count from the row's first token."""
    same_segment = query_segment[:, :, None] == key_segment[:, None, :]
    return same_segment & in_reach(query_position, key_position, window)


def xla_attention(query: Queries, key: Keys, value: Keys, segment_ids: Segments, window: int | None) -> Queries:
    """Attention in four blocks of queries, which skips three eighths of the logits, all of them in the future.

    The head axis comes before the position axis, and the R = H / G query heads of a group form one matrix: on CPU that
    halves the time (the products become large), and on every platform fewer logits are held.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # [B, L, H, K] -> [B, G, R, L, K]
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)  # [B, L, G, K] -> [B, G, L, K]
    size = max(64, -(-length // 4))  # rows of few tokens gain nothing and compile longer
    position, out = jnp.arange(length), []
    for start in range(0, length, size):
        block = slice(start, start + size)
        where = (position[block], segment_ids[:, block])
        out.append(attend_in_block(query[:, :, :, block], *where, block, key, value, segment_ids, window))
    # [B, G, R, L, K] -> [B, L, H, K]
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def attend_in_block(
    query: Float[Array, "B G R T K"],
    query_position: Int[Array, "*B T"],
    query_segment: Int[Array, "B T"],
    block: slice,
    key: Float[Array, "B G L K"],
    value: Float[Array, "B G L K"],
    segment_ids: Segments,
    window: int | None,
) -> Float[Array, "B G R T K"]:
    """Queries whose positions all lie in one block of the row, over the keys that one of them may read."""
    keys = slice(0 if window is None else max(0, block.start - window + 1), block.stop)
    key_position = jnp.arange(segment_ids.shape[1])[keys]
    mask = may_read(query_position, query_segment, key_position, segment_ids[:, keys], window)
    return attend(query, key[:, :, keys], value[:, :, keys], mask)


def attend(
    query: Float[Array, "*B G R T K"],
    key: Float[Array, "*B G S K"],
    value: Float[Array, "*B G S K"],
    mask: Bool[Array, "*B T S"],
) -> Float[Array, "*B G R T K"]:
    """T queries of R heads over the S keys and values that these heads share; weight 0 where the mask is False."""
    merged = query.reshape(*query.shape[:-3], -1, query.shape[-1])  # [..., R, T, K] -> [..., R T, K]
    logits = jnp.einsum("...qk,...sk->...qs", merged, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*query.shape[:-1], -1)  # [..., R T, S] -> [..., R, T, S]
    weights = _masked_softmax(logits, mask[..., None, None, :, :], 1 / math.sqrt(query.shape[-1])).astype(value.dtype)
    weights = weights.reshape(*merged.shape[:-1], -1)
    out = jnp.einsum("...qs,...sk->...qk", weights, value, preferred_element_type=jnp.float32)
    return out.reshape(query.shape).astype(query.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _masked_softmax(logits: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """softmax(scale * logits) over the last axis where the mask is True, 0 elsewhere.

    The derivative is written out so that only the weights are kept for the backward pass.
    """
    return jax.nn.softmax(jnp.where(mask, scale * logits, MASKED), axis=-1)


@_masked_softmax.defjvp
def _masked_softmax_jvp(
    scale: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(*primals, scale)
    change = weights * (scale * tangents[0])
    return weights, change - weights * jnp.sum(change, axis=-1, keepdims=True)


def splash_attention(query: Queries, key: Keys, value: Keys, segment_ids: Segments, window: int | None) -> Queries:
    """The TPU kernel, interpreted (and slow) on other platforms; it reads key-value heads in place, without repeating
    them.

    It skips blocks of keys in the future or before the window, and masks segments within blocks.
    """
    # Imported here: on other platforms the start of a run does without the compiler of TPU kernels.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = query.shape[1:3]
    size = next(size for size in SPLASH_BLOCKS if length % size == 0)
    within = (length, length)
    mask = splash.CausalMask(within) if window is None else splash.LocalMask(within, (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            *(size, size, size),  # forward: queries, keys and values, keys and values of one product
            *(size, size, size),  # gradients of keys and values: the same
            *(size, size),  # gradients of queries: queries, keys and values
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


def cudnn_attention(query: Queries, key: Keys, value: Keys, segment_ids: Segments, window: int | None) -> Queries:
    """NVIDIA's kernel. Segments are passed as a mask for all heads: 2 bytes for each of a row's L x L pairs of tokens.

    The kernel's own packed layout would need no mask, but no public function of JAX passes it on. Neither does one skip
    the gradient of the mask, which the backward kernel writes and nobody reads.
    """
    position = jnp.arange(segment_ids.shape[1])
    mask = may_read(position, segment_ids, position, segment_ids, window)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")
