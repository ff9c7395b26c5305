"""M-FAC as an Optax gradient transformation.

Elias Frantar, Eldar Kurtic, Dan Alistarh, "M-FAC: Efficient Matrix-Free
Approximations of Second-Order Information", NeurIPS 2021,
https://arxiv.org/abs/2107.03356 (the dynamic algorithm).
"""

# No `from __future__ import annotations` here: Optax's contract suite compares the
# annotation of `learning_rate` with the object `optax.ScalarOrSchedule`.
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from mfac_jax import _groups, _solve, _storage, _windows
from mfac_jax._dense_window import DenseWindow
from mfac_jax._row_sparse_window import RowSparseWindow
from mfac_jax._windows import StoredGradients, Window, WindowFn


class ScaleByMFACState(NamedTuple):
    """State of :func:`scale_by_mfac`.

    Attributes:
      count: updates so far, refused ones included; schedules of ``damp`` see it.
      gram: the Gram matrix ``K = G Gᵀ`` of the stored gradients, shape ``(m, m)``.
      inverse: ``(m λ I + K)⁻¹``, from which the next solve follows, shape ``(m, m)``.
      window: the last ``m`` gradients, the rows of ``G``, in the tree of the
        parameters: of a leaf stored densely an array of shape ``(m, *leaf.shape)``, of
        another the tuple of arrays of its window kind.
      damp: the damping ``λ`` that the last solve used, in ``gram``'s dtype. It is the
        one that was asked for unless that dtype could not resolve it.
      num_raised: steps at which the damping had to be raised.
      num_refused: gradients that were not finite and did not enter the window.
      num_dropped: rows that a :class:`~mfac_jax.RowSparseWindow` has left out, over all
        gradients and leaves, up to the largest int32.
    """

    count: jax.Array  # shape=(), dtype=jnp.int32
    gram: jax.Array  # shape=(num_grads, num_grads), dtype=float32 or float64
    inverse: jax.Array  # shape=(num_grads, num_grads), dtype=gram.dtype
    window: Any  # num_grads gradients of every leaf
    damp: jax.Array  # shape=(), dtype=gram.dtype
    num_raised: jax.Array  # shape=(), dtype=jnp.int32
    num_refused: jax.Array  # shape=(), dtype=jnp.int32
    num_dropped: jax.Array  # shape=(), dtype=jnp.int32


