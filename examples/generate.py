"""Write pictures from a trained VAE: samples, interpolations, latent traversals and a map of the latents.

    python examples/generate.py runs/mnist-...                  writes into runs/mnist-.../generated
    python examples/generate.py RUN --between 3 18 --around 3   choose test images by number

RUN is a folder that train.py wrote, or a checkpoint file. Ctrl-C leaves no half-written file; the exit code is 130.
Errors that the user can fix end with one line and exit code 2.

Files in --out, each written atomically; those of an earlier call are removed first:
    generated.png       64 images decoded from z of the prior
    interpolations.png  from a test image to another, decoded from the line between the means of their posteriors
    traversals.png      one latent dimension at a time goes from -3 to 3; the largest divergence comes first
    latent_map.png      the means of the test images' posteriors, coloured by label if there are labels: two latents
                        themselves, or the first two principal components of more
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastvae import plots
from fastvae.evaluation import Posteriors, posteriors, principal_components
from fastvae.models import VAE
from fastvae.program import (
    Parser,
    Run,
    UserError,
    add_run_flags,
    images_in_words,
    open_run,
    prepare_folder,
    prior_in_words,
    run_program,
)

FILES = ("generated.png", "interpolations.png", "traversals.png", "latent_map.png")
SAMPLES = 64
INTERPOLATIONS = 8
STEPS = 9  # of an interpolation, with its ends, and of a traversal
REACH = 3.0  # of a traversal: 99.7 % of the prior
DIMENSIONS = 32  # the most that a traversal shows


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("generate.py", generate)


def generate() -> None:
    parser = Parser(__doc__)
    add_run_flags(parser, "generated")
    parser.add_argument(
        "--between",
        type=image_number,
        nargs=2,
        metavar=("I", "J"),
        help=f"interpolate between test images I and J, default: {INTERPOLATIONS} pairs drawn by the seed",
    )
    parser.add_argument(
        "--around", type=image_number, metavar="I", help="traverse from test image I, default: from z = 0"
    )
    arguments = parser.parse_args()
    say: Callable[[str], None] = (lambda line: None) if arguments.quiet else print
    run = open_run(arguments)
    if not run.dataset.has_pictures:
        raise UserError(f"{run.dataset.name} has no pictures: fastvae.load gives the model, which samples and decodes")
    for flag, numbers in (("--between", arguments.between or []), ("--around", [arguments.around or 0])):
        if max(numbers, default=0) >= len(run.images):
            raise UserError(f"{flag} must be at most {len(run.images) - 1}, the last test image, got {max(numbers)}")
    folder = prepare_folder(arguments.out or run.checkpoint.parent / "generated", FILES)
    say(f"model     {run.checkpoint}, {run.epoch} epochs")
    say(f"images    {images_in_words(run)}")

    generator = torch.Generator(run.images.device).manual_seed(arguments.seed)
    title = f"{SAMPLES} images from {prior_in_words(run.model)}"
    plots.write_image_grid(folder / "generated.png", run.model.sample(SAMPLES, generator), title=title)
    found = posteriors(run.model, run.images)
    pairs = [arguments.between] if arguments.between else random_pairs(len(run.images), arguments.seed)
    plots.plot_image_rows(
        folder / "interpolations.png",
        interpolations(run, found, pairs),
        [f"{first} to {second}" for first, second in pairs],
        ["image", *(f"{step / (STEPS - 1):g}" for step in range(STEPS)), "image"],
        title="Between test images, decoded from (1 - t) mu + t mu', for t =",
    )
    order = found.kl.argsort(descending=True)[:DIMENSIONS].tolist()
    base = torch.zeros_like(found.mu[0]) if arguments.around is None else found.mu[arguments.around]
    values = torch.linspace(-REACH, REACH, STEPS)
    others = "0" if arguments.around is None else f"those of test image {arguments.around}"
    shown = f"the first {len(order)} of {len(found.kl)}; " if len(order) < len(found.kl) else ""
    plots.plot_image_rows(
        folder / "traversals.png",
        traversals(run.model, base, order, values),
        [f"z[{dimension}], KL {found.kl[dimension]:.2f}" for dimension in order],
        [f"{value:g}" for value in values.tolist()],
        title=f"One latent dimension at a time, {shown}the others are {others}",
    )
    points, axis_labels = latent_map(found.mu)
    plots.plot_latent_map(folder / "latent_map.png", points, run.labels, axis_labels=axis_labels)
    say(f"written   {folder}: {', '.join(FILES)}")


@torch.no_grad()
def interpolations(run: Run, found: Posteriors, pairs: list[list[int]]) -> Tensor:
    """[pairs, 1 + STEPS + 1, C, H, W]: the first image, what lies between, the second image.

    Straight lines: the means lie well inside the shell of radius sqrt(K) on which samples of the prior lie and which
    spherical interpolation keeps to, the more so the fewer dimensions are active.
    """
    first, second = (torch.tensor(side, device=run.images.device) for side in zip(*pairs, strict=True))
    t = torch.linspace(0.0, 1.0, STEPS, device=run.images.device).view(1, -1, 1)
    z = torch.lerp(found.mu[first].unsqueeze(1), found.mu[second].unsqueeze(1), t)
    between = run.model.decode_mean(z.flatten(0, 1)).view(len(pairs), STEPS, *run.images.shape[1:])
    ends = [run.images[side].unsqueeze(1) / 255 for side in (first, second)]
    return torch.cat([ends[0], between, ends[1]], 1)


@torch.no_grad()
def traversals(model: VAE, base: Tensor, order: list[int], values: Tensor) -> Tensor:
    """[rows, STEPS, C, H, W]: in each row one dimension of z takes the values, the others are those of base [K]."""
    z = base.repeat(len(order), len(values), 1)
    for row, dimension in enumerate(order):
        z[row, :, dimension] = values.to(z)
    images = model.decode_mean(z.flatten(0, 1))
    return images.view(len(order), len(values), *images.shape[1:])


def latent_map(mu: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Points [N, 2] and what their axes are."""
    if mu.shape[1] == 1:
        return torch.cat([mu, torch.zeros_like(mu)], 1), ("mu[0]", "")
    if mu.shape[1] == 2:
        return mu, ("mu[0]", "mu[1]")
    points, share = principal_components(mu)
    return points, ("first principal component of mu", f"second; the two show {share:.0%} of the variance")


def random_pairs(count: int, seed: int) -> list[list[int]]:
    """Of different images, as far as there are enough."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(count, generator=generator)[: 2 * INTERPOLATIONS].tolist()
    numbers = numbers if len(numbers) > 1 else numbers * 2
    return [numbers[place : place + 2] for place in range(0, len(numbers) - 1, 2)]


def image_number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be the number of a test image, from 0, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
