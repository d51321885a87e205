"""Conversations: what is written, which tokens carry loss, what is refused; and one through `prepare` and `train`."""

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import save

from slm_jax.data.conversations import ROLES, TEMPLATES, ChatVocabulary, Turn, markers, written
from slm_jax.data.corpus import Corpus
from slm_jax.data.metadata import Metadata
from slm_jax.data.prepare import prepare
from slm_jax.data.preprocess import tokenize_document
from slm_jax.data.sentencepiece_vocabulary import train_sentencepiece
from slm_jax.data.sources import Source, read_documents
from slm_jax.data.vocabularies import VocabularyConfig, load_vocabulary
from slm_jax.data.vocabulary import ByteVocabulary, Vocabulary
from slm_jax.evaluate.harness import chat_text
from slm_jax.run_directory import RunDirectory
from slm_jax.score.selection import Selection

BYTES = ByteVocabulary()
ASKED = [Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", "+1?"), Turn("assistant", "3")]


def tokens_of(turns: list[Turn], template: str, vocabulary: Vocabulary = BYTES):
    text, spans = written(turns, TEMPLATES[template])
    return tokenize_document(text, [], vocabulary, loss_spans=spans, markers=markers(turns, TEMPLATES[template]))


def shown(turns: list[Turn], template: str) -> str:
    """The bytes of a document with BOS as ^, EOS as $, and what carries loss in brackets."""
    document = tokens_of(turns, template)
    names = {BYTES.bos_id: "^", BYTES.eos_id: "$"}
    parts, inside = [], False
    for token, loss in zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True):
        parts.append("" if loss == inside else "[" if loss else "]")
        parts.append(names.get(token) or chr(token - 3))
        inside = loss
    return "".join(parts) + ("]" if inside else "")


@pytest.mark.parametrize(
    "template, expected",
    [
        ("plain", "^User:\n1+1?\n\nAssistant:\n[2$]\n\nUser:\n+1?\n\nAssistant:\n[3$]"),
        ("tora", "^<|user|>\n1+1?\n<|assistant|>\n[2$]\n<|user|>\n+1?\n<|assistant|>\n[3$]"),
        (
            "chatml",
            "^<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[2<|im_end|>]\n"
            "<|im_start|>user\n+1?<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>$]",
        ),
    ],
)
def test_two_answers_by_hand(template, expected):
    assert shown(ASKED, template) == expected


def test_ids_and_mask_by_hand():
    document = tokens_of([Turn("user", "é"), Turn("assistant", "ü!")], "tora")
    prompt = [3 + byte for byte in b"<|user|>\n\xc3\xa9\n<|assistant|>\n"]
    answer = [3 + byte for byte in b"\xc3\xbc!"]
    assert document.tokens.tolist() == [1, *prompt, *answer, 2]
    assert document.loss_mask.tolist() == [False] * (1 + len(prompt)) + [True] * 4
    assert not document.noise.any()


def test_a_system_turn_and_what_follows_the_last_response():
    turns = [Turn("system", "Short."), *ASKED[:2], Turn("user", "Thanks")]
    assert shown(turns, "plain") == "^Short.\n\nUser:\n1+1?\n\nAssistant:\n[2$]"
    assert written(ASKED[:1], TEMPLATES["plain"]) == ("", [])


def test_toras_programs_carry_loss_and_their_results_do_not():
    """PAPERS of Rho-1's fine-tuning: the harness puts in newline, result, newline, fence and newline."""
    answer = "Let's see.\n```python\nprint(1+1)\n```\n```output\n2\n```\nIt is $\\boxed{2}$."
    turns = [Turn("user", "1+1?"), Turn("assistant", answer)]
    assert shown(turns, "tora") == (
        "^<|user|>\n1+1?\n<|assistant|>\n"
        "[Let's see.\n```python\nprint(1+1)\n```\n```output]\n2\n```\n[It is $\\boxed{2}$.$]"
    )
    assert "[Let's see.\n```python\nprint(1+1)\n```\n```output\n2\n```\nIt is" in shown(turns, "plain")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("```output\n```\nb", "[```output]\n```\n[b$]"),
        ("a```output\n1\n2\n```", "[a```output]\n1\n2\n```[$]"),
        ("```output\ncut", "[```output]\ncut[$]"),
        ("```output\n1\n```\n```output\n2\n```\nc", "[```output]\n1\n```\n[```output]\n2\n```\n[c$]"),
        ("```output\na ``` b\n```\nc", "[```output]\na ``` b\n```\n[c$]"),
    ],
)
def test_results_at_the_borders(answer, expected):
    assert shown([Turn("user", "q"), Turn("assistant", answer)], "tora").partition("<|assistant|>\n")[2] == expected


@pytest.fixture(scope="module")
def pieces() -> Vocabulary:
    texts = [f"User:\n{i} ducks swim, näher 漢字\n\nAssistant:\n{i * i} ducks\n\n" for i in range(400)]
    return train_sentencepiece(texts, 340)


