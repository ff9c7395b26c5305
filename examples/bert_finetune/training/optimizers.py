"""`--optim` and `--optim_args`: the optimizer, its schedule, the memory it takes."""

import contextlib
import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import psutil

import mfac_jax
from bert_finetune.arguments import Arguments
from bert_finetune.errors import UserError

# Beside the optimizer's state: parameters, gradient, update and activations of a batch,
# in units of the parameters.
_WORKING_COPIES = 4
# From the peak of a learning rate to its schedule.
_Schedules = Callable[[float], optax.Schedule]
# What Optax's optimizers call the tree of the weights that decay, and the decay.
_MASKS = ("mask", "weight_decay_mask")
_DECAYS = ("weight_decay", "weight_decay_rate")
_WORD_TABLE = "word_embeddings"


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


def _mfac(
    schedule: _Schedules, hyperparams: Mapping[str, Any], max_rows: Mapping[str, int]
):
    if hyperparams["word_lr"] is not None:
        max_rows = {k: v for k, v in max_rows.items() if k != _WORD_TABLE}
    windows = {
        "dense": mfac_jax.DenseWindow(),
        "bf16": mfac_jax.DenseWindow(jnp.bfloat16),
        "int8": mfac_jax.Int8Window(),
        "row_sparse": mfac_jax.compact_windows(max_rows),
        "row_sparse_bf16": mfac_jax.compact_windows(max_rows, jnp.bfloat16),
        "topk": mfac_jax.TopKWindow(),
    }
    name = hyperparams["window"]
    if name not in list(windows):
        raise ValueError(f"window must be one of {', '.join(windows)}, got {name!r}.")
    if hyperparams["weight_decay"] > 0 and name.startswith("row_sparse"):
        raise ValueError(
            f"weight_decay {hyperparams['weight_decay']} makes the gradients of the "
            f"embedding tables dense, for which window {name!r} has no room: choose "
            "dense, bf16, int8 or topk."
        )
    names = ("num_grads", "damp", "momentum", "weight_decay")
    optimizer = mfac_jax.mfac(
        schedule(hyperparams["lr"]),
        **{name: hyperparams[name] for name in names},
        window=windows[name],
        mask=decay_mask,
    )
    return _words_apart(optimizer, schedule, hyperparams)


def _words_apart(
    optimizer: optax.GradientTransformation,
    schedule: _Schedules,
    hyperparams: Mapping[str, Any],
) -> optax.GradientTransformation:
    """Leaves the word table to AdamW if it has a learning rate of its own."""
    word_lr = hyperparams["word_lr"]
    if word_lr is None:
        return optimizer
    if not _is_number(word_lr) or not 0 <= word_lr < math.inf:
        raise ValueError(
            f"word_lr must be null or a finite number of at least 0, got {word_lr!r}."
        )
    words = {**_ADAMW, **hyperparams, "lr": word_lr, "word_lr": None}
    return optax.partition(
        {True: _adamw(schedule, words, {}), False: optimizer}, _is_word_table
    )


def _is_word_table(params: Any) -> Any:
    """Marks the word table, of which M-FAC hardly moves the rows of rare words."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(p.key == _WORD_TABLE for p in path), params
    )


def _adamw(
    schedule: _Schedules, hyperparams: Mapping[str, Any], max_rows: Mapping[str, int]
):
    del max_rows
    for name in ("b1", "b2"):
        if not 0 <= hyperparams[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {hyperparams[name]}.")
    for name in ("eps", "weight_decay"):
        if hyperparams[name] < 0:
            raise ValueError(f"{name} must be at least 0, got {hyperparams[name]}.")
    b1, b2, eps, weight_decay = (
        float(hyperparams[name]) for name in ("b1", "b2", "eps", "weight_decay")
    )
    optimizer = optax.chain(
        _scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule(hyperparams["lr"])),
    )
    return _words_apart(optimizer, schedule, hyperparams)


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Like :func:`optax.scale_by_adam`, with the bias correction in full precision.

    Optax computes ``1 − βᵗ`` in float32, which for ``β = 0.999`` has a relative error
    of up to 1e-5: on a small BERT, losses 5e-6 away from torch's instead of 1e-7.
    """

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)

        def correction(beta):
            return -jnp.expm1(count * (math.log(beta) if beta else -math.inf))

        updates = jax.tree.map(
            lambda m, v: (
                (m / correction(b1)) / (jnp.sqrt(v / correction(b2)) + eps)
            ).astype(m.dtype),
            mu,
            nu,
        )
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update_fn)


# Defaults; `lr` and `weight_decay` default to their flags.
_MFAC = {
    "num_grads": 1024,
    "damp": 1e-6,
    "momentum": 0.0,
    "window": "row_sparse",
    "word_lr": None,
}
_ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "word_lr": None}
_OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "MFAC": (_mfac, _MFAC),
    "adamw": (_adamw, _ADAMW),
}


