"""What evaluations say of causal and selective runs: losses, accuracies, margins, repetition (docs/results.md).

    python benchmarks/evaluations_real_text.py --data FOLDER --seeds 0 1 2

Runs `causal` and `selective` of the recipe `math_web` for each seed, then asks each model MMLU-STEM's questions through
lm_eval (each choice as text), lets it answer GSM8K questions, and has it continue such questions and begin texts of its
own. What is finished is not run again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_text import arguments, last, spread, stage

from slm_jax.data.readers import records
from slm_jax.demo.pipeline import demo
from slm_jax.evaluate.math.chain_of_thought import wilson

ROOT = Path("runs/math_web")
RUNS = ("causal", "selective")
STEPS, QUESTIONS, PROMPTS = 150, 200, 64
TASK = """\
task: mmlu_stem
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer_index
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
FOUND: dict[str, Callable[[dict[str, Any]], Any]] = {
    "target loss, nats a token": lambda found: found["last"]["target/loss"],
    "general loss, nats a token": lambda found: found["last"]["general/loss"],
    "MMLU-STEM: gold loss, nats a character": lambda found: found["choices"]["gold_loss_per_character"],
    "margin, nats a character": lambda found: found["choices"]["margin_per_character"],
    "accuracy, by log p a character (chance 0.25)": lambda found: found["choices"]["accuracy_per_character"],
    "accuracy, by log p": lambda found: found["choices"]["accuracy"],
    f"GSM8K: right of {QUESTIONS}, no examples": lambda found: found["solved"],
    "greedy, behind GSM8K questions: distinct 4-grams": lambda found: found["texts"]["greedy/distinct_4"],
    "longest loop, of 128 tokens": lambda found: found["texts"]["greedy/longest_loop"],
    "drawn, behind BOS alone: distinct 1-grams": lambda found: found["texts"]["drawn/distinct_1"],
    "distinct 4-grams": lambda found: found["texts"]["drawn/distinct_4"],
    "longest loop": lambda found: found["texts"]["drawn/longest_loop"],
}


def main() -> None:
    options = arguments(__doc__ or "")
    if not options.report:
        for seed in options.seeds:
            demo(recipe="math_web", data=options.data, stages=RUNS, seed=seed)
            for name in RUNS:
                evaluate(folder_of(seed) / name, Path(options.data).absolute())
    print(table(options.seeds))


def folder_of(seed: int) -> Path:
    return ROOT if seed == 0 else ROOT / f"seed{seed}"


def evaluate(run: Path, data: Path) -> None:
    """Everything that one model is asked."""
    tasks = ROOT / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "mmlu_stem.yaml").write_text(TASK.format(file=data / "eval/mmlu_stem_test.jsonl.gz"))
    common = {"run": str(run)}
    if not record_of(run).exists():
        stage("evaluate", [], common | {"tasks": "mmlu_stem", "include_path": str(tasks)})
    asked = {"evaluate_math.questions": QUESTIONS, "evaluate_math.shots": 0}
    stage("evaluate math", [], common | {"data": str(data)}, **asked)
    if not (run / f"evaluate/{STEPS}.json").exists():
        questions = records(str(data / "gsm8k_test.jsonl.gz"), ())
        prompts = [f"{record.fields['question']}\n" for record, _ in zip(questions, range(PROMPTS), strict=False)]
        settings = {
            "Sampling.max_new_tokens": 128,
            "Samples.vocabulary": str(run),
            "greedy/Samples.name": "greedy",
            "greedy/Samples.prompts": prompts,
            "drawn/Samples.name": "drawn",
            "drawn/Samples.prompts": [""] * PROMPTS,
            "drawn/Sampling.temperature": 1.0,
        }
        samplers = [
            "evaluate.evaluators = [@greedy/Samples(), @drawn/Samples()]",
            "greedy/Samples.sampling = @greedy/Sampling()",
            "drawn/Samples.sampling = @drawn/Sampling()",
        ]
        stage("evaluate", [], common, samplers, **settings)


def record_of(run: Path) -> Path:
    return run / f"evaluate/{STEPS}/mmlu_stem/record.json"


def found_of(run: Path) -> dict[str, Any]:
    choices = json.loads(record_of(run).read_text())["results"]["none"]["mmlu_stem"]["mmlu_stem"]["choices"]
    solved = json.loads((run / f"math/{STEPS}/summary.json").read_text())["results"]["gsm8k"]
    texts = json.loads((run / f"evaluate/{STEPS}.json").read_text())["results"]
    return {"last": last(run), "choices": choices, "solved": solved, "texts": texts}


def table(seeds: list[int]) -> str:
    """Markdown: a measure a line. Mean over seeds, and (lowest to highest); of one run's questions the 95 % interval is
    that far to either side."""
    lines = [f"| measure | {' | '.join(RUNS)} | of one run, 95 % |", "|---|---|---|---|"]
    found = {name: [found_of(folder_of(seed) / name) for seed in seeds] for name in RUNS}
    for measure, of in FOUND.items():
        values = {name: [of(each) for each in found[name]] for name in RUNS}
        first = values[RUNS[0]][0]
        if not isinstance(first, dict):
            cells, interval = [spread(values[name]) for name in RUNS], ""
        elif "mean" in first:
            cells = [spread([value["mean"] for value in values[name]]) for name in RUNS]
            interval = f"± {1.96 * max(value['stderr'] for name in RUNS for value in values[name]):.3f}"
        else:
            right = {name: [round(value["accuracy"] * value["questions"]) for value in values[name]] for name in RUNS}
            cells = [", ".join(map(str, right[name])) for name in RUNS]
            interval = "{:.3f} to {:.3f}".format(*wilson(max(right[RUNS[0]] + right[RUNS[1]]), QUESTIONS))
        lines.append(f"| {measure} | {' | '.join(cells)} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
