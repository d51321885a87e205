"""What gin may set: each setting's name, type, default and sentence, for `--help` and the settings page.

The sentences are the entries `name: text` of docstrings, under `Args:` or `Attributes:`.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from slm_jax.configurable import OneOf, marks

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


def configurables() -> dict[str, Any]:
    """Name -> function or class, of everything in slm_jax that gin may bind and that has been imported."""
    registry = gin.config._REGISTRY.items()  # pyright: ignore[reportAttributeAccessIssue]
    return {name.split(".")[-1]: entry for name, entry in registry if (entry.module or "").startswith("slm_jax")}


def settings_of(name: str) -> list[Setting]:
    """The settings of one configurable, in the order of its signature."""
    entry = configurables()[name]
    signature = inspect.signature(entry.wrapped)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    defaults = {p.name: None if p.default is p.empty else repr(p.default) for p in parameters}
    documented = sentences(entry.wrapped)
    # `model` passes further settings on to the dataclass that it returns.
    if entry.allowlist:
        passed_on = inspect.signature(signature.return_annotation).parameters.values()
        further = [p for p in passed_on if p.name in entry.allowlist and p.name not in defaults]
        defaults |= {p.name: "(of the size)" for p in further}
        parameters += further
        documented |= sentences(signature.return_annotation)
    takes = typing.get_type_hints(entry.wrapped, include_extras=True)
    if entry.allowlist:
        takes |= typing.get_type_hints(signature.return_annotation, include_extras=True)
    producers = _producers()
    found = []
    for parameter in parameters:
        sentence = documented.get(parameter.name, "")
        named = [word for word in re.findall(r"\w+", sentence) if word in producers]
        taken = [made for kind in _kinds(parameter.annotation) for made in producers.get(kind.__name__, ())]
        found.append(
            Setting(
                parameter.name,
                _type_text(takes[parameter.name]),
                defaults[parameter.name],
                tuple(_values(takes[parameter.name], sentence, entry.wrapped)),
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


def help_text(stage: str) -> str:
    """What `slm-jax STAGE --help` prints: the stage's docstring, then its settings and those of all that it reaches."""
    about = re.split(r"\n\w+:\n", inspect.cleandoc(configurables()[stage].wrapped.__doc__ or ""))[0].strip()
    lines = [about, "", "Settings, as --gin.NAME=VALUE or in a --gin_file; those of the stage that are text also as"]
    lines += ["--NAME=VALUE (numbers too), those that are off also as --NAME:"]
    for name in reached_by(stage):
        lines += ["", name if name == stage else textwrap.fill(f"{name}: {summary(name)}", WIDTH)]
        for setting in settings_of(name):
            text = setting.sentence + (f" Values: {', '.join(setting.values)}." if setting.values else "")
            lines += [f"  {name}.{setting.declaration}"]
            lines += [textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)] if text else []
    return "\n".join(lines)


def summary(name: str) -> str:
    """The first paragraph of a configurable's docstring on one line."""
    text = inspect.cleandoc(configurables()[name].wrapped.__doc__ or "")
    return " ".join(text.split("\n\n")[0].split())


def sentences(documented: Any) -> dict[str, str]:
    """Name -> text of the entries under `Args:` or `Attributes:` in the docstring of a function or dataclass."""
    text = inspect.cleandoc(documented.__doc__ or "")
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?)+)", text, re.MULTILINE)
    listed = inspect.cleandoc("\n" + section[1]) if section else ""
    entries = re.split(r"^\*{0,2}(\w+): +", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}


def _producers() -> dict[str, list[str]]:
    """Class name -> the configurables that make one: the class, or functions that return it."""
    found: dict[str, list[str]] = {}
    for name, entry in configurables().items():
        made = entry.wrapped if inspect.isclass(entry.wrapped) else inspect.signature(entry.wrapped).return_annotation
        if inspect.isclass(made) and dataclasses.is_dataclass(made):
            found.setdefault(made.__name__, []).append(name)
    return found


def _kinds(annotation: Any) -> Iterator[type]:
    """The classes that an annotation names, in lists and alternatives too."""
    if arguments := typing.get_args(annotation):
        for argument in arguments:
            yield from _kinds(argument)
    elif inspect.isclass(annotation) and annotation is not types.NoneType:
        yield annotation


def _values(annotation: Any, sentence: str, owner: Any) -> Iterator[str]:
    """The choices and ranges of the annotation, or the keys of tables of the owner's module named in the sentence."""
    found = marks(annotation)
    for mark in found:
        yield from map(repr, mark.choices) if isinstance(mark, OneOf) else [str(mark)]
    if not found:
        for name in re.findall(r"`([A-Z_]{2,})`", sentence):
            yield from map(repr, getattr(sys.modules[owner.__module__], name, ()))


def _type_text(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_text(arguments[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join("None" if kind is types.NoneType else _type_text(kind) for kind in arguments)
    if arguments and typing.get_origin(annotation) in (Sequence, Mapping):
        return f"{annotation.__name__}[{', '.join(map(_type_text, arguments))}]"
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(annotation))
