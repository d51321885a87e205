"""What gin may set: each setting's name, type, default and sentence, for `--help` and the settings page.

The sentences are the entries `name: text` of docstrings, under `Args:` or `Attributes:`.
"""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slm_jax.configurable import OneOf, marks
from slm_jax.declarations import Declaration, declarations, table

WIDTH = 110  # of the help text, in characters


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a configurable.

    Attributes:
      name: its name, without that of the configurable.
      type: its annotation as text, module names removed; empty where there is none.
      default: its default as Python writes it; None where it is required, `(of the size)` where `model.size` decides.
      values: the allowed values or their range, as the annotation says, or the keys of a table named in the sentence.
      sentence: what the docstring says about it; empty where it says nothing.
      reaches: names of the configurables whose values it takes.
    """

    name: str
    type: str
    default: str | None
    values: tuple[str, ...]
    sentence: str
    reaches: tuple[str, ...]

    @property
    def declaration(self) -> str:
        """`name: type = default`, as in a signature."""
        type_ = f": {self.type}" if self.type else ""
        return f"{self.name}{type_} = {self.default or '(required)'}"


def settings_of(name: str) -> list[Setting]:
    """The settings of one configurable, in the order of its signature."""
    declaration, producers = declarations()[name], _producers()
    documented = sentences(declaration.doc)
    if declaration.takes_fields_of:
        documented |= sentences(declaration.takes_fields_of.doc)
    found = []
    for parameter in declaration.parameters.values():
        annotation, default = parameter.annotation, parameter.default
        sentence = documented.get(parameter.name, "")
        named = [word for word in re.findall(r"\w+", sentence) if word in producers]
        taken = [made for kind in kinds(annotation) for made in producers.get(kind.__name__, ())]
        shown = None if default is inspect.Parameter.empty else "(of the size)" if default is ... else repr(default)
        found.append(
            Setting(
                parameter.name,
                _type_text(annotation),
                shown,
                tuple(_values(annotation, sentence, declaration)),
                sentence,
                tuple(dict.fromkeys([*taken, *(made for word in named for made in producers[word])])),
            )
        )
    return found


def reached_by(stage: str) -> list[str]:
    """The stage and every configurable whose values reach it, in the order in which its settings name them."""
    found = [stage]
    for name in found:  # grows while it is read
        for setting in settings_of(name):
            found += [other for other in setting.reaches if other not in found]
    return found


# Package of a configurable -> heading of its group in the help of a stage, in this order.
GROUPS = {
    "train": "Phases, learning rate and optimizer",
    "score": "Selection",
    "data": "Data",
    "models": "Model",
    "evaluate": "Evaluation",
    "experiment": "Recipe",
}
OTHERS = "Devices and the like"


def help_text(name: str) -> str:
    """The text of `slm-jax STAGE --help` and `slm-jax help NAME`: the docstring and the settings, then, in groups, the
    settings of everything that they reach."""
    lines = [re.split(r"\n\w+:\n", declarations()[name].doc)[0].strip()]
    lines += ["", "Settings, as --gin.NAME=VALUE or in a --gin_file; those of the stage that are text also as"]
    lines += ["--NAME=VALUE (numbers too), those that are off also as --NAME:", *_settings_text(name)]
    grouped: dict[str, list[str]] = {heading: [] for heading in (*GROUPS.values(), OTHERS)}
    for other in reached_by(name)[1:]:
        grouped[GROUPS.get(declarations()[other].module.split(".")[1], OTHERS)].append(other)
    for heading, names in grouped.items():
        lines += ["", f"--- {heading} ---"] if names else []
        for other in names:
            lines += ["", textwrap.fill(f"{other}: {summary(other)}", WIDTH), *_settings_text(other)[1:]]
    return "\n".join(lines)


def _settings_text(name: str) -> list[str]:
    """A line for each setting of a configurable, and its sentence with the allowed values below it."""
    lines = ["", name]
    for setting in settings_of(name):
        text = setting.sentence + (f" Values: {', '.join(setting.values)}." if setting.values else "")
        lines += [f"  {name}.{setting.declaration}"]
        lines += [textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)] if text else []
    return lines


def summary(name: str) -> str:
    """The first paragraph of a configurable's docstring on one line."""
    return " ".join(declarations()[name].doc.split("\n\n")[0].split())


def sentences(doc: str) -> dict[str, str]:
    """Name -> text of the entries under `Args:` or `Attributes:` in the docstring of a function or dataclass."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?)+)", inspect.cleandoc(doc), re.MULTILINE)
    listed = inspect.cleandoc("\n" + section[1]) if section else ""
    entries = re.split(r"^\*{0,2}(\w+): +", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


def _producers() -> dict[str, list[str]]:
    """Class name -> the configurables that make one: the class, or functions that return it."""
    found: dict[str, list[str]] = {}
    for name, declaration in declarations().items():
        found.setdefault(declaration.makes, []).append(name)
    found.pop("", None)
    return found


def kinds(annotation: Any) -> Iterator[type]:
    """The classes that an annotation names, in lists and alternatives too."""
    if arguments := typing.get_args(annotation):
        for argument in arguments:
            yield from kinds(argument)
    elif inspect.isclass(annotation) and annotation is not types.NoneType:
        yield annotation


def _values(annotation: Any, sentence: str, owner: Declaration) -> Iterator[str]:
    """The choices and ranges of the annotation, or the keys of tables of the owner's module named in the sentence."""
    found = marks(annotation)
    for mark in found:
        yield from map(repr, mark.choices) if isinstance(mark, OneOf) else [str(mark)]
    if not found:
        for name in re.findall(r"`([A-Z_]{2,})`", sentence):
            yield from map(repr, table(name, owner.module))


def _type_text(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_text(arguments[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join("None" if kind is types.NoneType else _type_text(kind) for kind in arguments)
    if arguments and typing.get_origin(annotation) in (Sequence, Mapping):
        return f"{annotation.__name__}[{', '.join(map(_type_text, arguments))}]"
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(annotation))
