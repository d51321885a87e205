"""All missing inputs of a run at once, each with the command that makes it if a gin file names it."""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slm_jax import config as config_lib
from slm_jax.checkpoint import read_about
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError
from slm_jax.train.phases import Phase

# Setting that names a product -> its stage.
PRODUCTS = {
    "prepare.corpus": "prepare",
    "prepare.plain": "prepare",
    "train.run_dir": "train",
    "import.target": "import",
    "score.corpus": "score",
}


def missing_inputs(phases: Sequence[Phase], evaluators: Iterable[Any], init_from: str | None) -> list[str]:
    """One line for each corpus, score column and model that is read and missing; corpora first."""
    corpora: dict[str, Corpus | None] = {}
    found: dict[str, None] = {}
    read = [component.corpus for phase in phases for component in phase.mixture]
    for path in dict.fromkeys([*read, *(e.corpus for e in evaluators if getattr(e, "corpus", None))]):
        try:
            corpora[path] = Corpus.open(path)
        except UserError as error:
            if error.code != "corpus-not-found":
                raise
            corpora[path] = None
            found[f"corpus {path}{_made_by(('prepare.corpus', 'prepare.plain'), path)}"] = None
    for phase in phases:
        for column, component in itertools.product(phase.score_columns, phase.mixture):
            name, corpus = column.split("/")[1], corpora[component.corpus]
            try:
                if corpus is not None:
                    corpus.score(name)
                    continue
            except UserError as error:
                if error.code != "score-not-found":
                    raise
            found[f"score column {name} of {component.corpus}{_made_by(('score.corpus',), component.corpus)}"] = None
    if init_from is not None:
        try:
            read_about(init_from)
        except UserError:
            found[f"model {init_from}{_made_by(('train.run_dir', 'import.target'), init_from)}"] = None
    return list(found)


def _made_by(settings: Sequence[str], product: str) -> str:
    """The command whose gin file names the product, in the folders of the gin files that were read; else ''."""
    for folder in config_lib.gin_folders():
        for file in sorted(Path(folder).glob("*.gin")):
            text = file.read_text(encoding="utf-8", errors="replace")
            for setting in settings:
                if re.search(rf"^{re.escape(setting)}\s*=\s*(['\"]){re.escape(product)}\1", text, re.MULTILINE):
                    return f": slm-jax {PRODUCTS[setting]} --gin_file={file}"
            # Commands in headers, such as that of an import.
            if command := re.search(
                rf"^#\s*(slm-jax [^\n]*(?:\n#[^\n]*)?={re.escape(product)})\s*$", text, re.MULTILINE
            ):
                return ": " + re.sub(r"\s*\n#\s*", " ", command[1])
    return ""
