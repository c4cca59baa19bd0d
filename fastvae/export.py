"""Export models for use elsewhere: weights as safetensors, and encoder and decoder as ONNX or as programs of
`torch.export`.

    write_safetensors(path, model)              fastvae.load(path) returns the model
    write_onnx(path, Encoder(model))            images [B, C, H, W] in [0, 1] -> mu, logvar, [B, K] each
    write_onnx(path, Decoder(model))            z [B, K] -> images [B, C, H, W], the likelihood's means
    write_program(path, Decoder(model))         torch.export.load(path).module()(z), without fastvae

For a model of your own use fastvae.load(path, model) and Encoder(model, some data). For a conditional model use
Encoder(model, some data, their conditions) and Decoder(model, conditions).

A learned prior is written to safetensors only: the exported decoder takes z, so the caller draws it.

Batches may have any size. Everything is float32. Before a file is written, the exported program is run and compared
with the model.
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
from fastvae.likelihoods import NotImported, SigmoidMSE
from fastvae.models import VAE
from fastvae.models.stored import ModelNeeded, Stored, restored, stored
from fastvae.models.vae import given

# What an exported model may differ by, relative to 1 + |value|: a fortieth of a grey level of 256. Float32 leaves 1e-6,
# and a layer that is read wrongly 1e-2 or more.
TOLERANCE = 1e-4

# In the place of a checksum while it is computed.
_UNSEALED = "0" * 64


class Encoder(nn.Module):
    """A float32 copy of the model's encoder on the CPU, which returns (mu, logvar), [B, K] each, for data [B, ...].

    Args:
        data: some samples [N, ...]. They give the shape, and the exported encoder is compared with this one on them.
            With None the samples are random numbers in [0, 1], if the model has a ``data_shape``, the shape of one
            sample.
        condition: the condition of each sample, for a conditional model.

    Raises ``ValueError`` if data are needed, or if the condition has another number of rows.
    """

    output_names = ("mu", "logvar")

    def __init__(self, model: VAE, data: Tensor | None = None, condition: Tensor | None = None) -> None:
        super().__init__()
        self.model = _copied(model)
        if data is None:
            shape = getattr(model, "data_shape", None)
            if shape is None:
                name = type(model).__name__
                raise ValueError(f"data must be given, some samples [N, ...], because {name} has no data_shape")
            data = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        if data.dtype is torch.uint8:
            data = data.float() / (255 if model.likelihood.target == "unit" else 1)
        self.examples = _examples(data, condition)
        self.input_names = ("images" if data.ndim == 4 else "data", "condition")[: len(self.examples)]
        self.model.decoder, self.model.prior = nn.Identity(), None  # not to be written

    def forward(self, data: Tensor, condition: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.model.posterior(data, **given(condition))


class Decoder(nn.Module):
    """A float32 copy of the model's decoder on the CPU, which returns the likelihood's means [B, ...] for z.

    condition: for a conditional model some conditions [N, ...], which give the shape.
    """

    def __init__(self, model: VAE, condition: Tensor | None = None) -> None:
        super().__init__()
        self.model = _copied(model)
        self.model.encoder, self.model.prior = nn.Identity(), None  # not to be written
        count = 3 if condition is None else len(condition)
        z = torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        self.examples = _examples(z, condition)
        self.input_names = ("z", "condition")[: len(self.examples)]
        with torch.no_grad(), use_backend("reference"):
            self.output_names = ("images" if self(*_rows(self, 1)).ndim == 4 else "data",)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.model.decode_mean(z, **given(condition))


def write_onnx(path: str | os.PathLike[str], half: Encoder | Decoder) -> float | None:
    """Write ONNX (operator set 20), with named inputs and outputs whose first dimension is "batch".

    Returns the largest difference between `half` and onnxruntime, |difference| / (1 + |value|), or None if onnxruntime
    is not installed.

    Raises:
        ImportError: onnxscript, which torch's exporter needs, is not installed.
        RuntimeError: onnxruntime's result differs from the model's; nothing is written.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError('writing ONNX needs onnxscript: pip install "fastvae[export]"')
    exported = torch.onnx.export(
        _traced(half),
        dynamo=True,
        opset_version=20,
        input_names=half.input_names,
        output_names=half.output_names,
        # All inputs have the batch of the first.
        dynamic_shapes=({0: "batch"}, None)[: len(half.input_names)],
        verbose=False,
    )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    difference = None
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        difference = _difference(
            path,
            half,
            lambda *inputs: session.run(
                half.output_names, {name: x.numpy() for name, x in zip(half.input_names, inputs, strict=True)}
            ),
        )
    with replacing(Path(path)) as file:
        file.write(content)
    return difference


