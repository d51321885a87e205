"""Stage `generate`: what a model writes behind a prompt, on the terminal or line by line in a file."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import gin

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax.data import readers
from slm_jax.errors import UserError
from slm_jax.evaluate.continuation import Continuation
from slm_jax.evaluate.generation import Generator, Speed
from slm_jax.evaluate.lines import open_lines
from slm_jax.evaluate.sampling import Sampling
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.score.reference import load_model, run_vocabulary

FIELDS = ("prompt", "text")  # of a record: the first that it has is the prompt
FIRST_IDS = 8  # recorded of each prompt: whether BOS and the prefix stand there decides what is written
ENDINGS = {"eos": "ended by EOS", "stop": "ended by a stop", "length": "cut by the limit"}
BATCHES = 4  # so many are written to the file together


@gin.configurable
def generate(
    run: str,
    prompt: str | None = None,
    prompts: str | None = None,
    prefix: str = "",
    output: str | None = None,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    step: int | None = None,
    batch_size: int = 8,
    mesh: MeshConfig | None = None,
) -> None:
    """Continues prompts with a model: one prompt on the terminal, token by token; several as JSON lines in a file.

    Without a prompt, the model begins after BOS alone. A file begun with the same settings and prompts is continued. A
    file finished with other settings is kept as NAME.before1.jsonl, before2 and so on; one that was only begun is
    replaced. While one command writes a file, a second one is refused.

    Args:
      run: model directory: a train run, or an imported model.
      prompt: text to continue.
      prompts: a file of prompts (JSON lines or Parquet) with a field `prompt` or `text`.
      prefix: text placed between BOS and each prompt, tokenized separately, such as "URL: en.wikipedia.org" and an
        empty line.
      output: JSON lines with the results; for several prompts the default is `<run>/generate/<step>.jsonl`.
      sampling: how tokens are chosen and where texts end; a Sampling.
      num_samples: continuations per prompt; they differ only by chance.
      step: checkpoint; None takes the last.
      batch_size: rows continued at a time, over all devices.
      mesh: how devices share the work.
    """
    sampling = sampling or Sampling()
    config_lib.at_least(1, **{"generate.num_samples": num_samples})
    if num_samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"generate.num_samples {num_samples}: at temperature 0 all would be the same: set Sampling.temperature "
            "above 0"
        )
    if "\\n" in prefix:
        raise UserError(
            f"generate.prefix {prefix!r} has a backslash and an n where a line should end: a shell needs "
            "--prefix=$'URL: en.wikipedia.org\\n\\n' for it"
        )
    texts = [text for text in _texts(prompt, prompts) for _ in range(num_samples)]
    devices = mesh_lib.make_mesh(mesh)
    config_lib.print_unused()
    model = load_model(run, devices, step)
    vocabulary = run_vocabulary(run, model.vocabulary_hash)
    generator = Generator(model.params, model.config, vocabulary, devices, batch_size)
    ids = [generator.encode(text, prefix) for text in texts]
    for number, prompt_ids in enumerate(ids):
        generator.check(prompt_ids, sampling, f"prompt {number + 1} of {len(ids)}")
    about = {
        "run": run,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "prefix": {"text": prefix, "ids": generator.encode(prefix)[1:]},
        "prompts": {"file": prompts, "number": len(texts), "sha256": _hash(texts)},
        "num_samples": num_samples,
        "sampling": sampling,
    }
    if prompts is None and num_samples == 1:
        _one(generator, texts[0], ids[0], about, output)
    else:
        _several(generator, texts, ids, about, output or f"{run}/generate/{model.step}.jsonl")


def _texts(prompt: str | None, prompts: str | None) -> list[str]:
    if prompts is None:
        return [prompt or ""]
    if prompt is not None:
        raise UserError("generate.prompt and generate.prompts exclude each other: leave one out")
    texts = []
    for path in readers.resolve([prompts], "generate.prompts"):
        for record in readers.records(path, FIELDS):
            if record.fields is None:
                raise UserError(f"{record.place} is {record.problem}: each line holds an object with a prompt")
            text = next((record.fields[name] for name in FIELDS if name in record.fields), None)
            if not isinstance(text, str):
                raise UserError(f"{record.place} has no text in {' or '.join(FIELDS)}, but {sorted(record.fields)}")
            texts.append(text)
    if not texts:
        raise UserError(f"generate.prompts {prompts} holds no prompt: write one JSON object a line")
    return texts


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _line(place: int, text: str, ids: Sequence[int], about: dict[str, Any], made: Continuation) -> dict[str, Any]:
    return {
        "place": place,
        "prompt": text,
        "prefix": about["prefix"]["text"],
        "first_ids": list(ids[:FIRST_IDS]),
        "prompt_tokens": len(ids),
        "text": made.text,
        "tokens": len(made.tokens),
        "ended": made.ended,
        "seed": about["sampling"].seed,
    }


def _one(generator: Generator, text: str, ids: Sequence[int], about: dict[str, Any], output: str | None) -> None:
    """Streams to the terminal."""
    first = ", ".join(map(str, ids[:FIRST_IDS])) + (", ..." if len(ids) > FIRST_IDS else "")
    print(
        f"generate: step {about['step']} of {about['run']}, up to {about['sampling'].max_new_tokens} tokens behind "
        f"{len(ids)} [{first}]\n"
    )
    print(shown(about["prefix"]["text"] + text), end="", flush=True)
    made = None
    for piece in generator.stream(ids, about["sampling"]):
        if isinstance(piece, str):
            print(shown(piece), end="", flush=True)
        else:
            made = piece
    assert made is not None
    print(f"\n\ngenerate: {ENDINGS[made.ended]} after {len(made.tokens)} tokens; {_measured(generator.speed)}")
    if output is not None:
        with open_lines(output, about, 1) as file:
            if not file.done:
                file.append([_line(0, text, ids, about, made)])
        print(f"generate: see {output}")


def _several(
    generator: Generator, texts: Sequence[str], ids: Sequence[Sequence[int]], about: dict[str, Any], output: str
) -> None:
    """Writes a file, a few batches at a time."""
    total, lengths, sampling = len(ids), list(map(len, ids)), about["sampling"]
    print(
        f"generate: step {about['step']} of {about['run']}, up to {sampling.max_new_tokens} tokens behind each of "
        f"{total} prompts ({min(lengths)} to {max(lengths)} tokens, BOS and prefix among them) -> {output}"
    )
    ended = Counter()
    with open_lines(output, about, total) as file, progress(total, file.done, "generate", "prompt") as bar:
        while file.done < total:
            places = range(file.done, min(file.done + BATCHES * generator.batch_size, total))
            made = generator.continue_ids([ids[place] for place in places], sampling, first_place=places.start)
            found = [_line(p, texts[p], ids[p], about, one) for p, one in zip(places, made, strict=True)]
            file.append(found)
            ended.update(one.ended for one in made)
            bar.update(len(found))
            if about["prompts"]["file"] is None:
                for line in found:
                    bar.write(
                        f"\n[{line['place'] + 1}: {ENDINGS[line['ended']]}] {shown(line['prompt'] + line['text'])}"
                    )
    if not ended:
        print(f"generate: {output} is complete already")
        return
    counts = ", ".join(f"{ended[name]} {words}" for name, words in ENDINGS.items() if ended[name])
    print(f"generate: {counts}; {_measured(generator.speed)}\ngenerate: see {output}")


def _measured(speed: Speed) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens} tokens in {seconds:.2f} s" + (f" ({tokens / seconds:,.0f} a second)" if tokens else "")

    read, made = rate(speed.prompt_tokens, speed.reading), rate(speed.new_tokens, speed.making)
    return f"read {read}, wrote {made}, compiled in {speed.compiling:.1f} s"


def shown(text: str) -> str:
    """For a terminal: control characters, which could command it, as their names."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
