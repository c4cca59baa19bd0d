"""VAEs of one's own, of images with two heads, tables, signals, volumes and with a condition: trained for a few steps,
measured, kept in files, resumed and exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fastvae
import fastvae.functional as F
from fastvae import evaluation
from fastvae.export import Decoder, Encoder, write_onnx, write_program, write_safetensors
from fastvae.likelihoods import Categorical, Gaussian, Poisson, SigmoidMSE
from fastvae.models import VAE, ConvVAE
from fastvae.models.stored import stored
from fastvae.training import Training, read_checkpoint, train, write_checkpoint
from listening import listener

FILES = ("checkpoint.pt", "model.safetensors")


class TwoHeads(nn.Module):
    """An encoder as many are written: (mu, logvar), of data and, if there is one, a condition."""

    def __init__(self, inputs: int, latents: int) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(inputs, latents), nn.Linear(inputs, latents)

    def forward(self, x, condition=None):
        x = x.flatten(1) if condition is None else torch.cat([x.flatten(1), condition], 1)
        return self.mu(x), self.logvar(x)


class ConditionalDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2 + 3, 12)

    def forward(self, z, condition):
        return self.layer(torch.cat([z, condition], 1)).view(-1, 1, 4, 3)


def images() -> VAE:
    return VAE(TwoHeads(12, 2), nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 4, 3))), 2)


def conditional() -> VAE:
    return VAE(TwoHeads(12 + 3, 2), ConditionalDecoder(), 2)


def table() -> VAE:
    return VAE(nn.Sequential(nn.Linear(10, 6)), nn.Linear(3, 10), 3, Gaussian(std=1.0))


def signals() -> VAE:
    encoder = nn.Sequential(nn.Conv1d(2, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6))
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (4, 4)), nn.ConvTranspose1d(4, 2, 4, 4))
    return VAE(encoder, decoder, 3, Gaussian(std=1.0))


def volumes() -> VAE:
    encoder = nn.Sequential(nn.Conv3d(1, 2, 2, 2), nn.Flatten(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2, 1)), nn.ConvTranspose3d(2, 1, 2, 2))
    return VAE(encoder, decoder, 2)


MODELS = {
    "images": (images, (1, 4, 3)),
    "conditional": (conditional, (1, 4, 3)),
    "table": (table, (10,)),
    "signals": (signals, (2, 16)),
    "volumes": (volumes, (1, 4, 4, 2)),
}


def made(kind: str, count: int = 24, device="cpu") -> tuple[VAE, torch.Tensor, dict[str, torch.Tensor]]:
    """A model, data of a few patterns, and the condition, which says the pattern, in an argument's dict."""
    torch.manual_seed(0)
    make, shape = MODELS[kind]
    numbers = torch.arange(count) % 3
    data = (torch.rand(3, *shape)[numbers] + 0.1 * torch.rand(count, *shape)).clamp(0, 1).to(device)
    given = {"condition": torch.eye(3, device=device)[numbers]} if kind == "conditional" else {}
    return make().to(device), data, given


def step(model: VAE, data: torch.Tensor, optimizer: torch.optim.Optimizer, **given) -> float:
    output = model(data, **given)
    loss = F.elbo_loss(output.logits, data, output.kl, likelihood=model.likelihood).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", MODELS)
