"""Stages import and export: what goes in comes out to the bit, and what cannot be taken is named."""

import dataclasses
import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import toy
from test_processes import finish, start
from tokenizer_families import save

from slm_jax import mesh as mesh_lib
from slm_jax.convert import export_model as export_model_module
from slm_jax.convert.export_model import export_model
from slm_jax.convert.import_model import import_model
from slm_jax.data.vocabularies import load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.mesh import MeshConfig
from slm_jax.models import weights
from slm_jax.models.forward import param_shapes
from slm_jax.models.model_config import SIZES, ModelConfig, model_config
from slm_jax.models.tensor_files import INDEX, SINGLE, open_tensors, read_tensor, write_tensors
from slm_jax.models.trained_model import TrainedModel, load_model, run_vocabulary

AXES = MeshConfig(data=2, fsdp=2, model=2)


@pytest.fixture(scope="module")
def exported(reference, tmp_path_factory) -> Path:
    """The directory of Hugging Face of the toy run's last checkpoint."""
    target = tmp_path_factory.mktemp("exported") / "model"
    with toy.one_device():
        export_model(str(reference), str(target))
    return target


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def load(run: Path) -> TrainedModel:
    with toy.one_device():
        return load_model(str(run), mesh_lib.make_mesh())


def same(one: TrainedModel, other: TrainedModel) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def refused(code: str, source: Path, **settings) -> str:
    """Why an import is refused; nothing is left of it that could be taken for a model."""
    target = source.parent / "target"
    line = toy.refused(code, import_model, str(source), str(target), **settings)
    assert not (target / "checkpoints").exists()
    return line


def rewrite(directory: Path, change) -> None:
    """Writes the weights again after `change` of the dict of arrays."""
    arrays = {name: read_tensor(entry) for name, entry in open_tensors(directory).items()}
    change(arrays)
    shapes = [(name, array.shape) for name, array in arrays.items()]
    write_tensors(directory, shapes, "float32", 10**9, list(arrays.values()))


def reconfigure(directory: Path, **settings) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_trained_model_comes_back_to_the_bit_on_any_mesh(reference, exported, tmp_path):
    with toy.one_device():
        export_model(str(reference), str(tmp_path / "small"), file_gigabytes=2e-5)
    files = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert json.loads((tmp_path / "small" / INDEX).read_text())["weight_map"].keys() == open_tensors(exported).keys()
    import_model(str(tmp_path / "small"), str(tmp_path / "back"), vocab_multiple=8, mesh=AXES)
    trained, back = load(reference), load(tmp_path / "back")
    assert (back.step, back.vocabulary_hash) == (0, trained.vocabulary_hash)
    assert back.config == dataclasses.replace(trained.config, vocab_multiple=8)
    assert trained.config.vocab_size == 260 and back.params["head"]["kernel"].shape[1] == 264
    assert not back.params["head"]["kernel"][:, 260:].any() and not back.params["embed"]["embedding"][260:].any()
    back.params["head"]["kernel"] = back.params["head"]["kernel"][:, :260]
    back.params["embed"]["embedding"] = back.params["embed"]["embedding"][:260]
    same(back, trained)
    export_model(str(tmp_path / "back"), str(tmp_path / "again"), mesh=AXES)
    assert (tmp_path / "again" / SINGLE).read_bytes() == (exported / SINGLE).read_bytes()
    about = json.loads((tmp_path / "back" / "run.json").read_text())
    assert about["imported"]["vocabulary"] == {"ids": 259, "embedded": 260, "padded": 264}


