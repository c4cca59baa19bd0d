"""Each operation as the first of a process, on Triton's interpreter; run in a process of its own by `test_backend.py`.

    TRITON_INTERPRET=1 python tests/first_calls.py

The interpreter replaces parts of Triton when a kernel first runs, and keeps them replaced. So a kernel that runs after
another may run on its own, or not. Prints the names of the calls that do not.
"""

from __future__ import annotations

import os

import torch

import fastvae
import fastvae.functional as F

MOMENTS, IMAGES, KL, HALF = torch.randn(3, 8), torch.rand(3, 1, 5, 5), torch.rand(3), torch.tensor(0.5)
CALLS = {
    "gaussian_sample": lambda: F.gaussian_sample(*MOMENTS.chunk(2, 1)),
    "gaussian_kl": lambda: F.gaussian_kl(*MOMENTS.chunk(2, 1)),
    "gaussian_kl per_dimension": lambda: F.gaussian_kl(*MOMENTS.chunk(2, 1), reduction="per_dimension", free_bits=0.1),
    "gaussian_sample_kl": lambda: F.gaussian_sample_kl(*MOMENTS.chunk(2, 1)),
    "gaussian_sample_kl_packed": lambda: F.gaussian_sample_kl_packed(MOMENTS),
    "sigmoid_mse_loss": lambda: F.sigmoid_mse_loss(IMAGES, IMAGES),
    "elbo_loss": lambda: F.elbo_loss(IMAGES, IMAGES, KL),
    "elbo_loss tensor": lambda: F.elbo_loss(IMAGES, IMAGES, KL, beta=HALF),
    "elbo_value_and_grad": lambda: F.elbo_value_and_grad(IMAGES, IMAGES, KL),
    "elbo_value_and_grad tensor": lambda: F.elbo_value_and_grad(IMAGES, IMAGES, KL, beta=HALF),
}


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
