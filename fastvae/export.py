"""Models for use elsewhere: their weights as safetensors, their halves as ONNX and as programs of `torch.export`.

    write_safetensors(path, model)              fastvae.load(path) gives the model back
    write_onnx(path, Encoder(model))            images [B, C, H, W] in [0, 1] -> mu, logvar, [B, K] each
    write_onnx(path, Decoder(model))            z [B, K] -> images [B, C, H, W], the likelihood's means
    write_program(path, Decoder(model))         torch.export.load(path).module()(z), without fastvae

Batches may have any size. Everything is float32. What is written is first run, and compared with the model.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastvae.backend import use_backend
from fastvae.files import checksum, replacing
from fastvae.likelihoods import NotImported
from fastvae.models import VAE, ConvVAE
from fastvae.models.stored import restored, stored

# What an exported model may differ by, relative to 1 + |value|: a fortieth of a grey level of 256. Float32 leaves 1e-6,
# and a layer that is read wrongly 1e-2 or more.
TOLERANCE = 1e-4

# In the place of a checksum while it is computed.
_UNSEALED = "0" * 64


class Encoder(nn.Module):
    """(mu, logvar), [B, K] each, of images [B, C, H, W] in [0, 1]: a float32 copy of the model's encoder on the CPU."""

    input_name = "images"
    output_names = ("mu", "logvar")

    def __init__(self, model: ConvVAE) -> None:
        super().__init__()
        self.model = _copied(model)
        self.model.decoder = nn.Identity()  # not to be written
        self.image_shape = model.image_shape

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode(images).chunk(2, 1)

    def example(self, batch: int) -> Tensor:
        return torch.rand(batch, *self.image_shape, generator=torch.Generator().manual_seed(batch))


class Decoder(nn.Module):
    """Images [B, C, H, W] of z, the likelihood's means: a float32 copy of the model's decoder on the CPU."""

    input_name = "z"
    output_names = ("images",)

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = _copied(model)
        self.model.encoder = nn.Identity()  # not to be written

    def forward(self, z: Tensor) -> Tensor:
        return self.model.decode_mean(z)

    def example(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.model.latent_shape, generator=torch.Generator().manual_seed(batch))


def write_onnx(path: Path, half: Encoder | Decoder) -> float | None:
    """Write ONNX (operator set 20), with named inputs and outputs whose first dimension is "batch".

    Returns what `half` and onnxruntime differ by at most, |difference| / (1 + |value|), and None where onnxruntime is
    not installed.

    Raises:
        ImportError: onnxscript, which torch's exporter needs, is not installed.
        RuntimeError: onnxruntime computes something else than the model; nothing is written.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError('writing ONNX needs onnxscript: pip install "fastvae[export]"')
    exported = torch.onnx.export(
        _traced(half),
        dynamo=True,
        opset_version=20,
        input_names=[half.input_name],
        output_names=half.output_names,
        dynamic_shapes={half.input_name: {0: "batch"}},
        verbose=False,
    )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    difference = None
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        difference = _difference(path, half, lambda x: session.run(half.output_names, {half.input_name: x.numpy()}))
    with replacing(path) as file:
        file.write(content)
    return difference


def write_program(path: Path, half: Encoder | Decoder) -> float:
    """Write a program for ``torch.export.load(path).module()``, which takes and gives what `half` does.

    Returns what the two differ by at most, as `write_onnx`. Raises ``RuntimeError`` where that is too much, before
    anything is written, and ``OSError``.
    """
    buffer = io.BytesIO()
    torch.export.save(_traced(half), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer).module()
    difference = _difference(path, half, lambda x: _as_tuple(program(x)))
    with replacing(path) as file:
        file.write(buffer.getvalue())
    return difference


def write_safetensors(path: Path, model: ConvVAE) -> None:
    """The model's weights, bit for bit and under their names in its state_dict, with its settings as metadata, and a
    checksum: "sha256", of the file with 64 zeros in its place.

    Raises ``ImportError`` where safetensors is not installed, ``OSError``, and ``ValueError`` or ``TypeError`` for a
    model that its settings do not build, because a layer was replaced.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError('model.safetensors needs safetensors: pip install "fastvae[export]"') from error
    settings, tensors = stored(model)
    # "format" is what other readers of safetensors ask for.
    metadata = {"format": "pt", "model": "fastvae.models.ConvVAE", "settings": json.dumps(settings)}
    content = save(tensors, {**metadata, "sha256": _UNSEALED})
    # The header comes first, so this is the place.
    content = content.replace(_UNSEALED.encode(), checksum(content).encode(), 1)
    with replacing(path) as file:
        file.write(content)


def read_safetensors(path: str | os.PathLike[str]) -> ConvVAE:
    """The model that `write_safetensors` wrote, on the CPU.

    Raises ``ImportError`` where safetensors is not installed, ``OSError`` where there is no such file, and
    ``ValueError`` where it does not hold such a model, or is damaged: its checksum is another one (files that were
    written before there was one have none); or where the module of its likelihood, which the error names, is to be
    imported first.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f'{path} needs safetensors: pip install "fastvae[export]"') from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "settings" not in metadata:
                raise ValueError("it holds no settings of a ConvVAE")
            if "sha256" in metadata and not _whole(Path(path), metadata["sha256"]):
                raise ValueError("it is damaged: its checksum is not that of its content")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return restored(json.loads(metadata["settings"]), tensors)
    except OSError:
        raise
    except NotImported as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"{path} is not a model of fastvae: {' '.join(str(error).split())}") from error


def _whole(path: Path, digest: str) -> bool:
    return checksum(path.read_bytes().replace(digest.encode(), _UNSEALED.encode(), 1)) == digest


def _copied(model: VAE) -> VAE:
    own = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    return own.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def _traced(half: Encoder | Decoder) -> torch.export.ExportedProgram:
    # Two samples, because a size of 1 is taken for a constant. The reference, because fused operations exist nowhere
    # else.
    with use_backend("reference"):
        program = torch.export.export(
            half, (half.example(2),), dynamic_shapes={half.input_name: {0: torch.export.Dim("batch")}}
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine's files
    return program


def _difference(path: Path, half: Encoder | Decoder, run: Callable[[Tensor], Sequence[object]]) -> float:
    """Of `run` from `half`, over batches of 1 and 3; raises ``RuntimeError`` beyond TOLERANCE."""
    differences = []
    for batch in (1, 3):
        x = half.example(batch)
        for actual, expected in zip(run(x), _as_tuple(half(x)), strict=True):
            difference = (torch.as_tensor(actual) - expected).abs() / (1 + expected.abs())
            differences.append(float(difference.max()))
    if not all(difference <= TOLERANCE for difference in differences):  # so that a NaN is refused too
        raise RuntimeError(f"{path} was not written: it differs from the model by {max(differences):.2g}")
    return max(differences)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
