"""The suites' tables, what their forms ask, conditions, results as a table, and mistakes in one line."""

import dataclasses
import json
import sys

import pytest
import toy

from slm_jax.data.conversations import TEMPLATES, Turn, written
from slm_jax.evaluate.evaluate import evaluate
from slm_jax.evaluate.generation import Sampling
from slm_jax.evaluate.harness import Harness, TaskLoader, chat_text, sampling_of, scored
from slm_jax.evaluate.multiple_choice import Scored
from slm_jax.evaluate.perplexity import HeldOut
from slm_jax.evaluate.suites import HOSTS, MECO_FORMS, SUITES, Column, Form, host_prefix
from slm_jax.evaluate.tasks import averages, best_form, columns_of, prefixes, table, unconditional

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """What lm_eval's libraries keep goes to a folder of the tests, and they look for nothing elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def loader(offline) -> TaskLoader:
    """With all of lm_eval's own tasks."""
    loader = TaskLoader(None, offline=True, run_model_code=False)
    loader.check(["mmlu"])
    return loader


def test_suites_name_what_lm_eval_has(loader):
    loader.check([form.task for suite in SUITES.values() for column in suite.columns for form in column.forms])
    assert {name: len(suite.columns) for name, suite in SUITES.items()} == {
        "meco": 10,
        "rho1_general": 15,
        "continual": 17,
    }
    groups = [column.group for column in SUITES["continual"].columns]
    assert groups.count("average") == 13 and groups.count("German") == 4
    assert {form.task for column in SUITES["meco"].columns for form in column.forms} == set(HOSTS)
    assert host_prefix(HOSTS["mmlu"]) == "URL: www.testprepportal.com\n\n"
    assert all(column.forms or column.note for suite in SUITES.values() for column in suite.columns)


# A question of each data set, with the fields that it has there; the context, the answers, and the right one.
ARC = {"question": "Q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}
FIVE = {"question": "Q?", "choices": {"text": list("abcde"), "label": list("ABCDE")}, "answerKey": "D"}
SWAG = {"ind": 0, "activity_label": "Farm", "ctx_a": "Hens.", "ctx_b": "they", "endings": list("abcd"), "label": "3"}
BOOK = {"question_stem": "Q?", "choices": {"text": list("abcd"), "label": list("ABCD")}, "answerKey": "B"}
PHYSICAL = {"goal": "Q?", "sol1": "a", "sol2": "b", "label": 1}
SOCIAL = {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}
GRANDE = {"sentence": "The _ swims.", "option1": "hen", "option2": "duck", "answer": "2"}
LINES = ["\n A. a", "\n B. b", "\n C. c", "\n D. d", "\n E. e"]
ASKED = {
    ("arc_easy", "choices"): (ARC, f"Question: Q?{''.join(LINES[:3])}\nAnswer:", "A B C", 1),
    ("arc_easy", "cloze"): (ARC, "Question: Q?\nAnswer:", "a b c", 1),
    ("commonsense_qa", "choices"): (FIVE, f"Question: Q?{''.join(LINES)}\nAnswer:", "A B C D E", 3),
    ("commonsense_qa", "cloze"): (FIVE, "Question: Q?\nAnswer:", "a b c d e", 3),
    ("hellaswag", "choices"): (SWAG, f"Question: Farm: Hens. They{''.join(LINES[:4])}\nAnswer:", "A B C D", 3),
    ("hellaswag", "cloze"): (SWAG, "Farm: Hens. They", "a b c d", 3),
    ("openbookqa", "choices"): (BOOK, f"Question: Q?{''.join(LINES[:4])}\nAnswer:", "A B C D", 1),
    ("openbookqa", "cloze"): (BOOK, "Question: Q?\nAnswer:", "a b c d", 1),
    ("piqa", "choices"): (PHYSICAL, f"Question: Q?{''.join(LINES[:2])}\nAnswer:", "A B", 1),
    ("piqa", "cloze"): (PHYSICAL, "Question: Q?\nAnswer:", "a b", 1),
    ("social_iqa", "choices"): (SOCIAL, f"Question: C. Q?{''.join(LINES[:3])}\nAnswer:", "A B C", 2),
    ("social_iqa", "cloze"): (SOCIAL, "Question: C. Q?\nAnswer:", "a b c", 2),
    ("winogrande", "choices"): (GRANDE, "Question: The _ swims.\n A. hen\n B. duck\nAnswer:", "A B", 1),
    ("winogrande", "cloze"): (GRANDE, "The hen", "swims. swims.", 1),
}


@pytest.mark.parametrize("name", ASKED, ids="_".join)
def test_forms_of_olmes_ask_what_they_should(name, loader, tmp_path):
    """With one example, the same question with its right answer, before the question."""
    row, context, answers, gold = ASKED[name]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    (form,) = (form for forms in MECO_FORMS.values() for form in forms if (form.task, form.label) == name)
    changes = dict.fromkeys(("training_split", "validation_split", "test_split"), "train") | {"num_fewshot": 1}
    changes |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"train": str(data)}}}
    loaded = loader.load(dataclasses.replace(form, changes={**form.changes, **changes}))
    (task,) = loaded["tasks"].values()
    task.build_all_requests(limit=1)
    asked = [instance.args for instance in task.instances]
    expected = [f" {answer}" for answer in answers.split()]
    assert [answer for _, answer in asked] == expected
    before = "The duck" if name == ("winogrande", "cloze") else context  # there the options are in the context
    assert asked[0][0] == f"{before}{expected[gold]}\n\n{context}"
    likelihoods = scored(task, {"doc": task.eval_docs[0], "filtered_resps": [(-1.0, True)] * len(asked)})
    assert likelihoods is not None and likelihoods.gold == gold and len(likelihoods.totals) == len(expected)


