"""Plain float64 NumPy implementations of M-FAC."""

import numpy as np


def dense_inverse_product(window, vector, damp):
    """Returns ``F⁻¹ x`` by the explicit Fisher; ``window`` has shape (m, d)."""
    window = np.asarray(window, np.float64)
    fisher = damp * np.eye(window.shape[1]) + window.T @ window / len(window)
    return np.linalg.solve(fisher, np.asarray(vector, np.float64))


def newest_directions(gradients, num_grads, damp, start=0):
    """Yields ``F⁻¹ g`` for each gradient from ``start`` on, by the Gram matrix."""
    gradients = np.asarray(gradients, np.float64)
    gram = gradients @ gradients.T
    for t in range(start, len(gradients)):
        # The order does not matter, and unwritten rows add nothing.
        window = slice(max(0, t + 1 - num_grads), t + 1)
        system = gram[window, window] + num_grads * damp * np.eye(len(gram[window]))
        newest = np.eye(len(system))[-1]
        yield num_grads * np.linalg.solve(system, newest) @ gradients[window]


def recursive_inverse_product(window, vector, damp):
    """Returns ``F⁻¹ x`` by the paper's dynamic algorithm and its tables D and B."""
    window = np.asarray(window, np.float64)
    m = len(window)
    gram = window @ window.T
    d = np.zeros((m, m))  # D_ij = g_i F_{i-1}⁻¹ g_j for j >= i
    b = np.zeros((m, m))  # F_{i-1}⁻¹ g_i = Σ_k B_ik g_k
    for i in range(m):
        d[i, i:] = gram[i, i:] / damp
        b[i, i] = 1 / damp
        for k in range(i):
            ratio = d[k, i] / (m + d[k, k])
            d[i, i:] -= ratio * d[k, i:]
            b[i, : k + 1] -= ratio * b[k, : k + 1]
    products = window @ vector / damp  # becomes g_i F_{i-1}⁻¹ x
    for i in range(m):
        products[i + 1 :] -= d[i, i + 1 :] * products[i] / (m + d[i, i])
    pivots = m + np.diagonal(d)
    return vector / damp - (products / pivots) @ b @ window


def ring_windows(gradients, num_grads):
    """Yields the window after each write and the row of the newest gradient."""
    window = np.zeros((num_grads, gradients.shape[1]))
    for step, gradient in enumerate(gradients):
        window[step % num_grads] = gradient
        yield window.copy(), step % num_grads


def in_adams_metric(gradients, b2, eps):
    """Yields ``D^-½ g`` and ``D^-½`` for each gradient, with ``D = √ν̂ + ε``."""
    average = 0.0
    for step, gradient in enumerate(np.asarray(gradients, np.float64), start=1):
        average = b2 * average + (1 - b2) * gradient**2
        root = 1 / np.sqrt(np.sqrt(average / (1 - b2**step)) + eps)
        yield root * gradient, root


def adam_mfac_update(rows, root, b1, shift):
    """Returns the update from the stored rows, oldest first, by the explicit matrix.

    ``shift`` is ``ρ κ``, which is added to the diagonal of the Fisher matrix.
    """
    rows = np.asarray(rows, np.float64)
    weights = b1 ** np.arange(len(rows) - 1, -1, -1.0)
    momentum = weights @ rows / np.sum(weights)
    fisher = shift * np.eye(rows.shape[1]) + rows.T @ rows
    mean = np.mean(np.sum(rows**2, axis=1))
    return (mean + shift) * root * np.linalg.solve(fisher, momentum)
