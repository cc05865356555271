"""State space duality as matrices (arXiv 2405.21060): every sequence mixer is a structured matrix with its algorithms.

`StructuredMatrix` is what they have in common; a new mask is one such class.
"""

from dualscan.semiseparable import algebra as algebra  # registers the closed forms
from dualscan.semiseparable.costs import Cost, count
from dualscan.semiseparable.matrix import Dense, Diagonal, StructuredMatrix, closed
from dualscan.semiseparable.ranks import block_ranks
from dualscan.semiseparable.scans import scan
from dualscan.semiseparable.sss import OneSemiseparable, SemiseparableMatrix, as_semiseparable
from dualscan.semiseparable.structured import Cauchy, Cosine, Fourier, LowRank, Toeplitz, Vandermonde

__all__ = [
    "Cauchy",
    "Cosine",
    "Cost",
    "Dense",
    "Diagonal",
    "Fourier",
    "LowRank",
    "OneSemiseparable",
    "SemiseparableMatrix",
    "StructuredMatrix",
    "Toeplitz",
    "Vandermonde",
    "as_semiseparable",
    "block_ranks",
    "closed",
    "count",
    "scan",
]
