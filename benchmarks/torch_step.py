"""A float32 step on CPU is as fast as the same step in PyTorch, compiled.

    pip install torch transformers
    python benchmarks/torch_step.py --output FILE

The same model, parameters and batch in Hugging Face's LlamaForCausalLM, eager and through torch.compile: loss,
gradient, clipping, AdamW. Before anything is timed the losses of two successive steps must agree.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax
import measure
import numpy as np
import step

from slm_jax import mesh as mesh_lib
from slm_jax.models.model_config import ModelConfig, model_config
from slm_jax.train.optimizer import OptimizerConfig

LEARNING_RATE = 1e-4  # that of step.Trainer


def llama(model: ModelConfig, params: dict[str, Any], length: int) -> Any:
    """LlamaForCausalLM with our parameters: its matrices are [out, in], its rotary layout is ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=length,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    tensors = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    dim, layers = model.embed_dim, params["layers"]
    for i in range(model.num_layers):
        name = f"model.layers.{i}."
        tensors |= {name + "input_layernorm.weight": layers["attention_norm"]["scale"][i]}
        tensors |= {name + "post_attention_layernorm.weight": layers["mlp_norm"]["scale"][i]}
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            tensors[f"{name}self_attn.{theirs}.weight"] = layers["attention"][ours]["kernel"][i].reshape(dim, -1).T
        tensors[name + "self_attn.o_proj.weight"] = layers["attention"]["out"]["kernel"][i].reshape(-1, dim).T
        for part in ("gate", "up", "down"):
            tensors[f"{name}mlp.{part}_proj.weight"] = layers["mlp"][part]["kernel"][i].T
    result = LlamaForCausalLM(config)
    assert result.config.rope_parameters["rope_theta"] == model.rope_theta
    result.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()})
    return result


def torch_step(model: Any, tokens: np.ndarray, compiled: bool) -> Callable[[], float]:
    """A step to call, which returns its mean loss."""
    import torch

    settings = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    forward = torch.compile(model) if compiled else model

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return run


def compare(model: ModelConfig, rows: int, length: int, rounds: measure.Rounds) -> list[measure.Row]:
    """Rows of tokens per second: ours by remat, PyTorch eager and compiled, against PyTorch compiled."""
    import torch

    torch.set_num_threads(measure.cores())
    batch = step.random_batch(rows, length, model.vocab_size)
    trainer = step.Trainer(model, batch)
    params = jax.tree.map(np.asarray, mesh_lib.to_host(trainer.state.params))
    peers = {name: llama(model, params, length) for name in ("PyTorch eager", "PyTorch compiled")}
    steps = {name: torch_step(peer, batch.tokens, "compiled" in name) for name, peer in peers.items()}
    ours = {f"slm_jax, remat {remat}": trainer.step(None, remat=remat)[0] for remat in step.REMATS}
    for first in range(2):
        mean = float(ours["slm_jax, remat full"]()) / (rows * (length - 1))
        for name, run in steps.items():
            theirs = run()
            assert abs(theirs - mean) < 1e-3, f"step {first}: loss {mean} here, {theirs} in {name}"
    cases = [measure.Case(name, run, rows * length) for name, run in (steps | ours).items()]
    about = {"vocab_size": model.vocab_size, "batch": f"{rows} x {length}", "parameters": model.parameter_count()}
    about |= {"torch_threads": torch.get_num_threads()}
    return measure.compared(measure.interleaved(cases, rounds), "PyTorch compiled", "tokens/s", **about)


def main() -> None:
    parser = measure.parser(__doc__, repeats=5)
    arguments = parser.parse_args()
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        sys.exit(f"torch_step: skipped, {' and '.join(missing)} not installed: pip install torch transformers")
    measure.restarted_with(measure.KEEP_MEMORY)
    size, vocab_size, shape = "small", 32000, (4, 512)
    if arguments.quick:
        size, vocab_size, shape, arguments.repeats = "demo", 2048, (4, 128), 3
    load = measure.load_average()
    rounds = measure.Rounds(arguments.repeats, arguments.clock)
    rows = compare(model_config(size, vocab_size=vocab_size), *shape, rounds)
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()