def scale_by_mfac(
    num_grads: int = 1024,
    damp: optax.ScalarOrSchedule = 1e-6,
    *,
    window: Window | WindowFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients by the inverse of a damped empirical Fisher matrix.

    The Fisher is that of the last :math:`m` mini-batch gradients, the newest included:

    .. math::
        F = \lambda I + \frac{1}{m} \sum_{j=1}^{m} g_j g_j^T, \qquad
        F^{-1} g_i = m \sum_j c_j g_j, \qquad
        (m \lambda I + G G^T)\, c = e_i .

    :math:`m` is constant while the window fills, so the first step is about
    :math:`m g / \lVert g \rVert^2`. A step costs two reads of the window and
    :math:`O(m^2)` for the solve, whose inverse follows from the step before; now and
    then, where it has lost accuracy or the damping has changed, the factorisation of
    an :math:`m \times m` matrix.

    Gram matrix and solve are in float32, or in float64 once anything in a window is.
    Where that precision cannot resolve the damping (identical or nearly parallel
    gradients with :math:`m \lambda` below the rounding of :math:`\lVert g \rVert^2`),
    the solve raises it by factors of four until it can; the state holds the damping
    that was used and the number of such steps. Updates are always finite.

    A gradient that is not finite, or too large for its squared norm to be, is refused:
    the update is zero, window and Gram matrix stay as they were, schedules tick on.

    What is preconditioned is the gradient as its window stores it: rounded, quantised
    or sparse. The rest would lie outside the span of the window and come back
    multiplied by :math:`1 / \lambda`.

    .. warning::
        A dense window takes ``num_grads`` times the bytes of the parameters. Jit the
        training step with the optimizer state donated (``donate_argnums``): then it is
        updated in place, else it is copied at every step. For gradient accumulation
        average the gradients before ``update``: :class:`optax.MultiSteps` would
        evaluate this transformation at every micro-step and hold a second window.

    Args:
      num_grads: the number of gradients ``m`` in the window, static, at least 1.
      damp: the damping ``λ > 0``, in units of the squared gradient norm: a float, a
        traced scalar, or a schedule of the update count.
      window: how the gradients of a leaf are stored, static: a
        :class:`~mfac_jax.DenseWindow`, :class:`~mfac_jax.RowSparseWindow`,
        :class:`~mfac_jax.Int8Window` or :class:`~mfac_jax.TopKWindow`, or a function
        ``(path, leaf) -> window`` of the leaf's path, such as
        ``'encoder/dense/kernel'``, and the parameter or its
        :class:`jax.ShapeDtypeStruct`, such as :func:`~mfac_jax.compact_windows` makes
        one. ``None`` is ``DenseWindow()``, the one kind for parameters that are sharded
        over explicit mesh axes.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Updates have the dtypes of the
      gradients; parameters need not be passed to ``update``.

    Raises:
      TypeError: for a ``num_grads``, ``damp`` or ``window`` of the wrong type; from
        ``init``, for leaves that are not real floating-point arrays; also from
        ``update``, for gradients whose tree is not that of the parameters.
      ValueError: for ``num_grads < 1`` or ``damp <= 0``; from ``init``, for a compact
        window of a leaf that is sharded over explicit mesh axes; from ``update``, for
        gradients whose shapes are not those of the parameters, as far as the windows
        tell: a dense one has the shape, the others the number of blocks or the size of
        a row.

    Examples:
      The first step is ``m g / (m λ + gᵀ g)``:

      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=8, damp=1e-6)
      >>> params = {'w': jnp.zeros(2)}
      >>> state = opt.init(params)
      >>> grads = {'w': jnp.array([3.0, 4.0])}
      >>> updates, state = jax.jit(opt.update, donate_argnums=1)(grads, state)
      >>> print('{:.4f} {:.4f}'.format(*updates['w']))
      0.9600 1.2800
      >>> print(f'{state.damp:.0e}', state.num_raised)
      1e-06 0

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021
    """
    num_grads = _checked_num_grads(num_grads)
    _check_number(
        "damp",
        damp,
        "must be positive and finite: at 0 the Fisher is singular",
        lambda x: 0 < x < math.inf,
    )
    _windows.check_window(window)

    def init_fn(params):
        windows = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _init_window(window, _path_name(path), leaf, num_grads),
            params,
        )
        dtype = jnp.result_type(
            jnp.float32,
            *(
                leaf.dtype
                for leaf in jax.tree.leaves(windows)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ),
        )
        initial_damp = _value_at(damp, jnp.zeros((), jnp.int32), dtype)
        return ScaleByMFACState(
            count=jnp.zeros((), jnp.int32),
            gram=jnp.zeros((num_grads, num_grads), dtype),
            inverse=_solve.initial_inverse(num_grads, initial_damp),
            window=windows,
            damp=initial_damp,
            num_raised=jnp.zeros((), jnp.int32),
            num_refused=jnp.zeros((), jnp.int32),
            num_dropped=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        dtype = state.gram.dtype
        leaves, leaf_windows, treedef = _match(updates, state.window)
        groups = _groups.group_leaves(leaf_windows)
        grads, windows = groups.pack(leaves), groups.pack_windows(leaf_windows)
        index = (state.count - state.num_refused) % num_grads

        # 1. The newest row of G is the gradient as the window stores it. It is written
        #    last, from a value that depends on both passes: written first, XLA would
        #    copy the window.
        encoded = [w.encode(g, dtype) for w, g in zip(windows, grads, strict=True)]
        squared_norm = sum(
            (jnp.sum(jnp.square(e.vector)) for e in encoded),
            start=jnp.zeros((), dtype),
        )
        finite = jnp.isfinite(squared_norm)
        for g in grads:
            finite &= jnp.all(jnp.isfinite(g))
        # 2. The new row and column of K: the first pass over the window. By
        #    Cauchy-Schwarz products of rows with finite squared norms are finite.
        products = sum(
            (
                w.products(e.vector, dtype)
                for w, e in zip(windows, encoded, strict=True)
            ),
            start=jnp.zeros(num_grads, dtype),
        )
        products = jnp.where(finite, products.at[index].set(squared_norm), 0)
        gram = _with_row(state.gram, index, products)
        # 3. Solve (m λ I + K) c = e_i.
        solution = _solve.solve_for_row(
            gram, state.inverse, index, _value_at(damp, state.count, dtype)
        )
        # 4. The direction m Gᵀ c: the second pass.
        newest = num_grads * solution.coefficients[index]
        others = (num_grads * solution.coefficients).at[index].set(0)
        directions = [
            w.combine(others, newest * e.vector)
            for w, e in zip(windows, encoded, strict=True)
        ]
        # 5. Only what is finite is returned and remembered.
        accepted = finite
        for direction in directions:
            accepted &= jnp.all(jnp.isfinite(direction))
        directions = groups.unpack(
            [jnp.where(accepted, direction, 0) for direction in directions], leaves
        )
        directions = [
            _saturating_cast(direction, leaf.dtype)
            for direction, leaf in zip(directions, leaves, strict=True)
        ]
        windows = [
            w.write(index, e.row, accepted)
            for w, e in zip(windows, encoded, strict=True)
        ]
        num_dropped = sum(
            (e.num_dropped for e in encoded), start=jnp.zeros((), jnp.int32)
        )
        return treedef.unflatten(directions), ScaleByMFACState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            gram=_with_row(
                state.gram, index, jnp.where(accepted, products, state.gram[index])
            ),
            inverse=jnp.where(accepted, solution.inverse, state.inverse),
            window=_windows.unflatten(treedef, groups.unpack_windows(windows)),
            damp=jnp.where(accepted, solution.damp, state.damp),
            num_raised=state.num_raised + (accepted & solution.raised),
            num_refused=state.num_refused + ~accepted,
            num_dropped=_saturating_add(
                state.num_dropped, jnp.where(accepted, num_dropped, 0)
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    num_grads: int = 1024,
    damp: optax.ScalarOrSchedule = 1e-6,
    momentum: optax.ScalarOrSchedule = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    window: Window | WindowFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The M-FAC optimizer.

    With :math:`F` the damped empirical Fisher of the last :math:`m` gradients
    (:func:`scale_by_mfac` has the details), one step is

    .. math::
        g_t = \nabla f(\theta_t) + w\, \theta_t, \qquad
        v_t = \beta v_{t-1} + (1 - \beta) F^{-1} g_t, \qquad
        \theta_{t+1} = \theta_t - \eta v_t .

    As in the published optimizer, weight decay is coupled: it is part of the gradient
    that enters the window. For decoupled decay leave it 0 and chain::

        optax.chain(
            mfac_jax.scale_by_mfac(num_grads, damp),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )

    Coupled decay makes every gradient dense, so it cannot be combined with a
    row-sparse window of a leaf that decays. For a Python number ``init`` refuses that;
    of a schedule or a traced value, such as ``optax.inject_hyperparams`` makes of a
    number, it cannot know: rows are dropped, which ``num_dropped`` of the state shows.

    ``learning_rate``, ``damp``, ``momentum`` and ``weight_decay`` may be injected:
    ``optax.inject_hyperparams(mfac_jax.mfac, static_args=('num_grads', 'mask',
    'window'))``.

    Args:
      learning_rate: the step size ``η``: a float, a traced scalar or a schedule.
      num_grads: the number of gradients ``m`` in the window, static, at least 1.
      damp: the damping ``λ > 0``: a float, a traced scalar or a schedule.
      momentum: the rate ``0 <= β < 1`` of the moving average of the preconditioned
        steps, without bias correction: a float, a traced scalar or a schedule.
      weight_decay: ``w >= 0``: a float, a traced scalar or a schedule. Unless it is the
        float 0, ``update`` needs the parameters.
      mask: which leaves decay, static: a tree of booleans with the structure of the
        parameters or a prefix of it, or a function from parameters to such a tree.
      window: how gradients are stored, static; see :func:`scale_by_mfac`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Updates have the dtypes of the
      gradients.

    Raises:
      TypeError: as :func:`scale_by_mfac`.
      ValueError: as :func:`scale_by_mfac`, and for ``momentum`` outside ``[0, 1)`` or a
        negative ``weight_decay``; from ``init``, for a ``weight_decay`` above 0 on a
        leaf whose window is row-sparse.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax, optax
      >>> def loss(params):
      ...   return jnp.sum((params['w'] - 1.0) ** 2)
      >>> opt = mfac_jax.mfac(learning_rate=1e-2, num_grads=8, damp=10.0)
      >>> params = {'w': jnp.zeros(3)}
      >>> state = opt.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = opt.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for _ in range(5):
      ...   params, state = step(params, state)
      >>> print(f'{loss(params):.4f}')
      2.9579

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021
    """
    _check_number("momentum", momentum, "must be in [0, 1)", lambda x: 0 <= x < 1)
    _check_number(
        "weight_decay",
        weight_decay,
        "must be finite and at least 0",
        lambda x: 0 <= x < math.inf,
    )
    # Without decay the parameters are not needed, which optax's own zero case ignores.
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = (
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, mask)
    )
    chain = optax.chain(
        _keep_dtypes(decay),
        scale_by_mfac(num_grads, damp, window=window),
        _average_steps(momentum),
        _keep_dtypes(optax.scale_by_learning_rate(learning_rate)),
    )

    def init_fn(params):
        if isinstance(weight_decay, int | float) and weight_decay > 0:
            _check_row_sparse_leaves_do_not_decay(params, weight_decay, mask, window)
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, chain.update)


