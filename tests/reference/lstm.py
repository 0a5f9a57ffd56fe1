"""The LSTM layer as float64 NumPy, one token and one row at a time."""

import numpy as np

Weights = dict[str, np.ndarray]


def shapes(width: int, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's parameters, by path; gates are in the order i, f, g, o."""
    return {
        "cell.dense_i.kernel": (dim, 4 * width),
        "cell.dense_h.kernel": (width, 4 * width),
        "cell.dense_h.bias": (4 * width,),
        "output.kernel": (width, dim),
    }


def lstm(
    weights: Weights, x: np.ndarray, ids: np.ndarray, hidden: np.ndarray, cell: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs `[T, dim]` of x `[T, dim]`, and the units' outputs and cells after the last token.

    Args:
        weights: as `shapes` lists them.
        x: `[T, dim]`.
        ids: of documents, `[T]`.
        hidden, cell: of the units before the first token, `[width]`.
    """

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    width, rows = len(hidden), []
    for t in range(len(x)):
        if t > 0 and ids[t] != ids[t - 1]:
            hidden, cell = np.zeros(width), np.zeros(width)
        gates = x[t] @ weights["cell.dense_i.kernel"] + weights["cell.dense_h.bias"]
        gates += hidden @ weights["cell.dense_h.kernel"]
        i, f, g, o = gates.reshape(4, width)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        rows.append(hidden @ weights["output.kernel"])
    return np.array(rows), hidden, cell