def test_a_few_steps_of_training(kind, device):
    model, data, given = made(kind, device=device)
    before = evaluation.evaluate(model, data, **given).loss
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(30):
        step(model, data, optimizer, **given)
    assert evaluation.evaluate(model, data, **given).loss < before - 0.1
    assert model.sample(3, **{name: value[:3] for name, value in given.items()}).shape == data[:3].shape


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_what_is_measured(kind, device):
    """Against the textbook's formulas in float64."""
    model, data, given = made(kind, device=device)
    mu, logvar = model.posterior(data, **given)
    kl = 0.5 * (mu.double() ** 2 + logvar.double().exp() - 1 - logvar.double()).sum(1)
    found = evaluation.posteriors(model, data, **given)
    assert torch.equal(found.mu, mu)
    assert found.kl.sum().item() == pytest.approx(kl.mean().item(), rel=1e-5)
    means = model.decode_mean(mu, **given).double()
    errors = (means - data).square().flatten(1).mean(1)
    torch.testing.assert_close(
        evaluation.reconstruction_errors(model, data, deterministic=True, **given).double(), errors, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        model.reconstruct(data, deterministic=True, **given).double(), means, rtol=1e-5, atol=1e-6
    )
    result = evaluation.evaluate(model, data, **given)
    assert result.mse == pytest.approx(errors.mean().item(), rel=1e-5)
    bound, tighter = (f(model, data, **given).mean() for f in (evaluation.elbo, evaluation.log_likelihood))
    constant = model.likelihood.omitted * data[0].numel()
    assert bound.item() == pytest.approx(-result.loss - constant, rel=1e-5)
    assert tighter > bound
    batches = [
        evaluation.Batch(rows, rows, *condition)
        for rows, *condition in zip(data.split(24), *(value.split(24) for value in given.values()), strict=True)
    ]
    assert evaluation.evaluate_batches(model, batches) == result
    scores = evaluation.anomaly_scores(model, data, **given)
    assert torch.equal(scores, evaluation.reconstruction_errors(model, data, deterministic=True, **given))


def test_conditions_reach_both_halves():
    model, data, given = made("conditional")
    other = {"condition": given["condition"].roll(1, 0)}
    with torch.no_grad():
        z = torch.randn(24, 2)
        assert not torch.equal(model.decode(z, **given), model.decode(z, **other))
        assert not torch.equal(model.encode(data, **given)[0], model.encode(data, **other)[0])
        found, changed = (evaluation.log_likelihood(model, data, samples=3, **it) for it in (given, other))
        # Each sample is decoded with the condition of its own data, whatever the others' are.
        alone = evaluation.log_likelihood(model, data[:1], samples=3, condition=given["condition"][:1])
    torch.testing.assert_close(found[:1], alone, rtol=1e-6, atol=0)
    assert not torch.equal(found, changed)


