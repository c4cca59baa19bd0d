"""Train a ladder VAE on the bundled digits: three groups of latents, each with a prior that the groups above it set.

    python examples/hierarchical.py [--epochs 18]

The encoder goes up, from pixels to features of 7x7, 4x4 and 1x1. The decoder comes down, and draws latents at each
size: their prior p depends on what was drawn above, their posterior q on the features too. A block's divergence
KL(q || p) is of two learned Gaussians; ``gaussian_sample_kl_packed(q, prior=p)`` samples q and computes it, in one
launch forward and one backward. Pixels are bytes (`DiscretizedLogistic`), so nats become bits per dimension.

Groups join one after the other, from the top: for a third of the steps the first alone is drawn from its posterior, for
another third the first two. Where all are trained from the start, the group that is nearest to the pixels takes all,
and those above it are left unused. (Li et al., "Progressive Learning and Disentanglement of Hierarchical
Representations", 2020.)

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
LATENTS = (16, 4, 2)  # channels of each group, from the top: 1x1, 4x4, 7x7
WIDTH = 32
BATCH_SIZE, LEARNING_RATE, CLIP_NORM = 32, 2e-3, 200.0
LIKELIHOOD = DiscretizedLogistic(min_log_scale=-7.0)


class Drawn(NamedTuple):
    """parameters: of the likelihood. kl: of each group, [groups, B]."""

    parameters: tuple[Tensor, ...]
    kl: Tensor


class Block(nn.Module):
    """One group of latents: it takes what the groups above gave, [B, WIDTH, h, w], and adds its own."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.prior = conv(WIDTH, 2 * latents)  # [mu | logvar]
        self.posterior = nn.Sequential(conv(2 * WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, 2 * latents))
        self.merge = nn.Sequential(conv(WIDTH + latents, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, above: Tensor, features: Tensor | None, *, mean: bool = False) -> tuple[Tensor, Tensor]:
        """What goes down, and the divergence [B]. Without features z is of the prior; ``mean``: its mean."""
        p = self.prior(above)
        kl = above.new_zeros(len(above))
        if features is not None:
            q = self.posterior(torch.cat([above, features], 1))
            z, kl = F.gaussian_sample_kl_packed(q, prior=p)
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
                nn.Sequential(nn.Conv2d(1, WIDTH, 3, 2, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)),  # 7 x 7
                nn.Sequential(nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1)),  # 4 x 4
                nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, 4 * WIDTH, 4), nn.ReLU(), nn.Conv2d(4 * WIDTH, WIDTH, 1)),
            ]
        )
        self.top = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.blocks = nn.ModuleList([Block(latents) for latents in LATENTS])
        self.grow = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(WIDTH, 2 * WIDTH, 4), nn.ReLU(), conv(2 * WIDTH, WIDTH)),  # 4 x 4
                nn.ConvTranspose2d(WIDTH, WIDTH, 3, 2, 1),  # 7 x 7
                nn.Sequential(
                    nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(WIDTH, 2, 4, 2, 1)
                ),  # the parameters, 28 x 28
            ]
        )

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
            state = grow(torch.relu(state))
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
            drawn = model(images, 1 + len(LATENTS) * done // steps)
            objective.beta = min(1.0, len(LATENTS) * (done + 1) / steps)  # so that the first group is not left unused
            elbo = objective(drawn.parameters, images, drawn.kl.sum(0))
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
        nats = objective(drawn.parameters, test, drawn.kl.sum(0)).loss.item()
        groups = drawn.kl.mean(1).tolist()
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
    parser.add_argument("--epochs", type=positive_integer, default=18, help="default: 18")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of every random number, default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs", "ladder"), help="default: runs/ladder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
