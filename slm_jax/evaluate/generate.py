"""Stage `generate`: continues prompts with a model, on the terminal or line by line in a file."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from slm_jax import config as config_lib
from slm_jax import mesh as mesh_lib
from slm_jax.configurable import Count, Natural, OneOf, configurable
from slm_jax.data import readers
from slm_jax.data.conversations import TEMPLATES, ChatVocabulary
from slm_jax.errors import UserError
from slm_jax.evaluate.generation import Continuation, GenerationStats, Generator, Sampling
from slm_jax.evaluate.harness import chat_text
from slm_jax.evaluate.prefix import refuse_escaped_newline
from slm_jax.jsonl import open_result
from slm_jax.mesh import MeshConfig
from slm_jax.metrics import progress
from slm_jax.models.trained_model import load_model, run_vocabulary

FIELDS = ("prompt", "text")  # of a record: the first that it has is the prompt
FIRST_IDS = 8  # ids of each prompt to record: they show whether BOS and the prefix are there
ENDINGS = {"eos": "ended by EOS", "stop": "ended by a stop string", "length": "cut by the limit"}
BATCHES = 4  # batches whose continuations are written to the file together


@configurable
def generate(
    run: str,
    prompt: str | None = None,
    prompts: str | None = None,
    prefix: str = "",
    chat: Annotated[str, OneOf(TEMPLATES)] | None = None,
    output: str | None = None,
    sampling: Sampling | None = None,
    num_samples: Count = 1,
    step: Natural | None = None,
    batch_size: Count = 8,
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
      chat: a template of `Source.template`, which formats each prompt as a user's turn to be answered; None continues
        the prompt itself.
      output: JSON lines with the results; for several prompts the default is `<run>/generate/<step>.jsonl`.
      sampling: how tokens are chosen and where texts end; a Sampling.
      num_samples: continuations per prompt; they differ only by chance.
      step: checkpoint; None takes the last.
      batch_size: rows continued at a time, over all devices.
      mesh: how devices share the work.
    """
    sampling = sampling or Sampling()
    if num_samples > 1 and sampling.temperature == 0:
        raise UserError(
            "sampling-greedy",
            f"generate.num_samples = {num_samples} continuations are all the same at temperature 0: set "
            "Sampling.temperature above 0",
        )
    refuse_escaped_newline("generate.prefix", prefix)

    # ---- Prompts, all of them checked before the first is continued
    texts = [text for text in _read_prompts(prompt, prompts) for _ in range(num_samples)]
    devices = mesh_lib.make_mesh(mesh)
    config_lib.print_unused()
    model = load_model(run, devices, step)
    vocabulary = run_vocabulary(run, model.vocabulary_hash)
    if chat:
        texts = [chat_text(TEMPLATES[chat], [{"role": "user", "content": text}], answer_next=True) for text in texts]
        vocabulary = ChatVocabulary(vocabulary)
    generator = Generator(model.params, model.config, vocabulary, devices, batch_size)
    ids = [generator.encode(text, prefix) for text in texts]
    for number, prompt_ids in enumerate(ids):
        generator.check(prompt_ids, sampling, f"prompt {number + 1} of {len(ids)}")

    # ---- What decides the result: a file begun with the same record is continued
    sha256 = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    about = {
        "run": run,
        "step": model.step,
        "fingerprint": model.fingerprint,
        "prefix": {"text": prefix, "ids": generator.encode(prefix)[1:]},
        "prompts": {"file": prompts, "number": len(texts), "sha256": sha256},
        "num_samples": num_samples,
        "sampling": sampling,
    } | ({"chat": chat} if chat else {})
    if prompts is None and num_samples == 1:
        _to_terminal(generator, texts[0], ids[0], about, output)
    else:
        _to_file(generator, texts, ids, about, output or f"{run}/generate/{model.step}.jsonl")