def optax_aliases() -> dict[str, Callable[..., Any]]:
    """Returns the optimizers of Optax by name: its functions of a learning rate."""
    return {
        prefix + name: function
        for prefix, module in (("", optax), ("contrib.", optax.contrib))
        for name, function in vars(module).items()
        if name.islower() and not name.startswith(("_", "scale_by_"))
        if callable(function) and not isinstance(function, type)
        if "learning_rate" in inspect.signature(function).parameters
    }


def _optax(
    alias: Callable[..., Any],
    schedule: _Schedules,
    hyperparams: Mapping[str, Any],
    max_rows: Mapping[str, int],
):
    del max_rows
    parameters = inspect.signature(alias).parameters
    masks = {name: decay_mask for name in _MASKS if name in parameters}
    values = {name: _as_tuples(value) for name, value in hyperparams.items()}
    return alias(learning_rate=schedule(values.pop("lr")), **values, **masks)


def _as_tuples(value: Any) -> Any:
    """Optax takes tuples where JSON has lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _optax_defaults(alias: Callable[..., Any]) -> dict[str, Any]:
    """Returns what an optimizer of Optax has for `--optim_args`, as JSON has it.

    Arguments without a default are :attr:`inspect.Parameter.empty`; functions and other
    transformations are left out, to stay as they are.
    """
    defaults = {}
    for name, parameter in inspect.signature(alias).parameters.items():
        if name in ("learning_rate", *_MASKS):
            continue
        if parameter.default is parameter.empty:
            defaults[name] = parameter.empty
            continue
        with contextlib.suppress(TypeError):
            as_json = json.dumps(parameter.default, default=lambda x: jnp.dtype(x).name)
            defaults[name] = json.loads(as_json)
    return defaults


def _resolve(args: Arguments) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns the factory that `--optim` names and the defaults of what it takes."""
    if args.optim in _OPTIMIZERS:
        factory, defaults = _OPTIMIZERS[args.optim]
        return factory, {**defaults, "weight_decay": args.weight_decay}
    aliases = optax_aliases()
    name = args.optim.removeprefix("optax.")
    if name not in aliases:
        raise _unknown_optimizer(args.optim, aliases)
    if name.startswith("contrib.schedule_free"):
        raise UserError(
            f"--optim {args.optim} evaluates other parameters than those it trains, "
            "which is not supported: choose another optimizer."
        )
    defaults = _optax_defaults(aliases[name])
    decays = [decay for decay in _DECAYS if decay in defaults]
    if args.weight_decay > 0 and not decays:
        raise UserError(
            f"--weight_decay {args.weight_decay} has no effect on --optim {args.optim},"
            " which has no weight decay: leave the flag out, or choose another "
            "optimizer."
        )
    # Hugging Face's default, not Optax's, which differs between its optimizers.
    defaults |= dict.fromkeys(decays, args.weight_decay)
    return functools.partial(_optax, aliases[name]), defaults


