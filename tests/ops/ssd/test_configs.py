"""Launch configurations: tiles that the hardware has room for, for every shape family and architecture."""

import itertools

import pytest
import torch

from dualscan.ops.ssd import configs

# Shared memory a program, bytes, by compute capability.
SHARED = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024, (12, 0): 99 * 1024}
FAMILIES = list(itertools.product((1, 16, 24, 64, 65, 128, 256), (1, 16, 40, 64, 128, 256), configs.DTYPES))


@pytest.mark.parametrize("capability", SHARED)
def test_tiles_fit(capability: tuple[int, int]) -> None:
    for headdim, d_state, dtype in FAMILIES:
        c = configs.choose(headdim, d_state, dtype, capability)
        n, size = configs.power_of_two(d_state), dtype.itemsize
        # B, C and x of every stage; the state and the scaled inputs as operands; the output on its way.
        scan = c.stages * c.chunk * (2 * n + c.columns) + n * c.columns + 2 * c.chunk * c.columns
        rows = c.gradient_rows
        gradients = 2 * c.chunk * rows + c.gradient_stages * (2 * c.chunk + rows) * c.columns
        assert max(scan, gradients) * size <= SHARED[capability], (headdim, d_state, dtype)
        # A state column a register: 255 of 32 bits a thread, shared with the chunk's own tiles.
        assert n * c.columns <= 64 * 32 * c.warps
        assert c.gradient_rows <= n
        assert n % c.gradient_rows == 0
        assert (c.validated is not None) == (capability == (9, 0))


def test_powers_of_two_cover() -> None:
    assert [configs.power_of_two(n) for n in (1, 16, 17, 64, 65, 256)] == [16, 16, 32, 64, 128, 256]


def test_what_is_unsupported_is_named() -> None:
    assert configs.unsupported(torch.bfloat16, configs.MAX_D_STATE) is None
    assert "d_state=300" in str(configs.unsupported(torch.bfloat16, 300))
    assert "float64" in str(configs.unsupported(torch.float64, 16))
