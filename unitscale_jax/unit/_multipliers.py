"""Multipliers of roles: forward factor, initial scale and learning rate, by parametrization.

    W = forward · w,    w(0) ~ init · N(0, 1),    w -= learning rate · rate · (update of w)

An abc-parametrization: (A t, B / t, C / t) is the same training for any t with an optimizer that
normalizes gradients, and (A t, B / t, C / t^2) with SGD. The parametrizations differ in what they
leave to tune once a model has become wider.

    umup      unit-scaled muP: https://arxiv.org/abs/2407.17465
    mus       mu-nit scaling: https://arxiv.org/abs/2502.05967
    mup       maximal update parametrization, in the form of Table 8 of
              https://arxiv.org/abs/2203.03466: divide fans by those of the base model
    standard  one rate for all, variance 1 / fan-in
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

from unitscale_jax.errors import check_type, expected, unknown
from unitscale_jax.unit._roles import Role

Parametrization: TypeAlias = Literal["umup", "mus", "mup", "standard"]
Optimizer: TypeAlias = Literal["adam", "sgd", "muon"]

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
READOUTS = (None, "to_output_scale")


class Multipliers(NamedTuple):
    """What a parametrization says of one role.

    Attributes:
        forward: Factor of the parameter where the model uses it. The operations of `us.unit` have
            that of "umup" inside.
        init: Standard deviation at the start; of a norm, whose gain does not vary, its value.
        rate: Factor of the learning rate.
    """

    forward: float
    init: float
    rate: float


def multipliers(
    role: Role,
    parametrization: Parametrization = "umup",
    optimizer: Optimizer = "adam",
    *,
    readout_constraint: str | None = None,
) -> Multipliers:
    """The multipliers of a role.

    Args:
        role: What `roles` found, or one by hand. With "mup" its fans are multiples of those of the
            base model, whose learning rate is to be transferred.
        parametrization: "umup", "mus", "mup" or "standard".
        optimizer: "adam" for Adam, Lion and whatever else normalizes gradients; "sgd"; "muon",
            whose updates of weights have an RMS that no shape changes, and which leaves all other
            roles to Adam.
        readout_constraint: That of `us.unit.readout`, which decides how large gradients are and so
            matters to "sgd" alone: None or "to_output_scale".

    Raises:
        ValueError: A name is unknown; the message has its neighbours.

    Example:
        Nine layers, and what stands outside of them:

        >>> weight, bias = Role("weight", 64, 32, depth=9), Role("bias", 1, 32, depth=9)
        >>> 1 / multipliers(weight).rate, 1 / multipliers(bias).rate
        (24.0, 3.0)
        >>> multipliers(Role("embedding", 1000, 64)).rate, multipliers(Role("output", 64, 10)).rate
        (0.125, 1.0)
        >>> conv = Role("weight", 3 * 8, 32, depth=4)  # of a kernel (3, 8, 32)
        >>> round(multipliers(conv).rate, 7)
        0.1020621
    """
    check_type("role", role, Role, "a us.unit.Role, as Role('weight', fan_in, fan_out)")
    _check_names(parametrization, optimizer, readout_constraint)
    forward, init = FORWARD_INIT[parametrization](role)
    rate = RATES[parametrization, optimizer](role)
    # A constrained readout sends back in^-1 for 1, so all gradients before it are a width smaller.
    unit = parametrization in ("umup", "mus")
    if unit and optimizer == "sgd" and readout_constraint and role.kind != "output":
        rate *= _width(role)
    return Multipliers(forward, init, rate)


def _check_names(parametrization: str, optimizer: str, readout_constraint: str | None) -> None:
    if parametrization not in FORWARD_INIT:
        raise ValueError(unknown(parametrization, FORWARD_INIT, "parametrization"))
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown(optimizer, OPTIMIZERS, "optimizer"))
    if readout_constraint not in READOUTS:
        raise ValueError(expected("readout_constraint", readout_constraint, READOUTS))


def _width(role: Role) -> float:
    """The fan of a role that grows with the width of a model."""
    return role.fan_in if role.kind in ("weight", "output") else role.fan_out


# ------------------------------------------------------------------ forward factor, initial scale

VECTORS = {"bias": (1.0, 0.0), "norm": (1.0, 1.0)}


def _forward_init_umup(role: Role) -> tuple[float, float]:
    i = role.fan_in
    own = {"input": (i**-0.5, 1.0), "weight": (i**-0.5, 1.0), "output": (1 / i, 1.0)}
    return (own | VECTORS).get(role.kind, (1.0, 1.0))


def _forward_init_mus(role: Role) -> tuple[float, float]:
    i = role.fan_in
    own = {"weight": (i**-0.5, 1.0), "output": (1 / i, 1.0)}
    return (own | VECTORS).get(role.kind, (1.0, 1.0))


def _forward_init_mup(role: Role) -> tuple[float, float]:
    i = role.fan_in
    own = {"input": (1.0, i**-0.5), "weight": (1.0, i**-0.5), "output": (1 / i, 1.0)}
    return (own | VECTORS).get(role.kind, (1.0, 1.0))


def _forward_init_standard(role: Role) -> tuple[float, float]:
    product = role.kind in ("input", "weight", "output")
    return VECTORS.get(role.kind, (1.0, role.fan_in**-0.5 if product else 1.0))


FORWARD_INIT: dict[str, Callable[[Role], tuple[float, float]]] = {
    "umup": _forward_init_umup,
    "mus": _forward_init_mus,
    "mup": _forward_init_mup,
    "standard": _forward_init_standard,
}

# ------------------------------------------------------------------------------ learning rates


def _rate_umup_adam(role: Role) -> float:
    own = {"embedding": role.fan_out**-0.5, "weight": role.fan_in**-0.5}
    return own.get(role.kind, 1.0) * role.depth**-0.5


def _rate_umup_muon(role: Role) -> float:
    # An update of fixed RMS has a spectral norm of about sqrt(fan_in), which the forward factor
    # cancels: https://arxiv.org/abs/2601.01306.
    return role.depth**-0.5 if role.kind == "weight" else _rate_umup_adam(role)


def _rate_mus_adam(role: Role) -> float:
    return role.fan_in**-0.5 if role.kind == "weight" else 1.0


def _rate_mup_adam(role: Role) -> float:
    return 1 / role.fan_in if role.kind == "weight" else 1.0


def _rate_mup_sgd(role: Role) -> float:
    return 1.0 if role.kind == "weight" else float(_width(role))


def _rate_mup_muon(role: Role) -> float:
    return role.fan_in**-0.5 if role.kind == "weight" else 1.0


def _one(role: Role) -> float:
    del role
    return 1.0


RATES: dict[tuple[str, str], Callable[[Role], float]] = {
    ("umup", "adam"): _rate_umup_adam,
    ("umup", "sgd"): _rate_umup_adam,  # gradients are unit, as normalized ones are
    ("umup", "muon"): _rate_umup_muon,
    ("mus", "adam"): _rate_mus_adam,
    ("mus", "sgd"): _rate_mus_adam,
    ("mus", "muon"): _one,
    ("mup", "adam"): _rate_mup_adam,
    ("mup", "sgd"): _rate_mup_sgd,
    ("mup", "muon"): _rate_mup_muon,
    **{("standard", optimizer): _one for optimizer in OPTIMIZERS},
}
