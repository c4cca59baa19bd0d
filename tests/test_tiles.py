"""The sums that the last program of a launch makes of the partial sums of all."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastvae.kernels.tiles import sum_blocks, sum_groups_in_order


@triton.jit
def sum_kernel(terms_ptr, sums_ptr, groups, count, scale, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    sum_groups_in_order(terms_ptr, sums_ptr, groups, count, scale, GROUPS, BLOCK)


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (1, 3000), (3, 1025), (130, 9), (1500, 1)])
def test_partial_sums_of_more_programs_than_one_block_holds(groups, count, device) -> None:
    """Of integers, whose sums are exact: what a launch of that many programs leaves to its last one."""
    terms = torch.randint(-50, 50, (groups, count)).float().to(device)
    sums = torch.empty(groups, device=device)
    sum_kernel[(1,)](terms, sums, groups, count, 0.5, **sum_blocks(groups, count))
    assert torch.equal(sums, 0.5 * terms.sum(1))