def inverse_fisher_vector_product(
    state: ScaleByMFACState, vector: optax.Params, damp: jax.typing.ArrayLike
) -> optax.Params:
    r"""Multiplies any vector by the inverse of the damped empirical Fisher.

    .. math::
        F^{-1} x = \frac{1}{\lambda} \left(x - G^T (m \lambda I + G G^T)^{-1} G x\right)

    For vectors outside the window: for an influence function, say, or a gradient of
    other data. It divides the difference of two nearly equal vectors by ``λ``, so in
    float32 it keeps about ``eps · ‖x‖ / (λ ‖F⁻¹ x‖)`` of relative accuracy, and where
    the window's gradients are too parallel for the dtype it is NaN: use float64 or
    more damping there. The optimizer itself never goes this way.

    Args:
      state: the state of :func:`scale_by_mfac`; in that of a chain,
        ``optax.tree.get(opt_state, 'ScaleByMFACState')`` finds it.
      vector: ``x``, a tree with the structure and shapes of the parameters.
      damp: the damping ``λ > 0``, a float or a traced scalar.

    Returns:
      ``F⁻¹ x``, with the structure, shapes and dtypes of ``vector``.

    Raises:
      TypeError: if the tree of ``vector`` is not that of the parameters.
      ValueError: if ``damp`` is a Python number and not positive and finite, or if a
        shape of ``vector`` is not that of the parameter.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> opt = mfac_jax.scale_by_mfac(num_grads=2, damp=1.0)
      >>> state = opt.init(jnp.zeros(2))
      >>> _, state = opt.update(jnp.array([2.0, 0.0]), state)
      >>> x = mfac_jax.inverse_fisher_vector_product(state, jnp.ones(2), 1.0)
      >>> print('{:.4f} {:.4f}'.format(*x))
      0.3333 1.0000

    References:
      Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, 2021
    """
    _check_number(
        "damp",
        damp,
        "must be positive and finite: at 0 the Fisher is singular",
        lambda x: 0 < x < math.inf,
    )
    dtype = state.gram.dtype
    leaves, windows, treedef = _match(vector, state.window)
    damp = jnp.asarray(damp, dtype)
    products = sum(
        (w.products(x, dtype) for w, x in zip(windows, leaves, strict=True)),
        start=jnp.zeros(state.gram.shape[0], dtype),
    )
    coefficients = _solve.damped_solve(state.gram, damp, products)
    return treedef.unflatten(
        [
            (w.combine(-coefficients, x.astype(dtype)) / damp).astype(x.dtype)
            for w, x in zip(windows, leaves, strict=True)
        ]
    )


