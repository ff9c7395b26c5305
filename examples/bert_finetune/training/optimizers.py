"""`--optim` and `--optim_args`: M-FAC, AdamW, or any optimizer of Optax by name."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import mfac_jax
from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.training import optax_optimizers
from bert_finetune.training.schedules import make_schedule

# From the peak of a learning rate to its schedule.
_Schedules = Callable[[float], optax.Schedule]
# By name of a window: whether embedding tables are stored row-sparse, and the window.
_WINDOWS = {
    "dense": (False, mfac_jax.DenseWindow()),
    "bf16": (False, mfac_jax.DenseWindow(jnp.bfloat16)),
    "int8": (False, mfac_jax.Int8Window()),
    "row_sparse": (True, jnp.float32),
    "row_sparse_bf16": (True, jnp.bfloat16),
    "topk": (False, mfac_jax.TopKWindow()),
}
# Defaults; `lr` and `weight_decay` default to their flags.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "MFAC": {
        "num_grads": 1024,
        "damp": 1e-6,
        "momentum": 0.0,
        "window": "row_sparse",
        "word_lr": None,
    },
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "word_lr": None},
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_at_least_0(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a finite number of at least 0", _is_at_least_0),
    "num_grads": (
        "an integer of at least 1",
        lambda value: type(value) is int and value >= 1,
    ),
    "damp": ("a positive number", lambda value: _is_at_least_0(value) and value > 0),
    "momentum": ("a number in [0, 1)", _is_share),
    "window": (f"one of {', '.join(_WINDOWS)}", lambda value: value in [*_WINDOWS]),
    "word_lr": (
        "null or a finite number of at least 0",
        lambda value: value is None or _is_at_least_0(value),
    ),
    "b1": ("a number in [0, 1)", _is_share),
    "b2": ("a number in [0, 1)", _is_share),
    "eps": ("a finite number of at least 0", _is_at_least_0),
    "weight_decay": ("a finite number of at least 0", _is_at_least_0),
}


class Optimizer(NamedTuple):
    """An optimizer ready for the train step.

    Attributes:
      name: as given to `--optim`.
      hyperparams: every hyper-parameter with its value.
      schedule: learning rate by step.
      transformation: clipping followed by the optimizer.
    """

    name: str
    hyperparams: dict[str, Any]
    schedule: optax.Schedule
    transformation: optax.GradientTransformation


def parse_hyperparams(args: Arguments) -> dict[str, Any]:
    """Returns every hyper-parameter of the optimizer that the flags describe.

    Raises:
      UserError: for an unknown optimizer or hyper-parameter, malformed JSON, or a value
        out of range.
    """
    is_ours = args.optim in _DEFAULTS
    defaults: dict[str, Any] = {"lr": args.learning_rate}
    if is_ours:
        defaults |= {**_DEFAULTS[args.optim], "weight_decay": args.weight_decay}
    else:
        defaults |= optax_optimizers.defaults(args, [*_DEFAULTS])
    given = _parse_json(args.optim_args)
    for name, value in given.items():
        if name not in defaults:
            raise UserError(
                f"--optim_args has the unknown key {name!r}; {args.optim} knows "
                f"{', '.join(defaults)}."
            )
        expected, fits = (
            _EXPECTED[name]
            if is_ours or name == "lr"
            else optax_optimizers.expected(defaults[name])
        )
        if not fits(value):
            raise UserError(
                f"{name} in --optim_args must be {expected}, got {value!r}."
            )
    hyperparams = defaults | given
    missing = [k for k, v in hyperparams.items() if v is optax_optimizers.REQUIRED]
    if missing:
        raise UserError(
            f"--optim {args.optim} needs {', '.join(missing)} in --optim_args."
        )
    window = hyperparams.get("window")
    if window is not None and hyperparams["weight_decay"] > 0 and _WINDOWS[window][0]:
        raise UserError(
            f"weight_decay {hyperparams['weight_decay']} makes the gradients of the "
            f"embedding tables dense, for which window {window!r} has no room: choose "
            "dense, bf16, int8 or topk."
        )
    return hyperparams


def _parse_json(optim_args: str | None) -> dict[str, Any]:
    if optim_args is None:
        return {}
    try:
        given = json.loads(optim_args)
    except ValueError as error:
        raise UserError(
            f"--optim_args is not valid JSON ({error}): {optim_args!r}. "
            "Example: '{\"lr\": 1e-4}'."
        ) from error
    if not isinstance(given, dict):
        raise UserError(f"--optim_args must be a JSON object, got {optim_args!r}.")
    return given


def make_optimizer(
    args: Arguments,
    hyperparams: dict[str, Any],
    num_steps: int,
    max_rows: Mapping[str, int],
    params: Any,
) -> Optimizer:
    """Builds the optimizer.

    Args:
      args: the flags.
      hyperparams: from :func:`parse_hyperparams`.
      num_steps: over which the learning rate decays.
      max_rows: by name of an embedding table, the rows for which a batch has a
        gradient; row-sparse windows hold as many.
      params: of the model, or their shapes.

    Raises:
      UserError: for an optimizer of Optax that cannot train these parameters.
    """

    def schedule(peak: float) -> optax.Schedule:
        return make_schedule(args, peak, num_steps)

    if args.optim == "MFAC":
        optimizer = _mfac(schedule, hyperparams, max_rows)
    elif args.optim == "adamw":
        optimizer = _adamw(schedule, hyperparams)
    else:
        optimizer = optax_optimizers.make_optimizer(
            args.optim, schedule, hyperparams, params
        )
    if hyperparams.get("word_lr") is not None:
        words = {**_DEFAULTS["adamw"], **hyperparams, "lr": hyperparams["word_lr"]}
        optimizer = optax.partition(
            {True: _adamw(schedule, words), False: optimizer}, bert.is_word_table
        )
    if args.max_grad_norm:
        clip = optax.clip_by_global_norm(args.max_grad_norm)
        optimizer = optax.chain(clip, optimizer)
    return Optimizer(args.optim, hyperparams, schedule(hyperparams["lr"]), optimizer)


def _mfac(
    schedule: _Schedules, hyperparams: Mapping[str, Any], max_rows: Mapping[str, int]
) -> optax.GradientTransformation:
    is_row_sparse, window = _WINDOWS[hyperparams["window"]]
    if is_row_sparse:
        if hyperparams["word_lr"] is not None:
            max_rows = {k: v for k, v in max_rows.items() if k != bert.WORD_TABLE}
        window = mfac_jax.compact_windows(max_rows, window)
    names = ("num_grads", "damp", "momentum", "weight_decay")
    return mfac_jax.mfac(
        schedule(hyperparams["lr"]),
        **{name: hyperparams[name] for name in names},
        window=window,
        mask=bert.decay_mask,
    )


def _adamw(
    schedule: _Schedules, hyperparams: Mapping[str, Any]
) -> optax.GradientTransformation:
    names = ("b1", "b2", "eps", "weight_decay")
    return optax.adamw(
        schedule(hyperparams["lr"]),
        **{name: hyperparams[name] for name in names},
        mask=bert.decay_mask,
    )
