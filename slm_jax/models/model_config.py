"""The architecture of a model: one frozen dataclass, and named sizes."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from slm_jax.checkpoint import read_about
from slm_jax.configurable import (
    AtLeast,
    Below,
    Count,
    NotNegative,
    OneOf,
    Positive,
    PositiveShare,
    checked,
    configurable,
)
from slm_jax.errors import UserError


@configurable
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotary frequencies for rows longer than those of pre-training; the defaults are Llama 3.1's.

    Pairs of features whose rotation lies between the two thresholds get an interpolated frequency.

    Attributes:
      factor: how many times slower the slow pairs rotate.
      low_freq_factor: pairs that turn fewer times than this within `original_max_length` tokens are slowed by
        `factor`.
      high_freq_factor: pairs that turn more times than this within `original_max_length` tokens stay as they are.
      original_max_length: row length of pre-training.
    """

    factor: Positive = 8.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_length: Count = 8192

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                "setting-out-of-range",
                f"RopeScaling.high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}",
            )


@checked("model")
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder with rotary embedding and grouped-query attention; the defaults make it a Llama.

    Families differ in their fields: Mistral has a `sliding_window`, Qwen2 an `attention_bias`, Qwen3 a
    `query_key_norm`, GPT-NeoX (Pythia) its own `norm`, `mlp`, biases, `rotary_share` and a `parallel_residual`.

    Attributes:
      vocab_size: number of token ids; None takes the corpus' vocabulary.
      vocab_multiple: pad embedding and head to a multiple of this; padding ids get no probability.
      num_layers: number of blocks.
      embed_dim: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key and value heads; `num_heads` is a multiple of it.
      head_dim: width of a head; even, since rotary embedding turns pairs.
      mlp_dim: hidden width of the MLP.
      max_length: the longest row the model may read.
      norm: `rms`, or `layer` with mean and bias; before attention, before the MLP and before the head.
      norm_eps: added to the variance.
      mlp: `swiglu`, down(silu(gate(x)) * up(x)); or `gelu`, down(gelu(up(x))).
      attention_bias: add biases to the query, key and value projections.
      output_bias: add a bias to attention's output projection.
      mlp_bias: add biases to the MLP's projections.
      parallel_residual: the MLP reads what attention reads, not the sum after attention.
      query_key_norm: normalize each head's query and key before the rotation.
      rope_theta: base of the rotary frequencies.
      rope_scaling: slower rotary frequencies for long rows; None keeps them.
      rotary_share: fraction of a head's features, the first ones, that rotate with the position.
      sliding_window: each token attends to this many tokens of its segment, itself included; None attends to all.
      tied_head: the head is the transposed embedding.
      init_std: standard deviation of the initial weights.
      output_init_std: standard deviation for projections back into the residual stream; None is init_std / sqrt(2
        num_layers).
      dropout: in training, the fraction set to 0 of the embedding and of what each part adds to the residual stream.
      compute_dtype: `float32` or `bfloat16` for computation; parameters and moments are always float32. TPUs and
        recent GPUs round the operands of float32 products unless JAX_DEFAULT_MATMUL_PRECISION=highest is set.
      remat: what the backward pass keeps: `full` keeps each layer's input, `dots` the projections too, `none`
        everything.
      attention: `xla` (any platform), `splash` (TPU), `cudnn` (GPU), or `auto`, which picks by platform.
    """

    vocab_size: Count | None = None
    vocab_multiple: Count = 1
    num_layers: Count = 4
    embed_dim: Count = 128
    num_heads: Count = 2
    num_kv_heads: Count = 2
    head_dim: Count = 64
    mlp_dim: Count = 256
    max_length: Count = 2048
    norm: Annotated[str, OneOf(("rms", "layer"))] = "rms"
    norm_eps: Positive = 1e-5
    mlp: Annotated[str, OneOf(("swiglu", "gelu"))] = "swiglu"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    parallel_residual: bool = False
    query_key_norm: bool = False
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_share: PositiveShare = 1.0
    sliding_window: Count | None = None
    tied_head: bool = False
    init_std: NotNegative = 0.02
    output_init_std: NotNegative | None = None
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0
    compute_dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    remat: Annotated[str, OneOf(("full", "dots", "none"))] = "full"
    attention: Annotated[str, OneOf(("auto", "xla", "splash", "cudnn"))] = "auto"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                "model-shape",
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}",
            )
        if self.head_dim % 2 or self.rotary_dim % 2 or not self.rotary_dim:
            raise UserError(
                "model-shape",
                f"model.rotary_share {self.rotary_share} of model.head_dim {self.head_dim} is {self.rotary_dim} "
                "features: rotary embedding turns pairs of them, one or more; and head_dim is even",
            )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelConfig":
        """From a run's files. Fields that are missing in files of earlier versions take their defaults."""
        known = dict(fields)
        if known.get("rope_scaling"):
            known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
        return cls(**known)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head."""
        assert self.vocab_size is not None, "vocab_size is not known yet"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn with the position."""
        return int(self.head_dim * self.rotary_share)

    def parameter_count(self) -> int:
        """Number of parameters, including embedding and head."""
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
        """Floating point operations per token of a training step, forward and backward, without recomputation.

        6 for each parameter of a matrix (the embedding is a lookup), plus attention over the keys that a token reads:
        half of the row on average, fewer with a window.
        """
        matrices = self.parameter_count() - (0 if self.tied_head else self.padded_vocab_size * self.embed_dim)
        window = min(self.sliding_window or length, length)
        keys = window - window**2 / (2 * length)  # the first tokens of a row have fewer before them
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * keys  # query x key, and weights x value
        return 6.0 * (matrices + attention)


