"""The stage `generate`: the output on the terminal and in the file, and what a second command adds to it."""

import dataclasses
import json
from pathlib import Path

import pytest
import toy

from slm_jax import mesh as mesh_lib
from slm_jax.data.vocabulary import ByteVocabulary
from slm_jax.evaluate import generate as stage
from slm_jax.evaluate.generation import Generator, Sampling
from slm_jax.jsonl import ResumableJsonl
from slm_jax.models.trained_model import load_model

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, seed=3)
TEXTS = ["the farm", "hens and pigs", "", "corn", "12 ducks"]
IDS = ByteVocabulary().encode


def generate_here(run: Path, **settings) -> None:
    """`generate` in this process, on one device."""
    with toy.one_device():
        stage.generate(str(run), sampling=settings.pop("sampling", SAMPLING), **settings)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"prompt" if number % 2 else "text": text, "id": number} for number, text in enumerate(TEXTS)]
    path.write_text("\n\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture(scope="module")
def expected(reference):
    """What the generator itself gives."""
    with toy.one_device():
        mesh = mesh_lib.make_mesh()
        model = load_model(str(reference), mesh)
    return Generator(model.params, model.config, ByteVocabulary(), mesh).complete(TEXTS, SAMPLING, prefix="URL: a\n\n")


def read(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_continuations(reference, prompts, expected, tmp_path, capsys):
    output = tmp_path / "deep" / "out.jsonl"
    generate_here(reference, prompts=prompts, prefix="URL: a\n\n", output=str(output))
    lines = read(output)
    for place, (line, text, continuation) in enumerate(zip(lines, TEXTS, expected, strict=True)):
        ids = [1, *IDS("URL: a\n\n"), *IDS(text)]
        assert line == {
            "place": place,
            "prompt": text,
            "prefix": "URL: a\n\n",
            "first_ids": ids[:8],
            "prompt_tokens": len(ids),
            "text": continuation.text,
            "tokens": len(continuation.tokens),
            "ended": continuation.ended,
            "seed": 3,
        }
    about = json.loads((tmp_path / "deep" / "out.about.json").read_text())
    assert about["step"] == 6 and about["run"] == str(reference) and about["sampling"]["temperature"] == 1.0
    assert about["prefix"] == {"text": "URL: a\n\n", "ids": IDS("URL: a\n\n")}
    assert about["prompts"]["number"] == 5 and about["prompts"]["file"] == prompts
    printed = capsys.readouterr().out
    assert f"up to 12 tokens after each of 5 prompts (9 to 22 tokens, including BOS and prefix) -> {output}" in printed
    assert "per second), wrote" in printed and f"see {output}" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.about.json", "out.jsonl", "out.jsonl.lock"]


def test_a_prompt_is_continued_on_the_terminal(reference, expected, tmp_path, capsys):
    for output in (None, str(tmp_path / "out.jsonl")):
        generate_here(reference, prompt=TEXTS[0], prefix="URL: a\n\n", output=output)
        printed = capsys.readouterr().out
        assert (
            "generate: step 6" in printed
            and "up to 12 tokens after 17 [1, 88, 85, 79, 61, 35, 100, 13, ...]" in printed
        )
        assert "\n\n" + stage.printable("URL: a\n\n" + TEXTS[0] + expected[0].text) + "\n\ngenerate: " in printed
        assert f"after {len(expected[0].tokens)} tokens; read 17 tokens in " in printed and "compiled in" in printed
    [line] = read(tmp_path / "out.jsonl")
    assert line["text"] == expected[0].text and line["prompt"] == TEXTS[0] and line["place"] == 0


def test_a_model_begins_by_itself(reference, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    generate_here(reference, num_samples=3, output=str(output))
    lines = read(output)
    assert [line["prompt"] for line in lines] == ["", "", ""] and [line["first_ids"] for line in lines] == [[1]] * 3
    assert len({line["text"] for line in lines}) == 3
    printed = capsys.readouterr()
    assert all(stage.printable(line["text"]) in printed.out + printed.err for line in lines)


class Killed(BaseException):
    pass


def test_killed_in_the_middle_it_makes_what_is_missing(reference, prompts, tmp_path, monkeypatch):
    """Four prompts at a time; the last is lost, with half a line. What is there is not made again."""
    monkeypatch.setattr(stage, "BATCHES", 1)
    settings = {"prompts": prompts, "batch_size": 4}
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    generate_here(reference, **settings, output=str(whole))
    append = ResumableJsonl.append

    def die(lines, found):
        if lines.done:
            with (tmp_path / "out.jsonl.partial").open("a") as file:
                file.write('{"place": 4, "prom')
            raise Killed
        append(lines, found)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumableJsonl, "append", die)
        generate_here(reference, **settings, output=str(output))
    assert not output.exists()
    added = []
    monkeypatch.setattr(ResumableJsonl, "append", lambda lines, found: (added.extend(found), append(lines, found)))
    generate_here(reference, **settings, output=str(output))
    assert [line["place"] for line in added] == [4]
    assert output.read_text() == whole.read_text()
    generate_here(reference, **settings, output=str(output))  # nothing is left to do
    assert len(added) == 1
    other = dataclasses.replace(SAMPLING, seed=4)
    generate_here(reference, **settings, output=str(output), sampling=other)
    assert len(added) == 6 and {line["seed"] for line in read(output)} == {4}
    assert (tmp_path / "out.before1.jsonl").read_text() == whole.read_text()


def test_what_cannot_be_is_refused(reference, prompts, tmp_path):
    def text(code, **settings):
        return toy.refused(code, generate_here, reference, **settings)

    exclusive = text("settings-exclusive", prompt="a", prompts=prompts)
    assert "generate.prompt and generate.prompts" in exclusive
    assert "nowhere.jsonl" in toy.refusal(generate_here, reference, prompts="nowhere.jsonl")
    greedy = Sampling(max_new_tokens=12)
    assert "generate.num_samples = 2" in text("sampling-greedy", num_samples=2, sampling=greedy)
    assert "generate.num_samples is 0" in text("setting-out-of-range", num_samples=0)
    newline = text("prefix-escaped-newline", prefix="URL: a.org\\n\\n")
    assert "generate.prefix" in newline and "--prefix=$'URL: en.wikipedia.org\\n\\n'" in newline
    long = text("prompt-too-long", prompt="x" * 60)
    assert "prompt 1 of 1 has 61 tokens, with 12 new ones 73; the model reads 64" in long
    assert "no checkpoint of step 4" in toy.refusal(generate_here, reference, step=4)
    assert "out.txt" in text("jsonl-ending", prompts=prompts, output=str(tmp_path / "out.txt"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "mine"}\n')
    assert "mine.jsonl" in text("jsonl-foreign-file", prompts=str(mine), output=str(mine))
    assert mine.read_text() == '{"text": "mine"}\n'
    for content, code, named in (
        ('{"question": "a"}', "record-invalid", "mine.jsonl:1 has no text in prompt or text, only ['question']"),
        ('{"text": 3}', "record-invalid", "mine.jsonl:1"),
        ('{"text": "a"}\n{"text"', "record-invalid", "mine.jsonl:2"),
        ("\n", "no-records", "mine.jsonl"),
    ):
        mine.write_text(content)
        assert named in text(code, prompts=str(mine))


def test_a_terminal_is_not_commanded():
    assert stage.printable("a\x1b[2Jb\r\x9bé\n\t😀") == "a\\x1b[2Jb\\r\\x9bé\n\t😀"


def test_as_a_command(reference, tmp_path, shell):
    settings = toy.settings(Sampling={"max_new_tokens": 5, "stop": ["zzz"]})
    arguments = ["generate", f"--run={reference}", "--prompt=it's 'the'", "--prefix=URL: a\n\n", *settings]
    code, output, errors = shell(*arguments, folder=tmp_path)
    assert code == 0, errors
    assert "URL: a\n\nit's 'the'" in output and "cut by the limit after 5 tokens" in output
    code, _, errors = shell(*arguments, "--gin.Sampling.temperature=-1", folder=tmp_path)
    assert code == 2 and "slm-jax generate: error: Sampling.temperature is -1" in errors
