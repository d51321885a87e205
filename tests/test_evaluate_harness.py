"""lm-evaluation-harness on our models: the numbers of its own Hugging Face class, kept answers, suites, conditions."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slm_jax.checkpoint import Checkpoints
from slm_jax.config import to_json
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.evaluate.stage import evaluate
from slm_jax.models import forward
from slm_jax.models.config import ModelConfig

pytest.importorskip("lm_eval")
REAL = Path(__file__).parents[2] / "shared" / "data"
MODEL = ModelConfig(
    260, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48, max_length=192, init_std=0.3
)
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
    questions = [
        {"question": f"What do {animal} do?", "choices": ["Swim", "Fly high", "Eat corn"], "answer": number % 3}
        for number, animal in enumerate(("hens", "ducks", "pigs", "cows"))
    ]
    return write_tasks(
        tmp_path_factory.mktemp("tasks") / "tasks",
        {"choices": questions, "rolling": [{"text": "Hens eat corn. " * 20}], "written": questions},
    )


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
    ours = parity._as_ours(parity._tensors(theirs, MODEL, lambda parameter: parameter), MODEL, parity.LLAMA)
    mmlu, gsm8k = real("eval/mmlu_stem_test.jsonl.gz")[:8], real("gsm8k_test.jsonl.gz")[:3]
    rows = {
        "choices": [{"question": q["question"], "choices": q["choices"], "answer": q["answer_index"]} for q in mmlu],
        "rolling": [{"text": text["text"][:500]} for text in real("wikitext2_raw_test.jsonl.gz")[:2]],
        "written": [{"question": q["question"], "answer": q["final_answer"]} for q in gsm8k],
    }
    folder = write_tasks(tmp_path / "tasks", rows)
    names = [f"toy_{name}" for name in rows][:2]
    record = evaluate(str(save(tmp_path / "run", ours, MODEL)), tasks=",".join(names), include_path=str(folder))
    assert record["results"]["none"]["toy_choices"]["toy_choices"]["asked"]["truncated"] > 0

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    expected = {}
    for name in names:  # its rolling windows would have two BOS: one of the tokenizer, one of its own
        bos = name != "toy_rolling"
        wrapped = HFLM(theirs, tokenizer=tokenizer(), device="cpu", batch_size=4, max_length=192, add_bos_token=bos)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        expected[name] = simple_evaluate(wrapped, tasks=[name], task_manager=manager)
    for name in names:
        samples = json.loads("[" + ",".join(Path(file(record, name, 1)).read_text().splitlines()) + "]")
        for sample, other in zip(samples, expected[name]["samples"][name], strict=True):
            assert sample["doc_id"] == other["doc_id"] and sample["arguments"] == to_json(other["arguments"])
            answers, others = (
                [np.ravel(answer).tolist() for answer in each["filtered_resps"]] for each in (sample, other)
            )
            if name == "toy_written":
                assert answers == others
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

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2} | {characters[byte]: 3 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
