"""The laws of the library as assertions, for your own models and compositions."""

from unitscale_jax.testing._parts import check_inplace, check_parts

__all__ = ["check_inplace", "check_parts"]
