"""How far the filtered gradient is from the exact one: cosine and norm, at a run's checkpoint, on its kind of rows.

    python benchmarks/filtered_gradient.py --run runs/math_web/selective --corpus runs/math_web/crawl --output FILE

Both are gradients of the loss of the same selected tokens. Prints one line per ratio and writes
`{"ratio", "cosine", "norm_ratio", "by_parameter"}`; --fresh takes random parameters of the run's shape instead.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.data.batches import read_batch
from slm_jax.data.corpus import Corpus
from slm_jax.mesh import make_mesh, path_name
from slm_jax.models import forward
from slm_jax.models.trained_model import load_model
from slm_jax.score.selection import Selection, filtered_capacity
from slm_jax.train.step import micro_batch_gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--reference", default="reference", help="score column of the corpus")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.7])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    model = load_model(arguments.run, make_mesh(devices=jax.devices()[:1]))
    params = forward.init_params(model.config, jax.random.key(0)) if arguments.fresh else model.params
    corpus = Corpus.open(arguments.corpus)
    rows = np.random.default_rng(0).choice(corpus.num_rows, arguments.rows, replace=False)
    results = []
    for ratio in arguments.ratios:
        selection = Selection(ratio=ratio, reference=arguments.reference, gradient="filtered")
        batch = read_batch([corpus], np.zeros(len(rows), np.int64), rows, selection.columns())
        results.append({"ratio": ratio} | compare(params, model.config, selection, jax.tree.map(jnp.asarray, batch)))
        print("ratio {ratio}: cosine {cosine:.4f}, norm {norm_ratio:.4f} of the exact gradient's".format(**results[-1]))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


def compare(params, model, selection, batch) -> dict:
    """Cosine of the two gradients, over all parameters and of each, and the ratio of their norms."""
    capacity, key = filtered_capacity(selection, batch.tokens.shape), jax.random.key(0)
    exact, filtered = (
        jax.jit(lambda p, s=s: micro_batch_gradient(p, model, s, capacity, batch, None, key)[0])(params)
        for s in (dataclasses.replace(selection, gradient="exact"), selection)
    )
    products = jax.tree.map(lambda a, b: np.array([jnp.vdot(a, b), jnp.vdot(a, a), jnp.vdot(b, b)]), filtered, exact)
    each = {path_name(path): found for path, found in jax.tree_util.tree_leaves_with_path(products)}
    dot, own, true = sum(each.values())
    return {
        "cosine": float(dot / np.sqrt(own * true)),
        "norm_ratio": float(np.sqrt(own / true)),
        "by_parameter": {name: float(d / np.sqrt(o * t)) for name, (d, o, t) in each.items()},
    }


if __name__ == "__main__":
    main()
