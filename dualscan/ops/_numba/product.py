"""Small matrix products inside a kernel: register tiles of C += A B in the CPU's vectors.

A may have any strides (a transpose costs nothing); B and C have adjacent columns. Columns come in multiples of
`LANES` and rows in multiples of `TILE_ROWS`: kernels pad their scratch matrices with zeros.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dualscan.ops._numba.vector import FLOAT, HALF, INT, ZERO, at, device_function, intrinsic, load, store

# A tile of rows x (2 vectors) takes two thirds of the registers: 32 of 16 lanes with AVX-512, else 16 of 8 or 4.
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8
TILE_ROWS = 8 if _WIDE else 4


def padded(size: int) -> int:
    """The multiple of 16 that scratch matrices have, whatever the CPU."""
    return -(-size // 16) * 16


def function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """An LLVM function by its name."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _tile(vectors: int) -> Any:
    """A tile of TILE_ROWS x (vectors * LANES): `c = a b` or, with `add`, `c += a b` over `depth`."""

    @intrinsic
    def multiply(
        _typing: Any, c: Any, ldc: Any, a: Any, a_row: Any, a_step: Any, b: Any, ldb: Any, depth: Any, add: Any
    ):
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            c, ldc, a, a_row, a_step, b, ldb, depth, add = args
            vector = ir.VectorType(FLOAT, LANES)
            wide = ir.IntType(64)
            fma = function(builder, f"llvm.fma.v{LANES}f32", vector, [vector] * 3)

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

# Rows of a matrix that a matrix-vector product reads side by side, each with two vectors of sums.
DOT_ROWS = 4
# How many rows ahead the matrix is fetched: rows are short, and the CPU's own prefetcher starts anew on every page.
ROWS_AHEAD = 32


@intrinsic
def _dot_tile(_typing, out, w, ldw, x, steps):
    """`out[r] = sum of w[r, :] x` for DOT_ROWS rows of `2 LANES steps` elements; w float32 or bfloat16."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        out_at, w_at, ldw, x_at, steps = args
        vector, wide = ir.VectorType(FLOAT, LANES), ir.IntType(64)
        fma = function(builder, f"llvm.fma.v{LANES}f32", vector, [vector] * 3)
        add = function(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", FLOAT, [FLOAT, vector])
        narrow, half = ir.VectorType(HALF, LANES), w.dtype == types.uint16
        pointer = ir.IntType(8).as_pointer()
        prefetch = function(builder, "llvm.prefetch.p0i8", ir.VoidType(), [pointer, INT, INT, INT])
        hints = INT(0), INT(2), INT(1)  # for reading, into the second-level cache, data
        distance = builder.mul(ldw, wide(ROWS_AHEAD))

        def read(base: Any, offset: Any, half: bool) -> Any:
            place = builder.gep(base, [offset])
            if not half:
                return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
            bits = builder.load(builder.bitcast(place, narrow.as_pointer()), align=2)
            words = ir.VectorType(INT, LANES)
            return builder.bitcast(builder.shl(builder.zext(bits, words), ir.Constant(words, [16] * LANES)), vector)

        rows = [builder.gep(w_at, [builder.mul(ldw, wide(r))]) for r in range(DOT_ROWS)]
        sums = {(r, v): cgutils.alloca_once(builder, vector) for r in range(DOT_ROWS) for v in range(2)}
        for total in sums.values():
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        with cgutils.for_range(builder, steps) as loop:
            for v in range(2):
                offset = builder.add(builder.mul(loop.index, wide(2 * LANES)), wide(v * LANES))
                right = read(x_at, offset, False)
                for r in range(DOT_ROWS):
                    if v == 0 or not half:  # once a cache line
                        ahead = builder.gep(rows[r], [builder.add(offset, distance)])
                        builder.call(prefetch, (builder.bitcast(ahead, pointer), *hints))
                    left = read(rows[r], offset, half)
                    builder.store(builder.call(fma, (left, right, builder.load(sums[r, v]))), sums[r, v])
        for r in range(DOT_ROWS):
            total = builder.fadd(builder.load(sums[r, 0]), builder.load(sums[r, 1]))
            value = builder.call(add, (ir.Constant(FLOAT, 0.0), total), fastmath=("reassoc",))
            builder.store(value, builder.gep(out_at, [wide(r)]), align=4)
        return _context.get_dummy_value()

    return types.void(out, w, types.int64, x, types.int64), generate


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


@device_function
def multiply_vectors(w, bias, has_bias, x, x_stride, count, depth, begin, end, out, out_stride, sums):
    """`out[b, r] = w[r] . x[b] + bias[r]` for rows `begin` to `end` of a matrix with adjacent columns.

    `w` is read once for all `count` vectors x, which are float32; `sums` has room for DOT_ROWS values.
    """
    steps = depth // (2 * LANES)
    row = begin
    while row < end:
        rows = min(DOT_ROWS, end - row)
        for b in range(count):
            own = at(x, b * x_stride)
            if rows == DOT_ROWS:
                _dot_tile(sums, at(w, row * depth), depth, own, steps)
                first = steps * 2 * LANES
            else:
                first = 0
            for r in range(rows):
                total, line = sums[r] if rows == DOT_ROWS else ZERO, at(w, (row + r) * depth)
                for i in range(first, depth):
                    total += load(line, i) * own[i]
                if has_bias:
                    total += load(bias, row + r)
                store(out, b * out_stride + row + r, total)
        row += rows
