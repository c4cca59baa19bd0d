"""What the launchers of a loss and of a bound share: how parameters and target lie, and which gradients are written."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .layout import dense_strides, empty_gradients
from .tiles import Tiling, cut

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood


class Rows(NamedTuple):
    """How the parameters and the target lie, as `read_together` returns them, of a batch that is not empty."""

    batch: int
    event: int
    stride: int  # of the parameters' samples
    target_stride: int
    itemsize: int  # of the first parameter
    widest: int  # the largest itemsize
    heavy: bool  # `Likelihood.heavy`

    def tiles(self, per_row: bool) -> tuple[Tiling, dict[str, Any], list[int]]:
        """The cut, and what follows from it for both kernels: constants, and the arguments rows, column_units,
        stride_units, target_units, chunks and tail.

        The tensors are one row, unless each sample has a sum of its own, or there are gaps between the samples.
        """
        rows, columns, stride, target_stride, tail = self.batch, self.event, self.stride, self.target_stride, 0
        if rows == 1 or (stride == target_stride == columns and not per_row):
            rows, columns, stride, target_stride = 1, rows * columns, 0, 0
        alignment = gcd(16, columns, stride, target_stride)
        tiling = cut(rows, columns, self.itemsize, self.heavy)
        # Masked loads are whole vectors only if 16 divides the size, so the rest becomes a tail. A tensor that is small
        # enough for one program has none.
        if rows == 1 and alignment < 16 and cut(1, columns - columns % 16, self.itemsize, self.heavy).programs > 1:
            alignment, tail = 16, columns % 16
            columns -= tail
            tiling = cut(rows, columns, self.itemsize, self.heavy)
        constants = {
            "FLAT": rows == 1,
            "PER_ROW": per_row and rows > 1,
            "HAS_TAIL": tail > 0,
            "ALIGNMENT": alignment,
            "VECTOR": 16 // self.widest,
            "ROWS": tiling.tile_rows,
            "COLUMNS": tiling.tile_columns,
        }
        units = [size // alignment for size in (columns, stride, target_stride)]
        return tiling, constants, [rows, *units, tiling.chunks, tail]


def rows_of(tensors: Sequence[Tensor], heavy: bool) -> Rows:
    first = tensors[0]
    batch, itemsize = first.shape[0], first.element_size()
    widest = itemsize
    for tensor in tensors[1:]:
        widest = max(widest, tensor.element_size())
    return Rows(batch, first.numel() // batch, first.stride(0), tensors[-1].stride(0), itemsize, widest, heavy)


def constants_of(likelihood: Likelihood) -> dict[str, Any]:
    """The constants of both kernels that follow from the likelihood."""
    return {
        "TERM": likelihood.term.jit,
        "SETTINGS": likelihood.settings,
        "SLOPES": len(likelihood.parameters) + likelihood.target_has_slope,
        "SLOPE_FACTOR": likelihood.slope_factor,
        "UNIT": likelihood.target == "unit",
    }


def written_gradients(tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of the tensors that need one, at the strides at which the kernel reads the tensors.

    `in_format_of` gives the gradient of a tensor that had to be copied the strides of that tensor.
    """
    strides = dense_strides(tensors[0])
    each = zip(tensors, needed, strict=True)
    return tuple([tensor.new_empty_strided(tensor.shape, strides) for tensor, need in each if need])


def zeros_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Their gradients, if the batch is empty: that of a smaller parameter has elements all the same."""
    return [gradient.zero_() for gradient in empty_gradients(*tensors)]


def needed_of(values: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    return [value for value, need in zip(values, needed, strict=True) if need]


def wanted(needed: Sequence[bool]) -> tuple[int, ...]:
    return tuple(k for k, need in enumerate(needed) if need)


class Asked(NamedTuple):
    """What a launch is asked for beside gradients, and given for it: the values to fill and kl, or the upstream
    gradients of the values; the gradient of kl to fill; beta, the weight of the reconstruction, and grad_scale.
    """

    values: Sequence[Tensor | None] = (None, None, None)
    kl: Tensor | None = None
    upstream: Sequence[Tensor | None] = (None, None, None)
    kl_grad: Tensor | None = None
    weights: Sequence[Any] = (1.0, 1.0, 1.0)

    @property
    def kl_stride(self) -> int:
        return 0 if self.kl is None else self.kl.stride(0)

    def loss_grad_stride(self, reduction: str) -> int:
        """Of the upstream gradient of each sample's loss."""
        loss_grad = self.upstream[0]
        return loss_grad.stride(0) if reduction == "none" and loss_grad is not None else 0
