"""The choice of a window for each leaf, by its path."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mfac_jax._checks import named
from mfac_jax.windows._dense import DenseWindow
from mfac_jax.windows._protocol import Window
from mfac_jax.windows._row_sparse import RowSparseWindow

#: A function ``(path, leaf) -> window`` that chooses the window of a leaf. ``path`` is
#: the key path as a string, such as ``'encoder/dense/kernel'``, ``leaf`` the parameter
#: or its :class:`jax.ShapeDtypeStruct`; ``None`` selects
#: :class:`~mfac_jax.DenseWindow`.
WindowFn = Callable[[str, Any], Window | None]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, in flatten order.

    The keys of a path are joined by ``/``. The attribute ``value`` of Flax variables is
    omitted, so that a tree of variables and the same tree of arrays have the same
    paths.
    """
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {_name(path): leaf for path, leaf in paths_and_leaves}
    if len(leaves) == len(paths_and_leaves):
        return leaves
    # Keys that contain a slash can make two paths equal.
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths_and_leaves}


def _name(path: tuple[Any, ...]) -> str:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_window(window: Any) -> None:
    """Raises a TypeError unless ``window`` is a window, a function or ``None``."""
    is_function = callable(window) and not isinstance(window, type)
    if not (window is None or is_function or _is_window(window)):
        raise TypeError(
            "window must be a window such as mfac_jax.DenseWindow(), a function "
            f"(path, leaf) -> window, or None, got {window!r}."
        )


def choose_windows(
    window: Window | WindowFn | None, leaves: Mapping[str, Any]
) -> dict[str, Window]:
    """Returns the window of each leaf.

    Args:
      window: One window for all leaves, a function of path and leaf, or ``None``.
      leaves: The parameters by path.

    Raises:
      TypeError: If the function returns anything but a window or ``None``.
    """
    chosen = {}
    for path, leaf in leaves.items():
        spec = window
        if callable(window) and not isinstance(window, Window):
            spec = window(path, leaf)
        spec = DenseWindow() if spec is None else spec
        if not _is_window(spec):
            raise TypeError(
                "the window function must return a window such as "
                f"mfac_jax.DenseWindow(), got {spec!r} for {path!r}."
            )
        chosen[path] = spec
    if isinstance(window, _CompactWindows) and leaves:
        window.warn_if_unmatched(list(leaves))
    return chosen


def check_supported(path: str, leaf: Any, spec: Window, weight_decay: float) -> None:
    """Validates that a window can store the gradients of a leaf.

    Raises:
      ValueError: With the path of the leaf and the window's reason.
    """
    reason = spec.unsupported(leaf, weight_decay)
    if reason is not None:
        raise ValueError(f"{named(path)} {reason}")


def _is_window(value: Any) -> bool:
    # A class has the methods of its instances.
    return isinstance(value, Window) and not isinstance(value, type)


def compact_windows(
    max_rows: int | Mapping[str, int], dtype: jax.typing.DTypeLike | None = None
) -> WindowFn:
    """Stores embedding tables row-sparse and all other leaves densely.

    Pass the result as ``window`` of :func:`~mfac_jax.mfac`. It is exact while no
    mini-batch contains more than ``max_rows`` different tokens: ``batch size × sequence
    length`` is a safe bound, the largest number of different tokens in a batch a tight
    one. ``init`` warns if a pattern matches no path; :func:`~mfac_jax.window_table`
    shows the window of each leaf.

    Args:
      max_rows: Rows kept of each gradient (static). An integer applies to all leaves
        whose last key contains ``embedding``, as in Flax
        (``encoder/Embed_0/embedding``). A mapping from regular expressions to integers
        applies the first pattern found in the path, for the names of Equinox and
        PyTorch: ``{'layers/0/weight$': 512}``, ``{'word_emb/weight$': 512}``.
      dtype: Storage dtype of all windows (static), as in
        :class:`~mfac_jax.DenseWindow`.

    Returns:
      A function ``(path, leaf) -> window``.

    Raises:
      TypeError: As :class:`~mfac_jax.RowSparseWindow`, and for a string, which the
        optimizer passes if ``window`` is this function itself.
      ValueError: As :class:`~mfac_jax.RowSparseWindow`.
      re.error: For a malformed regular expression.

    Examples:
      >>> import jax.numpy as jnp, mfac_jax
      >>> params = {'embedding': jnp.zeros((30_000, 8)), 'kernel': jnp.zeros((8, 2))}
      >>> opt = mfac_jax.scale_by_mfac(4, window=mfac_jax.compact_windows(100))
      >>> print(mfac_jax.window_table(opt.init(params)))
      path       stored                                          bytes
      embedding  values float32[4,100,8] indices uint16[4,100]  13,600
      kernel     values float32[4,8,2]                             256
    """
    if isinstance(max_rows, str):
        raise TypeError(
            f"compact_windows takes max_rows, got {max_rows!r}; pass "
            "window=compact_windows(max_rows), not the function itself."
        )
    if not isinstance(max_rows, Mapping):
        max_rows = {r"embedding[^/]*$": max_rows}
    return _CompactWindows(
        tuple(
            (re.compile(pattern), RowSparseWindow(rows, dtype))
            for pattern, rows in max_rows.items()
        ),
        DenseWindow(dtype),
    )


@dataclasses.dataclass(frozen=True)
class _CompactWindows:
    tables: tuple[tuple[re.Pattern[str], RowSparseWindow], ...]
    others: DenseWindow

    def __call__(self, path: str, leaf: Any = None) -> Window:
        if not isinstance(path, str):
            # optax.inject_hyperparams calls it as a schedule.
            raise TypeError(
                f"a window function takes the path of a leaf, got {path!r}; with "
                "optax.inject_hyperparams, add 'window' to static_args."
            )
        return next((w for p, w in self.tables if p.search(path)), self.others)

    def warn_if_unmatched(self, paths: list[str]) -> None:
        shown = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
        for pattern, _ in self.tables:
            if not any(pattern.search(path) for path in paths):
                warnings.warn(
                    f"compact_windows: no path matches {pattern.pattern!r} ({shown}), "
                    "so no leaf is stored row-sparse for it. Pass a mapping from a "
                    "pattern that matches to max_rows, such as {'table$': 450}.",
                    stacklevel=2,
                )
