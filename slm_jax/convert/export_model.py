"""Stage `export`: a model directory -> a model directory of Hugging Face."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.configurable import Natural, OneOf, Positive, configurable
from slm_jax.data.huggingface_vocabulary import TOKENIZER_FILE
from slm_jax.data.sentencepiece_vocabulary import MODEL_FILE
from slm_jax.data.tokenizer_files import tokenizer_files
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.files import write_json
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models.huggingface import Tensor, tensors, to_theirs
from slm_jax.models.huggingface_config import write_config
from slm_jax.models.tensor_files import DTYPES, NAMES, write_tensors
from slm_jax.models.trained_model import TrainedModel, load_model, run_vocabulary

LOCK = "lock"


@configurable("export")
def export_model(
    source: str,
    target: str,
    step: Natural | None = None,
    dtype: Annotated[str, OneOf(NAMES)] = "float32",
    file_gigabytes: Positive = 5.0,
    mesh: MeshConfig | None = None,
) -> None:
    """Exports a model as a directory that transformers loads: config.json, safetensors, tokenizer files.

    `AutoModelForCausalLM.from_pretrained(target)` computes the same logits. The directory appears when it is complete.

    Args:
      source: model directory: a train run, an average or an import.
      target: directory to write.
      step: checkpoint; None takes the last.
      dtype: float32 (lossless), bfloat16 or float16, of the weights.
      file_gigabytes: maximum size of a weights file.
      mesh: how devices hold the parameters.
    """
    where = Path(target)
    if processes.on_first(where.exists):
        raise UserError("export-target-exists", f"{target} exists: choose another export.target, or delete it")

    # ---- What is exported
    devices = mesh_lib.make_mesh(mesh)
    config_lib.print_unused()
    model = load_model(source, devices, step)
    words = run_vocabulary(source, model.vocabulary_hash)
    settings = write_config(model.config, dtype)
    print(f"export: step {model.step} of {source} as {settings['model_type']} in {dtype} -> {target}", flush=True)

    # ---- Into a folder of another name, which gets its own when it is complete
    partial = where.with_name(where.name + ".partial")
    with contextlib.ExitStack() as stack:
        busy = f"another process is exporting to {target}: wait for it, or choose another export.target"
        stack.enter_context(processes.lock(partial / LOCK, busy))
        processes.on_first(lambda: _clear(partial))
        try:
            # All processes gather each tensor, the first writes it.
            wanted = tensors(model.config)
            arrays = _arrays(model, wanted, DTYPES[NAMES[dtype]])
            if processes.first():
                shapes = [(tensor.name, tensor.shape) for tensor in wanted]
                write_tensors(partial, shapes, dtype, int(file_gigabytes * 1e9), arrays)
            else:
                for _ in arrays:
                    pass
            processes.on_first(lambda: _finish(partial, where, settings, words))
        except Exception:
            if processes.first():
                shutil.rmtree(partial)
            raise
    print(f"export: done, {target}")


def _clear(partial: Path) -> None:
    """Removes what a killed export left."""
    for path in partial.iterdir():
        if path.name != LOCK:
            path.unlink()


def _arrays(model: TrainedModel, wanted: list[Tensor], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of Hugging Face's files, gathered one at a time."""
    leaves = {mesh_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    of_layer = jax.jit(lambda leaf, layer: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False))
    with progress(len(wanted), 0, "export", "tensor") as bar:
        for tensor in wanted:
            held = [leaves[path] if tensor.layer is None else of_layer(leaves[path], tensor.layer)
                    for path in tensor.paths]  # fmt: skip
            whole = to_theirs(mesh_lib.to_host(held), tensor)
            with np.errstate(over="ignore"):
                cast = whole.astype(dtype)
            if not np.isfinite(cast).all():
                finite = np.isfinite(whole).all()
                remedy = "take export.dtype = 'bfloat16' or 'float32'" if finite else "export an earlier checkpoint"
                what = f"values beyond {dtype}" if finite else "values that are NaN or infinite"
                raise UserError("weights-not-finite", f"{tensor.name} has {what}: {remedy}")
            yield cast
            bar.update()


def _finish(partial: Path, target: Path, settings: dict[str, Any], words: Vocabulary) -> None:
    """Writes the small files, and gives the directory its name."""
    files = tokenizer_files(words)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    if TOKENIZER_FILE not in files:
        print(f"export: without {TOKENIZER_FILE}, which cannot express this vocabulary; {MODEL_FILE} holds it")
    ids = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    if words.pad_id not in (words.bos_id, words.eos_id, words.unk_id):
        ids["pad_token_id"] = words.pad_id  # torch trains no row of the embedding that is named as padding
    write_json(partial / "config.json", settings | ids)
    write_json(partial / "generation_config.json", ids)
    (partial / LOCK).unlink()
    os.rename(partial, target)
