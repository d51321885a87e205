"""The type checker that jaxtyping applies to slm_jax under pytest: beartype, with int accepted where float is (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
