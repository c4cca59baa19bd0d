"""Each operation as the first of a process, on Triton's interpreter; run in a process of its own by `test_backend.py`.

    TRITON_INTERPRET=1 python tests/first_calls.py

The interpreter replaces parts of Triton when a kernel first runs, and keeps them replaced. So a kernel that runs after
another may run on its own, or not. Prints the names of the calls that do not.
"""

from __future__ import annotations

import os
from functools import partial

import torch

import fastvae
import fastvae.functional as F
from fastvae.kernels import elbo, likelihood, posterior  # noqa: F401 - imported once for all, which runs none of them
from fastvae.operations import Spec, of_each_kind, operations
from pairs import PAIRWISE

IMAGES, ROWS = Spec((3, 4, 5, 5)), Spec((2, 5000))
CALLS = {it.name: partial(it, F, *it.inputs(ROWS if it.long_rows else IMAGES)) for it in of_each_kind(operations())}
# A weight that is a tensor is read by another line of the kernel than a number.
CALLS |= {f"{name} tensor": partial(call, beta=torch.tensor(0.5)) for name, call in CALLS.items() if "elbo" in name}

CALLS |= PAIRWISE


def main() -> None:
    for name, call in CALLS.items():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with fastvae.use_backend("triton"):
                    call()
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1] != 0:
            print(name)


if __name__ == "__main__":
    main()
