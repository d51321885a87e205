"""Greedy generation on CPU is as fast as in PyTorch.

    pip install torch transformers
    python benchmarks/generation.py --output FILE

The same model and prompts in Hugging Face's LlamaForCausalLM, whose `generate` keeps keys and values too: one prompt,
and eight. Before anything is timed the tokens must agree. Our prompts and tokens go through all that a user's do.
"""

import importlib.util
import sys
from collections.abc import Iterable
from typing import SupportsIndex

import jax
import measure
import numpy as np
import torch_step

from slm_jax import mesh as mesh_lib
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.models import forward
from slm_jax.models.model_config import ModelConfig, model_config


class Endless(ByteVocabulary):
    """As many ids as Llama's, none of which ends a row, so that all become equally long; nobody reads them."""

    size = 32000
    eos_id = -1

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return ""


def compare(model: ModelConfig, length: int, new: int, rounds: measure.Rounds) -> list[measure.Row]:
    """Rows of new tokens per second, of one prompt and of eight."""
    import torch

    torch.set_num_threads(measure.cores())
    params = jax.jit(lambda: forward.init_params(model, jax.random.key(0)))()
    generator = Generator(params, model, Endless(), mesh_lib.make_mesh(devices=jax.devices()[:1]))
    peer = torch_step.llama(model, jax.tree.map(np.asarray, params), length + new)
    rows = []
    for count in (1, 8):
        prompts = np.random.default_rng(0).integers(3, Endless.size, (count, length))
        sampling = Sampling(max_new_tokens=new)

        def ours(prompts: np.ndarray = prompts, sampling: Sampling = sampling) -> list[list[int]]:
            return [made.tokens for made in generator.continue_ids(prompts.tolist(), sampling)]

        def theirs(prompts: np.ndarray = prompts) -> list[list[int]]:
            ids = torch.from_numpy(prompts)
            options = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "eos_token_id": None}
            made = peer.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            return made[:, length:].tolist()

        same = np.mean(np.array(ours()) == np.array(theirs()))
        assert same > 0.9, f"{same:.0%} of the tokens agree"  # two logits may tie
        cases = [measure.Case("PyTorch", theirs, count * new), measure.Case("slm_jax", ours, count * new)]
        about = {"prompts": count, "prompt_tokens": length, "new_tokens": new, "parameters": model.parameter_count()}
        rows += measure.compared(measure.interleaved(cases, rounds), "PyTorch", "tokens/s", **about)
    return rows


def main() -> None:
    parser = measure.parser(__doc__, repeats=5)
    arguments = parser.parse_args()
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        sys.exit(f"generation: skipped, {' and '.join(missing)} not installed: pip install torch transformers")
    measure.restarted_with(measure.KEEP_MEMORY)
    size, length, new = "small", 100, 64
    if arguments.quick:
        size, length, new, arguments.repeats = "demo", 20, 16, 3
    load = measure.load_average()
    model = model_config(size, vocab_size=Endless.size)
    rows = compare(model, length, new, measure.Rounds(arguments.repeats, arguments.clock))
    measure.report(rows, arguments.output, load, arguments.clock)


if __name__ == "__main__":
    main()
