"""Small matrix products inside a kernel: register tiles of C += A B in the CPU's vectors.

A may have any strides (a transpose costs nothing); B and C have adjacent columns. Columns come in multiples of
`LANES` and rows in multiples of `TILE_ROWS`: kernels pad their scratch matrices with zeros.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dualscan.ops._numba.vector import at, device_function, intrinsic

# A tile of rows x (2 vectors) takes two thirds of the registers: 32 of 16 lanes with AVX-512, else 16 of 8 or 4.
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8
TILE_ROWS = 8 if _WIDE else 4


def padded(size: int) -> int:
    """The multiple of 16 that scratch matrices have, whatever the CPU."""
    return -(-size // 16) * 16


def _tile(vectors: int) -> Any:
    """A tile of TILE_ROWS x (vectors * LANES): `c = a b` or, with `add`, `c += a b` over `depth`."""

    @intrinsic
    def multiply(
        _typing: Any, c: Any, ldc: Any, a: Any, a_row: Any, a_step: Any, b: Any, ldb: Any, depth: Any, add: Any
    ):
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            c, ldc, a, a_row, a_step, b, ldb, depth, add = args
            vector = ir.VectorType(ir.FloatType(), LANES)
            wide = ir.IntType(64)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
            )

            def place(base: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            def splat(value: Any) -> Any:
                lane = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                return builder.shuffle_vector(lane, lane, zeros)

            cells = [(r, v) for r in range(TILE_ROWS) for v in range(vectors)]
            outs = {(r, v): place(c, builder.add(builder.mul(ldc, wide(r)), wide(v * LANES))) for r, v in cells}
            rows = [builder.gep(a, [builder.mul(a_row, wide(r))]) for r in range(TILE_ROWS)]
            sums = {cell: cgutils.alloca_once(builder, vector) for cell in cells}
            adding = builder.icmp_signed("!=", add, add.type(0))
            with builder.if_else(adding) as (then, otherwise):
                with then:
                    for cell in cells:
                        builder.store(builder.load(outs[cell], align=4), sums[cell])
                with otherwise:
                    for cell in cells:
                        builder.store(ir.Constant(vector, [0.0] * LANES), sums[cell])
            with cgutils.for_range(builder, depth) as loop:
                step = builder.mul(loop.index, a_step)
                line = builder.mul(loop.index, ldb)
                right = [builder.load(place(b, builder.add(line, wide(v * LANES))), align=4) for v in range(vectors)]
                for r in range(TILE_ROWS):
                    left = splat(builder.load(builder.gep(rows[r], [step]), align=4))
                    for v in range(vectors):
                        total = builder.call(fma, (left, right[v], builder.load(sums[r, v])))
                        builder.store(total, sums[r, v])
            for cell in cells:
                builder.store(builder.load(sums[cell]), outs[cell], align=4)
            return _context.get_dummy_value()

        matrix = types.CPointer(types.float32)
        sizes = types.int64
        return types.void(matrix, sizes, matrix, sizes, sizes, matrix, sizes, sizes, sizes), generate

    return multiply


_wide_tile, _narrow_tile = _tile(2), _tile(1)


@device_function
def row_of_tiles(c, ldc, a, a_row, a_step, b, ldb, columns, depth, add):
    """TILE_ROWS rows of `c (+)= a b`."""
    j = 0
    while j + 2 * LANES <= columns:
        _wide_tile(at(c, j), ldc, a, a_row, a_step, at(b, j), ldb, depth, add)
        j += 2 * LANES
    while j < columns:
        _narrow_tile(at(c, j), ldc, a, a_row, a_step, at(b, j), ldb, depth, add)
        j += LANES


@device_function
def multiply(c, ldc, a, a_row, a_step, b, ldb, rows, columns, depth, add):
    """`c[rows, columns] (+)= a[rows, depth] b[depth, columns]`; element (i, k) of `a` is at `i a_row + k a_step`."""
    for i in range(0, rows, TILE_ROWS):
        row_of_tiles(at(c, i * ldc), ldc, at(a, i * a_row), a_row, a_step, b, ldb, columns, depth, add)
