"""Models for use elsewhere: what examples/export.py writes, run by onnxruntime and torch.export against the model."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastvae
import fastvae.functional as F
from fastvae import export
from fastvae.export import Decoder, Encoder, write_onnx, write_program, write_safetensors
from fastvae.models import VAE, ConvVAE
from fastvae.training import write_checkpoint

SCRIPT = Path(__file__).parents[1] / "examples" / "export.py"
BATCHES = (1, 3, 7)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("export_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> ConvVAE:
    """An odd and an even size, whose layers are padded in two ways; no bias is 0."""
    torch.manual_seed(0)
    model = ConvVAE((3, 9, 8), latent_dim=5, channels=(4, 6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(example, model, tmp_path_factory) -> Path:
    """A run, and what the example made of it."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "checkpoint.pt", model, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", str(folder)])
        assert example.main() == 0
    return folder


@pytest.fixture
def run(example, monkeypatch):
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        return example.main()

    return call


def latents(batch: int) -> torch.Tensor:
    return 3 * torch.randn(batch, 5)


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 9, 8)


# --- what the example writes ------------------------------------------------------------------------------------------


def test_files(folder) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt",
        "model.safetensors",
        "encoder.onnx",
        "decoder.onnx",
        "decoder.pt2",
    }


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_onnxruntime_computes_what_the_model_does(folder, model, batch) -> None:
    """Within assert_close's bound for float32; onnxruntime adds in another order."""
    z, x = latents(batch), images(batch)
    decoder, encoder = (onnxruntime.InferenceSession(folder / f"{half}.onnx") for half in ("decoder", "encoder"))
    (actual,) = decoder.run(["images"], {"z": z.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), torch.sigmoid(model.decode(z)))
    moments = encoder.run(["mu", "logvar"], {"images": x.numpy()})
    torch.testing.assert_close([torch.from_numpy(m) for m in moments], list(model.encode(x).chunk(2, 1)))


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_the_program_computes_what_the_model_does(folder, model, batch) -> None:
    z = latents(batch)
    program = torch.export.load(folder / "decoder.pt2").module()
    torch.testing.assert_close(program(z), torch.sigmoid(model.decode(z)), rtol=0, atol=0)


def test_the_program_needs_no_fastvae(folder, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastvae"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    program = torch.export.load(folder / "decoder.pt2").module()
    assert program(torch.zeros(4, 5)).shape == (4, 3, 9, 8)


def test_onnx_names_its_inputs_and_outputs(folder) -> None:
    def described(values) -> dict[str, list[str | int]]:
        return {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in values
        }

    encoder, decoder = (onnx.load(folder / f"{half}.onnx") for half in ("encoder", "decoder"))
    assert described(encoder.graph.input) == {"images": ["batch", 3, 9, 8]}
    assert described(encoder.graph.output) == {"mu": ["batch", 5], "logvar": ["batch", 5]}
    assert described(decoder.graph.input) == {"z": ["batch", 5]}
    assert described(decoder.graph.output) == {"images": ["batch", 3, 9, 8]}
    for half in (encoder, decoder):
        onnx.checker.check_model(half, full_check=True)
        assert [(opset.domain, opset.version) for opset in half.opset_import] == [("", 20)]


def test_a_half_holds_its_own_weights_and_no_paths(folder, model) -> None:
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    program = torch.export.load(folder / "decoder.pt2")
    assert sum(tensor.numel() for tensor in program.state_dict.values()) == decoder
    here = str(Path(fastvae.__file__).parent).encode()
    for name, size in (("encoder.onnx", encoder), ("decoder.onnx", decoder)):
        written = onnx.load(folder / name)
        parameters = [t for t in written.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert sum(onnx.numpy_helper.to_array(t).size for t in parameters) == size
        assert here not in (folder / name).read_bytes()
    with zipfile.ZipFile(folder / "decoder.pt2") as archive:
        assert not any(here in archive.read(name) for name in archive.namelist())


def test_the_example_says_what_it_wrote(folder, run, model, tmp_path, monkeypatch, example, capsys) -> None:
    """From a .safetensors, into another folder, where onnxruntime is not installed."""
    monkeypatch.setattr(example, "write_onnx", lambda path, half: None)
    assert run(folder / "model.safetensors", "--out", tmp_path / "new" / "folder") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / "new" / "folder" / name)
        for name in ("model.safetensors", "encoder.onnx", "decoder.onnx", "decoder.pt2")
    ]
    assert lines[1].endswith(
        "images [B, 3, 9, 8] -> mu, logvar [B, 5]; not compared with the model, because onnxruntime is not installed"
    )
    assert lines[3].endswith("z [B, 5] -> images [B, 3, 9, 8]; torch.export differs from the model by at most 0")


