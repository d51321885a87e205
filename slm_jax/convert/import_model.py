"""Stage `import`: a model from elsewhere -> a model directory."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.checkpoint import save_params
from slm_jax.configurable import Count, OneOf, configurable
from slm_jax.data.sentencepiece_vocabulary import read_tokenizer_bin
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import Vocabulary
from slm_jax.errors import UserError
from slm_jax.files import read_json, to_json, write_json
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models.llama2c import Llama2cFile
from slm_jax.models.model_config import FUNCTION_FIELDS, ModelConfig
from slm_jax.models.tensor_files import check_file
from slm_jax.models.weights import HuggingFaceWeights, Weights, load_params

PICKLE_STARTS = (b"PK", b"\x80")  # torch's zip of pickles, and a pickle


@configurable("import")
def import_model(
    source: str,
    target: str,
    vocabulary: str | None = None,
    compute_dtype: Annotated[str, OneOf(("float32", "bfloat16"))] | None = None,
    vocab_multiple: Count = 1,
    mesh: MeshConfig | None = None,
) -> None:
    """Imports a model as a model directory that can be scored with, trained from, evaluated and used to generate.

    If interrupted, it leaves no checkpoint, and the same command starts again.

    Args:
      source: a Hugging Face model directory (config.json, *.safetensors, tokenizer files) of the families Llama 2 and
        3, Mistral, Qwen2 and 2.5, Qwen3, GPT-NeoX; or a .bin file of llama2.c.
      target: model directory to write.
      vocabulary: tokenizer.json, tokenizer.model, tokenizer.bin (of llama2.c), or a directory with one; by default the
        source's.
      compute_dtype: float32 or bfloat16, in which the model computes from then on; None is bfloat16 for 16-bit
        weights, else float32. Weights are kept as they are.
      vocab_multiple: pad embedding and head to a multiple of this, so that a mesh can shard them.
      mesh: how devices hold the parameters.
    """
    devices = mesh_lib.make_mesh(mesh)
    source, where = os.path.expanduser(source), Path(target)
    if Path(source).resolve() == where.resolve():
        raise UserError("import-onto-source", f"import.target {target} is the source itself: choose another directory")
    weights = _open(Path(source))
    model = dataclasses.replace(weights.config, vocab_multiple=vocab_multiple)
    if compute_dtype is not None:
        model = dataclasses.replace(model, compute_dtype=compute_dtype)
    words = _vocabulary(vocabulary or source, source, model)
    config_lib.print_unused()
    record = _record(source, weights, words, model)
    with contextlib.ExitStack() as stack:
        busy = f"another process is importing into {target}: wait for it, or choose another import.target"
        stack.enter_context(processes.lock(where / "lock", busy))
        if processes.on_first(lambda: _is_done(where, record)):
            print(f"import: {target} is there already, made of the same files")
            return
        processes.on_first(lambda: _begin(where, record, words))

        # What will be imported, in words.
        embedded = f" of {model.vocab_size:,} that are embedded" if model.vocab_size != words.size else ""
        stored = sorted({str(weights.dtype("embed/embedding")), str(weights.dtype("final_norm/scale"))})
        print(
            f"import: {model.parameter_count():,} parameters of {source} in {' and '.join(stored)}, computing in "
            f"{model.compute_dtype} -> {target}\n"
            f"  vocabulary: {words.kind} of {words.size:,} ids{embedded}; BOS {words.bos_id}, EOS {words.eos_id}, "
            f"padding {words.pad_id}\n  rows of up to {model.max_length:,} tokens",
            flush=True,
        )

        with progress(sum(file.stat().st_size for file in weights.files()), 0, "import", "B") as bar:
            bar.unit_scale = True
            params = load_params(weights, model, devices, bar.update)
            bar.total = bar.n
        save_params(
            where, 0, params, to_json({"model": model, "vocabulary_hash": words.content_hash, "run": where.name})
        )
    print(f"import: done, {target}")


def _open(source: Path) -> Weights:
    if source.is_dir():
        return HuggingFaceWeights(source)
    check_file(source)
    with source.open("rb") as file:
        start = file.read(2)
    try:
        return Llama2cFile(source)
    except UserError as error:
        if not start.startswith(PICKLE_STARTS):  # which the header of a llama2.c file may start with, too
            raise
        raise UserError(
            "weights-pickled",
            f"{source} is pickled, and reading a pickle can run any code: give the directory of its safetensors, or, "
            "if you trust it, save the model as safetensors with transformers (save_pretrained)",
        ) from error


def _vocabulary(path: str, source: str, model: ModelConfig) -> Vocabulary:
    if path == source and Path(source).is_file():
        raise UserError(
            "import-no-vocabulary",
            f"{source} has no vocabulary in it: name its tokenizer.bin or tokenizer.model, --vocabulary=PATH",
        )
    try:
        found = read_tokenizer_bin(Path(path).expanduser()) if path.endswith(".bin") else load_vocabulary(path)
    except UserError as error:
        raise UserError(error.code, f"{error} (--vocabulary=PATH)") from error
    assert model.vocab_size is not None
    if found.size > model.vocab_size:
        raise UserError(
            "vocabulary-too-large",
            f"vocabulary {path} has {found.size} ids, the model of {source} embeds {model.vocab_size}: name the one it "
            "was trained with, --vocabulary=PATH",
        )
    return found


def _record(source: str, weights: Weights, words: Vocabulary, model: ModelConfig) -> dict[str, Any]:
    """run.json of the model directory, with the keys of a train run: what the model was made from. It holds names of
    files and no paths: model directories are passed on."""

    def files() -> list[dict[str, Any]]:
        found = []
        for path in weights.files():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found.append({"name": path.name, "bytes": path.stat().st_size, "sha256": content})
        return found

    identity = {
        "model": {name: getattr(model, name) for name in FUNCTION_FIELDS},
        "init_from": f"import of {Path(source).name}",
        "vocabulary_hash": words.content_hash,
        "corpora": {},
        "references": {},
    }
    imported = {
        "source": Path(source).name,
        "files": processes.on_first(files),
        "vocabulary": {"ids": words.size, "embedded": model.vocab_size, "padded": model.padded_vocab_size},
    }
    return to_json({"identity": identity, "imported": imported, "settings": {"model": model}, "starts": []})


def _is_done(target: Path, record: dict[str, Any]) -> bool:
    """Whether the target holds this very import.

    Raises:
      UserError: it holds another model.
    """
    if not any(step.name.isdecimal() for step in (target / "checkpoints").glob("*")):
        return False

    def compared(record: dict[str, Any]) -> list[Any]:
        imported = record.get("imported") or {}
        identity = (record.get("identity") or {}) | {"init_from": None}  # the same model may have moved
        return [identity, record.get("settings"), imported.get("files"), imported.get("vocabulary")]

    path = target / "run.json"
    if not path.exists() or compared(read_json(path)) != compared(record):
        raise UserError(
            "import-target-exists", f"{target} holds another model already: choose another import.target, or delete it"
        )
    return True


def _begin(target: Path, record: dict[str, Any], words: Vocabulary) -> None:
    """Writes everything but the checkpoint."""
    shutil.rmtree(target / "vocabulary", ignore_errors=True)  # a killed import may have left another
    words.save(target / "vocabulary")
    start = {name: value for name, value in config_lib.environment().items() if name != "command"}
    write_json(target / "run.json", record | {"starts": [start]})
