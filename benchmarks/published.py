"""What the rivals' own code reaches under the protocol of `quality.py`: perplexity, numbers only.

Measured once with the authors' layer solvers: float32, calibration of 128 windows of 256 tokens at random offsets,
blocks pruned in order with pruned blocks feeding the next, every linear map of the decoder blocks. SparseGPT: block
128, damping 0.01; Wanda and magnitude per output row; ALPS with its defaults. Wanda's row-wise count rounds down (29.7
% at 30 %, 69.0 % at 70 % on stories260k), which flatters it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Mean over calibration seeds, with min and max where five seeds were run (otherwise one)."""

    mean: float
    low: float | None = None
    high: float | None = None


PUBLISHED: dict[str, dict[str, dict[str, Published]]] = {
    "stories260k": {
        "0.3": {
            "magnitude": Published(5.68),
            "wanda": Published(5.24, 5.22, 5.27),
            "sparsegpt": Published(5.14, 5.13, 5.15),
            "alps": Published(4.84, 4.83, 4.85),
        },
        "0.5": {
            "magnitude": Published(35.81),
            "wanda": Published(18.48, 18.15, 18.73),
            "sparsegpt": Published(17.88, 17.78, 17.99),
            "alps": Published(11.44, 11.26, 11.59),
        },
        "0.6": {
            "magnitude": Published(111.91),
            "wanda": Published(52.59, 50.80, 54.13),
            "sparsegpt": Published(45.29, 44.03, 46.42),
            "alps": Published(26.56, 25.44, 27.89),
        },
        "0.7": {
            "magnitude": Published(321.15),
            "wanda": Published(138.54, 119.27, 148.68),
            "sparsegpt": Published(97.03, 92.61, 102.23),
            "alps": Published(55.64, 52.14, 56.92),
        },
        "2:4": {
            "magnitude": Published(117.74),
            "wanda": Published(62.57, 61.79, 63.62),
            "sparsegpt": Published(29.69, 29.08, 30.41),
            "alps": Published(21.02, 20.23, 21.43),
        },
    },
    "tiny-llama": {
        "0.5": {
            "magnitude": Published(25.94),
            "wanda": Published(25.57),
            "sparsegpt": Published(24.67),
            "alps": Published(24.32),
        },
        "0.6": {
            "magnitude": Published(29.17),
            "wanda": Published(28.01),
            "sparsegpt": Published(25.52),
            "alps": Published(24.61),
        },
        "0.7": {
            "magnitude": Published(42.65),
            "wanda": Published(38.31),
            "sparsegpt": Published(28.11),
            "alps": Published(25.31),
        },
        "2:4": {
            "magnitude": Published(29.03),
            "wanda": Published(28.41),
            "sparsegpt": Published(25.60),
            "alps": Published(24.75),
        },
        "4:8": {
            "magnitude": Published(27.13),
            "wanda": Published(26.93),
            "sparsegpt": Published(25.12),
            "alps": Published(24.58),
        },
    },
}