def write_program(path: str | os.PathLike[str], half: Encoder | Decoder) -> float:
    """Write a program for ``torch.export.load(path).module()``, which has the inputs and outputs of `half`.

    Returns the largest difference between the two, as `write_onnx` does. Raises ``RuntimeError`` before anything is
    written if the difference is too large, and ``OSError``.
    """
    buffer = io.BytesIO()
    torch.export.save(_traced(half), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer).module()
    difference = _difference(path, half, lambda *inputs: _as_tuple(program(*inputs)))
    with replacing(Path(path)) as file:
        file.write(buffer.getvalue())
    return difference


def write_safetensors(path: str | os.PathLike[str], model: VAE) -> None:
    """Write the model's weights, bit for bit and under their names in its state_dict. The metadata hold the model's
    class, its settings (see `fastvae.training.write_checkpoint`), its likelihood, and a checksum: "sha256", of the file
    with 64 zeros in its place.

    Raises ``ImportError`` if safetensors is not installed, ``OSError``, ``ValueError`` for a ConvVAE that its settings
    cannot build, because a layer was replaced, and ``TypeError`` if the model is not a VAE or a file cannot hold its
    settings.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError('model.safetensors needs safetensors: pip install "fastvae[export]"') from error
    held = stored(model)
    metadata = {
        "format": "pt",  # what other readers of safetensors ask for
        "model": held.model,
        "settings": json.dumps(held.settings),
        "likelihood": held.likelihood,
        "sha256": _UNSEALED,
    }
    # Copies, because safetensors refuses parameters that are shared.
    content = save({name: value.clone() for name, value in held.tensors.items()}, metadata)
    # The header comes first, so this is the place.
    content = content.replace(_UNSEALED.encode(), checksum(content).encode(), 1)
    with replacing(Path(path)) as file:
        file.write(content)


def read_safetensors(path: str | os.PathLike[str], model: VAE | type[VAE] | None = None) -> VAE:
    """Read the model that `write_safetensors` wrote. It is on the CPU; ``model`` is as in `fastvae.load`.

    Raises ``ImportError`` if safetensors is not installed, and ``OSError`` if there is no such file. Raises
    ``ValueError`` if the file holds no such model, if its checksum is wrong (older files have none), if ``model`` is
    needed or does not fit, or if the module of its likelihood, which the error names, must be imported first.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f'{path} needs safetensors: pip install "fastvae[export]"') from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "settings" not in metadata:
                raise ValueError("it holds no settings of a model")
            if "sha256" in metadata and not _whole(Path(path), metadata["sha256"]):
                raise ValueError("it is damaged: its checksum is not that of its content")
            settings = json.loads(metadata["settings"])
            held = Stored(
                # What files of before do not hold.
                metadata.get("model", "fastvae.models.ConvVAE"),
                settings,
                metadata.get("likelihood", (settings or {}).get("likelihood", SigmoidMSE().key)),
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            )
            return restored(held, model)
    except OSError:
        raise
    except (NotImported, ModelNeeded) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(f"{path} is not a model of fastvae: {' '.join(str(error).split())}") from error


def _whole(path: Path, digest: str) -> bool:
    return checksum(path.read_bytes().replace(digest.encode(), _UNSEALED.encode(), 1)) == digest


def _copied(model: VAE) -> VAE:
    own = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    return own.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]


def _examples(data: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
    """What a half is traced and compared with: on the CPU, floats in float32."""
    if condition is not None and len(condition) != len(data):
        raise ValueError(f"condition must have a row for each of the {len(data)} samples, got {list(condition.shape)}")
    given = (data,) if condition is None else (data, condition)
    return tuple((it.float() if it.is_floating_point() else it).detach().cpu() for it in given)


def _rows(half: Encoder | Decoder, count: int) -> tuple[Tensor, ...]:
    """The first examples, from the start again where there are fewer."""
    return tuple(it[torch.arange(count) % len(it)] for it in half.examples)


def _traced(half: Encoder | Decoder) -> torch.export.ExportedProgram:
    # Two samples, because a size of 1 is taken for a constant. The reference, because fused operations exist nowhere
    # else.
    batch = torch.export.Dim("batch")
    with use_backend("reference"):
        program = torch.export.export(half, _rows(half, 2), dynamic_shapes=tuple({0: batch} for _ in half.examples))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine's files
    return program


def _difference(path: str | os.PathLike[str], half: Encoder | Decoder, run: Callable[..., Sequence[object]]) -> float:
    """Of `run` from `half`, over batches of 1 and 3; raises ``RuntimeError`` beyond TOLERANCE."""
    differences = []
    for batch in (1, 3):
        inputs = _rows(half, batch)
        for actual, expected in zip(run(*inputs), _as_tuple(half(*inputs)), strict=True):
            difference = (torch.as_tensor(actual) - expected).abs() / (1 + expected.abs())
            differences.append(float(difference.max()))
    if not all(difference <= TOLERANCE for difference in differences):  # so that a NaN is refused too
        raise RuntimeError(f"{path} was not written: it differs from the model by {max(differences):.2g}")
    return max(differences)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
