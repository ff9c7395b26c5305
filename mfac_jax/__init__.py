"""M-FAC, a matrix-free second-order optimizer, for Optax."""

from mfac_jax._dense_window import DenseWindow
from mfac_jax._mfac import (
    ScaleByMFACState,
    inverse_fisher_vector_product,
    mfac,
    scale_by_mfac,
)

__all__ = [
    "DenseWindow",
    "ScaleByMFACState",
    "inverse_fisher_vector_product",
    "mfac",
    "scale_by_mfac",
]
