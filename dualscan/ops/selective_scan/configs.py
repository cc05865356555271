"""Launch configurations of the GPU's kernels: fixed, nothing is tuned at run time."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program works on, and the launch parameters.

    Attributes:
        channels: of a program, a power of two; 32 a warp give every thread one channel.
        warps: of a program.
        rows: tokens in registers at a time.
        kept: the backward keeps the states in front of every `kept` tiles of rows, and computes the others again.
        validated: date of the check against float64 on a device; None is arithmetic from the register file only.
    """

    channels: int
    warps: int
    rows: int = 1
    kept: int = 1
    validated: str | None = None


# Not validated on a device. Compiled for Hopper the forward takes 156 registers of a thread without spills, the
# backward all 255 and 33 spilled words; with half the channels it takes 210, but twice the shuffles and the partial
# sums of dB and dC. Sums over channels inside one warp need no barrier.
FORWARD = Tile(channels=64, rows=16, warps=2)
STEP = Tile(channels=32, warps=2)
BACKWARD = Tile(channels=64, rows=8, warps=1, kept=8)