def window_nbytes(state_or_shapes: Any) -> int:
    """Returns the bytes that the windows of an optimizer state take.

    Counts the stored gradients with their indices, scales and error buffers; not the
    Gram matrix and its inverse, which take ``num_grads²`` numbers each.

    Args:
      state_or_shapes: a state that contains that of :func:`scale_by_mfac`, however
        deep, or its shapes: ``jax.eval_shape(opt.init, params)`` allocates nothing.

    Returns:
      Bytes, a Python integer.

    Raises:
      ValueError: if there is no state of :func:`scale_by_mfac`.

    Examples:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> params = {'w': jnp.zeros((1000, 100))}
      >>> for window in mfac_jax.DenseWindow(), mfac_jax.Int8Window():
      ...   opt = mfac_jax.mfac(1e-4, num_grads=32, window=window)
      ...   print(f'{mfac_jax.window_nbytes(jax.eval_shape(opt.init, params)):,}')
      12,800,000
      3,303,168
    """
    leaves = jax.tree.leaves(
        state_or_shapes, is_leaf=lambda x: isinstance(x, ScaleByMFACState)
    )
    states = [leaf for leaf in leaves if isinstance(leaf, ScaleByMFACState)]
    if not states:
        raise ValueError("there is no state of mfac_jax.scale_by_mfac in this tree.")
    return sum(
        leaf.size * leaf.dtype.itemsize
        for state in states
        for leaf in jax.tree.leaves(state.window)
    )


