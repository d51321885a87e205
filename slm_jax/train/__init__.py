"""Phases, schedules, plan, step and loop. The package can be called as the stage `train`."""

import slm_jax

slm_jax.callable_package(__name__)
