"""A matrix product in which a row's sums do not depend on the other rows: `deterministic=True` is built on it.

cuBLAS chooses tiles and splits of the inner dimension by the number of rows, and with them the order of sums. Here one
tile serves any number of rows, filled up with zeros, and a program goes over the inner dimension from its start to its
end:

    x [T, K]  64 rows │ 128 numbers ─► 128 ─► ...     W [N, K]  64 columns of y │ 128 ─► 128 ─► ...

Few rows are bound by the weights' bytes: each is read once for every 64 rows. The roof of many rows is the tensor
cores; square tiles of 64 cannot reach it, and neither do few columns fill the machine, as nothing is split.

Sources: He and Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference" (2025), for products that do not
depend on the batch; the loop is that of Triton's tutorial on matrix multiplication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class LinearTile(NamedTuple):
    """How a program is cut out; it follows from the type alone.

    Attributes:
        rows: Of x.
        columns: Of y.
        depth: Products that are summed up at once.
        warps: Of 32 threads.
        stages: Of the pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_HALF = LinearTile(64, 64, 128, 8, 3)
_FLOAT32 = LinearTile(32, 64, 32, 4, 3)  # without tensor cores


@triton.jit(do_not_specialize=["rows"])  # the same instructions for one row as for many
def _linear(
    x, weight, bias, out, rows, columns, x_stride, weight_stride, out_stride,
    INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of y. Row tiles come first, so that programs that run at once share the weights they read."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    in_rows, in_columns = (row < rows)[:, None], (column < columns)[:, None]
    at_x = x + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    at_weight = weight + column.to(tl.int64)[:, None] * weight_stride + depth[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        inside = (start + depth < INNER)[None, :]
        x_tile = tl.load(at_x + start, mask=in_rows & inside, other=0.0)
        weight_tile = tl.load(at_weight + start, mask=in_columns & inside, other=0.0)
        acc = tl.dot(x_tile, tl.trans(weight_tile), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at_out = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=in_rows & (column < columns)[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """X W^T + bias, with every row's bits the same in any company. Summed in float32, rounded once.

    Args:
        x: [T, K], contiguous rows; float32, float16 or bfloat16.
        weight: [N, K], contiguous rows, of the same type.
        bias: [N], of the same type, or None.

    Returns:
        [T, N], in the same type.

    Raises:
        ValueError: Shapes or types do not belong together.
    """
    (rows, inner), columns = x.shape, weight.shape[0]
    if weight.shape[1] != inner or (bias is not None and bias.shape != (columns,)) or weight.dtype != x.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("x and weight must have contiguous rows")
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = _FLOAT32 if x.dtype == torch.float32 else _HALF
    if rows:
        _linear[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns))](
            x, weight, bias, out, rows, columns, x.stride(0), weight.stride(0), out.stride(0),
            INNER=inner, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
