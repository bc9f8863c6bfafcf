"""The laws of the library as assertions, for your own models and compositions."""

from unitscale_jax.testing._parts import check_inplace, check_parts
from unitscale_jax.testing._sharded import check_collectives, check_sharded
from unitscale_jax.testing._width import WidthReport, WidthRow, check_width

__all__ = [
    "WidthReport",
    "WidthRow",
    "check_collectives",
    "check_inplace",
    "check_parts",
    "check_sharded",
    "check_width",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