class _AverageStepsState(NamedTuple):
    count: jax.Array  # shape=(), dtype=jnp.int32
    average: optax.Updates  # like the parameters, float32 at least


def _average_steps(momentum: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """``v ← β v + (1 − β) s``; :func:`optax.ema` takes no schedule for ``β``."""

    def init_fn(params):
        return _AverageStepsState(
            count=jnp.zeros((), jnp.int32),
            average=jax.tree.map(
                lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)),
                params,
            ),
        )

    def update_fn(updates, state, params=None):
        del params

        def average(step, previous):
            beta = _value_at(momentum, state.count, previous.dtype)
            return beta * previous + (1 - beta) * step

        averages = jax.tree.map(average, updates, state.average)
        updates = jax.tree.map(lambda v, s: v.astype(s.dtype), averages, updates)
        return updates, _AverageStepsState(
            count=jnp.asarray(optax.safe_increment(state.count)), average=averages
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _keep_dtypes(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Casts updates back: a traced float32 factor would widen bfloat16 leaves."""

    def update_fn(updates, state, params=None):
        new_updates, state = inner.update(updates, state, params)
        return jax.tree.map(lambda n, u: n.astype(u.dtype), new_updates, updates), state

    return optax.GradientTransformation(inner.init, update_fn)


def _value_at(value: optax.ScalarOrSchedule, count: jax.Array, dtype) -> jax.Array:
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def _with_row(gram: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    return gram.at[index].set(row).at[:, index].set(row)


def _saturating_cast(x: jax.Array, dtype) -> jax.Array:
    """Casts to ``dtype``; numbers too large for a narrower one become its largest."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        x = jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    return x.astype(dtype)


def _saturating_add(total: jax.Array, number: jax.Array) -> jax.Array:
    return total + jnp.minimum(number, jnp.iinfo(total.dtype).max - total)


def _path_name(path: tuple[Any, ...]) -> str:
    """Joins the keys of a path; the trailing ``value`` of an NNX state is dropped."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def _init_window(
    window: Window | WindowFn | None, path: str, leaf: Any, num_grads: int
) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            "M-FAC needs real floating-point parameters, but "
            f"{path or 'the parameter'} has dtype {leaf.dtype}. Leave it out with "
            "optax.masked or optax.partition."
        )
    spec = _windows.spec_of(window, path, leaf)
    is_sharded = any(axis is not None for axis in jax.typeof(leaf).sharding.spec)
    if is_sharded and not isinstance(spec, DenseWindow):
        raise ValueError(
            f"{path or 'the parameter'} is sharded over explicit mesh axes, which only "
            f"mfac_jax.DenseWindow stores, got {spec}."
        )
    return spec.init(leaf, num_grads)


def _check_row_sparse_leaves_do_not_decay(
    params: optax.Params, weight_decay: float, mask: Any, window: Any
) -> None:
    """Decay fills the rows of a gradient that a row-sparse window has no room for."""
    decays = True if mask is None else mask(params) if callable(mask) else mask

    def check(path, leaf, decays):
        name = _path_name(path)
        spec = _windows.spec_of(window, name, leaf)
        if decays and isinstance(spec, RowSparseWindow) and spec.drops_rows_of(leaf):
            raise ValueError(
                f"weight_decay {weight_decay} makes the gradients of "
                f"{name or 'the parameter'} dense, but its window stores "
                f"{spec.max_rows} of {leaf.shape[0]} rows. Use decoupled decay, "
                "optax.chain(mfac_jax.scale_by_mfac(...), "
                "optax.add_decayed_weights(...), "
                "optax.scale_by_learning_rate(...)), or spare the leaf with mask, or "
                "store it with mfac_jax.DenseWindow()."
            )

    jax.tree_util.tree_map_with_path(check, params, jax.tree.broadcast(decays, params))


def _match(tree: Any, windows: Any) -> tuple[list[Any], list[StoredGradients], Any]:
    """Flattens a gradient-like tree beside the windows; checks structure and shapes."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    rows, window_treedef = _windows.flatten(windows)
    if treedef != window_treedef:
        raise TypeError(
            "the gradients must have the tree of the parameters that init was given: "
            f"expected {window_treedef}, got {treedef}."
        )
    for (path, leaf), w in zip(paths_and_leaves, rows, strict=True):
        if not w.fits(jnp.shape(leaf)):
            raise ValueError(
                f"the gradient of {_path_name(path) or 'the parameter'} must have the "
                f"shape of the parameter that init was given: expected {w.leaf_shape}, "
                f"got {jnp.shape(leaf)}."
            )
    return [jnp.asarray(leaf) for _, leaf in paths_and_leaves], rows, treedef


def _checked_num_grads(num_grads: Any) -> int:
    if isinstance(num_grads, jax.core.Tracer):
        raise TypeError(
            "num_grads is a shape and cannot be traced; with optax.inject_hyperparams "
            "pass static_args=('num_grads', 'mask', 'window')."
        )
    _storage.check_integer("num_grads", num_grads, 1)
    return operator.index(num_grads)


def _check_number(
    name: str, value: Any, requirement: str, holds: Callable[[float], bool]
) -> None:
    """Checks a Python number; schedules, arrays and tracers pass."""
    if callable(value) or isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.")
    if not holds(float(value)):
        raise ValueError(f"{name} {requirement}, got {value}.")
