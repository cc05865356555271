"""Launch configurations of the GPU's kernels: fixed, nothing is tuned at run time."""

from dataclasses import dataclass

from torch import Tensor

# Tokens between the states that the forward keeps for the backward: 16 states are a byte a token and channel, beside
# the six of x, dt and z in bfloat16.
KEPT = 64


def kept_states(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """The shape of these states: (pieces of `KEPT` tokens of all sequences, d_state, channels)."""
    batch, seqlen, channels = x.shape
    pieces = batch * -(-seqlen // KEPT) if cu_seqlens is None else cu_seqlens.shape[0] - 1 + seqlen // KEPT
    return pieces, A.shape[1], channels


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program works on, and the launch parameters.

    Attributes:
        channels: of a program, a power of two; 32 a warp give every thread one channel.
        warps: of a program.
        rows: tokens in registers at a time, a divisor of `KEPT`; of the backward 4 or 8.
        registers: of a thread at most, where the compiler would take more than leaves room for enough warps.
        resident: warps for every multiprocessor that sequences are cut into segments to get.
        least: times `KEPT` tokens of a segment at least.
        validated: date of the check against float64 on a device, values and every gradient.
    """

    channels: int
    warps: int
    rows: int = 1
    registers: int | None = None
    resident: float = 8
    least: int = 1
    validated: str | None = None

    def segment(self, warps: int, multiprocessors: int, batch: int, seqlen: int) -> int:
        """Tokens of a segment: all of a sequence, or so few that the warps fill the multiprocessors.

        Args:
            warps: that one sequence takes.
            multiprocessors: of the device.
            batch: sequences of `seqlen` tokens, or 1 where they are packed.
            seqlen: tokens.
        """
        share = batch * seqlen * warps / (multiprocessors * self.resident)
        if share > seqlen / 2:  # a second scan over everything is not worth less than twice the warps
            return max(-(-seqlen // KEPT), 1) * KEPT
        return max(int(share) // KEPT, self.least) * KEPT


# With 168 registers of a thread twelve warps are resident on a multiprocessor where the compiler's 185 leave ten; the
# few that it then spills cost less: on an H200 at 8 x 2048 tokens, 5120 channels and N 16, 1.25 ms forward against 2.58
# (128 registers: 1.48), and forward and backward 8.6 ms against 8.9 (200: 9.4). On an H100, where B and C are packed,
# two warps of a program take 0.81 ms forward, one takes 0.88. In the backward they halve the memory of its part of dB
# and dC, and with 8 rows its loop over states spills nothing.
FORWARD = Tile(channels=64, warps=2, rows=16, registers=168)
BACKWARD = Tile(channels=64, warps=2, rows=8, registers=168)
STEP = Tile(channels=32, warps=2, validated="2026-11-22")
