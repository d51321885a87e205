"""The suites of the papers as tables: their columns, and the tasks of lm-evaluation-harness that measure each.

A paper's own pipeline often differs. A note says where the paper does not state shots, metric or wording, and where the
harness has no such task.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from slm_jax.data.metadata import Metadata

UNCONDITIONAL = "unconditional"  # log p(choice | question) - log p(choice | "Answer:"), which lm_eval lacks


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to ask a column's questions.

    Attributes:
      task: a task, group or tag of lm_eval.
      metric: its metric and filter, or UNCONDITIONAL.
      label: distinguishes the forms of a column.
      shots: few-shot examples; None as the task says.
      sampled: maximum number of questions per task, drawn with a fixed seed; None takes all.
      changes: to the task's settings.
      runs_code: whether the metric runs code written by the model.
    """

    task: str
    metric: str
    label: str = ""
    shots: int | None = None
    sampled: int | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    runs_code: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column, whose value is that of its best form; without forms it is not measured.

    Attributes:
      note: printed under the table.
      group: columns of a group are averaged.
      suite: name of its suite where several run together.
    """

    name: str
    forms: tuple[Form, ...] = ()
    note: str = ""
    group: str = "average"
    suite: str = ""


@dataclasses.dataclass(frozen=True)
class Suite:
    source: str
    columns: tuple[Column, ...]


# MeCo's customised URLs (arXiv 2501.01956, section 3.3): the host that a task's questions are said to come from.
HOSTS = {
    "mmlu": "www.testprepportal.com",
    "arc_easy": "www.sciencestudyquiz.com",
    "arc_challenge": "www.sciencestudyquiz.com",
    "commonsense_qa": "www.quizsmart.com",
    "hellaswag": "www.wikihowquiz.com",
    "openbookqa": "www.factquizmaster.com",
    "piqa": "www.basicknowledgequiz.com",
    "social_iqa": "www.socialskillsassessment.com",
    "winogrande": "www.testpreppractice.com",
    "truthfulqa_mc2": "www.factcheckfun.com",
}


def host_prefix(host: str) -> str:
    """The text after BOS for a host: what `prepare` puts before its documents."""
    return Metadata().prefix(host)


# OLMES (arXiv 2406.08446), which MeCo uses: the better of two forms, five fixed examples before each question. Examples
# are the first five of the training split here, and the wording is ours where the paper leaves it open.
ACCURACIES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
OLMES = {"fewshot_config": {"sampler": "first_n"}, "metric_list": ACCURACIES}
RAW, PER_CHARACTER = "acc,none", "acc_norm,none"
LIST = "{% for choice in OF %}\n {{'ABCDE'[loop.index0]}}. {{choice}}{% endfor %}"
TEXTS, ENDINGS = LIST.replace("OF", "choices.text"), LIST.replace("OF", "choices")


def _choices(task: str, question: str, options: str, letters: int | None, sampled: int | None = None) -> Form:
    """Lettered choices, answered by letter. letters: their number; None for as many as there are texts."""
    answers = "{{'ABCDE'[:choices.text|length]|list}}" if letters is None else list("ABCDE"[:letters])
    changes = {**OLMES, "doc_to_text": f"Question: {question}{options}\nAnswer:", "doc_to_choice": answers}
    return Form(task, RAW, "choices", 5, sampled, changes)


def _cloze(task: str, metric: str, question: str = "", sampled: int | None = None) -> Form:
    """Each choice's text as the answer. question: '' keeps the task's wording."""
    changes = {**OLMES, "doc_to_text": f"Question: {question}\nAnswer:"} if question else OLMES
    return Form(task, metric, "cloze", 5, sampled, changes)


def _changed(form: Form, **more: Any) -> Form:
    return dataclasses.replace(form, changes={**form.changes, **more})


SIQA = "{{context}} {{question}}"
OF_SIQA = "\n A. {{answerA}}\n B. {{answerB}}\n C. {{answerC}}"
MECO_FORMS: dict[str, tuple[Form, ...]] = {
    "MMLU": (Form("mmlu", RAW, "choices", 5),),
    "ARC-e": (
        _choices("arc_easy", "{{question}}", TEXTS, None, 1000),
        _cloze("arc_easy", PER_CHARACTER, "{{question}}", 1000),
    ),
    "ARC-c": (
        _choices("arc_challenge", "{{question}}", TEXTS, None),
        _cloze("arc_challenge", UNCONDITIONAL, "{{question}}"),
    ),
    "CSQA": (
        _choices("commonsense_qa", "{{question}}", TEXTS, 5),
        _changed(
            _cloze("commonsense_qa", UNCONDITIONAL, "{{question}}"),
            doc_to_target="{{choices.label.index(answerKey)}}",
            doc_to_choice="{{choices.text}}",
        ),
    ),
    "HSwag": (
        _choices("hellaswag", "{{query}}", ENDINGS, 4, 1000),
        _cloze("hellaswag", PER_CHARACTER, sampled=1000),
    ),
    "OBQA": (
        _choices("openbookqa", "{{question_stem}}", TEXTS, 4),
        _cloze("openbookqa", UNCONDITIONAL, "{{question_stem}}"),
    ),
    "PIQA": (
        _choices("piqa", "{{goal}}", "\n A. {{sol1}}\n B. {{sol2}}", 2, 1000),
        _cloze("piqa", PER_CHARACTER, "{{goal}}", 1000),
    ),
    "SIQA": (_choices("social_iqa", SIQA, OF_SIQA, 3, 1000), _cloze("social_iqa", PER_CHARACTER, SIQA, 1000)),
    "WG": (
        _changed(
            _choices("winogrande", "{{sentence}}", "\n A. {{option1}}\n B. {{option2}}", 2),
            doc_to_target="{{answer|int - 1}}",
        ),
        Form("winogrande", RAW, "cloze", 5, changes={"fewshot_config": OLMES["fewshot_config"]}),
    ),
    "TruQA": (Form("truthfulqa_mc2", RAW),),
}
MECO_NOTES = {
    "MMLU": "choices alone; the mean over questions, OLMES takes that over subjects",
    "TruQA": "mc2, with the six fixed examples of the task",
}
MECO = Suite(
    "MeCo, arXiv 2501.01956, section 3.1 and appendix A; OLMES, arXiv 2406.08446",
    tuple(Column(name, forms, MECO_NOTES.get(name, "")) for name, forms in MECO_FORMS.items()),
)

SHOTS_OPEN, TEN = "shots are not stated", "pass@10 is not measured"
MATHS = "by the paper's rules: slm-jax evaluate math"
RHO1_GENERAL = Suite(
    "Rho-1, arXiv 2404.07965, figure 5 and appendix E",
    (
        Column("MMLU", (Form("mmlu", RAW, shots=5),), SHOTS_OPEN),
        Column("BBH", (Form("bbh_cot_fewshot", "exact_match,get-answer"),), f"{SHOTS_OPEN}: 3, chain of thought"),
        Column("MATH", (Form("minerva_math", "exact_match,none"),), f"4 shots, all of MATH; {MATHS}"),
        Column("GSM8K", (Form("gsm8k_cot", "exact_match,flexible-extract"),), f"8 shots; {MATHS}"),
        Column("MBPP", (Form("mbpp", "pass_at_1,none", runs_code=True),), f"3 shots; {TEN}"),
        Column("HumanEval", (Form("humaneval", "pass@1,create_test", runs_code=True),), f"greedy; {TEN}"),
        Column("AGIEval", (Form("agieval_en", RAW),), f"{SHOTS_OPEN}: 0, the English tasks"),
        Column("ARC-c", (Form("arc_challenge", PER_CHARACTER, shots=0),), SHOTS_OPEN),
        Column("ARC-e", (Form("arc_easy", PER_CHARACTER, shots=0),), SHOTS_OPEN),
        Column("BoolQ", (Form("boolq", RAW, shots=0),), SHOTS_OPEN),
        Column("PIQA", (Form("piqa", PER_CHARACTER, shots=0),), SHOTS_OPEN),
        Column("HellaSwag", (Form("hellaswag", PER_CHARACTER, shots=0),), SHOTS_OPEN),
        Column("WinoGrande", (Form("winogrande", RAW, shots=0),), SHOTS_OPEN),
        Column("OBQA", (Form("openbookqa", PER_CHARACTER, shots=0),), SHOTS_OPEN),
        Column("TydiQA", (Form("tydiqa_goldp", "f1,none", shots=1),), f"{SHOTS_OPEN}: 1, mean of nine languages"),
    ),
)

METRIC_OPEN = "the metric is not stated: this one fits the printed numbers"
CONTINUAL = Suite(
    "Continual pre-training, arXiv 2403.08763, tables of section 6",
    (
        Column("HellaSwag", (Form("hellaswag", PER_CHARACTER, shots=0),), METRIC_OPEN),
        Column("ARC-c", (Form("arc_challenge", RAW, shots=0),), METRIC_OPEN),
        Column("ARC-e", (Form("arc_easy", RAW, shots=0),), METRIC_OPEN),
        Column("BoolQ", (Form("boolq", RAW, shots=0),)),
        Column("MathQA", (Form("mathqa", RAW, shots=0),), SHOTS_OPEN),
        Column("MMLU", (Form("mmlu", RAW, shots=5),)),
        Column("OBQA", (Form("openbookqa", RAW, shots=0),), METRIC_OPEN),
        Column("PIQA", (Form("piqa", RAW, shots=0),), METRIC_OPEN),
        Column("WG", (Form("winogrande", RAW, shots=0),)),
        Column("TfQA1", (Form("truthfulqa_mc1", RAW),)),
        Column("TfQA2", (Form("truthfulqa_mc2", RAW),)),
        Column("NQ", (Form("nq_open", "exact_match,remove_whitespace", shots=5),)),
        Column("TrQA", (Form("triviaqa", "exact_match,remove_whitespace", shots=5),)),
        Column("HellaSwag-DE", (Form("hellaswag_de", PER_CHARACTER, shots=0),), METRIC_OPEN, "German"),
        Column("ARC-c-DE", (Form("arc_de", RAW, shots=0),), METRIC_OPEN, "German"),
        Column("MMLU-DE", (Form("m_mmlu_de", RAW, shots=5),), "", "German"),
        Column("TriviaQA-DE", (), "lm_eval has no German TriviaQA: give one as a task of your own", "German"),
    ),
)

SUITES = {"meco": MECO, "rho1_general": RHO1_GENERAL, "continual": CONTINUAL}
