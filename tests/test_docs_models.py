"""Every command of docs/tutorials/models.md, in its order, with a small generated model and little text."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import toy
from test_models_llama2c import SHAPES, tokenizer_bin
from test_models_llama2c import write as write_llama2c
from tokenizer_families import save

from slm_jax.__main__ import STAGES
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.models.huggingface import tensors
from slm_jax.models.huggingface_config import write_config
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.tensor_files import write_tensors
from slm_jax.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorials" / "models.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]

# What makes a command of the page small, by its stage.
SMALL = {
    "prepare": toy.settings(prepare={"sequence_length": 64, "processes": 1}),
    "train": toy.settings(
        Phase={"steps": 2, "batch_size": 8},
        train={"gradient_accumulation_steps": 2},
        MixtureComponent={"epochs": 100.0},
    ),
    "generate": toy.settings(Sampling={"max_new_tokens": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a user would be: the project's recipes, the downloads, and text."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ROOT / "configs", folder / "configs")
    download = save("llama_2", folder / "downloads" / "tinyllama")
    model = ModelConfig(
        load_vocabulary(download).size + 12, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=48, max_length=64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = [(tensor.name, tensor.shape) for tensor in tensors(model)]
    arrays = (0.1 * rng.standard_normal(shape).astype(np.float32) for _, shape in shapes)
    write_tensors(download, shapes, "float32", 10**9, arrays)
    (download / "config.json").write_text(json.dumps(write_config(model, "float32")))
    stories = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    write_llama2c(folder / "downloads" / "stories.bin", stories, version=0, shared=True)
    tokenizer_bin(folder / "downloads" / "tokenizer.bin", as_characters=True)
    words = random.Random(0)
    (folder / "data").mkdir()
    for name in ("clean", "web", "held"):
        texts = [" ".join(words.choices(toy.WORDS, k=words.randint(5, 30))) for _ in range(60)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_runs(folder, shell):
    ours = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("slm-jax ")]
    assert [line for line in COMMANDS if not line.startswith(("slm-jax ", "hf download "))] == []
    assert {command[0] for command in ours} >= {"import", "prepare", "train", "score", "evaluate", "generate", "export"}
    for command in ours:
        stage, *_ = command
        if stage == "generate" and stage not in STAGES:
            continue
        code, output, errors = shell(*command, *SMALL.get(stage, ()), folder=folder)
        assert code == 0, f"{' '.join(command)}\n{output}\n{errors}"

    runs = folder / "runs" / "tinyllama"
    evaluated = [json.loads((runs / path).read_text())["results"]["held/loss"]
                 for path in ("base/evaluate/0.json", "selective/evaluate/2.json")]  # fmt: skip
    trained = [[row["held/loss"] for row in RunDirectory(runs / run).metrics() if "held/loss" in row]
               for run in ("reference", "causal", "selective")]  # fmt: skip
    assert {first for first, _ in trained} == {evaluated[0]} and trained[2][-1] == evaluated[1]
    assert all(last < evaluated[0] for _, last in trained)
    assert load_vocabulary(folder / "exports" / "tinyllama").content_hash == load_vocabulary(runs / "base").content_hash
    _transformers_loads_it(folder)


def _transformers_loads_it(folder: Path) -> None:
    """As the page says, and it computes what was trained."""
    transformers = pytest.importorskip("transformers")
    [block] = [block for language, block in BLOCKS if language == "python"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names: dict = {}
        exec(compile(block, "docs/tutorials/models.md", "exec"), names)
    assert isinstance(names["model"], transformers.LlamaForCausalLM)
    assert str(names["model"].dtype) == "torch.bfloat16"
    assert names["prompt"]["input_ids"][0, 0] == names["tokenizer"].bos_token_id


def test_every_recipe_of_the_page_is_in_it():
    recipes = sorted(path.name for path in (ROOT / "configs" / "runs" / "tinyllama").glob("*.gin"))
    assert recipes == sorted(set(re.findall(r"configs/runs/tinyllama/(\w+\.gin)", PAGE)))
