"""What a model is: one frozen dataclass, and a named size with changes."""

import dataclasses
from pathlib import Path
from typing import Any

import gin

from slm_jax.checkpoint import read_about
from slm_jax.errors import UserError


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary frequencies for rows longer than those of pre-training, as in Llama 3.1, whose values these are.

    Pairs that turn more than `high_freq_factor` times within `original_max_length` tokens stay as they are, those that
    turn less than `low_freq_factor` times become `factor` times slower, and between the two the frequency is mixed.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope_scaling: high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder with rotary embedding and grouped-query attention; the defaults make it a Llama.

    The fields say in what the families differ: Mistral has a sliding window, Qwen2 an attention_bias, Qwen3 a
    query_key_norm, GPT-NeoX (Pythia) its own norm, MLP, biases, rotary_share and a parallel_residual.
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
    norm: str = "rms"  # before each part and before the head; layer: with mean and bias
    norm_eps: float = 1e-5
    mlp: str = "swiglu"  # down(silu(gate(x)) * up(x)); gelu: down(gelu(up(x)))
    attention_bias: bool = False  # of the projections to query, key and value
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    parallel_residual: bool = False  # the MLP reads what attention reads, not what attention adds to
    query_key_norm: bool = False  # each head's query and key are normed before they turn
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_share: float = 1.0  # of a head's features, the first of them, turn with the position
    sliding_window: int | None = None  # a token reads the last so many tokens of its segment, itself among them
    tied_head: bool = False
    init_std: float = 0.02
    output_init_std: float | None = None  # of projections back into the stream; init_std / sqrt(2 num_layers) if None
    dropout: float = 0.0  # share set to 0, in training, of the embedding and of what each part adds to the stream
    # TPUs and recent GPUs round operands of float32 products too, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
    compute_dtype: str = "float32"  # or bfloat16; parameters and their moments are float32 always
    remat: str = "full"  # full: keep each layer's input; dots: keep the projections too; none: keep everything
    attention: str = "auto"  # xla: any platform; splash: TPU; cudnn: GPU; auto: what the platform has

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if not 0 < self.rotary_share <= 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise UserError(
                f"rotary_share {self.rotary_share} of head_dim {self.head_dim} is {self.rotary_dim} features: rotary "
                "embedding turns pairs, one or more of them"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout}: take a share from 0 to below 1")
        if self.norm not in ("rms", "layer"):
            raise UserError(f"norm {self.norm!r}: take 'rms' or 'layer'")
        if self.mlp not in ("swiglu", "gelu"):
            raise UserError(f"mlp {self.mlp!r}: take 'swiglu' or 'gelu'")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UserError(f"compute_dtype {self.compute_dtype!r}: take 'float32' or 'bfloat16'")
        if self.remat not in ("full", "dots", "none"):
            raise UserError(f"remat {self.remat!r}: take 'full', 'dots' or 'none'")
        if self.attention not in ("auto", "xla", "splash", "cudnn"):
            raise UserError(f"attention {self.attention!r}: take 'auto', 'xla', 'splash' or 'cudnn'")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window {self.sliding_window}: a token reads at least itself, take 1 or more")

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelConfig":
        """From what a run's files say; fields that came later have their defaults, with which nothing changed."""
        known = dict(fields)
        if known.get("rope_scaling"):
            known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
        return cls(**known)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head."""
        assert self.vocab_size is not None, "the vocabulary size is not known yet"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn with the position."""
        return int(self.head_dim * self.rotary_share)

    def parameter_count(self) -> int:
        """Parameters in all, embedding and head included (tested against those of the public models)."""
        dim, width = self.embed_dim, self.head_dim
        read, written = self.num_heads + 2 * self.num_kv_heads, self.num_heads  # heads: query, key, value; output
        attention = dim * width * (read + written)
        attention += (width * read if self.attention_bias else 0) + (dim if self.output_bias else 0)
        into_mlp = 2 if self.mlp == "swiglu" else 1
        mlp = dim * self.mlp_dim * (into_mlp + 1) + (self.mlp_dim * into_mlp + dim if self.mlp_bias else 0)
        per_feature = 2 if self.norm == "layer" else 1  # scale, and bias
        norms = 2 * per_feature * (dim + (width if self.query_key_norm else 0))
        embedding = self.padded_vocab_size * dim * (1 if self.tied_head else 2)
        return self.num_layers * (attention + mlp + norms) + per_feature * dim + embedding

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
    *("norm", "norm_eps", "mlp", "attention_bias", "output_bias", "mlp_bias", "parallel_residual", "query_key_norm"),
    *("rope_theta", "rope_scaling", "rotary_share", "sliding_window", "tied_head"),
)


