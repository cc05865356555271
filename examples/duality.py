"""One operator, four faces: the recurrence, masked attention, the chunked form, and a semiseparable matrix written out.

Run: python examples/duality.py
"""

import torch

from dualscan import linear_attention, ssd


def semiseparable(log_decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """M of Y = M X (arXiv 2405.21060, equation 6), entry by entry, for one head: (seqlen, seqlen)."""
    length = log_decay.shape[0]
    matrix = torch.zeros(length, length, dtype=log_decay.dtype)
    for j in range(length):
        for i in range(j + 1):
            matrix[j, i] = C[j] @ B[i] * log_decay[i + 1 : j + 1].sum().exp()
    return matrix


def main() -> None:
    """Prints the largest difference of each form from the matrix, and the ranks that make the fast forms possible."""
    torch.manual_seed(0)
    length, headdim, d_state = 96, 8, 4
    x = torch.randn(1, length, 1, headdim, dtype=torch.float64)
    dt = torch.rand(1, length, 1, dtype=torch.float64)
    A = torch.tensor([-0.7], dtype=torch.float64)
    B, C = torch.randn(2, 1, length, 1, d_state, dtype=torch.float64).unbind(0)

    matrix = semiseparable((dt * A)[0, :, 0], B[0, :, 0], C[0, :, 0])
    expected = matrix @ (dt[0] * x[0, :, 0])
    for impl in ("recurrent", "quadratic", "chunked"):
        y = ssd(x, dt, A, B, C, impl=impl).y[0, :, 0]
        print(f"{impl:<17} differs from the matrix by {(y - expected).abs().max():.1e}")
    y = linear_attention(C, B, x * dt.unsqueeze(-1), log_decay=dt * A).y[0, :, 0]
    print(f"{'linear attention':<17} differs from the matrix by {(y - expected).abs().max():.1e}")

    ranks = [int(torch.linalg.matrix_rank(matrix[cut:, :cut])) for cut in range(8, length, 8)]
    print(f"rank of every block below the diagonal: {sorted(set(ranks))}, d_state is {d_state}")


if __name__ == "__main__":
    main()