@pytest.mark.parametrize("name, expected", [("truthfulqa_mc1", 0), ("truthfulqa_mc2", None)])
def test_where_several_choices_are_right_none_is_the_gold_one(name, expected, loader, tmp_path):
    """TruthfulQA's mc2 says that the first is right; which are is in its labels."""
    data = tmp_path / "data.jsonl"
    row = {"question": "Q?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}}
    data.write_text(json.dumps(row | {"mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 1, 0]}}) + "\n")
    files = {"validation": str(data)}
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (task,) = loader.load(Form(name, "acc,none", changes=changes))["tasks"].values()
    sample = {"doc": task.eval_docs[0], "filtered_resps": [(-1.0, True)] * 3}
    found = scored(task, sample)
    assert (found.gold if found else None) == expected


def test_columns_and_conditions():
    assert [column.name for column in columns_of("meco, mine", False)][-2:] == ["TruQA", "mine"]
    code = {column.name: column for column in columns_of("rho1_general", False)}["HumanEval"]
    assert not code.forms and "--run_model_code" in code.note
    assert all(column.forms for column in columns_of("rho1_general", True))
    assert "boolq is named twice" in toy.refused("tasks-invalid-list", columns_of, "boolq,boolq", False)
    assert "(meco, rho1_general, continual)" in toy.refused("tasks-invalid-list", columns_of, " , ", False)
    line = toy.refused("tasks-invalid-list", columns_of, "meco,continual,meco", False)
    assert "meco MMLU is named twice" in line

    columns, harness = columns_of("mmlu,mine", False), Harness(hosts={"mine": "www.mine.org"})
    found = prefixes(columns, "none,right,wrong,unrelated", None, harness)
    assert found["none"] == {"mmlu": "", "mine": ""}
    assert found["right"] == {"mmlu": "URL: www.testprepportal.com\n\n", "mine": "URL: www.mine.org\n\n"}
    assert all(found["wrong"][task] not in (found["right"][task], "") for task in ("mmlu", "mine"))
    assert found["unrelated"]["mmlu"] == "URL: boards.4chan.org\n\n"
    assert prefixes(columns, None, "Hello ", harness) == {"given": {"mmlu": "Hello ", "mine": "Hello "}}
    assert list(prefixes(columns, "none,given", "Hello ", harness)) == ["none", "given"]
    for code, named, *given in (
        ("tasks-unknown-condition", "'best'", "best", None, harness),
        ("tasks-prefix-without-condition", "evaluate.prefix", "none", "Hello", harness),
        ("tasks-prefix-without-condition", "'given'", "given", None, harness),
        ("prefix-escaped-newline", "evaluate.prefix", None, r"URL: a.org\n\n", harness),
        ("tasks-unknown-host", "Harness.hosts = {'mine': 'www.example.org'}", "right", None, Harness()),
    ):
        assert named in toy.refused(code, prefixes, columns, *given)


def test_several_suites_are_told_apart():
    columns = columns_of("meco,continual,mine", False)
    names = [column.name for column in columns]
    assert names[0] == "meco MMLU" and "continual MMLU" in names and names[-1] == "mine"
    assert len(set(names)) == len(names) == 10 + 17 + 1
    best = {name: {"value": 1.0 if name.startswith("meco") else 0.5} for name in names}
    best["continual TriviaQA-DE"] = None
    assert averages(columns, best) == {
        "meco average": {"mean": 1.0, "columns": 10, "missing": 0},
        "continual average": {"mean": 0.5, "columns": 13, "missing": 0},
        "continual German": {"mean": 0.5, "columns": 3, "missing": 1},
    }


def result(value: float, **more) -> dict:
    asked = {"requests": 4, "truncated": 0, "dropped_tokens": 0, **more}
    values = {"acc,none": {"value": value, "stderr": 0.1}}
    return {**values["acc,none"], "metric": "acc,none", "values": values, "choices": {}, "asked": asked}


def test_a_suite_as_a_table():
    """The better form counts; what was not measured is left out of the mean, and that is said."""
    form = Form("t", "acc,none")
    columns = [
        *(Column("one", (form,)), Column("two", (form,))),
        *(Column("none", (), "there is none"), Column("t", (form,), group="")),
    ]
    worse, better = result(0.4), result(0.5, truncated=1, dropped_tokens=1234)
    results = {"one": {"choices": worse, "cloze": better}, "two": {"t": result(0.25)}, "none": {}}
    results["t"] = {"t": result(1.0)}
    best = {name: best_form(forms) for name, forms in results.items()}
    assert best["one"] == {"form": "cloze", **{name: better[name] for name in better if name != "asked"}}
    record = {"columns": columns, "results": {"none": results}, "best": {"none": best}}
    record["averages"] = {"none": averages(columns, best)}
    assert record["averages"]["none"] == {"average": {"mean": 0.375, "columns": 2, "missing": 1}}
    assert [line.split() for line in table(record).splitlines()[:6]] == [
        ["none"],
        ["one", "0.5000", "±", "0.1000"],
        ["two", "0.2500", "±", "0.1000"],
        ["none", "-"],
        ["t", "acc", "1.0000", "±", "0.1000"],
        ["average", "without", "1", "of", "3", "0.3750"],
    ]
    assert "none: there is none" in table(record)
    assert "one cloze, after BOS none: 1 of 4 texts lost 1,234 tokens on their left" in table(record)


def test_what_the_answer_alone_would_get_is_taken_away():
    """Raw, both questions are answered with the second choice; it is likely after any question."""
    asked = {("t", 0): Scored([-3.0, -2.0], [1, 1], 0), ("t", 5): Scored([-9.0, -2.0], [1, 1], 1)}
    alone = {("t", 0): Scored([-5.0, -1.0], [1, 1], 0), ("t", 5): Scored([-5.0, -1.0], [1, 1], 1)}
    assert unconditional(asked, alone) == {"value": 1.0, "stderr": 0.0}
    assert (
        unconditional(asked, {place: each._replace(totals=[0.0, 0.0]) for place, each in alone.items()})["value"] == 0.5
    )


def test_what_a_task_generates_with():
    settings = {"until": ["\n", ""], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0, "top_p": 0.5}
    assert sampling_of(settings) == Sampling(5, stop=("\n",))
    assert sampling_of(settings | {"do_sample": True, "temperature": 0.5}) == Sampling(5, 0.5, top_p=0.5, stop=("\n",))
    for name in ("num_beams", "length_penalty"):
        assert name in toy.refused("task-unknown-generation-setting", sampling_of, settings | {name: 2})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_written_as_for_training(name):
    """Up to the response that comes next, and within one that is begun."""
    template = TEMPLATES[name]
    turns = [Turn("system", "S"), Turn("user", "Q?"), Turn("assistant", "A."), Turn("user", "And?")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole = written([*turns, Turn("assistant", "It is so.")], template)[0]
    asked = chat_text(template, messages, True)
    assert asked + "It is so." + template.closes == whole
    begun = chat_text(template, [*messages, {"role": "assistant", "content": "It is"}], False)
    assert begun + " so." + template.closes == whole


QUESTION = {"question": "Q?", "choices": ["a", "b"], "answer": 0}
OWN = """
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""


@pytest.mark.parametrize(
    "data, code, named",
    [
        ("", "no-records", "FOLDER/mine.jsonl"),
        ("\n", "no-records", "FOLDER/mine.jsonl"),
        (json.dumps(QUESTION) + '\n{"question":\n', "record-invalid", "FOLDER/mine.jsonl:2"),
        (json.dumps({"choices": ["a"], "answer": 0}), "harness-task-not-loaded", "'question' is undefined"),
    ],
)
def test_data_of_ones_own_that_cannot_be_read(data, code, named, tmp_path):
    (tmp_path / "mine.jsonl").write_text(data)
    files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'mine.jsonl'}}}}}"
    (tmp_path / "mine.yaml").write_text(f"task: mine\ntag: all_mine\n{files}{OWN}")
    loader = TaskLoader(str(tmp_path), offline=True, run_model_code=False)
    loader.check(["mine", "all_mine"])
    for name in ("mine", "all_mine"):
        text = toy.refused(code, loader.load, Form(name, "acc,none"))
        assert "mine" in text and named.replace("FOLDER", str(tmp_path)) in text


def test_a_file_that_is_no_yaml_is_named(loader, tmp_path, monkeypatch):
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: [json\ntest_split: test\n")
    monkeypatch.setattr(loader, "_folder", str(tmp_path))
    assert f"{tmp_path}/bad.yaml:3" in toy.refused("harness-invalid-yaml", loader.check, ["bad"])
    loader.check(["arc_easy"])  # which needs nothing of it


def test_mistakes(loader, tmp_path, monkeypatch):
    assert "did you mean 'arc_easy'?" in toy.refused("harness-unknown-task", loader.check, ["arc_esy"])
    line = toy.refused("harness-task-not-loaded", loader.load, Form("arc_easy", "acc,none"))
    assert "arc_easy" in line and "evaluate.offline" in line and "ai2_arc" in line
    assert "evaluate.tasks" in toy.refused(
        "settings-exclusive", evaluate, "run", [HeldOut("held", "corpus")], tasks="boolq"
    )
    assert "Harness.chat is 'mine'" in toy.refused("setting-unknown-value", Harness, chat="mine")
    assert "Harness.limit is 0" in toy.refused("setting-out-of-range", Harness, limit=0)
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in toy.refused("harness-folder-not-found", evaluate, "run", tasks="boolq", include_path=nowhere)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install lm_eval" in toy.refused("harness-not-installed", TaskLoader, None, False, False)
