"""Files of llama2.c: their model, computed here as it is there, gives the same logits; their tokenizer the same ids."""

import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tokenizer_families import HARD, sentencepiece_of_llama

from slm_jax import mesh as mesh_lib
from slm_jax.convert.import_model import import_model
from slm_jax.data.sentencepiece_vocabulary import SentencePieceVocabulary, read_tokenizer_bin
from slm_jax.models import forward
from slm_jax.models.llama2c import MAGIC
from slm_jax.models.trained_model import load_model, run_vocabulary

DIM, MLP, LAYERS, HEADS, KV_HEADS, VOCAB, ROW = 16, 24, 2, 4, 2, 400, 12
WIDTH = DIM // HEADS
SHAPES = {
    "embedding": (VOCAB, DIM),
    "attention_norm": (LAYERS, DIM),
    "query": (LAYERS, DIM, DIM),
    "key": (LAYERS, KV_HEADS * WIDTH, DIM),
    "value": (LAYERS, KV_HEADS * WIDTH, DIM),
    "out": (LAYERS, DIM, DIM),
    "mlp_norm": (LAYERS, DIM),
    "gate": (LAYERS, MLP, DIM),
    "down": (LAYERS, DIM, MLP),
    "up": (LAYERS, MLP, DIM),
    "final_norm": (DIM,),
    "head": (VOCAB, DIM),
}
WORDS = SentencePieceVocabulary(sentencepiece_of_llama())


def angles() -> np.ndarray:
    return np.arange(ROW)[:, None] * 10000.0 ** -(np.arange(0, WIDTH, 2) / WIDTH)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(path: Path, arrays: dict[str, np.ndarray], version: int, shared: bool) -> Path:
    order = [name for name in SHAPES if name != "head"]
    vocab = VOCAB
    if version == 0:
        tables = [np.cos(angles()), np.sin(angles())]
        content = [arrays[name] for name in order] + tables + ([] if shared else [arrays["head"]])
        vocab = VOCAB if shared else -VOCAB
        head = b""
    else:
        norms = ["attention_norm", "mlp_norm", "final_norm"]
        order = norms + [name for name in order if name not in norms] + ([] if shared else ["head"])
        content = [arrays[name] for name in order]
        head = struct.pack("<Ii", MAGIC, version)
    head += struct.pack("<7i", DIM, MLP, LAYERS, HEADS, KV_HEADS, vocab, ROW)
    if version:
        head = (head + bytes([shared])).ljust(256, b"\0")
    path.write_bytes(head + b"".join(array.astype("<f4").tobytes() for array in content))
    return path


def logits_there(arrays: dict[str, np.ndarray], tokens: np.ndarray, shared: bool) -> np.ndarray:
    """Neighbouring features of a head turn together; one row, no batch."""

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def turned(x):  # [L, H, K]
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        cos, sin = np.cos(angles())[:, None], np.sin(angles())[:, None]
        first, second = pairs[..., 0], pairs[..., 1]
        return np.stack([first * cos - second * sin, first * sin + second * cos], -1).reshape(x.shape)

    x = arrays["embedding"][tokens].astype(np.float64)
    later = np.triu(np.full((ROW, ROW), -np.inf), 1)
    for layer in range(LAYERS):
        z = norm(x, arrays["attention_norm"][layer])
        query, key, value = ((z @ arrays[name][layer].T).reshape(ROW, -1, WIDTH) for name in ("query", "key", "value"))
        query, key = turned(query), turned(key)
        key, value = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (key, value))
        scores = np.einsum("qhk,thk->hqt", query, key) / np.sqrt(WIDTH) + later
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hqt,thk->qhk", share, value).reshape(ROW, DIM) @ arrays["out"][layer].T
        z = norm(x, arrays["mlp_norm"][layer])
        gate = z @ arrays["gate"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (z @ arrays["up"][layer].T)) @ arrays["down"][layer].T
    return norm(x, arrays["final_norm"]) @ arrays["embedding" if shared else "head"].T


def tokenizer_bin(path: Path, as_characters: bool) -> Path:
    """As the versions of llama2.c write it: bytes by name, or as the character of that number."""
    tokens = []
    for token in range(WORDS.size):
        piece = WORDS.piece(token).replace("▁", " ")
        if as_characters and piece.startswith("<0x"):
            piece = chr(int(piece[3:5], 16))
        tokens.append({1: "\n<s>\n", 2: "\n</s>\n"}.get(token, piece).encode("utf-8"))
    scores = [WORDS._processor.get_score(token) for token in range(WORDS.size)]
    parts = [struct.pack("<fI", score, len(token)) + token for score, token in zip(scores, tokens, strict=True)]
    path.write_bytes(struct.pack("<I", max(map(len, tokens))) + b"".join(parts))
    return path