def test_a_target_that_is_not_the_input():
    """As of a denoising VAE."""
    model, data, _ = made("images")
    noisy = (data + 0.3 * torch.rand_like(data)).clamp(0, 1)
    with torch.no_grad():
        errors = (model.decode_mean(model.posterior(noisy)[0]) - data).square().flatten(1).mean(1)
    found = evaluation.reconstruction_errors(model, noisy, deterministic=True, target=data)
    torch.testing.assert_close(found, errors)
    assert evaluation.evaluate(model, noisy, target=data).mse == pytest.approx(errors.mean().item(), rel=1e-5)
    plain, denoised = evaluation.elbo(model, noisy), evaluation.elbo(model, noisy, target=data)
    assert (plain - denoised).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, x: evaluation.evaluate(m, x, condition=torch.eye(3)),
            "condition must have a row for each of the 24",
        ),
        (lambda m, x: evaluation.elbo(m, x, target=x[:5]), r"target must have a row .*, got \[5, 1, 4, 3\]"),
        (lambda m, x: m.sample(2, condition=torch.eye(3)), "condition must have a row for each of the 2 samples"),
        (lambda m, x: Encoder(m, x, torch.eye(3)), "condition must have a row for each of the 24 samples"),
        (lambda m, x: Encoder(m), "data must be given, some samples .*, because VAE has no data_shape"),
        (lambda m, x: ConvVAE().encode(torch.rand(1, 1, 28, 28), torch.eye(1)), "condition must be None for a ConvVAE"),
        (lambda m, x: evaluation.evaluate_batches(m, []), "batches must hold at least one batch"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    model, data, _ = made("conditional")
    with pytest.raises(ValueError, match=message):
        call(model, data)


@pytest.mark.parametrize(("returned", "got"), [((1, 2, 3), "3 in a tuple"), ([1, 2], "list"), (None, "NoneType")])
def test_an_encoder_returns_one_tensor_or_two(returned, got):
    class Wrong(nn.Module):
        def forward(self, x):
            return returned

    with pytest.raises(TypeError, match=rf"encoder must return a tensor .* or a tuple \(mu, logvar\), got {got}"):
        VAE(Wrong(), nn.Linear(2, 3), 2).encode(torch.rand(1, 3))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_two_heads_are_the_packed_encoder(backend, device):
    """The same weights in one layer: noise, values and gradients are equal."""
    model, data, _ = made("images", 6, device)
    packed = VAE(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), model.decoder, 2).to(device)
    with torch.no_grad():
        for name in ("weight", "bias"):
            both = [getattr(head, name) for head in (model.encoder.mu, model.encoder.logvar)]
            getattr(packed.encoder[1], name).copy_(torch.cat(both))
    with fastvae.use_backend(backend):
        outputs = []
        for each in (model, packed):
            torch.manual_seed(1)
            outputs.append(each(data))
            (outputs[-1].z.sum() + outputs[-1].kl.sum()).backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    both = torch.cat([model.encoder.mu.weight.grad, model.encoder.logvar.weight.grad])
    torch.testing.assert_close(both, packed.encoder[1].weight.grad, rtol=1e-5, atol=1e-6)


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        self.seen = x
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize(
    ("likelihood", "divided"), [(SigmoidMSE(), 255), (Gaussian(), 255), (Poisson(), 1), (Categorical(), 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_the_encoder_reads_bytes_as_the_likelihood_does(likelihood, divided, dtype):
    model = VAE(Seen(), nn.Linear(2, 3), 2, likelihood).to(dtype)
    counts = torch.tensor([[0, 7, 255]], dtype=torch.uint8)
    model.encode(counts)
    assert model.encoder.seen.dtype == dtype
    torch.testing.assert_close(model.encoder.seen, counts.to(dtype) / divided, rtol=0, atol=0)


def test_classes_are_handed_on():
    """For an nn.Embedding."""
    model = VAE(Seen(), nn.Linear(2, 3), 2, Categorical())
    model.encode(torch.tensor([[0, 7, 300]]))
    assert model.encoder.seen.dtype == torch.int64
    with pytest.raises(TypeError, match=r"x must be uint8 \(read as x\) or floating point, got torch.int64"):
        VAE(Seen(), nn.Linear(2, 3), 2, Poisson()).encode(torch.tensor([[0, 7, 300]]))


def test_evaluation_of_classes():
    """Squared errors of probabilities from one-hot vectors."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    decoder = nn.Sequential(nn.Linear(2, 36), nn.Unflatten(1, (3, 4, 3)))
    model = VAE(encoder, decoder, 2, Categorical())
    data = torch.randint(0, 3, (5, 4, 3), dtype=torch.uint8)
    with torch.no_grad():
        means = torch.softmax(model.decode(model.posterior(data)[0]), 1)
    one_hot = torch.eye(3)[data.long()].permute(0, 3, 1, 2)
    expected = (means - one_hot).square().flatten(1).mean(1)
    torch.testing.assert_close(evaluation.reconstruction_errors(model, data, deterministic=True), expected)
    assert evaluation.evaluate(model, data).mse == pytest.approx(expected.mean().item(), rel=1e-5)
    assert math.isfinite(evaluation.elbo(model, data).sum())


# Files


def write(path, model) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, model)
    else:
        write_checkpoint(path, model, 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["conditional", "volumes"])
def test_a_copy_of_the_given_model_gets_the_weights(kind, dtype, name, tmp_path):
    model, _, _ = made(kind)
    model.to(dtype)
    write(tmp_path / name, model)
    other = MODELS[kind][0]()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    loaded = fastvae.load(tmp_path / name, other)
    assert type(loaded) is VAE and not loaded.training and loaded is not other
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == dtype
        assert torch.equal(loaded.state_dict()[key], value)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@dataclass(frozen=True)
class Wider(Gaussian):
    pass


class OwnVAE(VAE):
    """Offers its settings."""

    def __init__(self, columns: int, hidden: tuple[int, ...] = (4,)) -> None:
        likelihood = Gaussian()
        width = hidden[0]
        outputs = len(likelihood.parameters) * columns
        encoder = nn.Sequential(nn.Linear(columns, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
        super().__init__(encoder, nn.Linear(1, outputs), 1, likelihood)
        self.settings = {"columns": columns, "hidden": list(hidden)}

    def decode(self, z):
        return self.decoder(z).chunk(2, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_class_with_settings_is_called_with_them(name, tmp_path):
    model = OwnVAE(5, (7,))
    model(torch.rand(6, 5))  # BatchNorm's statistics are kept too
    write(tmp_path / name, model)
    state = torch.get_rng_state()
    loaded = fastvae.load(tmp_path / name, OwnVAE)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.settings == model.settings
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    x = torch.rand(3, 5)
    assert torch.equal(evaluation.elbo(model, x), evaluation.elbo(loaded, x))
    with pytest.raises(ValueError, match=rf"{name}: it holds a model of the class test_own_models.OwnVAE, "):
        fastvae.load(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_what_does_not_fit_the_file_is_named(name, tmp_path):
    path = tmp_path / name
    write(path, made("table")[0])
    for given, message in (
        (made("signals")[0], r"is not a (checkpoint|model) of fastvae: .*encoder.0.weight"),
        (OwnVAE, r"it holds no settings of fastvae.models.vae.VAE: give a model in place of its class"),
        (None, r"it holds a model of the class fastvae.models.vae.VAE, which no file builds: give a model"),
        (
            VAE(*table().children(), 3, Gaussian(std=2.0)),
            r"it holds a model with the likelihood .*Gaussian\(std=1.0,.*, got one with Gaussian\(std=2.0",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fastvae.load(path, given)
        assert str(path) in str(error.value)
    write(path, VAE(*table().children(), 3, Wider(std=1.0)))  # of a module that is imported under another name now
    held = stored(VAE(*table().children(), 3, Wider(std=1.0)))
    assert held.likelihood.startswith("test_own_models:Wider(")
    assert fastvae.load(path, VAE(*table().children(), 3, Wider(std=1.0))).likelihood == Wider(std=1.0)


@pytest.mark.parametrize("name", FILES)
def test_shared_parameters_stay_shared(name, tmp_path):
    model, _, _ = made("table")
    model.extra = nn.ModuleList([model.decoder])
    write(tmp_path / name, model)
    other, _, _ = made("table")
    other.extra = nn.ModuleList([other.decoder])
    loaded = fastvae.load(tmp_path / name, other)
    assert loaded.extra[0].weight is loaded.decoder.weight
    assert torch.equal(loaded.decoder.weight, model.decoder.weight)


def test_a_compiled_model_is_written_as_the_model(tmp_path):
    model = ConvVAE((1, 4, 4), 2, (2,))
    write_checkpoint(tmp_path / "checkpoint.pt", torch.compile(model, backend="eager"), 1)
    assert all(
        torch.equal(value, fastvae.load(tmp_path / "checkpoint.pt").state_dict()[name])
        for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("settings", [{"likelihood": SigmoidMSE()}, [1], "x", {"a": {1, 2}}], ids=repr)
def test_settings_that_no_file_holds_are_refused(settings, tmp_path):
    model, _, _ = made("table")
    model.settings = settings
    for name in FILES:
        with pytest.raises(TypeError, match=r"model.settings must be a dict of numbers, texts"):
            write(tmp_path / name, model)
    assert not list(tmp_path.iterdir())


def test_training_resumes_from_a_file(tmp_path):
    """Bit for bit as if it had not been written, with the average."""
    from fastvae.training import MovingAverage

    data = torch.rand(16, 1, 4, 3)

    def run(model, epochs, average, state=None):
        states = []
        settings = Training(epochs=epochs, batch_size=4, threads=1)
        train(model, data, data, settings, average=average, listeners=[listener(state=states.append)], resume=state)
        return states[-1]

    torch.manual_seed(0)
    whole = images()
    path = tmp_path / "checkpoint.pt"
    first, average = images(), MovingAverage(images(), 0.9)
    first.load_state_dict(whole.state_dict())
    torch.manual_seed(1)
    run(whole, 3, whole_average := MovingAverage(whole, 0.9))
    torch.manual_seed(1)
    average = MovingAverage(first, 0.9)
    write_checkpoint(path, first, 2, run(first, 2, average))
    found = read_checkpoint(path, images())
    assert found.in_use is found.average is not None
    torch.manual_seed(5)
    again = MovingAverage(found.model, 0.9)
    run(found.model, 3, again, found.state)
    for one, other in ((whole, found.model), (whole_average.model, again.model)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# Exports


@torch.no_grad()
def test_programs_of_any_model(tmp_path):
    """With the names of the inputs, for any batch; what is compared is real data where it is given."""
    for kind in ("conditional", "signals", "table"):
        model, data, given = made(kind)
        with fastvae.use_backend("triton"):
            encoder, decoder = Encoder(model, data, **given), Decoder(model, **given)
            assert write_program(tmp_path / "encoder.pt2", encoder) < 1e-5
            assert write_program(tmp_path / "decoder.pt2", decoder) < 1e-5
        program = torch.export.load(tmp_path / "encoder.pt2").module()
        found = program(data[:7], *(value[:7] for value in given.values()))
        expected = model.posterior(data[:7], **{name: value[:7] for name, value in given.items()})
        torch.testing.assert_close(tuple(found), expected)
        assert encoder.input_names[0] == ("images" if kind == "conditional" else "data")


@torch.no_grad()
def test_onnx_of_a_conditional_model(tmp_path):
    model, _, given = made("conditional")
    with fastvae.use_backend("triton"):
        assert write_onnx(tmp_path / "decoder.onnx", Decoder(model, **given)) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    z = torch.randn(5, 2)
    (found,) = session.run(["images"], {"z": z.numpy(), "condition": given["condition"][:5].numpy()})
    expected = model.decode_mean(z, condition=given["condition"][:5])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


class Whole(nn.Module):
    """A module of one's own around the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x, eps):
        z, kl = F.gaussian_sample_kl_packed(self.encoder(x), eps=eps)
        return torch.sigmoid(self.decoder(z)), kl


@torch.no_grad()
def test_traces_of_the_operations_take_the_plain_path_by_themselves():
    """Where fused operations are asked for, as a GPU's user has without asking."""
    module = Whole()
    x, eps, other_x, other_eps = torch.rand(3, 6), torch.randn(3, 4), torch.rand(3, 6), torch.randn(3, 4)
    mu, logvar = module.encoder(other_x).chunk(2, 1)
    expected = torch.sigmoid(module.decoder(mu + (0.5 * logvar).exp() * other_eps))
    with fastvae.use_backend("triton"):
        traced = torch.jit.trace(module, (x, eps), check_trace=False)
        exported = torch.export.export(module, (x, eps)).module()
        content = torch.onnx.export(module, (x, eps), dynamo=True, verbose=False).model_proto.SerializeToString()
        for found in (traced(other_x, other_eps), exported(other_x, other_eps)):
            torch.testing.assert_close(found[0], expected)
    session = onnxruntime.InferenceSession(content)
    inputs = {it.name: value.numpy() for it, value in zip(session.get_inputs(), (other_x, other_eps), strict=True)}
    np.testing.assert_allclose(session.run(None, inputs)[0], expected.numpy(), rtol=1e-4, atol=1e-6)
