"""M-FAC, a matrix-free second-order optimizer, for Optax."""

from mfac_jax import windows
from mfac_jax._adam_mfac import ScaleByAdamMFACState, adam_mfac, scale_by_adam_mfac
from mfac_jax._checkpoints import drop_windows, refill_windows
from mfac_jax._diagnostics import diagnostics, window_nbytes, window_table
from mfac_jax._inverse_product import inverse_fisher_vector_product
from mfac_jax._mfac import mfac, scale_by_mfac
from mfac_jax._sharding import state_shardings
from mfac_jax._state import ScaleByMFACState
from mfac_jax.windows import (
    DenseWindow,
    Int8Window,
    RowSparseWindow,
    TopKWindow,
    compact_windows,
)

__version__ = "0.2.0"

__all__ = [
    "DenseWindow",
    "Int8Window",
    "RowSparseWindow",
    "ScaleByAdamMFACState",
    "ScaleByMFACState",
    "TopKWindow",
    "adam_mfac",
    "compact_windows",
    "diagnostics",
    "drop_windows",
    "inverse_fisher_vector_product",
    "mfac",
    "refill_windows",
    "scale_by_adam_mfac",
    "scale_by_mfac",
    "state_shardings",
    "window_nbytes",
    "window_table",
    "windows",
]
