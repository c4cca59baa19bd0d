"""Train a ladder VAE on the bundled digits: three groups of latents, each with a prior that the groups above it set.

    python examples/hierarchical.py [--epochs 12]      about a minute on two cores

The encoder goes up, from pixels to features of 14x14, 7x7 and 1x1. The decoder comes down, and draws latents at each
size: their prior p depends on what was drawn above, their posterior q on the features too. A block's divergence
KL(q || p) is of two learned Gaussians; ``gaussian_sample_kl_packed(q, prior=p)`` samples q and computes it, in one
launch forward and one backward. Pixels are bytes (`DiscretizedLogistic`), so nats become bits per dimension.

The loop is its own, because `fastvae.training.train` is for one group of latents.

Files in --out, each written atomically:
    generated.png    64 images: latents of every group drawn from its prior
    groups.png       test images, and what is left of them with the first group's latents, the first two's, and all; the
                     other groups then have the means of their priors
    summary.json     every number that is printed, with settings and versions

Source: Sønderby et al., "Ladder Variational Autoencoders", 2016; Child, "Very Deep VAEs", 2021.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvae.functional as F
from fastvae import plots
from fastvae.data import load_digits
from fastvae.evaluation import bits_per_dimension
from fastvae.likelihoods import DiscretizedLogistic
from fastvae.nn import ELBOLoss
from fastvae.program import Parser, choose_device, positive_integer, prepare_folder, run_program, seed
from fastvae.training import versions, write_summary

FILES = ("generated.png", "groups.png", "summary.json")
LATENTS = (16, 4, 1)  # channels of each group, from the top: 1x1, 7x7, 14x14
WIDTH = 24
BATCH_SIZE, LEARNING_RATE, CLIP_NORM = 32, 2e-3, 200.0
WARMUP = 0.3  # of all steps, in which the divergence's weight grows to 1
# Nats that a dimension of each group may hold at no cost in training. Without them the last group, which is nearest to
# the pixels, takes all, and the groups above it are left unused.
FREE_BITS = (0.5, 0.05, 0.0)
LIKELIHOOD = DiscretizedLogistic(min_log_scale=-7.0)


class Drawn(NamedTuple):
    """parameters: of the likelihood. kl: of each group, in the mean over the batch, [groups]."""

    parameters: tuple[Tensor, ...]
    kl: Tensor


class Block(nn.Module):
    """One group of latents: it takes what the groups above gave, [B, WIDTH, h, w], and adds its own."""

    def __init__(self, latents: int, free_bits: float) -> None:
        super().__init__()
        self.free_bits = free_bits
        self.prior = conv(WIDTH, 2 * latents)  # [mu | logvar]
        self.posterior = nn.Sequential(conv(2 * WIDTH, WIDTH), nn.SiLU(), conv(WIDTH, 2 * latents))
        self.merge = nn.Sequential(conv(WIDTH + latents, WIDTH), nn.SiLU(), conv(WIDTH, WIDTH))

    def forward(self, above: Tensor, features: Tensor | None, *, mean: bool = False) -> tuple[Tensor, Tensor]:
        """What goes down, and the mean divergence. Without features z is of the prior; ``mean``: its mean."""
        p = self.prior(above)
        kl = above.new_zeros(())
        if features is not None:
            q = self.posterior(torch.cat([above, features], 1))
            free_bits = self.free_bits if self.training else 0.0
            z, kl = F.gaussian_sample_kl_packed(q, prior=p, reduction="batchmean", free_bits=free_bits)
        else:
            mu, logvar = p.chunk(2, 1)
            z = mu if mean else F.gaussian_sample(mu, logvar)
        return above + self.merge(torch.cat([above, z], 1)), kl


class Ladder(nn.Module):
    """A hierarchical VAE of images uint8 [B, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, WIDTH, 3, 2, 1), nn.SiLU(), conv(WIDTH, WIDTH)),  # 14 x 14
                nn.Sequential(nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.SiLU(), conv(WIDTH, WIDTH)),  # 7 x 7
                nn.Sequential(nn.SiLU(), nn.Conv2d(WIDTH, 4 * WIDTH, 7), nn.SiLU(), nn.Conv2d(4 * WIDTH, WIDTH, 1)),
            ]
        )
        self.top = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.blocks = nn.ModuleList([Block(*numbers) for numbers in zip(LATENTS, FREE_BITS, strict=True)])
        self.grow = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(WIDTH, 2 * WIDTH, 7), nn.SiLU(), conv(2 * WIDTH, WIDTH)),  # 7 x 7
                nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2),  # 14 x 14
                nn.Sequential(nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2), nn.SiLU(), conv(WIDTH, 2)),  # the parameters
            ]
        )

        for name, parameter in self.named_parameters():  # with torch's own the first group held 0.2 nats
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor, groups: int = len(LATENTS)) -> Drawn:
        """Latents of the first ``groups`` groups are drawn from their posteriors, others are their priors' means."""
        found: list[Tensor | None] = []
        features = images.float() / 127.5 - 1
        for layer in self.up:
            features = layer(features)
            found.insert(0, features)  # from the top
        return self.down(len(images), [*found[:groups], *[None] * (len(LATENTS) - groups)], mean=True)

    def down(self, count: int, features: list[Tensor | None], *, mean: bool = False) -> Drawn:
        """From the top: of each group the features of the images, None for the prior."""
        state, divergences = self.top.expand(count, -1, -1, -1), []
        for block, grow, own in zip(self.blocks, self.grow, features, strict=True):
            state, kl = block(state, own, mean=mean)
            state = grow(nn.functional.silu(state))
            divergences.append(kl)
        return Drawn(state.chunk(2, 1), torch.stack(divergences))

    def sample(self, count: int) -> Tensor:
        """Images [count, 1, 28, 28] in [0, 1]."""
        return LIKELIHOOD.mean(*self.down(count, [None] * len(LATENTS)).parameters)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("hierarchical.py", run)


