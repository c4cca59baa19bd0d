"""Write what a run learned into files for use elsewhere.

    python examples/export.py RUN               RUN: a run's folder, or a checkpoint.pt or model.safetensors
    python examples/export.py RUN --out DIR     write into DIR instead of the folder of RUN

Files, each written atomically, and only after what it computes was compared with the model; those of an earlier export
are removed first:
    model.safetensors    the weights; fastvae.load("model.safetensors") gives the model back
    encoder.onnx         images [B, C, H, W] in [0, 1] -> mu and logvar, [B, K] each
    decoder.onnx         z [B, K] -> images [B, C, H, W] in [0, 1]
    decoder.pt2          the same for torch.export.load("decoder.pt2").module(), which needs no fastvae

What the user can put right ends in one line and exit code 2, an exported model that computes something else in exit
code 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import fastvae
from fastvae.export import Decoder, Encoder, write_onnx, write_program, write_safetensors
from fastvae.program import Parser, UserError, prepare_folder, run_program

FILES = ("model.safetensors", "encoder.onnx", "decoder.onnx", "decoder.pt2")


def main() -> int:
    """Run the program; returns its exit code."""
    # Torch's exporter speaks of operations of torchvision and of its own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        return run_program("export.py", lambda: run(parse_arguments()))
    except RuntimeError as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> None:
    try:
        model = fastvae.load(arguments.run)
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = arguments.out or (arguments.run if arguments.run.is_dir() else arguments.run.parent)
    # Not what was read: an export of model.safetensors beside it writes it again.
    prepare_folder(folder, [name for name in FILES if folder / name != arguments.run])
    images, latents = f"images [B, {', '.join(map(str, model.image_shape))}]", f"[B, {model.latent_dim}]"
    encoder, decoder = Encoder(model), Decoder(model)

    write_safetensors(folder / "model.safetensors", model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(folder / "model.safetensors", f"{parameters:,} parameters")
    difference = write_onnx(folder / "encoder.onnx", encoder)
    say(folder / "encoder.onnx", f"{images} -> mu, logvar {latents}", compared("onnxruntime", difference))
    difference = write_onnx(folder / "decoder.onnx", decoder)
    say(folder / "decoder.onnx", f"z {latents} -> {images}", compared("onnxruntime", difference))
    difference = write_program(folder / "decoder.pt2", decoder)
    say(folder / "decoder.pt2", f"z {latents} -> {images}", compared("torch.export", difference))


def say(path: Path, *facts: str) -> None:
    print(f"{path}: {'; '.join(facts)}", flush=True)


def compared(runtime: str, difference: float | None) -> str:
    if difference is None:
        return f"not compared with the model, because {runtime} is not installed"
    return f"{runtime} differs from the model by at most {difference:.1g}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder of RUN")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
