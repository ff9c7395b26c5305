"""Builds the optimizer of `--optim` and `--optim_args`: M-FAC, AdamW or Optax's."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import mfac_jax
from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.training import devices, optax_optimizers
from bert_finetune.training.schedules import make_schedule

# Maps a peak learning rate to its schedule.
_Schedules = Callable[[float], optax.Schedule]
# Window name -> whether embedding tables are row-sparse, and the window or its dtype.
_WINDOWS = {
    "dense": (False, mfac_jax.DenseWindow()),
    "bf16": (False, mfac_jax.DenseWindow(jnp.bfloat16)),
    "int8": (False, mfac_jax.Int8Window()),
    "row_sparse": (True, jnp.float32),
    "row_sparse_bf16": (True, jnp.bfloat16),
    "topk": (False, mfac_jax.TopKWindow()),
}
# `lr` and `weight_decay` default to their flags.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "MFAC": {
        "num_grads": 1024,
        "damp": 1e-6,
        "momentum": 0.0,
        "window": "row_sparse",
        "word_lr": None,
    },
    "adam_mfac": {
        "num_grads": 128,
        "damp": 0.3,
        "b1": 0.9,
        "b2": 0.99,
        "window": "row_sparse",
        "word_lr": None,
    },
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "word_lr": None},
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# A description of the valid values, and a predicate.
_Expected = tuple[str, Callable[[Any], bool]]
_SHARE: _Expected = ("a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
_AT_LEAST_0: _Expected = (
    "a finite number of at least 0",
    lambda x: _is_number(x) and 0 <= x < math.inf,
)
_EXPECTED: dict[str, _Expected] = {
    "lr": _AT_LEAST_0,
    "num_grads": ("an integer of at least 1", lambda x: type(x) is int and x >= 1),
    "damp": ("a positive number", lambda x: _is_number(x) and 0 < x < math.inf),
    "momentum": _SHARE,
    "window": (f"one of {', '.join(_WINDOWS)}", lambda x: x in [*_WINDOWS]),
    "word_lr": (f"null or {_AT_LEAST_0[0]}", lambda x: x is None or _AT_LEAST_0[1](x)),
    "b1": _SHARE,
    "b2": _SHARE,
    "eps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
}


class Optimizer(NamedTuple):
    """An optimizer ready for the train step."""

    name: str  # As given to `--optim`.
    hyperparams: dict[str, Any]
    schedule: optax.Schedule  # Of the learning rate.
    transformation: optax.GradientTransformation  # With clipping.


def parse_hyperparams(args: Arguments) -> dict[str, Any]:
    """Returns all hyperparameters of the optimizer, from the flags and defaults.

    Raises a UserError for an unknown optimizer or hyperparameter, malformed JSON, or a
    value out of range.
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
            known = f"{args.optim} accepts {', '.join(defaults)}"
            raise UserError(f"--optim_args has the unknown key {name!r}; {known}.")
        known = _EXPECTED[name] if is_ours or name == "lr" else None
        expected, fits = known or optax_optimizers.expected(defaults[name])
        if not fits(value):
            raise UserError(
                f"{name} in --optim_args must be {expected}, got {value!r}."
            )
    hyperparams = defaults | given
    missing = [k for k, v in hyperparams.items() if v is optax_optimizers.REQUIRED]
    if missing:
        names = ", ".join(missing)
        raise UserError(f"--optim {args.optim} needs {names} in --optim_args.")
    window = hyperparams.get("window")
    decays_gradients = args.optim == "MFAC" and hyperparams["weight_decay"] > 0
    if window is not None and decays_gradients and _WINDOWS[window][0]:
        raise UserError(
            f"weight_decay {hyperparams['weight_decay']} makes the gradients of the "
            f"embedding tables dense, which window {window!r} cannot store: choose "
            "dense, bf16, int8 or topk."
        )
    return hyperparams


def check_num_grads(hyperparams: Mapping[str, Any], num_devices: int) -> None:
    """Raises a UserError unless the window can be split over the devices."""
    num_grads = hyperparams.get("num_grads", 0)
    if num_grads % num_devices:
        above = num_grads + -num_grads % num_devices
        raise UserError(
            f"num_grads in --optim_args must be a multiple of {num_devices}, the "
            f"number of devices that share the window, got {num_grads}: give {above} "
            "or another --num_devices."
        )


def _parse_json(optim_args: str | None) -> dict[str, Any]:
    if optim_args is None:
        return {}
    try:
        given = json.loads(optim_args)
    except ValueError as error:
        what = f"--optim_args is not valid JSON ({error}): {optim_args!r}"
        raise UserError(f"{what}. Example: '{{\"lr\": 1e-4}}'.") from error
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
    """Builds the optimizer for these parameters, or their shapes.

    ``max_rows`` is the maximum of rows per gradient of each embedding table.
    """

    def schedule(peak: float) -> optax.Schedule:
        return make_schedule(args, peak, num_steps)

    name = args.optim
    if name == "MFAC":
        names = ("num_grads", "damp", "momentum", "weight_decay")
        optimizer = _mfac(mfac_jax.mfac, names, schedule, hyperparams, max_rows)
    elif name == "adam_mfac":
        names = ("num_grads", "damp", "b1", "b2", "weight_decay")
        optimizer = _mfac(mfac_jax.adam_mfac, names, schedule, hyperparams, max_rows)
    elif name == "adamw":
        optimizer = _adamw(schedule, hyperparams)
    else:
        make = optax_optimizers.make_optimizer
        optimizer = make(name, schedule, hyperparams, params)
    if hyperparams.get("word_lr") is not None:
        # Another optimizer's betas do not apply to AdamW.
        names = [*hyperparams] if name == "adamw" else ["weight_decay"]
        words = _DEFAULTS["adamw"] | {k: hyperparams[k] for k in names}
        words["lr"] = hyperparams["word_lr"]
        optimizer = optax.partition(
            {True: _adamw(schedule, words), False: optimizer}, bert.is_word_embedding
        )
    if args.max_grad_norm:
        clip = optax.clip_by_global_norm(args.max_grad_norm)
        optimizer = optax.chain(clip, optimizer)
    return Optimizer(name, hyperparams, schedule(hyperparams["lr"]), optimizer)


def _mfac(
    factory: Callable[..., optax.GradientTransformation],
    names: Sequence[str],
    schedule: _Schedules,
    hyperparams: Mapping[str, Any],
    max_rows: Mapping[str, int],
) -> optax.GradientTransformation:
    is_row_sparse, window = _WINDOWS[hyperparams["window"]]
    if is_row_sparse:
        if hyperparams["word_lr"] is not None:
            max_rows = {k: v for k, v in max_rows.items() if k != bert.WORD_EMBEDDINGS}
        window = mfac_jax.compact_windows(max_rows, window)
    return factory(
        schedule(hyperparams["lr"]),
        **{name: hyperparams[name] for name in names},
        window=window,
        window_axis=devices.AXIS if devices.count() > 1 else None,
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
