"""A policy: in which dtype parameters are stored, arithmetic is done, and results are returned.

    Policy(param="float32", compute="bfloat16", output="float32")

Float32 masters keep the small updates that a 16-bit weight would round away; 16-bit arithmetic is
what accelerators are fast at (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740).
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from unitscale_jax import rules, tree as trees
from unitscale_jax.errors import closest
from unitscale_jax.typing import DType, Params

FIELDS = ("param", "compute", "output")
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Policy:
    """The dtypes of stored parameters, of arithmetic and of results.

    Attributes:
        param: Dtype in which parameters are stored and updated.
        compute: Dtype in which the model computes.
        output: Dtype of the floating results.
        overrides: Pairs `(pattern, compute dtype)` over parameter names, first match wins; see
            `unitscale_jax.rules`. Norms and routers often stay in float32.

    Raises:
        ValueError: A dtype is unknown, or none that a model can compute in.
        TypeError: An override is not a pair of a pattern and a dtype.

    Example:
        >>> policy = Policy(compute="float16", overrides=[("**/norm/*", "float32")])
        >>> policy
        Policy(param='float32', compute='float16', output='float32', \
overrides=(('**/norm/*', 'float32'),))
        >>> eval(repr(policy)) == policy
        True
    """

    param: DType = "float32"
    compute: DType = "bfloat16"
    output: DType = "float32"
    overrides: rules.Rules[DType] = ()

    def __post_init__(self) -> None:
        """Normalizes dtypes to `np.dtype`, and overrides to a tuple of pairs."""
        for field in FIELDS:
            object.__setattr__(self, field, dtype_of(getattr(self, field), f"Policy.{field}"))
        pairs = rules.pairs_of(self.overrides)
        overrides = tuple((p, dtype_of(d, f"Policy.overrides, {p!r},")) for p, d in pairs)
        object.__setattr__(self, "overrides", overrides)

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads a policy from text such as a command line has.

        Args:
            text: "field=dtype" for any of param, compute and output, joined by commas; a field
                that is left out has its default.

        Raises:
            ValueError: A field or dtype is unknown, or a field comes twice.

        Example:
            >>> Policy.parse("param=float32,compute=bfloat16,output=float32") == Policy()
            True
            >>> Policy.parse("param=float32,compute=bf16")
            Traceback (most recent call last):
                ...
            ValueError: Policy.compute is 'bf16', which names no dtype to compute in; \
closest: 'bfloat16'. Use float16, bfloat16, float32 or float64.
        """
        fields: dict[str, Any] = {}
        for item in text.split(","):
            field, _, dtype = (word.strip() for word in item.partition("="))
            if field not in FIELDS or field in fields:
                fault = "comes twice" if field in fields else "is no field of a policy"
                raise ValueError(
                    f"{field!r} in {text!r} {fault}. Write each of {', '.join(FIELDS)} at most "
                    "once, as in 'param=float32,compute=bfloat16,output=float32'."
                )
            fields[field] = dtype
        return cls(**fields)

    def __repr__(self) -> str:
        """The call that makes this policy."""
        names = [f"{field}={getattr(self, field).name!r}" for field in FIELDS]
        overrides = tuple((p, np.dtype(dtype).name) for p, dtype in rules.pairs_of(self.overrides))
        if overrides:
            names.append(f"overrides={overrides!r}")
        return f"Policy({', '.join(names)})"

    def cast_to_param(self, params: Params) -> Params:
        """Casts the floating leaves of `params` to the dtype they are stored in.

        Example:
            >>> Policy(param="bfloat16").cast_to_param({"w": 1.5})["w"].dtype
            dtype(bfloat16)
        """
        return trees.astype(params, self.param)


def dtype_of(dtype: DType, where: str) -> np.dtype:
    """The floating dtype that a name, a scalar type or a dtype stands for.

    Raises:
        ValueError: It is none of `DTYPES`, or float64 while `jax_enable_x64` is off.
    """
    # Numpy reads None as float64 and "half", "d" or "f4" as floats; a config should not.
    name = dtype if isinstance(dtype, str) else _name(dtype)
    if name not in DTYPES:
        near = closest(_spelled_out(name), DTYPES, most=1)
        raise ValueError(
            f"{where} is {dtype!r}, which names no dtype to compute in{near}. "
            f"Use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}."
        )
    if name == "float64" and jax.dtypes.canonicalize_dtype(name) != name:
        raise ValueError(
            f"{where} is float64, which JAX would silently make float32. Call "
            "jax.config.update('jax_enable_x64', True) first, or use float32."
        )
    return np.dtype(name)


def _name(dtype: Any) -> str:
    try:
        return "None" if dtype is None else np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _spelled_out(name: str) -> str:
    """The name that an abbreviation may be meant for, as "float32" for "fp32"."""
    short = {"bf16": "bfloat16", "f16": "float16", "half": "float16"}
    if name.startswith("fp"):
        return name.replace("fp", "float")
    return short.get(name, name)
