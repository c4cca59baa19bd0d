"""The kernel that makes a batch: it reads chosen images as bytes and writes them as floats."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import load_target
from .launch import Plan, launch, make_plan
from .layout import dense_strides, event_size, remembered, with_dense_rows
from .tiles import UNSPECIALIZED, cut, program_tile, tile_offsets


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gather_batch_kernel(
    images_ptr, indices_ptr, batch_ptr, rows, columns, row_stride, chunks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """batch[i] = images[indices[i]], bytes read as t / 255.

    Shapes: images [any, columns] at distance row_stride; indices int64 [rows]; batch [rows, columns], dense.
    Bytes per float32 element: reads 4 (1 of uint8 images), writes 4; 8 more per row for its index. Launches: 1.
    Roundings: 2. Deterministic.
    """
    first_row, first_column = program_tile(chunks, False, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    image = tl.load(indices_ptr + first_row + row, mask=inside_row, other=0).to(tl.int64)
    source = image[:, None] * row_stride + first_column + tl.arange(0, COLUMNS)[None, :]
    values = load_target(images_ptr + source, inside, True)
    at = batch_ptr + first_row * columns + first_column + tile_offsets(columns, ROWS, COLUMNS)
    tl.store(at, values.to(batch_ptr.dtype.element_ty), mask=inside)


@remembered
def plan_forward(rows: int, columns: int, row_stride: int) -> Plan:
    tiling = cut(rows, columns, torch.float32.itemsize)
    return make_plan(
        tiling.programs,
        # Half of what `cut` says for floats: 16 elements per thread, which are 16 bytes of uint8 images.
        tiling.num_warps // 2,
        rows,
        columns,
        row_stride,
        tiling.chunks,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
    )


def gather_batch(images: Tensor, indices: Tensor) -> Tensor:
    """float32 [B, ...] in the memory format of images [N, ...], uint8 or floating point; indices int64 [B], each from 0
    to N - 1.
    """
    images = with_dense_rows(images)
    size = indices.shape[0]
    shape = (size, *images.shape[1:])
    batch = torch.empty_strided(shape, dense_strides(images), dtype=torch.float32, device=images.device)
    if batch.numel():
        plan = plan_forward(size, event_size(images), images.stride(0))
        launch(gather_batch_kernel, plan, images.device, images, indices, batch)
    return batch
