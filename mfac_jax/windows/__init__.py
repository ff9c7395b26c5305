"""Windows: storage formats for the gradients of a leaf.

A kind of window subclasses :class:`~mfac_jax.windows.Window` as a frozen dataclass; its
``init`` returns :class:`~mfac_jax.windows.StoredGradients`. Custom windows implement
these two protocols and can use the functions, the building blocks of the built-in
kinds.
"""

from mfac_jax.windows._choice import WindowFn, compact_windows
from mfac_jax.windows._dense import DenseGradients, DenseWindow
from mfac_jax.windows._int8 import Int8Gradients, Int8Window
from mfac_jax.windows._protocol import Encoded, StoredGradients, Window
from mfac_jax.windows._reductions import fold_gradients, inner_products, map_gradients
from mfac_jax.windows._row_sparse import RowSparseGradients, RowSparseWindow
from mfac_jax.windows._storage import write_row
from mfac_jax.windows._top_k import TopKGradients, TopKWindow

__all__ = [
    "DenseGradients",
    "DenseWindow",
    "Encoded",
    "Int8Gradients",
    "Int8Window",
    "RowSparseGradients",
    "RowSparseWindow",
    "StoredGradients",
    "TopKGradients",
    "TopKWindow",
    "Window",
    "WindowFn",
    "compact_windows",
    "fold_gradients",
    "inner_products",
    "map_gradients",
    "write_row",
]
