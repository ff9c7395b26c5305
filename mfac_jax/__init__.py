"""M-FAC, a matrix-free second-order optimizer, for Optax."""

from mfac_jax._dense_window import DenseWindow
from mfac_jax._int8_window import Int8Window
from mfac_jax._mfac import (
    ScaleByMFACState,
    inverse_fisher_vector_product,
    mfac,
    scale_by_mfac,
    window_nbytes,
)
from mfac_jax._row_sparse_window import RowSparseWindow
from mfac_jax._top_k_window import TopKWindow
from mfac_jax._windows import compact_windows

__all__ = [
    "DenseWindow",
    "Int8Window",
    "RowSparseWindow",
    "ScaleByMFACState",
    "TopKWindow",
    "compact_windows",
    "inverse_fisher_vector_product",
    "mfac",
    "scale_by_mfac",
    "window_nbytes",
]