@pytest.mark.parametrize("version, shared", [(0, True), (0, False), (1, True), (1, False)])
def test_the_logits_are_those_of_llama2c(version, shared, arrays, tmp_path):
    source, target = write(tmp_path / "stories.bin", arrays, version, shared), tmp_path / "imported"
    vocabulary = tokenizer_bin(tmp_path / "tokenizer.bin", as_characters=False)
    with toy.one_device():
        import_model(str(source), str(target), vocabulary=str(vocabulary))
        model = load_model(str(target), mesh_lib.make_mesh())
    assert model.config.tied_head == shared and model.config.compute_dtype == "float32"
    assert run_vocabulary(str(target), model.vocabulary_hash).size == VOCAB
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, ROW))
    where = jnp.arange(ROW)[None]
    batch = (jnp.asarray(tokens), where, jnp.ones_like(where))
    logits = jax.jit(lambda params: forward.logits(
        params, model.config, forward.hidden_states(params, model.config, *batch)))(model.params)  # fmt: skip
    np.testing.assert_allclose(logits[0], logits_there(arrays, tokens[0], shared), rtol=1e-4, atol=1e-4)


def test_what_is_none_of_its_files_is_refused(arrays, tmp_path):
    path, target = write(tmp_path / "stories.bin", arrays, 1, True), str(tmp_path / "target")
    assert str(path) in toy.refused("import-no-vocabulary", import_model, str(path), target)
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack("<i", 2) + content[8:])
    assert "version 2" in toy.refused("llama2c-version", import_model, str(path), target)
    path.write_bytes(content[:-4])
    line = toy.refused("llama2c-header", import_model, str(path), target)
    assert f"{len(content) - 4:,}" in line and f"{len(content):,}" in line
    for other in (b"GGUF and so on, with some more", b"short"):
        path.write_bytes(other)
        assert str(path) in toy.refused("llama2c-header", import_model, str(path), target)
    path.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    words = str(tokenizer_bin(tmp_path / "tokenizer.bin", as_characters=False))
    assert "NaN" in toy.refused("weights-not-finite", import_model, str(path), str(tmp_path / "nan"), words)
    assert not Path(target).exists()


def test_a_width_that_looks_like_a_pickle_is_a_width(tmp_path):
    """640 begins with the two bytes with which a pickle begins."""
    dim, vocab, row = 640, 3, 2
    numbers = (dim, 1, 1, 2, 1, vocab, row)
    count = vocab * dim + 2 * dim + 2 * dim * dim + 2 * (dim // 2) * dim + 3 * dim + dim + row * dim // 2
    path = tmp_path / "stories.bin"
    path.write_bytes(struct.pack("<7i", *numbers) + bytes(4 * count))
    assert path.read_bytes()[:2] == b"\x80\x02"
    toy.refused("import-no-vocabulary", import_model, str(path), str(tmp_path / "target"))
    path.write_bytes(path.read_bytes()[:-4])
    assert str(path) in toy.refused("weights-pickled", import_model, str(path), str(tmp_path / "target"))


@pytest.mark.parametrize("as_characters", [False, True])
def test_the_vocabulary_is_the_one_it_was_made_of(as_characters, tmp_path):
    vocabulary = read_tokenizer_bin(tokenizer_bin(tmp_path / "tokenizer.bin", as_characters))
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (1, 2, 0) and vocabulary.size == WORDS.size
    for text in HARD:
        ids = WORDS.encode(text)
        assert vocabulary.encode(text) == ids and vocabulary.decode(ids) == WORDS.decode(ids)
    np.testing.assert_array_equal(vocabulary.token_bytes(), WORDS.token_bytes())


def test_a_damaged_vocabulary_is_refused(tmp_path):
    path = tokenizer_bin(tmp_path / "tokenizer.bin", as_characters=False)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert str(path) in toy.refused("vocabulary-damaged", read_tokenizer_bin, path)
    path.write_bytes(content[:200])
    assert str(path) in toy.refused("vocabulary-damaged", read_tokenizer_bin, path)
    path.write_bytes(content.replace(b"<0x41>", b"<0x42>"))
    assert "token 68 is '<0x42>', not the byte 65" in toy.refused("vocabulary-damaged", read_tokenizer_bin, path)
    path.unlink()
    assert str(path) in toy.refused("vocabulary-not-found", read_tokenizer_bin, path)