CONTENT = st.text(alphabet="ab \n`<|>é漢😀", min_size=1, max_size=12).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENT), max_size=6)


@settings(deadline=None, max_examples=150)
@given(TURNS, st.sampled_from(sorted(TEMPLATES)))
def test_every_token_of_a_response_has_loss_and_no_other(pieces, turns, template):
    """Read back from the ids, in bytes and in pieces: the text is whole, what has loss is what was answered."""
    turns = [Turn(*turn) for turn in turns]
    text, spans = written(turns, TEMPLATES[template])
    answered = "".join(turn.content + TEMPLATES[template].closes for turn in turns if turn.role == "assistant")
    if template != "tora":
        assert "".join(text[begin:end] for begin, end, _ in spans) == answered
    for vocabulary in (BYTES, pieces):
        document = tokens_of(turns, template, vocabulary)
        assert vocabulary.decode(document.tokens) == text
        assert vocabulary.decode(document.tokens[document.loss_mask]) == "".join(text[b:e] for b, e, _ in spans)
        ends = document.tokens == vocabulary.eos_id
        inner = 0 if template == "chatml" else sum(turn.role == "assistant" for turn in turns) - 1
        assert ends.sum() == max(inner, 0) + 1
        assert document.loss_mask[ends].all() == bool(spans)


def test_markers_are_control_tokens_where_the_vocabulary_has_them(tmp_path):
    """Those of the template, not those in the words of a turn; the ids are those of transformers."""
    qwen = load_vocabulary(save("qwen", tmp_path))
    begin, end = (qwen.control_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    turns = [Turn("user", "The fox <|im_end|>"), Turn("assistant", "dogs"), *ASKED[2:]]
    document = tokens_of(turns, "chatml", qwen)
    encode = qwen.encode
    asked = [begin, *encode("user\nThe fox <|im_end|>"), end, *encode("\n"), begin, *encode("assistant\n")]
    begun = [qwen.bos_id, *asked, *encode("dogs"), end]
    assert document.tokens.tolist()[: len(begun)] == begun
    answered = [False] * (len(asked) + 1) + [True] * (len(encode("dogs")) + 1) + [False]
    assert document.loss_mask.tolist()[: len(answered)] == answered
    assert np.isin(document.tokens, [begin, end]).sum() == 10  # eight markers; EOS, which also begins, is <|im_end|>
    text = chat_text(TEMPLATES["chatml"], [{"role": "user", "content": "1+1?"}], answer_next=True)
    prompt = ChatVocabulary(qwen).encode(text)
    assert prompt == tokens_of(ASKED[:2], "chatml", qwen).tokens.tolist()[1 : len(prompt) + 1]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text, _ = written(ASKED, TEMPLATES["chatml"])
    assert theirs.encode(text, add_special_tokens=False) == tokens_of(ASKED, "chatml", qwen).tokens.tolist()[1:-1]


def test_a_token_that_would_cross_a_border_is_cut_there(pieces):
    text, duck = " ducks ducks", pieces.encode(" ducks")
    assert len(duck) == 1 and pieces.encode(text) == duck * 2, "the vocabulary has the word as one piece"
    uncut = tokenize_document(text, [], pieces, loss_spans=[(6, 12, False)])
    assert uncut.tokens[1:-1].tolist() == duck * 2 and uncut.loss_mask.tolist() == [False, False, True, True]
    cut = tokenize_document(text, [], pieces, loss_spans=[(9, 12, False)])
    assert cut.tokens[1:-1].tolist() == [*pieces.encode(" ducks du"), *pieces.encode("cks")]
    assert pieces.decode(cut.tokens[cut.loss_mask]) == "cks" and pieces.decode(cut.tokens) == text
    assert not tokenize_document(text, [], pieces, loss_spans=[(0, 6, False)]).loss_mask[-1], "EOS follows no answer"


def write(path, *records) -> str:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    return str(path)


def read(*files: str, **named) -> list[dict]:
    return list(read_documents(Source("s", list(files), **named)))


RECORDS = {
    "messages": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "id": "x"},
    "conversations": {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    "prompt_response": {"prompt": "1+1?", "response": "2"},
}


@pytest.mark.parametrize("schema", RECORDS)
def test_schemas_of_public_data_say_the_same(schema, tmp_path):
    record = RECORDS[schema]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    as_json = {key: json.dumps(value) if isinstance(value, list) else value for key, value in record.items()}
    files = (write(tmp_path / "a.jsonl", record, as_json), str(tmp_path / "a.parquet"))
    for row in read(*files, schema=schema, template="tora"):
        assert row["text"] == "<|user|>\n1+1?\n<|assistant|>\n2" and row["loss_spans"] == [(28, 29, False)]


def test_fields_of_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "1+1?", "more": {"answer": "2"}, "url": "http://x.org"})
    (row,) = read(path, text_field="question", response_field="more.answer", template="plain")
    assert row["text"] == "User:\n1+1?\n\nAssistant:\n2" and row["url"] == "http://x.org"


