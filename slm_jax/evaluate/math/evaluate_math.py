"""Stage `evaluate math`: a model answers mathematical questions, few-shot by chain of thought or with programs."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax import processes
from slm_jax.configurable import Count, Natural, NotNegative, OneOf, PositiveShare, Seed, configurable
from slm_jax.data import readers
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.evaluate.math import prompts as prompts_lib
from slm_jax.evaluate.math.chain_of_thought import Answered, Attempt, Judge, ask, judged, summarise
from slm_jax.evaluate.math.equality import RULES_VERSION, Grader
from slm_jax.evaluate.math.prompts import Example, Prompt, Style
from slm_jax.evaluate.math.questions import SETS, Question, find_file, read_questions
from slm_jax.evaluate.math.sandbox import Ran, Sandbox
from slm_jax.evaluate.math.tool_use import STOP as TOOL_STOP
from slm_jax.evaluate.math.tool_use import attempts_with_tools, tool_prompt
from slm_jax.files import move_aside, read_json, to_json, write_json
from slm_jax.jsonl import open_result
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models.trained_model import load_model, run_vocabulary
from slm_jax.run_directory import RunDirectory

BATCHES = 4  # of the generator, asked together: it sorts prompts by length
FIRST_IDS = 16  # ids of the first prompt to record: they show whether BOS is there
GRADERS = ("sympy", "latex2sympy2_extended")  # packages


@configurable
def evaluate_math(
    run: str,
    sets: Sequence[Annotated[str, OneOf(SETS)]] = ("gsm8k",),
    data: str = "data",
    output: str | None = None,
    step: Natural | None = None,
    shots: Natural | None = None,
    examples: Mapping[str, str] | None = None,
    questions: Count | None = None,
    max_new_tokens: Count = 1024,
    samples: Count = 1,
    temperature: NotNegative = 0.0,
    top_p: PositiveShare | None = None,
    seed: Seed = 0,
    tools: bool = False,
    rounds: Count = 4,
    sandbox: Sandbox | None = None,
    batch_size: Count = 8,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Measures a model's accuracy on sets of mathematical questions, by its generated answers.

    If interrupted, the same command continues with the unanswered questions. A set finished with other settings is
    kept as NAME.before1.jsonl, before2 and so on; one that was only begun with others is evaluated from the start.
    summary.json covers all sets answered with these settings by this model; a summary of other settings is kept as
    well. While one command evaluates a set, a second one that would write the same file is refused.

    Args:
      run: model directory.
      sets: names of gsm8k, math, math500, svamp, asdiv, mawps, tabmwp, mathqa, mmlu_stem, sat_math, ocw, gsm_hard.
      data: folder of their files: NAME_test.jsonl (.gz, .zst, .parquet), also in its subfolder `eval`, or
        NAME/test.jsonl.
      output: folder of the results; by default `<run>/math/<step>`, with tools `<run>/math/<step>_tools`.
      step: checkpoint; None takes the last.
      shots: worked examples before a question; None takes all of the set's style (8 or 4).
      examples: set -> JSON file with a list of {"question", "solution"}, in place of the built-in examples.
      questions: number of questions per set, from the first; None takes all.
      max_new_tokens: maximum length of an answer, in each round; at most half of the model's maximum length.
      samples: answers per question; from two on, the most frequent answer is judged too.
      temperature: divides the logits; 0 takes the most likely token.
      top_p: sample from the most likely tokens that make up this probability; None samples from all.
      seed: of the sampling.
      tools: the model writes programs, which run in a sandbox; prompts are ToRA's, without examples.
      rounds: with `tools`, how many programs of one answer are run, one after the other.
      sandbox: limits of the programs.
      batch_size: rows continued at a time.
      mesh: how devices share the work.
    """
    # ---- Checks, before anything is loaded
    examples = examples or {}
    _check(sets, samples, temperature, examples)
    files = {name: find_file(name, data) for name in sets}
    asked = {name: read_questions(name, file, questions) for name, file in files.items()}
    sandbox = sandbox or Sandbox()
    how = processes.on_first(sandbox.check) if tools else "by chain of thought"

    # ---- The model, and what all sets share
    devices = mesh_lib.make_mesh(mesh)
    config_lib.print_unused()
    model = load_model(run, devices, step)
    generator = Generator(model.params, model.config, run_vocabulary(run, model.vocabulary_hash), devices, batch_size)
    new = min(max_new_tokens, generator.model.max_length // 2)
    stop = TOOL_STOP if tools else prompts_lib.STOP
    sampling = Sampling(new, temperature, None, top_p, stop, seed)
    where = Path(output or RunDirectory(run).math(model.step, tools))
    total = sum(map(len, asked.values()))
    print(f"evaluate math: step {model.step} of {run} on {total} questions of {', '.join(sets)}, {how} -> {where}")
    if new < max_new_tokens:
        print(
            f"evaluate math: {new} new tokens instead of {max_new_tokens}: the model reads {generator.model.max_length}"
        )
    about = {"run": run, "step": model.step, "fingerprint": model.fingerprint, "max_new_tokens": new}
    about |= {"temperature": temperature, "top_p": top_p, "seed": seed, "samples": samples, "stop": stop}
    about |= {"rounds": rounds if tools else None, "sandbox": sandbox if tools else None, "batch_size": batch_size}
    about["rules"] = RULES_VERSION  # answers graded by other rules are asked again, and kept as NAME.before1.jsonl
    about["graders"] = {package: importlib.metadata.version(package) for package in GRADERS}

    def fits(text: str) -> bool:
        """Whether the model can read a prompt and write an answer after it."""
        return len(generator.encode(text)) + new <= generator.model.max_length

    def run_all(programs: Sequence[str]) -> list[Ran]:
        """Runs them in the first process and sends the results to the others, so that all continue the same texts."""
        return [Ran(*ran) for ran in processes.on_first(lambda: [list(ran) for ran in sandbox.run_all(programs)])]

    def attempts(texts: Sequence[str], seed: int) -> list[Attempt]:
        seeded = dataclasses.replace(sampling, seed=seed)
        if tools:
            return attempts_with_tools(generator.complete, seeded, texts, run_all, rounds, fits)
        return [Attempt(found.text, found.ended) for found in generator.complete(texts, seeded)]

    # ---- One set after the other
    results = {}
    with jax.set_mesh(devices):
        for name in sets:
            style, path = prompts_lib.STYLES[SETS[name].style], examples.get(name)
            shown = () if tools else (prompts_lib.read_examples(path) if path else style.examples)[:shots]

            def prompt_of(question: Question, style: Style = style, shown: Sequence[Example] = shown) -> Prompt | None:
                if not tools:
                    return prompts_lib.fitting(style, shown, question.text, fits)
                prompt = tool_prompt(question.text)
                return prompt if fits(prompt.text) else None

            first = prompt_of(asked[name][0])
            ids = generator.encode(first.text)[:FIRST_IDS] if first else []
            of_set = {"set": name, "questions": len(asked[name]), "texts": _hash(asked[name]), "examples": _hash(shown)}
            of_set |= {"first_prompt": first.text if first else None, "first_ids": ids}
            batch = max(1, BATCHES * batch_size // samples)
            file = str(where / f"{name}.jsonl")
            answer = functools.partial(ask, asked[name], prompt_of, attempts, samples, batch, seed=seed)
            results[name] = {"first_ids": ids, **_answered(name, file, {**about, **of_set}, len(asked[name]), answer)}

    record = {**about, "files": files, "results": results}
    processes.on_first(lambda: _write_summary(where / "summary.json", about, record))
    print(f"evaluate math: done, {where}/summary.json")
    return record


def _check(sets: Sequence[str], samples: int, temperature: float, examples: Mapping[str, str]) -> None:
    """Refuses settings that contradict each other, and a missing package."""
    if not sets or len(set(sets)) < len(sets):
        raise UserError("math-invalid-sets", f"evaluate_math.sets {sets!r}: name each set once, of {', '.join(SETS)}")
    if samples > 1 and temperature == 0:
        raise UserError(
            "sampling-greedy",
            f"evaluate_math.samples = {samples} answers are all the same at temperature 0: set "
            "evaluate_math.temperature above 0",
        )
    if unknown := sorted(set(examples) - set(sets)):
        raise UserError(
            "math-examples-of-other-set",
            f"evaluate_math.examples names {unknown[0]!r}: remove it, or add it to evaluate_math.sets {sets}",
        )
    for package in GRADERS:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                "math-grader-not-installed",
                f"evaluate math compares answers with {package}: pip install latex2sympy2_extended[antlr4_13_2]",
            )


def _answered(
    name: str, path: str, about: dict[str, Any], count: int, answer: Callable[..., Iterator[list[Answered]]]
) -> dict[str, Any]:
    """Asks the unanswered questions of a set and sums up all; every process computes, the first judges and writes."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_result(path, about, count))
        bar = stack.enter_context(progress(count, file.done, name, "question"))
        judge = Judge(stack.enter_context(contextlib.closing(Grader())))
        for answered in answer(done=file.done):
            file.append([judged(*one, judge) if processes.first() else {} for one in answered])
            bar.update(len(answered))
        rows = (record.fields or {} for record in readers.records(str(file.path), ()))
        summary = processes.on_first(lambda: summarise(list(rows)))
    low, high = summary["interval"]
    print(f"  {name}: {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {summary['questions']}", end="")
    print(f", majority {summary['majority']['accuracy']:.3f}" if "majority" in summary else "")
    return summary


def _write_summary(path: Path, about: dict[str, Any], record: dict[str, Any]) -> None:
    """Adds the sets that other commands asked the same model with the same settings."""
    if path.exists():
        before = read_json(path)
        if {**before, **to_json(about)} == before:
            record = {**record, **{part: {**before[part], **record[part]} for part in ("files", "results")}}
        else:
            move_aside(str(path).removesuffix(".json"), ".json")
    write_json(path, record)


def _hash(texts: Sequence[Question] | Sequence[Example]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
