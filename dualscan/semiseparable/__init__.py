"""State space duality as matrices (arXiv 2405.21060): every sequence mixer is a structured matrix with its algorithms.

`StructuredMatrix` is what they have in common; a new mask is one such class.
"""

from dualscan.semiseparable.matrix import Dense, StructuredMatrix, closed
from dualscan.semiseparable.structured import Toeplitz

__all__ = ["Dense", "StructuredMatrix", "Toeplitz", "closed"]