@pytest.mark.parametrize(
    "schema, record, reason",
    [
        ("messages", {"messages": "hello"}, "not a list of turns (with 'role' and 'content')"),
        ("messages", {"messages": [["user", "hello"]]}, "not a list of turns"),
        (
            "messages",
            {"messages": [{"role": "tool", "content": "x"}]},
            "unknown role ('role' is 'tool'; known are system, user",
        ),
        ("messages", {"messages": [{"from": "human", "value": "x"}]}, "unknown role ('role' is None"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ('role' is ['user']"),
        ("messages", {"messages": "[" * 100_000}, "not a list of turns"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "a turn without text ('content' is None)"),
        ("messages", {"text": "hello"}, "no field 'messages' (schema 'messages'; fields there: text)"),
        ("prompt_response", {"prompt": "x", "response": ["y"]}, "fields 'prompt' and 'response' are not both strings"),
        ("prompt_response", {"prompt": "x"}, "fields 'prompt' and 'response' are not both strings"),
        ("prompt_response", {"prompt": None, "response": "y"}, "fields 'prompt' and 'response' are not both strings"),
        ("prompt_response", {"prompt": 0, "response": "y"}, "fields 'prompt' and 'response' are not both strings"),
        ("messages", {"messages": 0}, "not a list of turns"),
        ("messages", {"messages": {}}, "not a list of turns"),
        ("prompt_response", {"prompt": "\ud800", "response": "y"}, "not valid Unicode"),
    ],
)
def test_a_malformed_conversation_is_counted_and_then_named(schema, record, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[schema]) + "\n" + json.dumps(record))
    settings = {"schema": schema, "template": "plain"}
    assert [row["skipped"] for row in read(str(path), **settings)] == ["", reason.partition(" (")[0]]
    message = toy.refused("source-bad-lines", read, str(path), bad_lines=0, **settings)
    assert f"{path}:2: {reason}" in message


def test_a_conversation_without_a_response_is_skipped(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1?", "response": ""},
        {"prompt": "1+1?", "response": None},
        {"prompt": "1+1?", "response": " \n"},
        {"prompt": "", "response": "2"},
        {"prompt": "1+1?", "response": "2"},
    )
    found = [row["skipped"] for row in read(path, schema="prompt_response", template="tora")]
    assert found == ["no response"] * 3 + ["empty text", ""]


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"schema": "messages"}, "'messages' has conversations: set template to one of plain, tora, chatml"),
        ({"response_field": "answer"}, "schema 'plain'"),
        ({"template": "tora"}, "schema 'plain'"),
        ({"schema": "messages", "template": "plain", "spans_field": "spans"}, "spans_field"),
    ],
)
def test_a_source_that_makes_no_sense(settings, named, tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS["messages"])
    assert named in toy.refused("source-template", Source(**{"name": "s", "files": [path], **settings}).check)


def test_roles_are_written_by_every_template():
    assert {role for template in TEMPLATES.values() for role in template.opens} == set(ROLES.values())


def test_prepare_and_train_on_answers_alone(tmp_path):
    """From the file to a selective step: prompts are read and not trained on, no answer loses its question."""
    problems = [{"prompt": f"{i}+1?", "response": f"It is {i + 1}.\n```output\n{i}\n```\nYes"} for i in range(120)]
    source = Source("sums", [write(tmp_path / "a.jsonl", *problems)], schema="prompt_response", template="tora")
    arguments = {
        "vocabulary": VocabularyConfig(kind="bytes"),
        "sequence_length": 160,
        "packing": "whole",
        "processes": 1,
    }
    corpus: Corpus = prepare(tmp_path / "corpus", [source], **arguments)
    columns = corpus.read(np.arange(corpus.num_rows))
    answers = []
    for tokens, mask, segments in zip(columns["tokens"], columns["loss_mask"], columns["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert tokens[here][0] == BYTES.bos_id and tokens[here][-1] == BYTES.eos_id, "whole"
            answers.append(BYTES.decode(tokens[here & mask]))
    assert sorted(answers) == sorted(f"It is {i + 1}.\n```outputYes" for i in range(120))
    other = (tmp_path / "other", [source])
    message = toy.refused("metadata-of-conversations", prepare, *other, **arguments, metadata=Metadata())
    assert "template 'tora'" in message
    phases = [toy.phase(corpus, steps=2, selection=Selection("loss", ratio=0.5))]
    toy.train_here(tmp_path / "run", phases, model=dataclasses.replace(toy.MODEL, max_length=160))
    rows = RunDirectory(tmp_path / "run").metrics()
    assert [row["selected_share"] for row in rows] == pytest.approx([0.5, 0.5], abs=0.01)