def test_user_errors_are_one_line(folder, run, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    for arguments, message in (
        ((), "the following arguments are required: RUN"),
        ((tmp_path / "none",), "No such file or directory"),
        ((tmp_path,), "No such file or directory"),
        ((tmp_path / "file",), "is not a checkpoint of fastvae"),
        ((tmp_path / "model.safetensors",), "is not a model of fastvae"),
        ((folder, "--out", tmp_path / "file"), f"--out must be a folder, got the file {tmp_path / 'file'}"),
    ):
        assert run(*arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("export.py: error: ")
        assert output.err.count("\n") == 1
        assert message in output.err


def test_what_is_installed_is_enough_for_something(folder, run, tmp_path, monkeypatch, capsys) -> None:
    """After README's first command there is neither safetensors nor onnxscript: the command for them is named."""
    checkpoint = tmp_path / "checkpoint.pt"
    write_checkpoint(checkpoint, fastvae.load(folder / "model.safetensors"), 1)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert run(checkpoint) == 2
    output = capsys.readouterr()
    assert output.err == (
        "export.py: error: model.safetensors not written: model.safetensors needs safetensors: pip install "
        '"fastvae[export]"; encoder.onnx, decoder.onnx not written: writing ONNX needs onnxscript: pip install '
        '"fastvae[export]"\n'
    )
    assert output.out.startswith(str(tmp_path / "decoder.pt2"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "decoder.pt2"}


def test_another_result_is_exit_code_1(folder, run, tmp_path, monkeypatch, capsys, example) -> None:
    def refuse(path, half):
        raise RuntimeError(f"{path} was not written: it differs")

    monkeypatch.setattr(example, "write_onnx", refuse)
    assert run(folder, "--out", tmp_path) == 1
    assert capsys.readouterr().err == f"export.py: {tmp_path / 'encoder.onnx'} was not written: it differs\n"


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture
def exported_before(folder, monkeypatch) -> None:
    """torch's exporter, which takes seconds, gives the decoder that was written already."""
    written = SimpleNamespace(model_proto=onnx.load(folder / "decoder.onnx"))
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: written)


def almost(model: ConvVAE, name: str, change: float) -> ConvVAE:
    """The model with one of its numbers changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).flatten()[0] += change
    return other


def test_no_file_of_an_earlier_export_stays_beside_new_ones(run, example, model, tmp_path, monkeypatch, capsys) -> None:
    """Nor is the file removed that is read."""
    write_safetensors(tmp_path / "model.safetensors", model)
    for name in ("encoder.onnx", "decoder.onnx", "decoder.pt2"):
        (tmp_path / name).write_text("of an earlier model")

    def refuse(*arguments):
        raise ImportError("no onnxscript")

    monkeypatch.setattr(example, "write_onnx", refuse)
    assert run(tmp_path / "model.safetensors") == 2
    assert capsys.readouterr().err == "export.py: error: encoder.onnx, decoder.onnx not written: no onnxscript\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "decoder.pt2"}
    assert b"of an earlier model" not in (tmp_path / "decoder.pt2").read_bytes()


@pytest.mark.parametrize("change", [0.01, math.nan])
def test_no_onnx_is_written_that_computes_something_else(change, model, tmp_path, exported_before) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_text("before")
    with pytest.raises(RuntimeError, match=r"decoder.onnx was not written: it differs from the model by"):
        write_onnx(path, Decoder(almost(model, "decoder.logits.bias", change)))
    assert [file.name for file in tmp_path.iterdir()] == ["decoder.onnx"]
    assert path.read_text() == "before"
    assert write_onnx(path, Decoder(model)) < 1e-6
    assert path.read_text("latin-1") != "before"


def test_without_onnxruntime_nothing_is_compared(model, tmp_path, monkeypatch, exported_before) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert write_onnx(tmp_path / "decoder.onnx", Decoder(almost(model, "decoder.logits.bias", 0.01))) is None
    assert (tmp_path / "decoder.onnx").exists()


def test_no_program_is_written_that_computes_something_else(tmp_path) -> None:
    class Another(Decoder):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return super().forward(z) + (1e-3 if torch.compiler.is_exporting() else 0)

    half = Another(VAE(torch.nn.Identity(), torch.nn.Linear(2, 3), 2))
    with pytest.raises(RuntimeError, match=r"decoder.pt2 was not written: it differs from the model by 0.000"):
        write_program(tmp_path / "decoder.pt2", half)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch, model) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnxscript: pip install "fastvae\[export\]"'):
        write_onnx(tmp_path / "decoder.onnx", Decoder(model))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r'safetensors: pip install "fastvae\[export\]"'):
        write_safetensors(tmp_path / "model.safetensors", model)
    with pytest.raises(ImportError, match=r'safetensors: pip install "fastvae\[export\]"'):
        fastvae.load(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_reference_is_what_is_traced(tmp_path) -> None:
    """Fused operations would be unknown wherever the program is loaded."""

    class Diverging(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return F.gaussian_kl(z, z, reduction="none")

    with fastvae.use_backend("triton"):
        half = Decoder(VAE(torch.nn.Identity(), Diverging(), 2))
        program = export._traced(half)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not [name for name in called if "fastvae" in name]


def test_halves_are_float32_copies() -> None:
    """Of a model in any dtype and memory format, in training or not, which stays as it was."""
    model = ConvVAE((1, 6, 6), 2, (3,)).to(torch.bfloat16, memory_format=torch.channels_last).train()
    for half in (Encoder(model), Decoder(model)):
        assert {(p.dtype, p.requires_grad, p.is_contiguous()) for p in half.parameters()} == {
            (torch.float32, False, True)
        }
        assert not half.model.training
    assert model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, True)}
    assert len(model.encoder) == 4
    assert len(model.decoder) == 5


# --- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_safetensors_give_the_model_back(dtype, tmp_path) -> None:
    """Bit for bit, in evaluation mode, trainable, and without a draw from the generator."""
    path = tmp_path / "model.safetensors"
    model = ConvVAE((2, 7, 6), 3, (4, 5)).to(dtype, memory_format=torch.channels_last)
    write_safetensors(path, model)
    before = torch.get_rng_state()
    loaded = fastvae.load(str(path))
    assert torch.equal(torch.get_rng_state(), before)
    path.write_bytes(bytes(path.stat().st_size))  # the model does not hang on its file
    assert not loaded.training
    assert loaded.settings == model.settings
    likelihood = "fastvae.likelihoods.sigmoid_mse:SigmoidMSE()"
    expected = {"image_shape": (2, 7, 6), "latent_dim": 3, "channels": (4, 5), "likelihood": likelihood}
    assert model.settings == expected
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == dtype
        assert state[name].device.type == "cpu"
        assert torch.equal(state[name].view(torch.uint8), value.contiguous().view(torch.uint8))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_safetensors_are_a_state_dict_for_others(folder, model) -> None:
    assert {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def damaged(model: ConvVAE, path: Path, how: str) -> None:
    tensors = dict(model.state_dict())
    settings = dict(model.settings)
    if how == "a tensor missing":
        del tensors["encoder.moments.bias"]
    if how == "a tensor too many":
        tensors["encoder.conv3.bias"] = torch.zeros(2)
    if how == "another shape":
        tensors["decoder.logits.bias"] = torch.zeros(4)
    if how == "integers":
        tensors["decoder.logits.bias"] = torch.zeros(3, dtype=torch.int32)
    if how == "other settings":
        settings["latent_dim"] = 0
    if how == "unknown settings":
        settings["layers"] = 3
    text = "[3," if how == "no JSON" else json.dumps(settings)
    save_file(tensors, path, None if how == "no metadata" else {"settings": text})
    content = path.read_bytes()
    if how == "cut in the weights":
        path.write_bytes(content[:-100])
    if how == "cut in the header":
        path.write_bytes(content[:40])
    if how == "empty":
        path.write_bytes(b"")
    if how == "something else":
        path.write_bytes(b"PK\3\4" * 50)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a tensor missing", "encoder.moments.bias"),
        ("a tensor too many", "encoder.conv3.bias"),
        ("another shape", "decoder.logits.bias"),
        ("integers", ""),
        ("other settings", "latent_dim must be a positive integer, got 0"),
        ("unknown settings", "layers"),
        ("no JSON", ""),
        ("no metadata", "it holds no settings of a model"),
        ("cut in the weights", ""),
        ("cut in the header", ""),
        ("empty", ""),
        ("something else", ""),
    ],
)
def test_damaged_safetensors(how, reason, model, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    damaged(model, path, how)
    with pytest.raises(ValueError, match=rf"model.safetensors is not a model of fastvae: .*{reason}") as error:
        fastvae.load(path)
    assert "\n" not in str(error.value)


def test_a_changed_bit_of_safetensors_is_seen(tmp_path) -> None:
    """What is read of a changed file is what was written: without the name of the checksum it is an older file."""
    path = tmp_path / "model.safetensors"
    model = ConvVAE((1, 4, 4), 2, (2,))
    write_safetensors(path, model)
    content = path.read_bytes()
    refused = 0
    for place in torch.randint(0, 8 * len(content), (300,)).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = fastvae.load(path).state_dict()
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())
    assert refused > 250


def test_an_undamaged_file_is_read(model, tmp_path) -> None:
    damaged(model, tmp_path / "model.safetensors", "not at all")
    assert fastvae.load(tmp_path / "model.safetensors").settings == model.settings


def test_a_missing_file_is_an_os_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        fastvae.load(tmp_path / "model.safetensors")
