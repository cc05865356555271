"""State space duality as matrices (arXiv 2405.21060): every sequence mixer is a structured matrix with its algorithms.

`StructuredMatrix` is what they have in common; a new mask is one such class.
"""

from dualscan.semiseparable.costs import Cost, count
from dualscan.semiseparable.matrix import Dense, StructuredMatrix, closed
from dualscan.semiseparable.scans import scan
from dualscan.semiseparable.structured import Cauchy, Cosine, Diagonal, Fourier, LowRank, Toeplitz, Vandermonde

__all__ = [
    "Cauchy",
    "Cosine",
    "Cost",
    "Dense",
    "Diagonal",
    "Fourier",
    "LowRank",
    "StructuredMatrix",
    "Toeplitz",
    "Vandermonde",
    "closed",
    "count",
    "scan",
]
