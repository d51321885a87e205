"""`slm-jax STAGE` / `python -m slm_jax STAGE`: finds the stage, reads its settings, calls it, reports errors."""

import argparse
import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Sequence

import gin

from slm_jax import config, messages, startup
from slm_jax import settings as settings_lib
from slm_jax.declarations import declarations
from slm_jax.errors import UserError
from slm_jax.messages import DONE, FAILED, INTERRUPTED, USAGE
from slm_jax.renamed import SYNONYMS

# Stage -> the module that holds the function of that name (`analyze report` is analyze_report). It is imported when the
# command's arguments are checked.
STAGES = {
    "prepare": "slm_jax.data.prepare",
    "train": "slm_jax.train.loop",
    "score": "slm_jax.score.score_corpus",
    "evaluate": "slm_jax.evaluate.evaluate",
    "evaluate math": "slm_jax.evaluate.math.evaluate_math",
    "generate": "slm_jax.evaluate.generate",
    "average": "slm_jax.train.average",
    "import": "slm_jax.convert.import_model",
    "export": "slm_jax.convert.export_model",
    "analyze inspect": "slm_jax.analyze.inspector",
    "analyze report": "slm_jax.analyze.report_runs",
    "analyze dynamics": "slm_jax.analyze.dynamics",
    "analyze selection": "slm_jax.analyze.analyze_selection",
    "analyze tokenizers": "slm_jax.analyze.tokenizers",
    "compile": "slm_jax.compile.compile_ahead",
    "experiment": "slm_jax.experiment.run_experiment",
    "init": "slm_jax.experiment.own_data",
    "run": "slm_jax.experiment.own_data",
    "experiment world": "slm_jax.experiment.worlds.write_world",
    "experiment label": "slm_jax.experiment.worlds.label",
    "experiment filter": "slm_jax.experiment.worlds.filter_documents",
}
SHARED = (  # stages that several processes can run together
    *("train", "score", "evaluate", "evaluate_math", "generate", "import", "export"),
    *("analyze_inspect", "analyze_dynamics", "analyze_selection", "analyze_tokenizers"),
)
JOB = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")
_WRITABLE, _FOLDER = "make it writable, then run the same command again", "choose a path whose parents are folders"
PATH_FAULTS = {  # number of an operating system's error -> remedy
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG), _WRITABLE),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _FOLDER),
    errno.ENOENT: "check the path, and the target of its links",
    errno.ELOOP: "its links form a loop; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def command() -> int:
    """`main` as a program: libraries print to a log, and every error is one line."""
    return messages.command(main)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a stage; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="slm-jax",
        description="Train language models on the tokens that matter.",
        epilog="`slm-jax STAGE --help` lists the settings of a stage, `slm-jax help NAME` those of a class such as "
        "Selection, `slm-jax help sizes` the sizes of models.",
        add_help=False,
    )
    stages = ", ".join(STAGES)
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE [RUN ...]", help=f"one of {stages}; then runs, for stages that take several"
    )
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="file of settings; repeatable")
    allow = "let gin files import Python modules, which runs their code; only for files that you trust"
    parser.add_argument("--allow_gin_imports", action="store_true", help=allow)
    parser.add_argument("--gin.NAME=VALUE", dest="_", action="store_true", help="one setting; overrides files")
    parser.add_argument(
        "--NAME=VALUE", dest="_", action="store_true", help="a setting of the stage: a string or number"
    )
    parser.add_argument("--NAME", dest="_", action="store_true", help="turns on a setting of the stage")
    parser.add_argument("--help", "-h", action="store_true", help="show this text, or the settings of the stage")
    try:
        known, rest = parser.parse_known_args(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    if not known.stage:
        parser.print_help(sys.stdout if known.help else sys.stderr)
        return DONE if known.help else USAGE
    if known.stage[0] == "help":
        return _help(known.stage[1:])
    words = next((number for number in (2, 1) if " ".join(known.stage[:number]) in STAGES), None)
    if words is None:
        return _fail(" ".join(known.stage[:2]), f"no such stage: there are {stages}", USAGE)
    # argparse treats an argument that contains a space as a word, even if it begins with --.
    stage, runs = "_".join(known.stage[:words]), [word for word in known.stage[words:] if not word.startswith("--")]
    settings = {*rest, *known.stage} - {*known.stage[:words], *runs}
    rest = [argument for argument in (sys.argv[1:] if arguments is None else arguments) if argument in settings]
    if known.help:
        print(settings_lib.help_text(stage))
        return DONE
    bindings = [_binding(stage, argument) for argument in rest]
    if runs and (binding := config.words_binding(stage, runs)):
        bindings.insert(0, binding)  # a setting by its name overrides a word
        if stage == "prepare" and not known.gin_file:  # files alone need no settings of a source
            bindings.insert(0, "Source.name='text'")
    elif runs or None in bindings:
        return _refuse(stage, _unknown(stage, runs[0] if runs else rest[bindings.index(None)]))
    bindings = [binding for binding in bindings if binding is not None]
    return _run(stage, known.gin_file, bindings, known.allow_gin_imports)


def _help(words: Sequence[str]) -> int:
    """`slm-jax help NAME`: a stage, a class such as Selection, or the named sizes of models."""
    name = "_".join(words)
    if name == "sizes":
        from slm_jax.models.model_config import sizes_text

        print(sizes_text())
    elif name in declarations():
        print(settings_lib.help_text(name))
    else:
        near = difflib.get_close_matches(name, declarations(), n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"known are sizes, {', '.join(sorted(declarations()))}"
        return _fail("help", f"no help on {name!r}: {known}", USAGE)
    return DONE


def _binding(stage: str, argument: str) -> str | None:
    """NAME=VALUE for gin, from --gin.NAME=VALUE, from --NAME=VALUE for a setting of the stage that is a string or
    a number, or from --NAME for a flag; None for another argument."""
    if re.fullmatch(r"--gin\.[^=]+=.*", argument, re.DOTALL):
        return argument.removeprefix("--gin.")
    found = re.fullmatch(r"--(\w+)=(.*)", argument, re.DOTALL)
    if found and found[1] in config.text_lists(stage) and not found[2].startswith("["):
        return f"{stage}.{found[1]}=[{found[2]!r}]"
    if found and found[1] in config.text_lists(stage):
        return f"{stage}.{found[1]}={found[2]}"
    if found and found[1] in config.text_settings(stage):
        return f"{stage}.{found[1]}={found[2]!r}"
    if found and found[1] in config.number_settings(stage):
        return f"{stage}.{found[1]}={found[2]}"
    if argument.removeprefix("--") in config.flags(stage):
        return f"{stage}.{argument.removeprefix('--')}=True"
    return None


def _unknown(stage: str, argument: str) -> str:
    """The message for an unknown argument, with the nearest known one."""
    name, equals, value = argument.removeprefix("--").partition("=")
    texts, flags = config.text_settings(stage), config.flags(stage)
    own = {other: f"--{other}" for other in (*texts, *config.text_lists(stage), *config.number_settings(stage), *flags)}
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.7)
    if argument.startswith("--") and (name in SYNONYMS or near):
        meant = f"--gin.{SYNONYMS[name]}" if name in SYNONYMS else own[near[0]]
        return f"unknown argument {argument!r}: did you mean {meant}{equals}{value}?"
    message = f"unknown argument {argument!r}: settings look like --gin.NAME=VALUE"
    return message + "".join([f", --{other}=TEXT" for other in texts] + [f", --{other}" for other in flags])


def _run(stage: str, files: Sequence[str], bindings: Sequence[str], allow_imports: bool) -> int:
    messages.begin(f"slm-jax {stage}")
    try:
        config.load(files, bindings, allow_imports=allow_imports)
        config.check_complete(stage)
    except UserError as error:
        return _refuse(stage, _text(error))
    startup.before_jax()
    # Imported only here: JAX takes seconds, which a mistake in the arguments should not cost.
    from slm_jax import processes
    from slm_jax.compile.topology import silence_missing_chips

    silence_missing_chips()
    with processes.together():
        return _call(stage)


def _refuse(stage: str, message: str) -> int:
    """Fails before the stage begins. The other processes of a job end too, even if their settings are right."""
    if stage in SHARED and any(name in os.environ for name in JOB):
        from slm_jax import processes

        with contextlib.suppress(UserError):
            processes.start(preemptible=False)
    return _fail(stage, message, USAGE)


def _call(stage: str) -> int:
    from slm_jax import processes
    from slm_jax.data.store import disk_full_is_an_answer

    try:
        if stage in SHARED:
            processes.start(preemptible=stage == "train")
            if stage != "train":  # train compares more, once its corpora are open
                processes.same(lambda: {"settings": gin.config_str(), "code": config.environment()["versions"]})
        with disk_full_is_an_answer(f"the results of {stage}", "free some space, then the same command continues"):
            gin.get_configurable(stage)()
    except (UserError, FloatingPointError) as error:
        wrong_setting = getattr(error, "code", "").startswith("setting-")
        return _fail(stage, _text(error), USAGE if wrong_setting else FAILED)
    except (TypeError, RuntimeError) as error:
        missing = re.search(r"missing \d+ required.*?arguments?: (.+)", str(error))
        called = re.search(r"In call to configurable '([\w.]+)'", str(error))
        if not (missing and called):
            raise
        name = called[1].split(".")[-1]
        return _fail(stage, f"settings are missing: {name} needs {missing[1]} (--gin.{name}.NAME=VALUE)", USAGE)
    except OSError as error:
        number = re.match(r"\[Errno (\d+)\]", str(error))  # gin raises a copy that keeps only the text
        if not number or int(number[1]) not in PATH_FAULTS:
            raise
        code = f"[os-{errno.errorcode[int(number[1])].lower()}]"
        return _fail(stage, f"{_text(error)}: {PATH_FAULTS[int(number[1])]} {code}", FAILED)
    except KeyboardInterrupt:
        return _fail(stage, "interrupted; the same command continues", INTERRUPTED)
    return DONE


def _text(error: BaseException) -> str:
    """The first line of an error, without what gin adds, and the code of a UserError."""
    code = f" [{error.code}]" if isinstance(error, UserError) else ""
    return str(error).splitlines()[0] + code


def _fail(stage: str, message: str, code: int) -> int:
    line = f"slm-jax {stage}: error: {message}{messages.log_named()}"
    if processes := sys.modules.get("slm_jax.processes"):  # not imported: there are no others yet
        processes.fail(line, code)
    messages.say(line)
    return code


if __name__ == "__main__":
    sys.exit(command())