# The fields that decide the shapes of parameters and the function; the others may change between starts of a run.
FUNCTION_FIELDS = (
    *("vocab_size", "vocab_multiple", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("norm", "norm_eps", "mlp", "attention_bias", "output_bias", "mlp_bias", "parallel_residual", "query_key_norm"),
    *("rope_theta", "rope_scaling", "rotary_share", "sliding_window", "tied_head"),
)


def decoder(
    num_layers: int, embed_dim: int, mlp_dim: int, heads: tuple[int, int], vocab_size: int = 32000, **fields: Any
) -> ModelConfig:
    """A model of these layers, width, hidden width of the MLP, and query and key-value heads; a Llama by default."""
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
    return decoder(num_layers, embed_dim, mlp_dim, heads, **fields)


def _gpt_neox(num_layers: int, embed_dim: int, num_heads: int, vocab_size: int = 50304) -> ModelConfig:
    """Initialized as in arXiv 2403.08763. The vocabulary size includes the padding of the public models, which gets
    probability as it did in their training."""
    return decoder(
        num_layers,
        embed_dim,
        4 * embed_dim,
        (num_heads, num_heads),
        vocab_size,
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
    "tinyllama_1_1b": decoder(22, 2048, 5632, (32, 4)),
    "llama2_7b": decoder(32, 4096, 11008, (32, 32), max_length=4096),
    "mistral_7b": decoder(32, 4096, 14336, (32, 8), max_length=32768, sliding_window=4096),
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


@configurable("model", allowlist=["size", *(f.name for f in dataclasses.fields(ModelConfig))])
def model_config(size: str = "demo", **changes: Any) -> ModelConfig:
    """A named size, or the architecture of a model directory, with single fields changed.

    For example `model.size = 'tinyllama_1_1b'` or `model.size = 'runs/tinyllama'`, with `model.num_layers = 2`.

    Args:
      size: a key of `SIZES`, or a model directory.
      **changes: fields of `ModelConfig`.

    Raises:
      UserError: `size` is neither.
    """
    if size in SIZES:
        return dataclasses.replace(SIZES[size], **changes)
    if not (Path(size) / "checkpoints").is_dir():
        raise UserError(
            "model-size-unknown", f"model.size {size!r}: take {', '.join(SIZES)}, or the path of a model directory"
        )
    return dataclasses.replace(ModelConfig.from_json(read_about(size)["model"]), **changes)


def sizes_text() -> str:
    """The text of `slm-jax help sizes`: a line for each named size."""
    header = ("model.size", "parameters", "layers", "width", "heads", "kv heads", "vocabulary", "longest row")
    rows: list[tuple[str, ...]] = [header]
    for name, config in SIZES.items():
        whole = dataclasses.replace(config, vocab_size=config.vocab_size or 2048)
        fields = (config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads)
        vocabulary = config.vocab_size or "the corpus'"
        rows.append(
            (name, f"{whole.parameter_count() / 1e6:,.1f}M", *map(str, (*fields, vocabulary, config.max_length)))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "Parameters of sizes that take the corpus' vocabulary are those at 2048 ids."
    return "\n".join([*lines, "", note])
