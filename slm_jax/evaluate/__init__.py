"""Evaluators, generation and tasks. The package can be called as the stage `evaluate`."""

import slm_jax

slm_jax.callable_package(__name__)
