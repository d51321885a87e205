"""lm-evaluation-harness on our models: the numbers of its own Hugging Face class, kept answers, suites, conditions."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st

from slm_jax import mesh as mesh_lib
from slm_jax.checkpoint import Checkpoints
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate.evaluate import evaluate
from slm_jax.evaluate.generation import Sampling
from slm_jax.evaluate.harness import Harness
from slm_jax.evaluate.likelihood import Likelihoods
from slm_jax.evaluate.lm_adapter import LMAdapter, rolling_windows
from slm_jax.evaluate.suites import SUITES, UNCONDITIONAL, Column, Form, Suite
from slm_jax.evaluate.tasks import table
from slm_jax.files import to_json
from slm_jax.jsonl import ResumableJsonl
from slm_jax.models import forward
from slm_jax.models.model_config import ModelConfig
from slm_jax.models.trained_model import load_model

pytest.importorskip("lm_eval")
REAL = Path(__file__).parents[2] / "shared" / "data"
MODEL = ModelConfig(
    260, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48, max_length=128, init_std=0.3
)
FARMS = [("tiny Farm", "reworded"), ("tiny Farm", "alone"), ("other Farm", "toy_choices")]
QUESTION = '"Question: {{question}}\\nAnswer:"'
TASKS = {
    "choices": f"""
output_type: multiple_choice
fewshot_split: test
doc_to_text: {QUESTION}
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "written": f"""
output_type: generate_until
doc_to_text: {QUESTION}
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n", "e"], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}


def write_tasks(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """Tasks of the names with the rows as their data."""
    folder.mkdir(parents=True)
    for name, each in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in each))
        head = f"task: toy_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + "test_split: test" + TASKS[name])
    return folder


def save(run: Path, params: forward.Params, config: ModelConfig) -> Path:
    """A model directory."""
    vocabulary = ByteVocabulary()
    about = {"model": config, "vocabulary_hash": vocabulary.content_hash, "run": str(run)}
    with Checkpoints(run) as checkpoints:
        checkpoints.save(1, {"params": params}, to_json(about))
    vocabulary.save(run / "vocabulary")
    return run


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """What lm_eval's libraries keep goes to a folder of the tests, and they look for nothing elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "run", forward.init_params(MODEL, jax.random.key(0)), MODEL)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Four questions as choices and as texts to be written, and a text of three windows."""
    questions = [
        {"question": f"What do {animal} do?", "choices": ["Swim", "Fly high", "Eat corn"], "answer": number % 3}
        for number, animal in enumerate(("hens", "ducks", "pigs", "cows"))
    ]
    rows = {"choices": questions, "rolling": [{"text": "Hens eat corn. " * 20}], "written": questions}
    return write_tasks(tmp_path_factory.mktemp("tasks") / "tasks", rows)


def evaluate_here(run: Path, tasks: Path, names: str = ",".join(f"toy_{name}" for name in TASKS), **settings: Any):
    with toy.one_device():
        return evaluate(str(run), tasks=names, include_path=str(tasks), **settings)


@pytest.fixture(scope="module")
def record(run, tasks, tmp_path_factory) -> dict[str, Any]:
    """Of all three tasks, under four conditions."""
    hosts = {"toy_choices": "www.farm.org", "toy_rolling": "www.farm.org", "toy_written": "www.write.org"}
    output = str(tmp_path_factory.mktemp("output") / "out")
    conditions = "none,right,wrong,unrelated"
    return evaluate_here(run, tasks, conditions=conditions, harness=Harness(hosts=hosts), output=output)


