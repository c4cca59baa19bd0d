"""Find the images that a trained VAE explains worse than those that it was trained on.

    python examples/anomaly.py runs/mnist-...          find unusual test images
    python examples/anomaly.py RUN --against digits    treat the images of another dataset as anomalies
    python examples/anomaly.py RUN --normal 0 1 2      treat other labels as anomalies
    python examples/anomaly.py RUN                     the same, if train.py --labels 0 1 2 wrote the run

RUN is a folder that train.py wrote, or a checkpoint file. An image is flagged if its score is above the threshold.
The threshold is a percentile of the training images' scores, with --normal of those with these labels. Normal test
images may be flagged more often than the percentile says, because the model has not seen them; the program prints the
counts. Ctrl-C leaves no half-written file; the exit code is 130. Errors that the user can fix end with one line and
exit code 2.

Files in --out, each written atomically; those of an earlier call are removed first:
    anomaly.json            threshold, counts, and with --against or --normal the area under the curve
    scores.csv              a row for each test image, and each image of --against
    score_histogram.png     the scores and the threshold
    most_anomalous.png      the images with the highest scores and their reconstructions, highest first; not of tables
                            and signals
    roc.png                 with --against or --normal: the rates at every threshold
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvae
from fastvae import plots
from fastvae.evaluation import SCORES, anomaly_scores, roc
from fastvae.files import write_csv
from fastvae.program import (
    Parser,
    Run,
    UserError,
    add_run_flags,
    images_in_words,
    open_dataset,
    open_run,
    prepare_folder,
    run_program,
)
from fastvae.training import versions, write_summary

FILES = ("anomaly.json", "scores.csv", "score_histogram.png", "most_anomalous.png", "roc.png")
MOST = 20
AXES = {
    "reconstruction": "mean squared error of an image's pixels, with z = mu",
    "elbo": "minus the evidence lower bound, nats per image",
}


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("anomaly.py", find_anomalies)


def find_anomalies() -> None:
    arguments = parse_arguments()
    say: Callable[[str], None] = (lambda line: None) if arguments.quiet else print
    run = open_run(arguments, of_all_labels=arguments.against is None)
    if arguments.normal is None and arguments.against is None:
        arguments.normal = run.trained_labels
    training = normal_training_images(run, arguments)
    images, anomalous, columns = images_to_judge(run, arguments)
    folder = prepare_folder(arguments.out or run.checkpoint.parent / "anomaly", FILES)
    say(f"model       {run.checkpoint}, {run.epoch} epochs")
    say(f"images      {images_in_words(run)}")

    def scores_of(of: Tensor) -> Tensor:
        return anomaly_scores(run.model, of, score=arguments.score, seed=arguments.seed).double().cpu()

    reference, scores = scores_of(training), scores_of(images)
    threshold = float(np.percentile(reference.numpy(), arguments.percentile))
    flagged = scores > threshold
    say(
        f"threshold   {threshold:.5g}, percentile {arguments.percentile:g} of the scores of "
        f"{len(training):,} training images of {run.dataset.name} ({arguments.score})"
    )
    if anomalous is None:
        sets = {"training": reference, "test": scores}
    else:
        sets = {"normal": scores[~anomalous], "anomalies": scores[anomalous]}
    counts = {name: {"images": len(of), "above": int((of > threshold).sum())} for name, of in sets.items()}
    for name, count in counts.items():
        share = count["above"] / count["images"]
        say(f"{name:11} {count['above']:,} of {count['images']:,} images above the threshold ({share:.1%})")
    curve = None if anomalous is None else roc(scores, anomalous)
    if curve is not None:
        say(f"ROC         area under the curve {curve.auc:.4f}")

    plots.plot_scores(folder / "score_histogram.png", sets, threshold, score_label=AXES[arguments.score])
    if curve is not None:
        rates = [counts[name]["above"] / counts[name]["images"] for name in ("normal", "anomalies")]
        plots.plot_roc(folder / "roc.png", curve, (rates[0], rates[1]))
    most = scores.argsort(descending=True, stable=True)[:MOST].to(images.device)
    if run.dataset.has_pictures:
        plots.plot_reconstructions(
            folder / "most_anomalous.png",
            images[most].float() / 255,
            run.model.reconstruct(images[most], deterministic=True),
            deterministic=True,
            title="The most anomalous images",
        )
    marks = [None] * len(images) if anomalous is None else anomalous.int().tolist()
    write_csv(
        folder / "scores.csv",
        ("dataset", "image", "label", "anomaly", "score", "above"),
        zip(*columns, marks, scores.tolist(), flagged.int().tolist(), strict=True),
    )
    write_summary(
        folder / "anomaly.json",
        {
            "checkpoint": str(run.checkpoint),
            "epoch": run.epoch,
            "dataset": run.dataset.name,
            "against": arguments.against,
            "normal_labels": arguments.normal,
            "score": arguments.score,
            "percentile": arguments.percentile,
            "threshold": threshold,
            "training_images": len(training),
            **counts,
            "auc": None if curve is None else curve.auc,
            "seed": arguments.seed,
            "device": images.device.type,
            "backend": fastvae.backend_for(torch.empty(0, device=images.device))._asdict(),
            "versions": versions(),
        },
    )
    say(f"written     {folder}: {', '.join(name for name in FILES if (folder / name).exists())}")


def normal_training_images(run: Run, arguments: argparse.Namespace) -> Tensor:
    """Those that the model has seen, of the normal labels, on its device."""
    seen = run.dataset if run.trained_labels is None else run.dataset.of_classes(run.trained_labels)
    count = min(run.trained_images or sys.maxsize, arguments.limit or sys.maxsize)
    images = seen.train_images[:count]
    if arguments.normal is not None:
        labels = seen.train_labels
        if labels is None or run.labels is None:
            raise UserError(f"--normal needs labels, and {run.dataset.name} has none")
        images = images[torch.isin(labels[:count], torch.tensor(arguments.normal))]
    if len(images) == 0:
        raise UserError(f"--normal: none of the {count:,} training images has such a label")
    return images.to(run.images.device)


def images_to_judge(run: Run, arguments: argparse.Namespace) -> tuple[Tensor, Tensor | None, list[list[Any]]]:
    """Images, which are anomalies where that is known, and the columns dataset, number and label of scores.csv."""
    columns: list[list[Any]] = [
        [run.dataset.name] * len(run.images),
        list(range(len(run.images))),
        [None] * len(run.images) if run.labels is None else run.labels.tolist(),
    ]
    if arguments.normal is not None:
        assert run.labels is not None
        anomalous = ~torch.isin(run.labels, torch.tensor(arguments.normal))
        if anomalous.all() or not anomalous.any():
            what = "none" if anomalous.all() else "every one"
            raise UserError(f"--normal must split the test images in two, but {what} has such a label")
        return run.images, anomalous, columns
    if arguments.against is None:
        return run.images, None, columns
    settings = {} if run.dataset.standardisation is None else {"standardisation": run.dataset.standardisation._asdict()}
    other = open_dataset("--against", arguments.against, arguments.against_dir, run.model, settings)
    others = other.test_images[: arguments.limit].to(run.images.device)
    labels = other.test_labels
    columns[0] += [other.name] * len(others)
    columns[1] += range(len(others))
    columns[2] += [None] * len(others) if labels is None else labels[: len(others)].tolist()
    images = torch.cat([run.images, others])
    return images, torch.arange(len(images)) >= len(run.images), columns


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_run_flags(parser, "anomaly")
    parser.add_argument("--score", choices=SCORES, default="reconstruction", help="default: reconstruction")
    parser.add_argument(
        "--percentile", type=percentage, default=99.0, metavar="P", help="of the training scores, default: 99"
    )
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--normal", type=int, nargs="+", metavar="LABEL", help="images of other labels are anomalies")
    known.add_argument("--against", metavar="NAME", help="a dataset whose test images are anomalies")
    parser.add_argument("--against-dir", type=Path, metavar="DIR", help="of that dataset's files")
    arguments = parser.parse_args()
    if arguments.against_dir is not None and arguments.against is None:
        raise UserError("--against-dir is of --against, which was not given")
    return arguments


def percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 100, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