def _read_prompts(prompt: str | None, prompts: str | None) -> list[str]:
    if prompts is None:
        return [prompt or ""]
    if prompt is not None:
        raise UserError("settings-exclusive", "generate.prompt and generate.prompts exclude each other: remove one")
    texts = []
    for path in readers.resolve([prompts], "generate.prompts"):
        for record in readers.records(path, FIELDS):
            if record.fields is None:
                remedy = "write one object with a prompt per line"
                raise UserError("record-invalid", f"{record.place} is {record.problem}: {remedy}")
            text = next((record.fields[name] for name in FIELDS if name in record.fields), None)
            if not isinstance(text, str):
                raise UserError(
                    "record-invalid",
                    f"{record.place} has no text in {' or '.join(FIELDS)}, only {sorted(record.fields)}: write one "
                    "object with a prompt per line",
                )
            texts.append(text)
    if not texts:
        raise UserError("no-records", f"generate.prompts: {prompts} has no prompts: write one JSON object per line")
    return texts


def _to_terminal(
    generator: Generator, text: str, ids: Sequence[int], about: dict[str, Any], output: str | None
) -> None:
    """Streams one continuation; `output` keeps it as well."""
    first = ", ".join(map(str, ids[:FIRST_IDS])) + (", ..." if len(ids) > FIRST_IDS else "")
    print(
        f"generate: step {about['step']} of {about['run']}, up to {about['sampling'].max_new_tokens} tokens after "
        f"{len(ids)} [{first}]\n"
    )
    print(printable(about["prefix"]["text"] + text), end="", flush=True)
    made = None
    for piece in generator.stream(ids, about["sampling"]):
        if isinstance(piece, str):
            print(printable(piece), end="", flush=True)
        else:
            made = piece
    assert made is not None
    print(f"\n\ngenerate: {ENDINGS[made.ended]} after {len(made.tokens)} tokens; {_timing(generator.stats)}")
    if output is not None:
        with open_result(output, about, 1) as file:
            if not file.done:
                file.append([_line(0, text, ids, about, made)])
        print(f"generate: see {output}")


def _to_file(
    generator: Generator, texts: Sequence[str], ids: Sequence[Sequence[int]], about: dict[str, Any], output: str
) -> None:
    """Writes continuations as JSON lines, a few batches at a time; shows those that came from no file."""
    total, lengths, sampling = len(ids), list(map(len, ids)), about["sampling"]
    print(
        f"generate: step {about['step']} of {about['run']}, up to {sampling.max_new_tokens} tokens after each of "
        f"{total} prompts ({min(lengths)} to {max(lengths)} tokens, including BOS and prefix) -> {output}"
    )
    ended = Counter()
    with open_result(output, about, total) as file, progress(total, file.done, "generate", "prompt") as bar:
        while file.done < total:
            places = range(file.done, min(file.done + BATCHES * generator.batch_size, total))
            made = generator.continue_ids([ids[place] for place in places], sampling, first_place=places.start)
            found = [_line(p, texts[p], ids[p], about, one) for p, one in zip(places, made, strict=True)]
            file.append(found)
            ended.update(one.ended for one in made)
            bar.update(len(found))
            for line in found if about["prompts"]["file"] is None else ():
                text = printable(line["prompt"] + line["text"])
                bar.write(f"\n[{line['place'] + 1}: {ENDINGS[line['ended']]}] {text}")
    if not ended:
        print(f"generate: {output} is already complete")
        return
    counts = ", ".join(f"{ended[name]} {words}" for name, words in ENDINGS.items() if ended[name])
    print(f"generate: {counts}; {_timing(generator.stats)}\ngenerate: see {output}")


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


def _timing(stats: GenerationStats) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens} tokens in {seconds:.2f} s" + (f" ({tokens / seconds:,.0f} per second)" if tokens else "")

    read, made = rate(stats.prompt_tokens, stats.prefill_seconds), rate(stats.new_tokens, stats.decode_seconds)
    return f"read {read}, wrote {made}, compiled in {stats.compile_seconds:.1f} s"


def printable(text: str) -> str:
    """Replaces control characters, which could command a terminal, by their escapes."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