def real(name: str) -> list[dict[str, Any]]:
    with gzip.open(REAL / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.skipif(not REAL.exists(), reason="the real text is not here")
def test_scores_are_those_of_lm_evals_own_class(tmp_path):
    """On real questions and text, some of them longer than what the model reads."""
    torch = pytest.importorskip("torch")
    parity = pytest.importorskip("test_models_parity")
    theirs = parity._their_model("Llama", MODEL, {})
    theirs.generation_config.pad_token_id = 0
    ours = jax.tree.map(jnp.asarray, parity._as_ours(theirs, MODEL, lambda parameter: parameter))
    mmlu, gsm8k = real("eval/mmlu_stem_test.jsonl.gz"), real("gsm8k_test.jsonl.gz")[:3]
    mmlu = mmlu[:3] + [question for question in mmlu if len(question["question"]) < 50][:5]
    rows = {
        "choices": [{"question": q["question"], "choices": q["choices"], "answer": q["answer_index"]} for q in mmlu],
        "rolling": [{"text": text["text"][:300]} for text in real("wikitext2_raw_test.jsonl.gz")[:2]],
        "written": [{"question": q["question"], "answer": q["final_answer"]} for q in gsm8k],
    }
    folder = write_tasks(tmp_path / "tasks", rows)
    names = [f"toy_{name}" for name in rows]
    with toy.one_device():
        record = evaluate(str(save(tmp_path / "run", ours, MODEL)), tasks=",".join(names), include_path=str(folder))
    asked = record["results"]["none"]["toy_choices"]["toy_choices"]["asked"]
    assert 0 < asked["truncated"] < asked["requests"] == 32

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    expected = {}
    for name in names:  # its rolling windows would have two BOS: one of the tokenizer, one of its own
        bos = name != "toy_rolling"
        wrapped = HFLM(theirs, tokenizer=tokenizer(), device="cpu", batch_size=4, max_length=128, add_bos_token=bos)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        expected[name] = simple_evaluate(wrapped, tasks=[name], task_manager=manager)
    for name in names:
        samples = json.loads("[" + ",".join(Path(file(record, name, 1)).read_text().splitlines()) + "]")
        for sample, other in zip(samples, expected[name]["samples"][name], strict=True):
            assert sample["doc_id"] == other["doc_id"] and sample["arguments"] == to_json(other["arguments"])
            answers, others = (
                [np.ravel(answer).tolist() for answer in each["filtered_resps"]] for each in (sample, other)
            )
            if name == "toy_written":  # theirs ends with what begins a character, where ours leaves it out
                assert [text.rstrip("\ufffd") for (text,) in answers] == [text.rstrip("\ufffd") for (text,) in others]
            else:
                np.testing.assert_allclose(answers, others, rtol=1e-6, atol=1e-4)
        numbers = json.loads(Path(file(record, name, 0)).read_text())["results"][name]
        for metric, value in expected[name]["results"][name].items():
            if isinstance(value, float):
                assert numbers[metric] == pytest.approx(value, rel=1e-4), metric
    assert torch.get_num_threads() == 1


def file(record: dict[str, Any], name: str, number: int) -> str:
    return record["results"]["none"][name][name]["files"][number]


def tokenizer():
    """Bytes, as a tokenizer of transformers."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these represent themselves
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {characters[byte]: 3 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_what_stands_behind_bos_is_recorded_and_changes_the_answers(record):
    assert list(record["results"]) == ["none", "right", "wrong", "unrelated"]
    vocabulary = ByteVocabulary()
    shown = {}
    for condition, columns in record["results"].items():
        asked = columns["toy_choices"]["toy_choices"]["asked"]
        ids = [vocabulary.bos_id, *vocabulary.encode(asked["prefix"] + "Question: What do")][:16]
        assert asked["first_ids"] == ids and asked["first_text"].startswith("<s>")
        shown[condition] = asked["prefix"]
    assert shown["none"] == "" and shown["right"] == "URL: www.farm.org\n\n"
    assert shown["wrong"].startswith("URL: www.") and shown["wrong"] != shown["right"]
    assert shown["unrelated"] == "URL: boards.4chan.org\n\n"
    values = {condition: best["toy_choices"]["choices"]["margin"]["mean"] for condition, best in record["best"].items()}
    assert len(set(values.values())) == 4
    assert (record["bos_id"], record["step"], len(record["fingerprint"])) == (vocabulary.bos_id, 1, 16)
    assert {"lm_eval", "datasets", "jax"} <= set(record["environment"]["versions"])


def test_results_are_lm_evals_own_and_ours(record):
    for name, number in (("toy_choices", 4), ("toy_rolling", 1), ("toy_written", 4)):
        result = record["results"]["right"][name][name]
        theirs = json.loads(Path(result["files"][0]).read_text())
        assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= set(theirs)
        assert theirs["results"][name] == result["metrics"][name]
        samples = [json.loads(line) for line in Path(result["files"][1]).read_text().splitlines()]
        assert len(samples) == number and {"doc", "arguments", "filtered_resps", "target"} <= set(samples[0])
        assert result["questions"] == {name: number}
        written = json.loads((Path(result["files"][0]).parents[1] / "record.json").read_text())
        assert written["results"]["right"][name][name] == json.loads(json.dumps(to_json(result)))
    choices = record["results"]["none"]["toy_choices"]["toy_choices"]
    assert choices["metrics"]["toy_choices"]["acc,none"] == choices["choices"]["accuracy"]["mean"]
    assert choices["metrics"]["toy_choices"]["acc_norm,none"] == choices["choices"]["accuracy_per_character"]["mean"]
    rolling = record["results"]["none"]["toy_rolling"]["toy_rolling"]
    assert set(rolling["values"]) == {"byte_perplexity,none", "bits_per_byte,none"} and not rolling["choices"]
    lines = table(record).splitlines()
    assert lines[0].split() == ["none", "right", "wrong", "unrelated"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["toy_choices", "acc"],
        ["toy_choices", "acc_norm"],
        ["toy_rolling", "byte_perplexity"],
    ]
    assert any("texts lost" in line and line.startswith("toy_rolling") for line in lines) is False


@pytest.fixture
def adapter(run, tmp_path) -> LMAdapter:
    mesh, requests = mesh_lib.make_mesh(devices=jax.devices()[:1]), tmp_path / "requests.jsonl"
    return LMAdapter(load_model(str(run), mesh), ByteVocabulary(), mesh, requests, batch_tokens=512, batch_size=4)


def test_a_prefix_is_as_if_the_text_began_with_it(adapter):
    prefix, requests, text = "URL: a.org\n\n", [("Hens eat", " corn"), ("", "corn")], "corn " * 40
    with adapter.recorded(prefix):
        behind, rolling = adapter.loglikelihoods(requests), adapter.rolling([text])[0]
        written = adapter.generate([("He", Sampling(4))])
    with adapter.recorded(""):
        assert adapter.loglikelihoods([(prefix + "Hens eat", " corn")])[0] == pytest.approx(behind[0])
        after, before = adapter.rolling([prefix + "corn", prefix])
        assert after - before == pytest.approx(behind[1][0])
        assert adapter.generate([(prefix + "He", Sampling(4))]) == written
        assert adapter.rolling([prefix + text])[0] != pytest.approx(rolling)  # there the prefix is measured too
        assert adapter.rolling([text])[0] != pytest.approx(rolling)


def test_a_text_too_long_loses_its_beginning_and_is_counted(adapter):
    with adapter.recorded("") as asked:
        adapter.loglikelihoods([("a" * 200, "corn"), ("a", "corn")])
        assert (asked.requests, asked.truncated, asked.dropped_tokens) == (2, 1, 1 + 200 + 4 - 129)
        adapter.generate([("a" * 200, Sampling(8)), ("a", Sampling(8))])
    assert (asked.requests, asked.truncated, asked.dropped_tokens) == (4, 2, 76 + 1 + 200 - 120)
    line = toy.refused("task-too-many-new-tokens", adapter.generate, [("a", Sampling(128))])
    assert "asks for 128 new tokens, the model reads 128" in line and "max_gen_toks" in line
    with adapter.recorded("x" * 130):
        assert "131 tokens" in toy.refused("prefix-too-long", adapter.rolling, ["corn"])


def test_killed_it_goes_on_and_asks_for_nothing_twice(run, tasks, record, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluate"))
    requests, ask = copy / "evaluate" / "requests.jsonl", Likelihoods._batch
    small = Harness(batch_tokens=256)

    def killed(*arguments):
        if requests.exists():
            raise KeyboardInterrupt
        return ask(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Likelihoods, "_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_here(copy, tasks, "toy_choices", harness=small)
    assert len(ResumableJsonl(requests).rows()) == 2  # a batch of two rows
    with requests.open("a") as file:
        file.write('{"key": "cut in the mid')
    again = evaluate_here(copy, tasks, "toy_choices", harness=small)["results"]["none"]["toy_choices"]["toy_choices"]
    assert (again["asked"]["requests"], again["asked"]["known"]) == (12, 2)
    expected = record["results"]["none"]["toy_choices"]["toy_choices"]
    for measure, each in expected["choices"].items():
        assert again["choices"][measure]["mean"] == pytest.approx(each["mean"], rel=1e-5)

    def asked(*_):
        raise AssertionError("asked for what is known")

    monkeypatch.setattr(Likelihoods, "_batch", asked)
    third = evaluate_here(copy, tasks, "toy_choices", harness=small)["results"]["none"]["toy_choices"]["toy_choices"]
    assert third["asked"].pop("known") == 12 and again["asked"].pop("known") == 2
    assert third == again
    assert len(ResumableJsonl(requests).rows()) == 12


@given(st.integers(0, 70), st.integers(2, 12), st.integers(1, 3))
def test_rolling_windows_are_those_of_lm_eval(number, max_length, head):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + number))
    windows = rolling_windows([1], ids, max_length)
    expected = map(make_disjoint_window, get_rolling_token_windows(ids, 1, max_length, 1))
    assert [(list(window.context), list(window.continuation)) for window in windows] == list(expected)
    if head <= max_length:  # after a longer head each token is still predicted once, and nothing is too long
        behind = rolling_windows([1] * head, ids, max_length)
        assert [token for window in behind for token in window.continuation] == ids
        assert all(len(window.context) + len(window.continuation) <= max_length + 1 for window in behind)


def test_a_suite_takes_the_better_form_of_each_column(run, tasks, adapter, monkeypatch):
    """A form with another wording, three of the four questions of it, and one without what its answers alone get."""
    wording = {"doc_to_text": "{{question}} They", "doc_to_choice": "{{choices}}"}
    forms = (
        Form("toy_choices", "acc,none", "reworded", 1, 3, wording),
        Form("toy_choices", UNCONDITIONAL, "alone"),
    )
    columns = (Column("Farm", forms), Column("Sea", (), "there is no such task"))
    monkeypatch.setitem(SUITES, "tiny", Suite("a paper", columns))
    record = evaluate_here(run, tasks, "tiny")
    reworded, alone = (record["results"]["none"]["Farm"][label] for label in ("reworded", "alone"))
    assert reworded["questions"] == {"toy_choices": 3} and alone["questions"] == {"toy_choices": 4}
    assert reworded["shots"]["toy_choices"] == 1 and alone["shots"]["toy_choices"] == 0
    assert record["best"]["none"]["Farm"]["value"] == max(reworded["value"], alone["value"])
    mean = max(reworded["value"], alone["value"])
    assert record["averages"]["none"]["average"] == {"mean": mean, "columns": 1, "missing": 1}
    monkeypatch.setitem(SUITES, "other", Suite("a paper", (Column("Farm", (Form("toy_choices", "acc,none"),)),)))
    both = evaluate_here(run, tasks, "tiny,other")
    assert both["averages"]["none"]["tiny average"] == record["averages"]["none"]["average"]
    files = {both["results"]["none"][name][label]["files"][0] for name, label in FARMS}
    assert len(files) == 3 and all(Path(file).exists() for file in files)
    samples = [json.loads(line) for line in Path(reworded["files"][1]).read_text().splitlines()]
    context = samples[0]["arguments"][0][0]
    assert context.count(" They") == 2 and context.endswith("do? They")
    gains = []
    for sample in map(json.loads, Path(alone["files"][1]).read_text().splitlines()):
        prior = adapter.loglikelihoods([("Answer:", answer) for _, answer in sample["arguments"]])
        totals = [float(total) for total, _ in sample["filtered_resps"]]
        gains.append(int(np.subtract(totals, [total for total, _ in prior]).argmax()) == sample["target"])
    assert alone["value"] == np.mean(gains)