def test_what_is_written_is_what_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"tensor{i}": rng.normal(size=(3, i)[: 1 + i % 2]).astype(np.float16) for i in range(1, 6)}
    shapes = [(name, array.shape) for name, array in arrays.items()]
    write_tensors(tmp_path, shapes, "float16", 20, iter(arrays.values()))
    theirs: dict[str, np.ndarray] = {}
    for file in tmp_path.glob("*.safetensors"):
        theirs |= safetensors.numpy.load_file(file)
    assert theirs.keys() == arrays.keys() and len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_sixteen_bits(dtype, reference, exported, tmp_path):
    with toy.one_device():
        export_model(str(reference), str(tmp_path / "half"), dtype=dtype)
        import_model(str(tmp_path / "half"), str(tmp_path / "ours"))
        import_model(str(tmp_path / "half"), str(tmp_path / "exact"), compute_dtype="float32")
        export_model(str(tmp_path / "ours"), str(tmp_path / "again"), dtype=dtype)
    assert (tmp_path / "again" / SINGLE).read_bytes() == (tmp_path / "half" / SINGLE).read_bytes()
    halves, wholes = open_tensors(tmp_path / "half"), open_tensors(exported)
    for name, entry in halves.items():
        expected = read_tensor(wholes[name]).astype(jax.numpy.bfloat16 if dtype == "bfloat16" else np.float16)
        np.testing.assert_array_equal(read_tensor(entry), expected)
    assert load(tmp_path / "ours").config.compute_dtype == "bfloat16"
    assert load(tmp_path / "exact").config.compute_dtype == "float32"
    sizes = [sum(f.stat().st_size for f in (tmp_path / run / "checkpoints").rglob("*")) for run in ("ours", "exact")]
    assert max(sizes) < 4 * load(reference).config.parameter_count()  # bytes: kept in 16 bits


def test_a_run_begins_with_it(exported, corpus, shell, tmp_path):
    """With its architecture by name. The other stages take it as docs/models.md says, which has a test of its own."""
    imported = str(tmp_path / "imported")
    command = ["import", f"--source={exported}", f"--target={imported}"]
    code, output, errors = shell(*command, folder=tmp_path)
    assert code == 0, errors
    assert "vocabulary: bytes of 259 ids of 260 that are embedded; BOS 1, EOS 2, padding 0" in output
    code, output, _ = shell(*command, folder=tmp_path)
    assert code == 0 and "is there already, made of the same files" in output
    draw = toy.settings(MixtureComponent={"corpus": corpus.path, "epochs": 100.0}, Phase={"steps": 1, "batch_size": 8})
    rate = toy.settings(constant_schedule={"peak": 1e-2, "warmup": 0.0})
    train = ["train", *toy.CONSTANT, *draw, *rate, *toy.settings(model={"size": imported})]

    code, _, errors = shell(*train, f"--run_dir={tmp_path}/run", f"--init_from={imported}", folder=tmp_path)
    assert code == 0, errors
    [(_, loss)] = toy.losses(tmp_path / "run")
    assert loss < 4.5 < np.log(259)
    code, _, errors = shell(*train, f"--run_dir={imported}", folder=tmp_path)
    assert code == 1 and "[resume-other-run]" in errors and "holds a model" in errors and "train.run_dir" in errors
    branch = [f"--run_dir={tmp_path}/branch", f"--init_from={imported}", "--init_mode=state"]
    code, _, errors = shell(*train, *branch, folder=tmp_path)
    assert code == 1 and "[branch-not-trained]" in errors and "train.init_mode = 'params'" in errors


def test_the_architecture_of_a_model_directory_has_a_name(exported, tmp_path):
    with toy.one_device():
        import_model(str(exported), str(tmp_path / "imported"))
    found = model_config(str(tmp_path / "imported"), dropout=0.1)
    assert found == dataclasses.replace(toy.MODEL, dropout=0.1)
    assert "'nowhere'" in toy.refused("model-size-unknown", model_config, "nowhere")


def test_a_killed_import_leaves_no_model_and_the_same_command_makes_one(exported, reference, tmp_path):
    arguments = ["import", f"--source={exported}", f"--target={tmp_path}/imported"]
    first = toy.Command(tmp_path / "log", *arguments)
    code, _ = first.when((tmp_path / "imported" / "run.json").exists, signal.SIGKILL)
    if code == -signal.SIGKILL:
        finished = [path.name for path in (tmp_path / "imported").glob("checkpoints/*") if path.name.isdecimal()]
        assert finished in ([], ["0"])
    code, output = toy.Command(tmp_path / "log", *arguments).finish()
    assert code == 0, output
    same(load(tmp_path / "imported"), load(reference))


def test_an_import_of_other_weights_is_not_there_already(copy, tmp_path, capsys):
    """The same architecture, so files of the same names and sizes."""
    for _ in range(2):
        import_model(str(copy), str(tmp_path / "model"))
    assert "is there already, made of the same files" in capsys.readouterr().out
    rewrite(copy, lambda arrays: arrays.update({name: array + 1 for name, array in arrays.items()}))
    line = toy.refused("import-target-exists", import_model, str(copy), str(tmp_path / "model"))
    assert str(tmp_path / "model") in line
    assert str(copy) in toy.refused("import-onto-source", import_model, str(copy), f"{copy}/../{copy.name}")


