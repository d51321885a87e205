"""Per-token losses, scores and selection. The package can be called as the stage `score`."""

import slm_jax

slm_jax.callable_package(__name__)