def _llama(
    num_layers: int, embed_dim: int, mlp_dim: int, heads: tuple[int, int], vocab_size: int = 32000, **fields: Any
) -> ModelConfig:
    num_heads, num_kv_heads = heads
    return ModelConfig(
        vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=mlp_dim,
        **fields,
    )


def _llama3(num_layers: int, embed_dim: int, mlp_dim: int, heads: tuple[int, int], **fields: Any) -> ModelConfig:
    fields |= {"vocab_size": 128256, "max_length": 8192, "rope_theta": 500000.0}
    return _llama(num_layers, embed_dim, mlp_dim, heads, **fields)


def _gpt_neox(num_layers: int, embed_dim: int, num_heads: int, vocab_size: int = 50304) -> ModelConfig:
    """The vocabulary counts what pads it: there it takes probability, as where these models were trained. Parameters
    start as there too (arXiv 2403.08763)."""
    return ModelConfig(
        vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=4 * embed_dim,
        norm="layer",
        mlp="gelu",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        parallel_residual=True,
        rotary_share=0.25,
        init_std=(2 / (5 * embed_dim)) ** 0.5,
        output_init_std=2 / (num_layers * embed_dim**0.5),
    )


# The demo sizes use heads of 64: on CPU, attention with 32 costs three times as much.
SIZES: dict[str, ModelConfig] = {
    "demo": ModelConfig(),  # 1.2M parameters at a vocabulary of 2048
    "small": ModelConfig(num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=2, mlp_dim=1408),
    # Public models: layers, width, MLP, heads and key-value heads.
    "tinyllama_1_1b": _llama(22, 2048, 5632, (32, 4)),
    "llama2_7b": _llama(32, 4096, 11008, (32, 32), max_length=4096),
    "mistral_7b": _llama(32, 4096, 14336, (32, 8), max_length=32768, sliding_window=4096),
    "llama3_8b": _llama3(32, 4096, 14336, (32, 8)),
    # MeCo (arXiv 2501.01956), with the vocabulary of Llama 3; all matrices start with the same deviation.
    "meco_600m": _llama3(24, 1024, 4096, (16, 16), output_init_std=0.02),
    "meco_1_6b": _llama3(24, 2048, 5504, (16, 8), output_init_std=0.02),
    "meco_3b": _llama3(28, 3072, 8192, (24, 8), output_init_std=0.02),
    "meco_8b": _llama3(32, 4096, 14336, (32, 8), output_init_std=0.02),
    # Pythia (arXiv 2304.01373): layers, width, heads.
    "pythia_70m": _gpt_neox(6, 512, 8),
    "pythia_160m": _gpt_neox(12, 768, 12),
    "pythia_410m": _gpt_neox(24, 1024, 16),
    "pythia_1b": _gpt_neox(16, 2048, 8),
    "pythia_1_4b": _gpt_neox(24, 2048, 16),
    "pythia_2_8b": _gpt_neox(32, 2560, 32),
    "pythia_6_9b": _gpt_neox(32, 4096, 32, vocab_size=50432),
    "pythia_12b": _gpt_neox(36, 5120, 40, vocab_size=50688),
    # Continual pre-training (arXiv 2403.08763).
    "continual_405m": _gpt_neox(24, 1024, 16),
    "continual_10b": _gpt_neox(36, 4608, 36, vocab_size=50688),
}


# pyright takes gin's decorator for one without arguments.
@gin.configurable("model", allowlist=["size", *(f.name for f in dataclasses.fields(ModelConfig))])  # pyright: ignore[reportCallIssue]
def model_config(size: str = "demo", **changes: Any) -> ModelConfig:
    """A named size, or that of a model directory, with single fields changed: `model.size = 'tinyllama_1_1b'` or
    `model.size = 'runs/tinyllama'`, `model.num_layers = 2`."""
    if size in SIZES:
        return dataclasses.replace(SIZES[size], **changes)
    if not (Path(size) / "checkpoints").is_dir():
        raise UserError(f"model size {size!r} is unknown: known are {', '.join(SIZES)}, and model directories")
    return dataclasses.replace(ModelConfig.from_json(read_about(size)["model"]), **changes)
