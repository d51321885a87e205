"""gin files and overrides, and a record of the environment.

gin binds config dataclasses and the arguments of stage functions, nothing deeper. An unknown name is an error that
suggests the nearest known one; a name of an earlier version is an error that gives the new one (renamed.py).
"""

import ast
import difflib
import importlib.util  # noqa: F401 (gin reads importlib.util without importing it)
import io
import os
import platform
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

from slm_jax.configurable import fit, without_marks
from slm_jax.declarations import declarations, register
from slm_jax.errors import UserError
from slm_jax.renamed import SYNONYMS, new_setting
from slm_jax.settings import kinds, reached_by, settings_of

_command_line: list[str] = []  # bindings of `--gin.NAME=VALUE` in this process
RECORDED_PACKAGES = ("slm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
_imports_allowed = False  # whether gin files of this process may import Python modules
_open_files: list[str] = []  # the gin file being read, after the files that include it
_read_files: dict[str, str] = {}  # text of every gin file that was read, by path
_included: set[str] = set()  # files that another file includes


def load(files: Sequence[str] = (), bindings: Sequence[str] = (), *, allow_imports: bool = False) -> None:
    """Parses gin `files` in order, then `bindings` (`NAME=VALUE`); later bindings override earlier ones.

    Includes are looked up from the working directory and from the four directories above the including file.
    Files are data: an `import` runs code, and is refused unless `allow_imports`.

    No module of a stage needs to be imported for this.

    Raises:
      UserError: `gin-no-file`, `gin-unknown-name`, `gin-unknown-macro`, `gin-renamed`, `gin-syntax`, `gin-import`,
        `gin-includes-itself`, `gin-not-utf-8`, or `gin-error` for anything else; `setting-type` and the other codes of
        configurable.py for a value that does not fit its setting.
    """
    global _imports_allowed
    _imports_allowed = allow_imports
    register()
    bindings = [with_quotes(binding) for binding in bindings]
    _read_files.clear()
    _included.clear()
    gin.config._LOCATION_PREFIXES[:] = [""]  # pyright: ignore[reportAttributeAccessIssue] (those of an earlier load)
    gin.clear_config()
    _command_line[:] = bindings
    for file in files:
        load_more(file)
    _parse([], bindings)


def load_more(file: str | os.PathLike) -> None:
    """Parses one more gin file; the bindings of the last `load` still override it.

    Raises:
      UserError: as `load`.
    """
    if not os.path.isfile(file):
        raise UserError("gin-no-file", f"gin file {file} does not exist: check --gin_file")
    for directory in Path(file).resolve().parents[:4]:
        gin.add_config_file_search_path(str(directory))
    _parse([str(file)], _command_line)


def _parse(files: Sequence[str], bindings: Sequence[str]) -> None:
    try:
        with gin.unlock_config():
            gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=True)
    except UserError as error:  # gin appends where each including file names the next
        raise UserError(error.code, str(error).splitlines()[0]) from None
    except (ValueError, SyntaxError, OSError, ImportError, tokenize.TokenError) as error:
        raise UserError(*_explain(error)) from error
    # Check values here that gin would pass only when the stage runs; references and macros are checked then.
    for (_, selector), settings in gin.config._CONFIG.items():  # pyright: ignore[reportAttributeAccessIssue]
        declaration = declarations().get(selector.split(".")[-1])
        if declaration is None or declaration.selector != selector:  # a user's own
            continue
        for name, value in settings.items():
            inside = gin.config._iterate_flattened_values(value)  # pyright: ignore[reportAttributeAccessIssue]
            if not any(isinstance(item, gin.config.ConfigurableReference) for item in inside):  # pyright: ignore[reportAttributeAccessIssue]
                fit(value, declaration.parameters[name].annotation, f"{declaration.name}.{name}")


def with_quotes(binding: str) -> str:
    """A binding of the command line, `train.run_dir=runs/mine`, with the quotes that gin needs around text."""
    name, _, value = binding.partition("=")
    owner, _, setting = name.strip().split("/")[-1].rpartition(".")
    declaration = declarations().get(owner.split(".")[-1])
    parameter = declaration.parameters.get(setting) if declaration else None
    takes = set(kinds(parameter.annotation)) if parameter else set()
    if str not in takes or not value.strip() or value.strip()[0] in "\"'@%[({":
        return binding
    try:
        number = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return f"{name}={value!r}"
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return f"{name}={value!r}" if is_number and not takes & {int, float} else binding


def check_complete(stage: str) -> None:
    """Raises UserError `settings-missing` if a setting that the stage requires is not bound."""
    bound = gin.config._CONFIG.get(("", declarations()[stage].selector), {})  # pyright: ignore[reportAttributeAccessIssue]
    missing = [repr(s.name) for s in settings_of(stage) if s.default is None and s.name not in bound]
    if missing:
        names = " and ".join(missing)
        raise UserError("settings-missing", f"settings are missing: {stage} needs {names} (--gin.{stage}.NAME=VALUE)")


