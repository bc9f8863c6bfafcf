"""Parameters among the equations: where a value comes from, and which products it meets."""

from unitscale_jax.trace.params._device_sums import DeviceSum, device_sums
from unitscale_jax.trace.params._layouts import (
    MatrixForm,
    batch_pairs,
    contraction,
    from_matrices,
    matrix_form,
    to_matrices,
)
from unitscale_jax.trace.params._meeting import HeldParam, Meeting, above
from unitscale_jax.trace.params._meetings import meetings, observable, stacks_of
from unitscale_jax.trace.params._operands import (
    channel_rows,
    count_rows,
    damped_moments,
    input_rows,
    inverse_factor,
    second_moments,
    valid_rows,
)
from unitscale_jax.trace.params._product import Conv, Dot, Product, Ragged, product_of
from unitscale_jax.trace.params._provenance import (
    ACTIVATION,
    CONSTANT,
    Origin,
    input_origins,
    parameter,
    provenance,
    rule_names,
)

__all__ = [
    "ACTIVATION",
    "CONSTANT",
    "Conv",
    "DeviceSum",
    "Dot",
    "HeldParam",
    "MatrixForm",
    "Meeting",
    "Origin",
    "Product",
    "Ragged",
    "above",
    "rule_names",
    "batch_pairs",
    "to_matrices",
    "channel_rows",
    "contraction",
    "count_rows",
    "damped_moments",
    "device_sums",
    "input_rows",
    "inverse_factor",
    "matrix_form",
    "meetings",
    "observable",
    "input_origins",
    "parameter",
    "product_of",
    "provenance",
    "second_moments",
    "stacks_of",
    "from_matrices",
    "valid_rows",
]
