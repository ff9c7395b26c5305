"""Builds Optax optimizers from their names, with hyperparameters from JSON."""

import contextlib
import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError
from bert_finetune.model import bert

# Optax's parameter names for the weight decay mask and the weight decay.
_MASKS = ("mask", "weight_decay_mask")
_DECAYS = ("weight_decay", "weight_decay_rate")
REQUIRED = inspect.Parameter.empty


def aliases() -> dict[str, Callable[..., Any]]:
    """Returns Optax's optimizers by name: its functions with a learning_rate."""
    return {
        prefix + name: function
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, function in vars(module).items()
        if name.islower() and not name.startswith(("_", "scale_by_"))
        if callable(function) and not isinstance(function, type)
        if "learning_rate" in inspect.signature(function).parameters
    }


def _find(optim: str, others: Sequence[str]) -> Callable[..., Any]:
    """Returns the function that `--optim` names; the error suggests similar names."""
    known = aliases()
    name = optim.removeprefix("optax.")
    if name.startswith("contrib.schedule_free"):
        raise UserError(
            f"--optim {optim} evaluates parameters other than those it trains, which "
            "is not supported: choose another optimizer."
        )
    if name in known:
        return known[name]

    def short(name: str) -> str:
        return name.rpartition(".")[2].lower()

    names = {short(name): name for name in (*known, *others)}
    close = [names[match] for match in difflib.get_close_matches(short(optim), names)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(
        f"--optim must be {', '.join(others)} or the name of an Optax optimizer "
        f"with a learning_rate, such as lion or contrib.muon, got {optim!r}.{hint}"
    )


def _defaults(alias: Callable[..., Any]) -> dict[str, Any]:
    """Returns the defaults that JSON can express; other arguments are fixed."""
    defaults = {}
    for name, parameter in inspect.signature(alias).parameters.items():
        if name in ("learning_rate", *_MASKS):
            continue
        if parameter.default is REQUIRED:
            defaults[name] = REQUIRED
            continue
        with contextlib.suppress(TypeError):
            as_json = json.dumps(parameter.default, default=lambda x: jnp.dtype(x).name)
            defaults[name] = json.loads(as_json)
    return defaults


def defaults(args: Arguments, others: Sequence[str]) -> dict[str, Any]:
    """Returns the default of each hyperparameter of `--optim`, or :data:`REQUIRED`.

    ``others`` are further valid names, for the error message. Raises a UserError for an
    unknown optimizer, or a weight decay that the optimizer does not support.
    """
    values = _defaults(_find(args.optim, others))
    decays = [decay for decay in _DECAYS if decay in values]
    if args.weight_decay > 0 and not decays:
        raise UserError(
            f"--weight_decay {args.weight_decay} has no effect on --optim {args.optim},"
            " which has no weight decay: leave the flag out, or choose another "
            "optimizer."
        )
    # Hugging Face's default; Optax's defaults differ between optimizers.
    return values | dict.fromkeys(decays, args.weight_decay)


def expected(default: Any) -> tuple[str, Callable[[Any], bool]]:
    """Returns a description of valid replacements for a default, and a predicate."""

    def is_plain(value):
        if isinstance(value, list):
            return all(map(is_plain, value))
        return not isinstance(value, dict)

    # null disables some options that Optax enables by default.
    if isinstance(default, bool):
        return "true or false", lambda value: value is None or isinstance(value, bool)
    if isinstance(default, int | float):
        return "a number", lambda value: value is None or type(value) in (int, float)
    return "a number, true, false, null, a string or a list of those", is_plain


def make_optimizer(
    optim: str,
    schedule: Callable[[float], optax.Schedule],
    hyperparams: Mapping[str, Any],
    params: Any,
) -> optax.GradientTransformation:
    """Builds an optimizer.

    Dry-runs one update; raises a UserError if the optimizer cannot train these
    parameters or cannot be checkpointed. ``schedule`` maps a peak learning rate to its
    schedule.
    """
    alias = _find(optim, [])
    masks = inspect.signature(alias).parameters.keys() & set(_MASKS)
    values = {name: _as_tuples(value) for name, value in hyperparams.items()}
    learning_rate = schedule(values.pop("lr"))

    def update(params):
        state = optimizer.init(params)
        return optimizer.update(params, state, params)

    try:
        values |= dict.fromkeys(masks, bert.decay_mask)
        optimizer = alias(learning_rate, **values)
        updates, state = jax.eval_shape(update, params)
        if not all(leaf.size for leaf in jax.tree.leaves(state)):
            raise ValueError("checkpoints cannot hold the empty arrays of its state")
        trees = jax.tree.leaves(updates), jax.tree.leaves(params)
        if [x.shape for x in trees[0]] != [x.shape for x in trees[1]]:
            raise ValueError("its updates differ in shape from the parameters")
    except Exception as error:  # Optimizers may raise any type.
        raise UserError(
            f"--optim {optim} cannot be used here: it needs more than gradients, does "
            "not accept a learning rate schedule, cannot be checkpointed, or does not "
            f"accept these --optim_args ({type(error).__name__}: {error})."
        ) from error
    return optimizer


def _as_tuples(value: Any) -> Any:
    """Converts lists, as JSON has them, to tuples, as Optax expects them."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