@pytest.mark.slow
def test_two_processes_import_and_export_as_one(exported, tmp_path):
    mesh = toy.settings(MeshConfig=dataclasses.asdict(AXES))
    for stage, source, target in (("import", exported, "imported"), ("export", tmp_path / "imported", "again")):
        arguments = [stage, f"--source={source}", f"--target={tmp_path / target}", f"--gin.{stage}.mesh=@MeshConfig()"]
        codes, output, other = finish(start(tmp_path, *arguments, *mesh))
        assert codes == [0, 0], output
        assert f"{stage}: done" in output and f"{stage}:" not in other
    assert (tmp_path / "again" / SINGLE).read_bytes() == (exported / SINGLE).read_bytes()


def test_a_broken_off_export_is_not_there(reference, exported, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with toy.one_device():
        monkeypatch.setattr(export_model_module, "tokenizer_files", stop)
        with pytest.raises(KeyboardInterrupt):
            export_model(str(reference), str(tmp_path / "model"), file_gigabytes=2e-5)
        assert not (tmp_path / "model").exists()
        monkeypatch.undo()
    with toy.one_device():
        export_model(str(reference), str(tmp_path / "model"))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(p.name for p in exported.iterdir())
    toy.refused("export-target-exists", export_model, str(reference), str(tmp_path / "model"))


def test_tensors_that_do_not_fit_are_named(copy, exported):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(copy, lambda arrays: arrays.pop(name))
    assert name in refused("weights-mismatch", copy)
    rewrite(copy, lambda arrays: arrays.update({name: np.zeros((3, 5), np.float32)}))
    assert f"{name} has shape (3, 5), (64, 32) by config.json" in refused("weights-mismatch", copy)
    rewrite(
        copy, lambda arrays: arrays.update({name: np.zeros((64, 32), np.float32), "adapter": np.zeros(1, np.float32)})
    )
    assert "adapter" in refused("weights-mismatch", copy)
    reconfigure(copy, num_hidden_layers=4)
    missing = "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight"
    assert missing in (line := refused("weights-mismatch", copy)) and "and 15 more" in line
    for sizes in ({"num_hidden_layers": 9_000_000}, {"hidden_size": 9_000_000}, {"intermediate_size": 10**7}):
        shutil.copy(exported / "config.json", copy)
        reconfigure(copy, **sizes)
        assert "parameters" in refused("weights-mismatch", copy)


def test_constants_of_older_versions_are_left_out(copy, tmp_path):
    rewrite(
        copy, lambda arrays: arrays.update({"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    )
    with toy.one_device():
        import_model(str(copy), str(tmp_path / "target"))


def test_a_head_that_is_the_embedding_may_be_saved_twice(copy, tmp_path):
    reconfigure(copy, tie_word_embeddings=True)
    assert "lm_head.weight is not model.embed_tokens.weight" in refused("weights-mismatch", copy)
    rewrite(copy, lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"]}))
    with toy.one_device():
        import_model(str(copy), str(tmp_path / "target"))
    assert "head" not in load(tmp_path / "target").params


def test_files_that_are_not_whole_are_refused(copy):
    weights_file = copy / SINGLE
    content = weights_file.read_bytes()
    for length in (5, 100, len(content) - 4):
        weights_file.write_bytes(content[:length])
        assert str(weights_file) in refused("file-damaged", copy)
    weights_file.write_bytes(content[:8] + b"?" + content[9:])
    assert str(weights_file) in refused("file-damaged", copy)
    weights_file.write_bytes(content)
    second = "model-00002-of-00002.safetensors"
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": second}}))
    assert second in refused("weights-missing", copy)
    (copy / INDEX).unlink()
    for damaged in ("{", "[1]", "[" * 100_000, "\xff"):
        (copy / "config.json").write_text(damaged, "latin-1")
        assert "config.json" in refused("file-damaged", copy)
    (copy / "config.json").unlink()
    assert "config.json does not exist" in refused("model-file", copy)


def with_header(directory: Path, change) -> None:
    """Changes the header of the weights, and nothing else."""
    content = (directory / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NORM = "model.norm.weight"  # [32] in float32


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[NORM].update(data_offsets=[0, 128]),  # on another tensor
        lambda header: header.update(twice=header[NORM]),
        lambda header: header.pop(NORM),  # bytes of nobody
        lambda header: header[NORM].update(shape=[31]),
        lambda header: header[NORM].update(shape=[32.0]),
        lambda header: header[NORM].update(shape=[-32]),
        lambda header: header[NORM].update(shape=[2**62, 2**62]),
        lambda header: header[NORM].update(data_offsets=[float(x) for x in header[NORM]["data_offsets"]]),
        lambda header: header[NORM].update(data_offsets=[x + 2**40 for x in header[NORM]["data_offsets"]]),
        lambda header: header[NORM].update(data_offsets=header[NORM]["data_offsets"][::-1]),
        lambda header: header[NORM].update(dtype="PICKLE"),
        lambda header: header.update({NORM: 7}),
    ],
)
def test_headers_that_do_not_describe_the_bytes_are_refused(change, copy):
    with_header(copy, change)
    assert str(copy / SINGLE) in refused("file-damaged", copy)


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
def test_what_is_no_file_is_refused(name, copy):
    """A pipe would never end."""
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    assert str(copy / name) in refused("model-file", copy)
    (copy / name).unlink()
    (copy / name).mkdir()
    assert str(copy / name) in refused("model-file", copy)


@pytest.mark.parametrize("name", ["..", ".", "", "../weights.safetensors", "/etc/passwd", "a/b.safetensors", "a\0b"])
def test_an_index_that_leaves_its_directory_is_refused(name, copy):
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert str(copy / INDEX) in refused("weights-outside", copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused(name, value, copy, capsys):
    rewrite(copy, lambda arrays: arrays[name].__setitem__((-1,) * arrays[name].ndim, value))
    line = refused("weights-not-finite", copy)
    assert str(copy) in line and "1 of the" in line and ("layer 1" in line) == ("layers.1" in name)


def test_a_byte_order_mark_is_no_damage(copy, tmp_path):
    (copy / "config.json").write_bytes(b"\xef\xbb\xbf" + (copy / "config.json").read_bytes())
    with toy.one_device():
        import_model(str(copy), str(tmp_path / "target"))


def test_quantized_weights_are_refused(copy):
    with_header(copy, lambda header: header[NORM].update(dtype="F8_E4M3", shape=[128]))
    assert "F8_E4M3" in (line := refused("weights-dtype", copy)) and NORM in line


def test_pickles_are_refused_with_the_way_to_convert_them(copy, tmp_path):
    (copy / SINGLE).rename(copy / "pytorch_model.bin")
    line = refused("weights-pickled", copy)
    assert f"{copy} holds its weights as pytorch_model.bin" in line
    assert f"M.from_pretrained('{copy}').save_pretrained('{copy}-converted')" in line
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04...")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02...")
    for name in ("model.pt", "model.bin"):
        assert name in refused("weights-pickled", tmp_path / name)
    (copy / "pytorch_model.bin").unlink()
    assert str(copy) in refused("weights-missing", copy)
    assert "nowhere does not exist" in refused("model-file", tmp_path / "nowhere")


def test_the_vocabulary_must_be_there_and_fit(copy, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(copy / name, small)
    line = toy.refusal(import_model, str(small), str(tmp_path / "target"))
    assert str(small) in line and line.endswith("(--vocabulary=PATH)") and not (tmp_path / "target").exists()
    with toy.one_device():
        import_model(str(small), str(tmp_path / "other"), vocabulary=str(copy))
        assert run_vocabulary(str(tmp_path / "other"), ByteVocabulary().content_hash).size == 259
        import_model(str(copy), str(tmp_path / "other"))  # elsewhere, but the same files: it is there already
        toy.refused("import-target-exists", import_model, str(copy), str(tmp_path / "other"), vocab_multiple=7)
    rewrite(small, lambda arrays: arrays.update(
        {name: arrays[name][:200] for name in ("model.embed_tokens.weight", "lm_head.weight")}))  # fmt: skip
    reconfigure(small, vocab_size=200)
    assert "259 ids" in (line := refused("vocabulary-too-large", small, vocabulary=str(copy))) and "200" in line


def test_settings_that_cannot_be_are_refused(reference, exported, tmp_path, copy):
    run, target = str(reference), str(tmp_path / "target")
    assert "'int8'" in toy.refused("setting-unknown-value", export_model, run, target, dtype="int8")
    toy.refused("setting-out-of-range", export_model, run, target, file_gigabytes=0)
    assert "has no checkpoint of step 4: it has 3, 6" in toy.refusal(export_model, run, target, step=4)
    assert "vocab_multiple is 0" in toy.refusal(import_model, str(copy), target, vocab_multiple=0)
    assert "'float64'" in refused("setting-unknown-value", copy, compute_dtype="float64")
    rewrite(copy, lambda arrays: arrays.update({"model.norm.weight": np.full(32, 1e5, np.float32)}))
    with toy.one_device():
        import_model(str(copy), target)
        line = toy.refused("weights-not-finite", export_model, target, str(tmp_path / "half"), dtype="float16")
    assert NORM in line and "export.dtype" in line
    assert not list(tmp_path.glob("half*"))


class Zeros:
    """Weights of any size, made when they are asked for."""

    def __init__(self, config: ModelConfig):
        self.config = config
        leaves = jax.tree_util.tree_leaves_with_path(param_shapes(config))
        self._shapes = {mesh_lib.path_name(path): leaf.shape for path, leaf in leaves}

    def files(self) -> list[Path]:
        return []

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        return np.full(self._shapes[path][int(layer is not None) :], layer or 0, np.float32)


def test_host_memory_holds_one_tensor_at_a_time():
    model = ModelConfig(64, num_layers=12, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=1024)
    stacked, one_tensor = 12 * 1024 * 256 * 4, 1024 * 256 * 4
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=4, model=2))
    tracemalloc.start()
    try:
        params = weights.load_params(Zeros(model), model, mesh, lambda size: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert one_tensor < peak < stacked
    up = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(np.unique(np.asarray(up), axis=0)[:, 0, 0], np.arange(12))
    assert up.sharding.spec == mesh_lib.P(None, "fsdp", "model")
    assert {shard.data.shape for shard in up.addressable_shards} == {(12, 64, 512)}


@pytest.mark.parametrize("size", SIZES)
def test_the_named_sizes_have_names_there(size):
    """And as many parameters by those names."""
    from slm_jax.models.huggingface import tensors
    from slm_jax.models.huggingface_config import read_config, write_config

    model = dataclasses.replace(SIZES[size], vocab_size=SIZES[size].vocab_size or 2048)
    there = json.loads(json.dumps(write_config(model, "float32")))
    again = dataclasses.replace(read_config(there, "x"), init_std=model.init_std, output_init_std=model.output_init_std)
    assert again == model
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(model)) == model.parameter_count()


def test_the_vocabulary_of_an_export_is_known_again(exported):
    assert load_vocabulary(exported).content_hash == ByteVocabulary().content_hash


def test_padding_is_named_where_there_is_any(exported, tmp_path):
    """torch trains no row of the embedding that is named as padding: a model that pads with EOS must not lose it."""
    assert json.loads((exported / "config.json").read_text())["pad_token_id"] == ByteVocabulary.pad_id
    words = load_vocabulary(save("llama_3", tmp_path / "llama_3"))
    assert words.pad_id == words.eos_id
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / export_model_module.LOCK).touch()
    export_model_module._finish(tmp_path / "partial", tmp_path / "done", {}, words)
    ids = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    assert json.loads((tmp_path / "done" / "config.json").read_text()) == ids


def test_an_import_holds_no_path_of_this_machine(exported, tmp_path):
    import_model(str(exported), str(tmp_path / "model"))
    for file in (tmp_path / "model").rglob("*"):
        if file.is_file() and file.name != "commit_success.txt":  # Orbax's own mark of a finished checkpoint
            assert str(tmp_path).encode() not in file.read_bytes(), file
            assert str(exported.parent).encode() not in file.read_bytes(), file


def test_an_export_holds_no_path_of_this_machine(reference, exported):
    files = list(exported.iterdir())
    assert {"config.json", "generation_config.json"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for path in (reference.parent, exported.parent, Path.cwd()):
            assert str(path).encode() not in content, (file.name, path)