def _unknown_optimizer(name: str, aliases: Mapping[str, Any]) -> UserError:
    def short(name):
        return name.rpartition(".")[2].lower()

    names = {short(known): known for known in (*aliases, *_OPTIMIZERS)}
    close = [names[match] for match in difflib.get_close_matches(short(name), names)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return UserError(
        f"--optim must be {', '.join(_OPTIMIZERS)} or the name of an Optax optimizer "
        f"with a learning_rate, such as lion or contrib.muon, got {name!r}.{hint}"
    )


def make_optimizer(
    args: Arguments, num_steps: int, max_rows: Mapping[str, int]
) -> Optimizer:
    """Builds what `--optim`, `--optim_args` and the flags beside them describe.

    Args:
      args: the flags.
      num_steps: over which the learning rate decays.
      max_rows: by name of an embedding table, the rows of which any batch has a
        gradient; row-sparse windows hold as many.

    Raises:
      UserError: for an unknown optimizer or hyper-parameter, malformed JSON, or a value
        out of range.
    """
    factory, defaults = _resolve(args)
    hyperparams = {"lr": args.learning_rate, **defaults}
    hyperparams |= _parse_optim_args(args, hyperparams)
    missing = [k for k, v in hyperparams.items() if v is inspect.Parameter.empty]
    if missing:
        raise UserError(
            f"--optim {args.optim} needs {', '.join(missing)} in --optim_args."
        )
    lr = hyperparams["lr"]
    if lr is None or not 0 <= lr < math.inf:
        raise UserError(f"the learning rate must be finite and at least 0, got {lr}.")
    num_warmup = args.warmup_steps or math.ceil(num_steps * args.warmup_ratio)

    def schedule(peak):
        return make_schedule(args.lr_scheduler_type, peak, num_steps, num_warmup)

    try:
        optimizer = factory(schedule, hyperparams, max_rows)
    except (TypeError, ValueError) as error:
        if args.optim not in _OPTIMIZERS:
            raise _cannot_train(args.optim, error) from None
        raise UserError(f"--optim_args of {args.optim}: {error}") from None
    clip = (
        optax.clip_by_global_norm(args.max_grad_norm)
        if args.max_grad_norm
        else optax.identity()
    )
    transformation = optax.chain(clip, optimizer)
    return Optimizer(args.optim, hyperparams, schedule(lr), transformation)


def _parse_optim_args(args: Arguments, known: Mapping[str, Any]) -> dict[str, Any]:
    if args.optim_args is None:
        return {}
    try:
        given = json.loads(args.optim_args)
    except ValueError as error:
        raise UserError(
            f"--optim_args is not valid JSON ({error}): {args.optim_args!r}. "
            "Example: '{\"lr\": 1e-4}'."
        ) from None
    if not isinstance(given, dict):
        raise UserError(f"--optim_args must be a JSON object, got {args.optim_args!r}.")
    for name, value in given.items():
        if name not in known:
            raise UserError(
                f"--optim_args has the unknown key {name!r}; {args.optim} knows "
                f"{', '.join(known)}."
            )
        if value is None and args.optim not in _OPTIMIZERS:
            continue  # Turns off some of what Optax has on by default.
        expected, fits = _expected(known[name])
        if not fits(value):
            raise UserError(
                f"{name} in --optim_args must be {expected}, got {value!r}."
            )
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expected(default: Any) -> tuple[str, Callable[[Any], bool]]:
    """Describes and recognises the values that can stand in for a default."""

    def is_plain(value):
        if isinstance(value, list):
            return all(map(is_plain, value))
        return not isinstance(value, dict)

    if isinstance(default, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if _is_number(default):
        return "a number", _is_number
    # Names, such as a window's, are checked where the names are.
    return "a number, true, false, null, a string or a list of those", is_plain


def make_schedule(
    kind: Literal["linear", "cosine", "constant"],
    peak: float,
    num_steps: int,
    num_warmup: int = 0,
) -> optax.Schedule:
    """Linear rise over the warm-up, if there is one, then what `kind` says.

    Linear and cosine schedules have come down to zero after `num_steps`, warm-up
    included. A warm-up of more than that stops short of the peak.
    """
    num_decay = max(1, num_steps - num_warmup)
    schedule = {
        "linear": optax.linear_schedule(peak, 0.0, num_decay),
        "cosine": optax.cosine_decay_schedule(peak, num_decay),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if num_warmup == 0:
        return schedule
    rise = optax.linear_schedule(0.0, peak, num_warmup)
    return optax.join_schedules([rise, schedule], [num_warmup])


def decay_mask(params: Any) -> Any:
    """Marks what decays: all but biases and LayerNorm weights, as in Hugging Face."""

    def decays(path, _):
        return path[-1].key != "bias" and not any(p.key == "LayerNorm" for p in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def nbytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_update(optimizer: Optimizer, params: Any) -> None:
    """Refuses an optimizer that cannot take a train step, or be saved, without one.

    Raises:
      UserError: with the cause.
    """

    def update(params):
        state = optimizer.transformation.init(params)
        return optimizer.transformation.update(params, state, params)

    try:
        updates, state = jax.eval_shape(update, params)
        if not all(leaf.size for leaf in jax.tree.leaves(state)):
            raise ValueError("checkpoints cannot hold the empty arrays of its state")
        if [u.shape for u in jax.tree.leaves(updates)] != [
            p.shape for p in jax.tree.leaves(params)
        ]:
            raise ValueError("its updates have other shapes than the parameters")
    except Exception as error:  # Whatever any version of Optax may raise.
        raise _cannot_train(optimizer.name, error) from None


def _cannot_train(name: str, cause: Exception) -> UserError:
    return UserError(
        f"--optim {name} cannot be used here: it needs more than gradients, it takes "
        "no schedule as its learning rate, it cannot be saved, or it does not take "
        f"these --optim_args ({type(cause).__name__}: {cause})."
    )


def check_memory(optimizer: Optimizer, params: Any) -> None:
    """Refuses an optimizer state that will not fit, before anything is allocated.

    Raises:
      UserError: with the size of the state, the memory there is, and what would fit.
    """
    shapes = jax.eval_shape(optimizer.transformation.init, params)
    state, working = nbytes(shapes), _WORKING_COPIES * nbytes(params)
    available = available_memory()
    if state + working <= available:
        return
    message = (
        f"the state of {optimizer.name} takes {state / 1e9:.1f} GB and training beside "
        f"it about {working / 1e9:.1f} GB, but {available / 1e9:.1f} GB of memory are "
        "available."
    )
    num_grads = optimizer.hyperparams.get("num_grads")
    if num_grads is not None:
        window = mfac_jax.window_nbytes(shapes)
        # Less one gradient: a top-k window also keeps an error of that size.
        for_window = available - working - (state - window) - nbytes(params)
        fitting = max(0, for_window * num_grads // window)
        message += (
            f" Its window holds num_grads = {num_grads} gradients; {fitting} would "
            "fit: lower num_grads in --optim_args."
        )
    raise UserError(message)


def available_memory() -> int:
    """Returns the bytes that can still be allocated on the first device."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = psutil.virtual_memory().available
    for limit_file in (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        try:
            limit = int(Path(limit_file).read_text())
        except (OSError, ValueError):
            continue  # No such version of cgroups, or "max": no limit.
        available = min(available, limit - psutil.Process().memory_info().rss)
    return available
