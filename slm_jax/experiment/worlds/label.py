"""Stage `experiment label`: which tokens were planted, as a score column that an oracle selects by."""

from collections.abc import Sequence

import numpy as np

from slm_jax.config import print_unused
from slm_jax.configurable import configurable
from slm_jax.data.corpus import Corpus
from slm_jax.errors import UserError

PLANTED = "/noise"  # ends the source names of marked spans


@configurable
def experiment_label(corpus: str, name: str = "planted", sources: Sequence[str] = ()) -> None:
    """Adds a column `loss` that is 1 on planted tokens and 0 on the rest.

    An oracle is `Selection(score='reference', reference=NAME, threshold=-0.5)`: it trains on what was not planted.

    Args:
      corpus: corpus directory. Gains `scores/<name>/`.
      name: of the column.
      sources: names of sources that count as planted too.
    """
    print_unused()
    table = Corpus.open(corpus)
    if unknown := {*sources} - {*table.source_names}:
        raise UserError(
            "label-unknown-source",
            f"experiment_label.sources: {corpus} has no source {min(unknown)!r}: {', '.join(table.source_names)}",
        )
    bad = np.array([source.endswith(PLANTED) or source in sources for source in table.source_names], np.float32)
    column = table.create_score(
        name, reference={"labels": "planted", "sources": list(sources), "fingerprint": f"labels {sorted(sources)}"}
    )
    for begin, end in column.pending():
        source_ids = table.read(np.arange(begin, end), ["source_ids"])["source_ids"]
        column.write(begin, {"loss": bad[source_ids]})
    print(f"experiment label: column {name} of {corpus} is complete")