class _GinText(io.StringIO):
    """The text of a gin file; gin reads the name for its messages."""

    name: str


@contextmanager
def _read_gin(path: str) -> Iterator[_GinText]:
    """Opens a gin file for gin.

    Raises:
      UserError: `gin-not-utf-8`, `gin-includes-itself`.
    """
    real = os.path.realpath(path)
    if real in _open_files:
        raise UserError("gin-includes-itself", f"gin file {path} includes itself: remove the include")
    content = Path(path).read_bytes()
    try:
        text = _GinText(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError("gin-not-utf-8", f"gin file {path}, line {line} is not UTF-8: save it as UTF-8") from None
    text.name = path
    _read_files[path] = text.getvalue()
    if _open_files:
        _included.add(path)
    _open_files.append(real)
    try:
        yield text
    finally:
        _open_files.pop()


_gin_import = gin.config.ParseContext.process_import  # pyright: ignore[reportAttributeAccessIssue]


def _import_if_allowed(context: Any, statement: Any) -> None:
    """Replaces gin's own handling of `import` and `from __gin__ import dynamic_registration`."""
    if not _imports_allowed:
        place = statement.location
        raise UserError(
            "gin-import",
            f"{place.filename or 'a setting'}, line {place.line_num}: '{statement.format()}' runs Python code, and "
            "settings are data: remove the line, or pass --allow_gin_imports if you trust the file",
        )
    _gin_import(context, statement)


gin.config.ParseContext.process_import = _import_if_allowed  # pyright: ignore[reportAttributeAccessIssue]
# This replaces all readers of gin. One of them looks for includes in Python packages: it logs "Path not found" for
# each, and fails if the folder `configs` can be imported.
gin.config._FILE_READERS[:] = [(_read_gin, os.path.isfile)]  # pyright: ignore[reportAttributeAccessIssue]


def _explain(error: Exception) -> tuple[str, str]:
    """Code and one line for a gin error, with the nearest known name if a name is unknown."""
    known, text = surface(), str(error)
    where = " ".join(line.strip() for line in text.splitlines()[1:3])
    macro = re.search(r"No bindings specified for '([^']+)/gin\.macro'", text)
    unknown = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", text)
    parameter = re.search(r"Configurable '([\w.]+)' doesn't (?:have a parameter named|include kwarg) '(\w+)'", text)
    if macro:
        return "gin-unknown-macro", f"macro %{macro[1]} has no value{_first_use(macro[1])}: add {macro[1]} = VALUE"
    if isinstance(error, tokenize.TokenError):  # raised at the end of the file
        file = next(reversed(_read_files), "a setting")
        return "gin-syntax", f"gin cannot read {file}: it ends inside a value; close its bracket or quotes"
    if unknown:
        name = unknown[1].split("/")[-1]
        if new := new_setting(name):
            return "gin-renamed", f"setting {name!r} is now called {new!r} ({where})"
        return "gin-unknown-name", f"unknown gin name {name!r}{_nearest(name, known)} ({where})"
    if parameter:
        configurable = parameter[1].split(".")[-1]
        if new := new_setting(f"{configurable}.{parameter[2]}"):
            return "gin-renamed", f"setting '{configurable}.{parameter[2]}' is now called {new!r} ({where})"
        nearest = _nearest_setting(configurable, parameter[2]) if configurable in known else ""
        return "gin-unknown-name", f"unknown gin name '{configurable}.{parameter[2]}'{nearest} ({where})"
    line = " ".join(text.split())
    if isinstance(error, SyntaxError) or "parse" in text or "malformed" in text:
        return "gin-syntax", (
            f"gin cannot read a value: {line}; values are Python literals, and a string needs quotes inside the "
            "shell's: --gin.train.run_dir=\"'runs/mine'\""
        )
    return "gin-error", line


def gin_folders() -> list[str]:
    """Folders of the gin files read so far, in the order of reading."""
    return list(dict.fromkeys(str(Path(path).parent) for path in _read_files))


def _first_use(macro: str) -> str:
    """The first use of a macro in a gin file, as text; empty if only the command line uses it."""
    for path, text in _read_files.items():
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(rf"%{re.escape(macro)}(?![\w/.])", line.split("#")[0]):
                return f" ({path}, line {number})"
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f": did you mean {near[0]!r}?" if near else f": known names are {', '.join(sorted(known))}"


def _nearest_setting(owner: str, name: str) -> str:
    """The setting that an unknown name of a configurable may mean: one of its own with a similar name or with these
    words in its description, or a setting of this name elsewhere."""
    if name in SYNONYMS:
        return f": did you mean {SYNONYMS[name].removeprefix(f'{owner}.')!r}?"
    own = {setting.name: setting.sentence for setting in settings_of(owner)}
    alike = difflib.get_close_matches(name, sorted(own), n=1, cutoff=0.6)
    alike += [setting for setting, sentence in own.items() if name.replace("_", " ") in sentence]
    reached = reached_by(owner)
    alike += [f"{other}.{name}" for other in reached for setting in settings_of(other) if setting.name == name]
    return f": did you mean {alike[0]!r}?" if alike else f": known names are {', '.join(sorted(own))}"


def surface() -> dict[str, dict[str, str]]:
    """Everything that gin may bind: configurable -> {parameter: default as text}. Frozen by a test."""
    return {name: {s.name: s.default or "(required)" for s in settings_of(name)} for name in declarations()}


def text_settings(stage: str) -> list[str]:
    """The stage's own settings that are strings, for which `--NAME=TEXT` needs no quotes for gin."""
    texts = (str, str | None, str | os.PathLike, str | os.PathLike | None)
    return [name for name, kind in _types(stage).items() if kind in texts]


def text_lists(stage: str) -> list[str]:
    """The stage's own settings that are lists of strings: `--NAME=TEXT` gives one, `--NAME="['A', 'B']"` several."""
    return [name for name, kind in _types(stage).items() if kind == Sequence[str]]


def flags(stage: str) -> list[str]:
    """The stage's own settings that are False by default, which `--NAME` turns on."""
    return [name for name, parameter in declarations()[stage].parameters.items() if parameter.default is False]


def number_settings(stage: str) -> list[str]:
    """Names of the stage's own settings that are one number, so that `--NAME=VALUE` needs no `gin.STAGE`."""
    numbers = (int, float, int | None, float | None)
    return [name for name, kind in _types(stage).items() if kind in numbers]


def _types(stage: str) -> dict[str, Any]:
    """The types of a stage's own settings, without ranges."""
    return {name: without_marks(parameter.annotation) for name, parameter in declarations()[stage].parameters.items()}


def words_binding(stage: str, words: Sequence[str]) -> str | None:
    """The binding for plain arguments after the stage's name: `slm-jax analyze report RUN RUN`, `slm-jax prepare FILE
    FILE`, `slm-jax experiment RECIPE`; None if the stage takes none, or fewer."""
    parameters = declarations()[stage].parameters
    if "runs" in parameters:
        return f"{stage}.runs={list(words)!r}"
    if stage == "prepare":
        return f"Source.files={list(words)!r}"
    one = next((name for name in ("recipe", "run", "folder") if name in parameters), None)
    return f"{stage}.{one}={words[0]!r}" if one and len(words) == 1 else None


class _Names(config_parser.ParserDelegate):
    """Parses bindings for their names only."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None: ...

    def macro(self, macro_name: str) -> None: ...


def print_unused() -> None:
    """Prints the settings that nothing has read; call it once a stage has built its settings.

    Each setting of the command line has its own line; those of a gin file share one. Included files are shared by
    stages, so their line names only the configurables.
    """
    used = set()  # names of the settings that were read, in all scopes that a call in that scope reads
    for (scope, selector), settings in gin.config._OPERATIVE_CONFIG.items():  # pyright: ignore[reportAttributeAccessIssue]
        scopes = ["/".join(scope.split("/")[:depth]) + "/" for depth in range(1, scope.count("/") + 2)] if scope else []
        names = [f"{selector.split('.')[-1]}.{setting}" for setting in settings]
        used |= {prefix + name for prefix in ("", *scopes) for name in names}

    def is_used(name: str) -> bool:
        scope, _, setting = name.rpartition("/")
        macro = f"{name}/macro.value" if "." not in setting else ""
        return bool(used & {f"{scope}/" * bool(scope) + ".".join(setting.split(".")[-2:]), macro})

    for name in (binding.split("=")[0].strip() for binding in _command_line):
        if not is_used(name):
            print(f"setting {name} has no effect: nothing that this stage builds reads it", flush=True)
    for path, text in _read_files.items():
        unread = {}  # setting, or its configurable in an included file -> line
        for statement in config_parser.ConfigParser(text, _Names()):
            if isinstance(statement, config_parser.BindingStatement):
                owner = "/".join(filter(None, (statement.scope, statement.selector)))
                name = ".".join(filter(None, (owner, statement.arg_name)))
                if not is_used(name):
                    unread[owner if path in _included else name] = statement.location.line_num
        if path in _included and unread:
            print(f"{path} (included): nothing that this stage builds reads {', '.join(unread)}", flush=True)
        elif unread:
            listed = ", ".join(f"{name} (line {line})" for name, line in unread.items())
            print(
                f"{path}: these settings have no effect, nothing that this stage builds reads them: {listed}",
                flush=True,
            )


def environment(more_packages: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, commit, command and platform: what one needs to repeat a run."""
    import importlib.metadata  # not needed to check a command's arguments

    versions = {}
    for package in (*RECORDED_PACKAGES, *more_packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": commit,
        "command": sys.argv,
        "platform": platform.platform(),
    }
