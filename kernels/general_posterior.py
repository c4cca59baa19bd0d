"""Launching the kernel of `general_forward`: posteriors with another prior or scale, several samples, or log-densities.
`general_gradients` launches those of its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .general_forward import general_forward_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import Strides, remembered, with_strides
from .moments import Layout, read_moments
from .noise import NO_RNG, noise_arguments, run_length, starts_on_quad
from .posterior import cut_columns
from .prior import PriorLayout, read_prior
from .tiles import Tiling, empty_sum, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.reference.gaussian import General


def strides_of_z(posterior: General, layout: Layout) -> tuple[Sequence[int], Strides]:
    """The shape and the strides of z, of which the noise is counted in memory."""
    if not posterior.samples:
        return layout.shape, layout.strides
    return (posterior.samples, *layout.shape), (layout.batch * layout.event, *layout.strides)


def allocate(posterior: General, mu: Tensor, layout: Layout) -> list[Tensor]:
    """z, kl and log_q, those that the posterior asks for."""
    results = []
    if posterior.draws:
        results.append(mu.new_empty_strided(*strides_of_z(posterior, layout)))
    if posterior.per_dimension:
        results.append(mu.new_empty_strided(layout.shape[1:], layout.strides[1:], dtype=torch.float32))
    elif posterior.diverges:
        results.append(mu.new_empty([layout.batch] if posterior.reduction == "none" else [], dtype=torch.float32))
    if posterior.log_prob:
        shape = [posterior.samples, layout.batch] if posterior.samples else [layout.batch]
        results.append(mu.new_empty(shape, dtype=torch.float32))
    return results


def scale_numbers(posterior: General) -> list[float]:
    """scale_eps, log_eps, low and high as the kernels take them."""
    log_eps = math.log(posterior.scale_eps) if posterior.scale_eps else 0.0
    return [posterior.scale_eps, log_eps, posterior.low, posterior.high]


def scale_constants(posterior: General) -> dict[str, Any]:
    return {
        "SCALE": posterior.scale,
        "HAS_EPS": posterior.scale_eps > 0,
        "CLAMP": posterior.low > -math.inf or posterior.high < math.inf,
    }


def shared_constants(posterior: General, prior: PriorLayout) -> dict[str, Any]:
    return {
        **scale_constants(posterior),
        "PRIOR_SCALE": posterior.prior_scale,
        "MU_SHARED": prior.mu_shared,
        "SECOND_SHARED": prior.second_shared,
        "SEVERAL": posterior.samples > 1,
        "PRIOR_INNER": prior.inner,
    }


def tile_constants(posterior: General, layout: Layout, tiling: Tiling, itemsize: int, on_quad: bool) -> dict[str, Any]:
    # The second sample, too, must start on a quad.
    on_quad = on_quad and (posterior.samples < 2 or layout.batch * layout.event % 4 == 0)
    return {
        "INNER": layout.inner,
        "FLAT": tiling.rows == 1,
        "RUN": run_length(tiling, itemsize, on_quad),
        "ROWS": tiling.tile_rows,
        "COLUMNS": tiling.tile_columns,
    }


def tiles_of(layout: Layout, columns: bool, per_row: bool, itemsize: int, gradients: bool) -> tuple[Tiling, int]:
    """And the blocks that share the tiles of the same columns. `columns`: for sums over rows."""
    if columns:
        return cut_columns(layout.batch, layout.event, itemsize)
    tiling = layout.tiles(per_row, itemsize)
    if tiling.tile_columns == 4096:
        # 8 numbers per thread in place of 16, of which some forms spill (sm_90, triton 3.9). Values of 4096 numbers in
        # 16 warps still spill 8 bytes, gradients of 2048 in 8 warps 16 (sm_80, triton 3.9). Not measured on a GPU.
        size = 4096 if gradients else 2048
        tiling = replace(tiling, tile_columns=size, num_warps=size // 256)
    return tiling, -(-tiling.rows // tiling.tile_rows)


def rows_at_once(tiling: Tiling, blocks: int) -> int:
    """In which the last program reads partial sums of columns."""
    return 4096 // tiling.tile_columns if blocks > 1 else 1


@remembered
def plan_forward(
    posterior: General, layout: Layout, prior: PriorLayout, has_prior: bool, itemsize: int, on_quad: bool
) -> tuple[Plan, int, int]:
    """And the numbers of partial sums of kl and of log_q."""
    of_rows = posterior.diverges and posterior.reduction == "none"
    per_row = of_rows or posterior.log_prob or (has_prior and prior.has_gaps(layout.event))
    tiling, blocks = tiles_of(layout, posterior.per_dimension, per_row, itemsize, False)
    programs = tiling.chunks * blocks
    finishing: dict[str, Any]
    if posterior.per_dimension:
        kl_partials = blocks * layout.event if blocks > 1 else 0
        finishing = {"SUM": "column", "GROUPS": 1, "BLOCK": rows_at_once(tiling, blocks)}
    elif of_rows:
        kl_partials = tiling.rows * tiling.chunks if tiling.chunks > 1 else 0
        finishing = {"SUM": "row", **sum_blocks(tiling.rows, tiling.chunks)}
    else:
        kl_partials = programs if posterior.diverges and programs > 1 else 0
        finishing = {"SUM": "all", **sum_blocks(1, programs if posterior.diverges else 1)}
    samples = max(1, posterior.samples)
    log_q_partials = samples * tiling.rows * tiling.chunks if posterior.log_prob and tiling.chunks > 1 else 0
    of_log_q = sum_blocks(samples * tiling.rows, tiling.chunks if posterior.log_prob else 1)
    plan = make_plan(
        programs,
        tiling.num_warps,
        *scale_numbers(posterior),
        posterior.free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        prior.mu_stride,
        prior.second_stride,
        tiling.chunks,
        blocks,
        samples,
        0.5 * reduction_scale(posterior.reduction, layout.batch, layout.event),
        **shared_constants(posterior, prior),
        **tile_constants(posterior, layout, tiling, itemsize, on_quad),
        **finishing,
        Q_GROUPS=of_log_q["GROUPS"],
        Q_BLOCK=of_log_q["BLOCK"],
    )
    return plan, kl_partials, log_q_partials


def general(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    prior_mu: Tensor | None,
    prior_second: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> list[Tensor]:
    """z, kl and log_q, those that the posterior asks for. free_bits, here and below, only with "per_dimension"."""
    mu, second, layout = read_moments(mu, second, posterior.dim)
    results = allocate(posterior, mu, layout)
    z = results[0] if posterior.draws else None
    kl = results[posterior.draws] if posterior.diverges else None
    log_q = results[-1] if posterior.log_prob else None
    if layout.batch * layout.event == 0:
        if kl is not None:
            # The mean of each dimension over nothing is NaN, but where there are no dimensions.
            kl.fill_(float("nan") if posterior.per_dimension else empty_sum(posterior.reduction, layout.batch))
        if log_q is not None:
            log_q.zero_()
        return results
    prior = read_prior(prior_mu, prior_second, posterior.dim, layout)
    noise = noise_arguments(rng, mu.device, layout.event) if posterior.draws and eps is None else NO_RNG
    plan, kl_partials, log_q_partials = plan_forward(
        posterior, layout, prior.layout, prior.mu is not None, mu.element_size(), starts_on_quad(noise[-1])
    )
    launch(
        general_forward_kernel,
        plan,
        mu.device,
        mu,
        second,
        prior.mu,
        prior.second,
        None if eps is None else with_strides(eps, strides_of_z(posterior, layout)[1]),
        z,
        kl,
        log_q,
        mu.new_empty(kl_partials, dtype=torch.float32) if kl_partials else None,
        mu.new_empty(log_q_partials, dtype=torch.float32) if log_q_partials else None,
        ticket(mu.device) if kl_partials or log_q_partials else None,
        *noise,
    )
    return results
