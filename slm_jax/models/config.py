"""What a model is: one frozen dataclass, and the named sizes."""

import dataclasses
from typing import Any

import gin

from slm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm before each part, rotary embedding, grouped-query attention, SwiGLU.

    `vocab_size` None means that of the corpus. `max_length` is the longest row the model may see.
    """

    vocab_size: int | None = None
    vocab_multiple: int = 1  # embedding and head are padded to a multiple; what pads them takes no probability
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 256
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None  # a token reads the last so many tokens of its segment, itself among them
    tied_head: bool = False
    init_std: float = 0.02
    compute_dtype: str = "float32"  # or bfloat16; parameters and their moments are float32 always
    remat: str = "full"  # full: keep each layer's input; dots: keep the matrix products too; none: keep everything
    attention: str = "auto"  # xla: any platform; splash: TPU; cudnn: GPU; auto: what the platform has

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute_dtype {self.compute_dtype!r}: take 'float32' or 'bfloat16'")
        if self.remat not in ("full", "dots", "none"):
            raise UserError(f"remat {self.remat!r}: take 'full', 'dots' or 'none'")
        if self.attention not in ("auto", "xla", "splash", "cudnn"):
            raise UserError(f"attention {self.attention!r}: take 'auto', 'xla', 'splash' or 'cudnn'")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window {self.sliding_window}: a token reads at least itself, take 1 or more")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head."""
        assert self.vocab_size is not None, "the vocabulary size is not known yet"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def parameter_count(self) -> int:
        """Parameters in all, embedding and head included (PAPERS §5 lists those of the public models)."""
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.embed_dim * self.mlp_dim
        layer = attention + mlp + 2 * self.embed_dim
        embedding = self.padded_vocab_size * self.embed_dim * (1 if self.tied_head else 2)
        return self.num_layers * layer + self.embed_dim + embedding

    def flops_per_token(self, length: int) -> float:
        """Floating point operations of one training step per token: forward and backward, recomputation not counted.

        6 for each parameter of a matrix (the embedding is a look-up) and the attention scores of the keys that a token
        reads: half of the row on average, fewer with a window.
        """
        matrices = self.parameter_count() - (0 if self.tied_head else self.padded_vocab_size * self.embed_dim)
        window = min(self.sliding_window or length, length)
        keys = window - window**2 / (2 * length)  # the first tokens of a row find fewer before them
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * keys  # products: scores, and what is read
        return 6.0 * (matrices + attention)


# What decides a function's shapes and values; the rest of ModelConfig may change between starts and runs.
FUNCTION_FIELDS = (
    *("vocab_size", "vocab_multiple", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("rope_theta", "norm_eps", "sliding_window", "tied_head"),
)

# The demo sizes use heads of 64: on CPU, attention with 32 costs three times as much.
SIZES: dict[str, ModelConfig] = {
    "demo": ModelConfig(),  # 1.2M parameters at a vocabulary of 2048
    "small": ModelConfig(num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=2, mlp_dim=1408),
    "tinyllama_1_1b": ModelConfig(
        vocab_size=32000, num_layers=22, embed_dim=2048, num_heads=32, num_kv_heads=4, mlp_dim=5632
    ),
    "llama2_7b": ModelConfig(
        vocab_size=32000,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
        max_length=4096,
    ),
    "meco_1_6b": ModelConfig(
        vocab_size=128256,
        num_layers=24,
        embed_dim=2048,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=5504,
        max_length=8192,
        rope_theta=500000.0,
    ),
}


# pyright takes gin's decorator for one without arguments.
@gin.configurable("model", allowlist=["size", *(f.name for f in dataclasses.fields(ModelConfig))])  # pyright: ignore[reportCallIssue]
def model_config(size: str = "demo", **changes: Any) -> ModelConfig:
    """A named size, with single fields changed: `model.size = 'tinyllama_1_1b'`, `model.num_layers = 2`."""
    if size not in SIZES:
        raise UserError(f"model size {size!r} is unknown: known are {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[size], **changes)