def run() -> None:
    arguments = parse_arguments()
    plots.require_matplotlib()
    device = choose_device(arguments.device)
    folder = prepare_folder(arguments.out, FILES)
    digits = load_digits()
    train, test = digits.train_images.to(device), digits.test_images.to(device)
    torch.manual_seed(arguments.seed)
    model = Ladder().to(device)
    objective = ELBOLoss(LIKELIHOOD)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    print(f"model      {sum(it.numel() for it in model.parameters()):,} parameters, {len(LATENTS)} groups on {device}")

    steps = arguments.epochs * (len(train) // BATCH_SIZE)
    done, start = 0, time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        total = torch.zeros((), device=device)
        order = torch.randperm(len(train), device=device)[: len(train) // BATCH_SIZE * BATCH_SIZE]
        for batch in torch.split(order, BATCH_SIZE):
            images = train[batch]
            drawn = model(images)
            objective.beta = min(1.0, (done + 1) / (WARMUP * steps))
            elbo = objective(drawn.parameters, images, drawn.kl.sum().expand(BATCH_SIZE))
            optimizer.zero_grad()
            elbo.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            total += elbo.reconstruction.detach() + elbo.kl.detach()
            done += 1
        print(f"epoch {epoch:>4} negative ELBO {total.item() / (len(train) // BATCH_SIZE):.2f} nats per image")
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        drawn = model(test)
        reconstruction = F.negative_log_likelihood(drawn.parameters, test, LIKELIHOOD)
        nats, groups = (reconstruction + drawn.kl.sum()).item(), drawn.kl.tolist()
        some = test[:10]
        shown = [LIKELIHOOD.mean(*model(some, count).parameters) for count in range(1, len(LATENTS) + 1)]
        plots.write_image_grid(folder / "generated.png", model.sample(64), title="64 images, z of each group's prior")
    plots.plot_image_rows(
        folder / "groups.png",
        torch.stack([some.float() / 255, *shown]),
        ["image", *(f"{count} of {len(LATENTS)} groups" for count in range(1, len(LATENTS) + 1))],
        [""] * len(some),
        title="Test images, and what the first groups' latents keep of them",
    )
    bits = bits_per_dimension(-nats, some[0].numel())
    words = ", ".join(f"{kl:.2f}" for kl in groups)
    print(f"test       negative ELBO {nats:.2f} nats per image, {bits:.4f} bits per dimension")
    print(f"groups     {words} nats of divergence, from the top; {seconds:.0f} s")
    write_summary(
        folder / "summary.json",
        {
            "negative_elbo": nats,
            "bits_per_dimension": bits,
            "divergences": groups,
            "seconds": seconds,
            "settings": {**vars(arguments), "out": str(folder)},
            "versions": versions(),
        },
    )
    print(f"written    {folder}: {', '.join(FILES)}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=positive_integer, default=12, help="default: 12")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of every random number, default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs", "ladder"), help="default: runs/ladder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
