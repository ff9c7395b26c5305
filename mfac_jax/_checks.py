"""Validates the arguments of the optimizer and its windows."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

# The requirement on a damping, for check_number.
POSITIVE = (
    "must be positive and finite: at 0 the Fisher is singular",
    lambda x: 0 < x < math.inf,
)
# The requirements on other hyperparameters, for check_number.
RATE = ("must be in [0, 1)", lambda x: 0 <= x < 1)
DECAY = ("must be finite and at least 0", lambda x: 0 <= x < math.inf)
EPSILON = ("must be positive and finite", lambda x: 0 < x < math.inf)
_DTYPES = ("float64", "float32", "bfloat16", "float16")


def number_of(value: Any) -> float | None:
    """Returns a concrete scalar as a float; ``None`` for schedules and tracers."""
    if callable(value) or isinstance(value, jax.core.Tracer):
        return None
    return float(value)


def check_number(
    name: str,
    value: Any,
    requirement: str,
    holds: Callable[[float], bool],
    kind: str = "a number",
) -> Any:
    """Validates a concrete scalar of any library.

    Args:
      name: The name of the argument, for the message.
      value: The argument. A traced scalar passes unchecked.
      requirement: The requirement in words, for the message.
      holds: Returns whether a number meets the requirement.
      kind: The accepted types in words, for the message.

    Returns:
      The value. Scalars of NumPy and other libraries become Python floats, which do not
      promote dtypes; a JAX array stays one, because ``optax.inject_hyperparams`` may
      pass a tracer at the next call.

    Raises:
      TypeError: If ``value`` is not a scalar.
      ValueError: If it does not meet the requirement.
    """
    is_number = hasattr(value, "__float__") and not isinstance(value, bool)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        kinds = jnp.floating, jnp.integer
        is_number = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    if not is_number or np.ndim(value) > 0:
        raise TypeError(f"{name} must be {kind}, got {_described(value)}.")
    number = number_of(value)
    if number is None:
        return value
    if not holds(number):
        shown = float(f"{number:.6g}")  # Drops the digits that float32 adds.
        raise ValueError(f"{name} {requirement}, got {shown}{_dtype_hint(value)}.")
    return value if isinstance(value, jax.Array) else number


def check_scalar(
    name: str, value: Any, requirement: str, holds: Callable[[float], bool]
) -> Any:
    """Validates a number or a schedule; see :func:`check_number`."""
    if callable(value):
        return value
    return check_number(name, value, requirement, holds, "a number or a schedule")


def check_learning_rate(value: Any) -> Any:
    """Validates a learning rate; see :func:`check_scalar`."""
    # PyTorch users may pass a model or its parameters. Some models are callable.
    holds_arrays = any(np.ndim(leaf) > 0 for leaf in jax.tree.leaves(value))
    if value is None or (holds_arrays and not _is_schedule(value)):
        raise TypeError(
            f"learning_rate must be a number or a schedule, got {_described(value)}. "
            "Parameters are passed to init: optimizer(learning_rate).init(params)."
        )
    return check_scalar("learning_rate", value, "must be finite", math.isfinite)


def _is_schedule(value: Any) -> bool:
    try:
        rate = jax.eval_shape(value, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception:  # A model that is called with a count may raise anything.
        return False
    return getattr(rate, "shape", None) == ()


def check_damp(value: Any) -> Any:
    """Validates a damping; see :func:`check_scalar`."""
    return check_scalar("damp", value, *POSITIVE)


def check_num_grads(value: Any, static_args: tuple[str, ...]) -> int:
    """Validates the number of gradients.

    Args:
      value: The argument.
      static_args: The static arguments of the caller, for the message.

    Returns:
      A Python integer.

    Raises:
      TypeError: If it is traced or not an integer.
      ValueError: If it is below 1.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            "num_grads is a shape and cannot be traced; with optax.inject_hyperparams, "
            f"pass static_args={static_args}."
        )
    return check_integer("num_grads", value, 1)


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Validates an integer of at least ``minimum``; returns a Python integer."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}.")
    return number


def check_window_axis(value: Any) -> None:
    """Raises a TypeError unless ``value`` can name mesh axes."""
    names = value if isinstance(value, tuple) else (value,)
    is_fine = all(isinstance(name, str) for name in names)
    if value is not None and not (is_fine and 0 < len(set(names)) == len(names)):
        raise TypeError(
            "window_axis must be the name of a mesh axis, a tuple of different names, "
            f"or None, got {value!r}."
        )


def check_dtype(kind: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Raises a ValueError unless ``dtype`` is a storage dtype or ``None``."""
    if dtype is None:
        return
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _DTYPES:
        raise ValueError(
            f"{kind} dtype must be one of {', '.join(_DTYPES)} or None, got {name}."
        )


def check_parameter(name: str, leaf: Any) -> None:
    """Validates that a leaf is a real floating-point array or number.

    Raises:
      TypeError: With the leaf's path and how to leave it out.
    """
    if isinstance(leaf, float):
        return
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        raise TypeError(
            "M-FAC needs real floating-point parameters, but "
            f"{named(name)} is {_described(leaf)}. Leave it out with optax.masked or "
            "optax.partition; for an Equinox model, pass "
            "eqx.filter(model, eqx.is_inexact_array)."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            "M-FAC needs real floating-point parameters, but "
            f"{named(name)} has dtype {leaf.dtype}. Leave it out with optax.masked or "
            "optax.partition."
        )


def named(path: str) -> str:
    """Returns the path of a leaf for a message; a tree of one leaf has no path."""
    return path or "the parameter"


def _described(value: Any) -> str:
    if isinstance(value, str | int | float | complex | None):
        return repr(value)
    shape = getattr(value, "shape", ())
    if shape:
        return f"an array of shape {tuple(shape)}"
    text = repr(value)
    return f"a {type(value).__name__}" + (f", {text}" if len(text) <= 60 else "")


def _dtype_hint(value: Any) -> str:
    """Returns a hint if rounding may have made a number invalid."""
    dtype = getattr(value, "dtype", None)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return ""
    return (
        f" in {dtype}; optax.inject_hyperparams casts hyperparameters to the dtype of "
        "the parameters unless you pass hyperparam_dtype=jnp.float32"
    )
