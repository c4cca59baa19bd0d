"""Export a trained model to files for use elsewhere.

    python examples/export.py RUN               RUN: a run's folder, or a checkpoint.pt or model.safetensors
    python examples/export.py RUN --out DIR     write into DIR instead of the folder of RUN

Files of an earlier export are removed first. Each file is written atomically, after its results were compared with the
model's:
    model.safetensors    the weights; fastvae.load("model.safetensors") returns the model
    encoder.onnx         images [B, C, H, W] in [0, 1] -> mu and logvar, [B, K] each
    decoder.onnx         z [B, K] -> images [B, C, H, W] in [0, 1]
    decoder.pt2          the same for torch.export.load("decoder.pt2").module(), which needs no fastvae

If the package for a file is not installed, the file is left out. The program names it at the end, with the command that
installs the package. decoder.pt2 only needs torch. Errors that the user can fix end with one line and exit code 2. The
exit code is 1 if an exported model computes another result.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
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
    encoder, decoder = Encoder(model), Decoder(model)
    data, latents = (f"[B, {', '.join(map(str, half.examples[0].shape[1:]))}]" for half in (encoder, decoder))
    images = f"{encoder.input_names[0]} {data}"

    missing: dict[str, list[str]] = {}  # what needs a package that is not installed: the files, by the error's words

    @contextlib.contextmanager
    def writing(name: str) -> Iterator[Path]:
        try:
            yield folder / name
        except ImportError as error:
            missing.setdefault(str(error), []).append(name)

    with writing("model.safetensors") as path:
        write_safetensors(path, model)
        say(path, f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    with writing("encoder.onnx") as path:
        difference = write_onnx(path, encoder)
        say(path, f"{images} -> mu, logvar {latents}", compared("onnxruntime", difference))
    with writing("decoder.onnx") as path:
        difference = write_onnx(path, decoder)
        say(path, f"z {latents} -> {images}", compared("onnxruntime", difference))
    with writing("decoder.pt2") as path:
        difference = write_program(path, decoder)
        say(path, f"z {latents} -> {images}", compared("torch.export", difference))
    if missing:
        raise UserError("; ".join(f"{', '.join(names)} not written: {words}" for words, names in missing.items()))


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
