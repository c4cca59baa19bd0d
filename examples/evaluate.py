"""Measure a trained VAE on the test images of the dataset that it was trained on.

    python examples/evaluate.py runs/mnist-...            writes into runs/mnist-.../evaluation
    python examples/evaluate.py RUN --dataset digits      on images of another dataset of the same shape

RUN is a folder that train.py wrote, or a checkpoint file. Ctrl-C leaves no half-written file; the exit code is 130.
Errors that the user can fix end with one line and exit code 2.

Bounds are of log p(x) in nats per image, under the model's likelihood and prior, and with its posteriors. The default
likelihood is a Gaussian of variance 1 around each pixel, with its constant: a density of pixels in [0, 1]. Compare
bounds only between models with the same likelihood. If p(x) is a probability, bounds are also given in bits per
dimension, because these are a code length: of bytes with DiscretizedLogistic, of binary images with Bernoulli.

Files in --out, each written atomically; those of an earlier evaluation are removed first:
    evaluation.json            every number below, with settings and versions
    images.csv                 a row for each image: label, mean squared error, bounds
    error_histogram.png        the mean squared error of each image, with z = mu
    kl_per_dimension.png       the divergence of each latent dimension; active ones are coloured
    worst_reconstructions.png  the images with the largest error, largest first; not of tables and signals
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import zip_longest

import torch

import fastvae
from fastvae import evaluation, plots
from fastvae.files import write_csv
from fastvae.likelihoods import Bernoulli, DiscretizedLogistic, Likelihood
from fastvae.program import (
    Parser,
    add_run_flags,
    images_in_words,
    open_run,
    positive_integer,
    prepare_folder,
    run_program,
)
from fastvae.training import versions, write_summary

FILES = (
    "evaluation.json",
    "images.csv",
    "error_histogram.png",
    "kl_per_dimension.png",
    "worst_reconstructions.png",
)
WORST = 20
ACTIVE = 0.01  # the variance of mu above which a latent dimension is active


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("evaluate.py", evaluate_run)


def evaluate_run() -> None:
    parser = Parser(__doc__)
    add_run_flags(parser, "evaluation")
    parser.add_argument(
        "--samples", type=positive_integer, default=100, metavar="S", help="for each log-likelihood, default: 100"
    )
    parser.add_argument(
        "--likelihood-images",
        type=positive_integer,
        default=1000,
        metavar="N",
        help="log-likelihoods of the first N images, default: 1000",
    )
    arguments = parser.parse_args()
    say: Callable[[str], None] = (lambda line: None) if arguments.quiet else print
    run = open_run(arguments)
    model, images = run.model, run.images
    folder = prepare_folder(arguments.out or run.checkpoint.parent / "evaluation", FILES)
    dimensions = images[0].numel()

    def bits_per_dimension(nats: float) -> float | None:
        discrete = is_probability(model.likelihood, images)
        return evaluation.bits_per_dimension(nats, dimensions) if discrete else None

    def in_words(nats: float) -> str:
        bits = bits_per_dimension(nats)
        return f"{nats:.2f} nats" + ("" if bits is None else f", {bits:.4f} bits per dimension")

    say(f"model           {run.checkpoint}, {run.epoch} epochs")
    say(f"images          {images_in_words(run)}")

    errors = evaluation.reconstruction_errors(model, images, deterministic=True)
    totals = evaluation.evaluate(model, images)
    mse = {"mean": errors.mean().item(), "median": errors.quantile(0.5).item(), "largest": errors.max().item()}
    say(f"error           {', '.join(f'{value:.4f} {name}' for name, value in mse.items())}, with z = mu")
    bounds = evaluation.elbo(model, images, seed=arguments.seed)
    elbo = bounds.mean().item()
    say(f"ELBO            {in_words(elbo)}; as a test loss, without constants, {totals.loss:.2f}")
    few = images[: arguments.likelihood_images]
    likelihoods = evaluation.log_likelihood(model, few, samples=arguments.samples, seed=arguments.seed)
    likelihood, elbo_of_few = likelihoods.mean().item(), bounds[: len(few)].mean().item()
    say(
        f"log p(x)        {in_words(likelihood)}; {arguments.samples} samples, "
        f"{len(few):,} images, whose ELBO is {elbo_of_few:.2f}"
    )
    posteriors = evaluation.posteriors(model, images)
    active = evaluation.active_units(posteriors.mu, threshold=ACTIVE)
    kl = posteriors.kl
    say(
        f"active units    {int(active.sum())} of {active.numel()}, with a variance of mu above {ACTIVE}; "
        f"KL {kl.sum():.2f} nats from N(0, I)"
    )

    labels = [None] * len(images) if run.labels is None else run.labels.tolist()
    worst = errors.argsort(descending=True, stable=True)[:WORST]
    rows = zip_longest(range(len(images)), labels, errors.tolist(), bounds.tolist(), likelihoods.tolist())
    write_csv(folder / "images.csv", ("image", "label", "mse", "elbo", "log_likelihood"), rows)
    plots.plot_errors(folder / "error_histogram.png", errors, deterministic=True)
    plots.plot_kl_per_dimension(folder / "kl_per_dimension.png", kl, active, threshold=ACTIVE)
    if run.dataset.has_pictures:
        plots.plot_reconstructions(
            folder / "worst_reconstructions.png",
            images[worst].float() / 255,
            model.reconstruct(images[worst], deterministic=True),
            deterministic=True,
            title="The test images with the largest error",
        )
    write_summary(
        folder / "evaluation.json",
        {
            "checkpoint": str(run.checkpoint),
            "epoch": run.epoch,
            "dataset": {"name": run.dataset.name, "images": len(images), "dimensions": dimensions},
            "likelihood": model.likelihood.key,
            "mse": mse,
            "loss": totals.loss,
            "elbo": {"nats": elbo, "bits_per_dimension": bits_per_dimension(elbo)},
            "log_likelihood": {
                "nats": likelihood,
                "bits_per_dimension": bits_per_dimension(likelihood),
                "samples": arguments.samples,
                "images": len(few),
                "elbo_of_these_images": elbo_of_few,
            },
            "active_units": {"count": int(active.sum()), "of": active.numel(), "variance_above": ACTIVE},
            "kl_per_dimension": kl.tolist(),
            "worst": [
                {"image": index, "label": labels[index], "mse": errors[index].item()} for index in worst.tolist()
            ],
            "seed": arguments.seed,
            "device": images.device.type,
            "backend": fastvae.backend_for(torch.empty(0, device=images.device))._asdict(),
            "versions": versions(),
        },
    )
    say(f"written         {folder}: {', '.join(name for name in FILES if (folder / name).exists())}")


def is_probability(likelihood: Likelihood, images: torch.Tensor) -> bool:
    """Whether p(x) of images, uint8, is a probability, which adds up to 1 over all images, and not a density."""
    if images.dtype is not torch.uint8:
        return False
    if isinstance(likelihood, Bernoulli):
        return bool(((images == 0) | (images == 255)).all())
    return isinstance(likelihood, DiscretizedLogistic) and likelihood.bins == 256


if __name__ == "__main__":
    sys.exit(main())
