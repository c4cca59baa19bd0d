"""Models with other likelihoods than the default: training, evaluation, pictures and files follow the likelihood."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

import fastvae
import fastvae.functional as F
from fastvae import likelihoods, plots
from fastvae.evaluation import anomaly_scores, elbo, evaluate, log_likelihood, reconstruction_errors
from fastvae.evaluation.batches import seeded_generator
from fastvae.export import Decoder, write_program, write_safetensors
from fastvae.likelihoods import Bernoulli, Likelihood, NotImported, SigmoidMSE, from_key
from fastvae.models import VAE, ConvVAE
from fastvae.training import (
    EpochMetrics,
    MovingAverage,
    Training,
    read_checkpoint,
    train,
    training_step,
    write_checkpoint,
)
from listening import listener

SHAPE = (1, 4, 3)
PIXELS = 12


@dataclass(frozen=True)
class LearnedVariance(Likelihood):
    """A Gaussian of mean `location` and variance exp(logvar), which has no term: its formula runs everywhere."""

    parameters = ("location", "logvar")
    target = "unit"
    roundings = (8, 8, 8)
    omitted = math.log(2 * math.pi) / 2

    def formula(self, location, logvar, target):
        return 0.5 * ((target - location).square() * torch.exp(-logvar) + logvar)

    def mean(self, location, logvar):
        return location


@dataclass(frozen=True)
class Laplace(Likelihood):
    """|t - location| / scale + log(2 scale), of any numbers."""

    scale: float = 0.25
    parameters = ("location",)
    target = "number"
    roundings = (4, 4)

    def formula(self, location, target):
        return (target - location).abs() / self.scale + math.log(2 * self.scale)

    def mean(self, location):
        return location


class TwoHeads(nn.Module):
    """A decoder to a mean and a log-variance of each pixel; not `learned`, the latter is a constant."""

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.location, self.logvar = nn.Linear(2, PIXELS), nn.Linear(2, PIXELS)
        self.learned = learned

    def forward(self, z):
        location, logvar = self.location(z).view(-1, *SHAPE), self.logvar(z).view(-1, *SHAPE)
        return location, logvar if self.learned else torch.full_like(location, -2.0)


class Fixed(nn.Module):
    """z ~ N(0, 1) whatever the image is; or, as a decoder, one image whatever z is."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x):
        return self.values.expand(len(x), *self.values.shape)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 4))


def binary_vae() -> VAE:
    return VAE(encoder(), nn.Sequential(nn.Linear(2, PIXELS), nn.Unflatten(1, SHAPE)), 2, Bernoulli())


def gaussian_vae(learned: bool = True) -> VAE:
    return VAE(encoder(), TwoHeads(learned), 2, LearnedVariance())


def some_images(device, count: int = 16) -> torch.Tensor:
    """Bytes of three patterns and some noise, so that there is something to learn."""
    patterns = torch.randint(0, 2, (3, *SHAPE), device=device)[torch.arange(count, device=device) % 3]
    return (patterns * 200 + torch.randint(0, 56, patterns.shape, device=device)).to(torch.uint8)


def trained(model: VAE, images: torch.Tensor) -> list[EpochMetrics]:
    return train(model, images, images, Training(epochs=20, batch_size=8, learning_rate=0.03))


# Training


def test_bernoulli_trains(device):
    model = binary_vae().to(device)
    rows = trained(model, some_images(device))
    assert rows[-1].loss < rows[0].loss - 1
    assert rows[-1].test_loss < rows[0].test_loss - 1


def textbook(model: VAE, output, x: torch.Tensor) -> torch.Tensor:
    """The loss by torch alone."""
    if isinstance(model.likelihood, Bernoulli):
        nll = binary_cross_entropy_with_logits(output.logits, x, reduction="sum") / len(x)
    else:
        location, logvar = output.logits
        nll = -Normal(location, torch.exp(0.5 * logvar)).log_prob(x).sum() / len(x)
        nll = nll - PIXELS * math.log(2 * math.pi) / 2
    return nll + output.kl.mean()


def plainly(model):
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def parallel(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def compiled_and_parallel(model):
    return compiled(parallel(model))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [plainly, compiled, parallel, compiled_and_parallel])
@pytest.mark.parametrize("make", [binary_vae, gaussian_vae, lambda: gaussian_vae(False)])
def test_a_step_is_torch_s(make, wrap, device, request):
    """The value, and by a step of gradient descent every parameter's gradient; from bytes, on the chosen backend."""
    if wrap in (parallel, compiled_and_parallel):
        request.getfixturevalue("group")
    backend = "triton" if wrap is plainly else "reference"
    model = make().to(device)
    images = some_images(device)
    expected = copy.deepcopy(model)
    with fastvae.use_backend(backend):
        torch.manual_seed(3)
        loss = textbook(expected, expected(images), images / 255)
        loss.backward()
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        values = training_step(wrap(model), optimizer, images)
    torch.testing.assert_close(values.loss, loss.detach(), rtol=1e-5, atol=0)
    for (name, before), after in zip(expected.named_parameters(), model.parameters(), strict=True):
        gradient = torch.zeros_like(before) if before.grad is None else before.grad
        torch.testing.assert_close(
            before - after, gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bytes_are_the_numbers_that_the_target_holds(backend, device):
    """The kernel that makes a batch reads them as t / 255, which a likelihood of any numbers does not."""
    images = some_images(device)
    model = VAE(Fixed(torch.zeros(2)), Fixed(torch.full(SHAPE, 3.0)), 1, Laplace(2.0)).to(device)
    with fastvae.use_backend(backend):
        row = train(model, images, images, Training(epochs=1, batch_size=8, learning_rate=1e-30))[0]
    errors = (images.float() - 3).abs()
    expected = (errors / 2 + math.log(4)).sum().item() / len(images)
    assert row.reconstruction == pytest.approx(expected, rel=1e-6)
    assert row.test_loss == pytest.approx(expected, rel=1e-6)
    assert row.test_mse == pytest.approx(errors.square().mean().item(), rel=1e-6)


def test_only_targets_in_the_unit_interval_are_warned_about(device):
    images = 4 * torch.randn(8, *SHAPE, device=device)
    for model, expected in ((binary_vae(), "expected 0 to 1, the targets of Bernoulli()"), (laplace_vae(), None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model.to(device), images, images, Training(epochs=1, batch_size=8))
        assert [expected in str(it.message) for it in caught] == ([True, True] if expected else [])
    images[0] = math.nan
    with pytest.warns(UserWarning, match="test_data hold NaN, expected numbers"):
        train(laplace_vae().to(device), -images[1:], images, Training(epochs=1, batch_size=7))


def laplace_vae() -> VAE:
    return VAE(encoder(), nn.Sequential(nn.Linear(2, PIXELS), nn.Unflatten(1, SHAPE)), 2, Laplace())


# Evaluation


@torch.no_grad()
def test_evaluation_of_bernoulli(device):
    model, images = binary_vae().to(device), some_images(device)
    x = images / 255
    z, kl = F.gaussian_sample_kl_packed(model.encode(images), generator=seeded_generator(model))
    entropies = binary_cross_entropy_with_logits(model.decode(z), x, reduction="none").flatten(1).sum(1)
    bounds = elbo(model, images)
    torch.testing.assert_close(bounds.float(), -entropies - kl, rtol=1e-5, atol=0)
    found = evaluate(model, images, beta=0.5)
    assert found.loss == pytest.approx((entropies + 0.5 * kl).mean().item(), rel=1e-5)
    means = torch.sigmoid(model.decode(model.encode(images).chunk(2, 1)[0]))
    assert found.mse == pytest.approx((means - x).square().mean().item(), rel=1e-5)
    torch.testing.assert_close(anomaly_scores(model, images, score="elbo"), -bounds, rtol=0, atol=0)


@torch.no_grad()
def test_bounds_hold_what_the_formula_omits(device):
    """A decoder that does not look at z has log p(x) = log p(x|z), with the Gaussian's constant."""
    location, logvar = torch.rand(SHAPE), torch.randn(SHAPE)

    class Constant(nn.Module):
        def forward(self, z):
            return tuple(it.to(z).expand(len(z), *SHAPE) for it in (location, logvar))

    model = VAE(Fixed(torch.zeros(2)), Constant(), 1, LearnedVariance()).to(device)
    images = some_images(device)
    exact = Independent(Normal(location.double(), torch.exp(0.5 * logvar.double())), 3).log_prob(images.cpu() / 255)
    for found in (elbo(model, images), log_likelihood(model, images, samples=3)):
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-5, atol=0)
    errors = reconstruction_errors(model, images)
    torch.testing.assert_close(errors.cpu(), (images.cpu() / 255 - location).square().flatten(1).mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_errors_are_of_means_in_float32(dtype, device):
    """Not of means that were rounded to the model's dtype."""
    with fastvae.use_backend("reference"):
        model = binary_vae().to(device, dtype)
        images = some_images(device)
        mu = model.encode(images).chunk(2, 1)[0]
        means = torch.sigmoid(model.decode(mu).double())
        expected = (means - images / 255).square().flatten(1).mean(1)
        found = reconstruction_errors(model, images, deterministic=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


# Pictures


def test_two_parameters_from_training_to_pictures(device, tmp_path):
    """Through all that holds a model, and back from a file."""
    model, images = gaussian_vae().to(device), some_images(device)
    rows = trained(model, images)
    assert rows[-1].loss < rows[0].loss - 1
    assert rows[-1].test_mse == pytest.approx(reconstruction_errors(model, images, deterministic=True).mean().item())
    bound, tighter = elbo(model, images).mean(), log_likelihood(model, images, samples=50).mean()
    assert bound.item() == pytest.approx(-rows[-1].test_loss - PIXELS * math.log(2 * math.pi) / 2, rel=1e-5)
    assert tighter > bound - 0.1
    location, logvar = model(images).logits
    assert location.shape == logvar.shape == images.shape
    with torch.no_grad():
        mu = model.encode(images).chunk(2, 1)[0]
        assert torch.equal(model.reconstruct(images, deterministic=True), model.decoder(mu)[0])
    generator = torch.Generator(device).manual_seed(1)
    sample = model.sample(3, generator)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.likelihood == LearnedVariance()
    assert torch.equal(loaded.sample(3, generator.manual_seed(1)), sample)
    difference = write_program(tmp_path / "decoder.pt2", Decoder(model))
    assert difference < 1e-6
    program = torch.export.load(tmp_path / "decoder.pt2").module()
    z = torch.randn(5, 2)
    torch.testing.assert_close(program(z), copy.deepcopy(model).cpu().decoder(z)[0].detach())


def test_tensorboard_shows_the_mean(device, monkeypatch):
    from fastvae import tensorboard

    class Writer:
        def add_scalar(self, *_):
            pass

        add_histogram = flush = add_scalar

        def add_image(self, name, grid, *_, **__):
            shown[name] = grid

    shown = {}
    model, images = laplace_vae().to(device), some_images(device, 8)
    board = tensorboard.TensorBoard(Writer(), model, images)
    board.epoch(EpochMetrics(1, 1, 2.0, 1.0, 1.0, 2.0, 0.1, 1.0, 0, 1e-3))
    expected = plots.tile(torch.cat([images / 255, model.reconstruct(images, deterministic=True)]), 8)
    assert (shown["reconstructions"] == expected).all()


def test_losses_below_zero_are_shown(tmp_path, monkeypatch):
    """The negative logarithm of a density may be negative; other plots begin at 0."""
    from matplotlib.figure import Figure

    limits = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **b: (limits.append(a[0].axes[0].get_ylim()), save(*a, **b))[1])
    for loss in (-30.0, 30.0):
        row = EpochMetrics(1, 1, loss, loss - 1.0, 1.0, loss, 0.1, 1.0, 0, 1e-3)
        plots.plot_losses(tmp_path / "loss.png", [row, row._replace(epoch=2)])
    assert limits[0][0] < -30
    assert limits[1][0] == 0


# What is refused


def test_a_likelihood_must_be_one():
    for kind in (VAE, ConvVAE):
        arguments = (nn.Identity(), nn.Identity(), 3) if kind is VAE else ()
        with pytest.raises(TypeError, match=r"likelihood must be a fastvae.likelihoods.Likelihood, got None"):
            kind(*arguments, likelihood=None)


@pytest.mark.parametrize(
    ("make", "returned", "message"),
    [
        (gaussian_vae, lambda y: y, r"2 tensor\(s\) \(location, logvar\), got Tensor"),
        (gaussian_vae, lambda y: [y, y], r"2 tensor\(s\) \(location, logvar\), got list"),
        (gaussian_vae, lambda y: (y, y, y), r"2 tensor\(s\) \(location, logvar\), got 3 in a tuple"),
        (binary_vae, lambda y: (y, y), r"1 tensor\(s\) \(logits\), got 2 in a tuple"),
    ],
)
def test_a_decoder_must_return_the_parameters(make, returned, message):
    model = make()
    model.decoder = Returning(returned)
    for call in (lambda: model(torch.rand(3, *SHAPE)), lambda: model.sample(2)):
        with pytest.raises(ValueError, match=rf"decoder must return the parameters of \w+\(\), {message}"):
            call()


class Returning(nn.Module):
    def __init__(self, returned) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, z):
        return self.returned(torch.zeros(len(z), *SHAPE))


# Files

LIKELIHOODS = [SigmoidMSE(), Bernoulli(), Laplace(0.5)]


def conv_vae(likelihood: Likelihood) -> ConvVAE:
    return ConvVAE((1, 8, 6), latent_dim=3, channels=(2,), likelihood=likelihood)


def write(path, model) -> None:
    if path.suffix == ".safetensors":
        write_safetensors(path, model)
    else:
        write_checkpoint(path, model, 1)


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_files_keep_the_likelihood(likelihood, name, tmp_path):
    model = conv_vae(likelihood)
    assert model.settings["likelihood"] == likelihood.key
    write(tmp_path / name, model)
    loaded = fastvae.load(tmp_path / name)
    assert loaded.likelihood == likelihood and loaded.settings == model.settings
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(loaded.sample(2, generator), model.sample(2, generator.manual_seed(0)))


def test_the_average_has_it_too(device, tmp_path):
    model = conv_vae(Bernoulli()).to(device)
    average = MovingAverage(model, 0.9)
    images = torch.randint(0, 256, (8, 1, 8, 6), dtype=torch.uint8, device=device)
    path = tmp_path / "checkpoint.pt"
    train(
        model,
        images,
        images,
        Training(epochs=1, batch_size=8),
        listeners=[listener(state=lambda state: write_checkpoint(path, model, 1, state))],
        average=average,
    )
    found = read_checkpoint(path)
    assert found.model.likelihood == found.average.likelihood == Bernoulli()
    assert found.in_use is found.average


def test_a_file_without_one_means_the_squared_error(tmp_path):
    """As files were written before models had a likelihood."""
    from safetensors.torch import save_file

    model = conv_vae(SigmoidMSE())
    settings = {name: value for name, value in model.settings.items() if name != "likelihood"}
    saved = {"model": model.state_dict(), "settings": settings, "epoch": 1, "state": None, "run": None}
    torch.save(saved, tmp_path / "checkpoint.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"settings": json.dumps(settings)})
    for name in ("checkpoint.pt", "model.safetensors"):
        assert fastvae.load(tmp_path / name).likelihood == SigmoidMSE()


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_reading_a_file_imports_no_module(name, tmp_path, monkeypatch):
    """The error names the module; once the program has imported it, the file is read."""
    source = "import test_likelihood_models\nclass Own(test_likelihood_models.Laplace):\n    pass\n"
    (tmp_path / "own_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import own_module

    path = tmp_path / name
    write(path, conv_vae(own_module.Own(0.75)))
    monkeypatch.delitem(sys.modules, "own_module")
    with pytest.raises(ValueError, match=rf"{name}: the likelihood own_module:Own\(scale=0.75\) .*: import own_module"):
        fastvae.load(path)
    assert "own_module" not in sys.modules
    import own_module as again

    assert fastvae.load(path).likelihood == again.Own(0.75)
    del sys.modules["own_module"]


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_what_could_not_be_read_is_not_written(name, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Local(Laplace):
        pass

    for likelihood in (Local(), Laplace(math.nan)):  # nan is no literal, and equals nothing
        with pytest.raises(ValueError, match="names no likelihood: it must be module:Class"):
            write(tmp_path / name, conv_vae(likelihood))
    model = conv_vae(Laplace())
    monkeypatch.setattr(sys.modules[__name__], "Laplace", dataclass(frozen=True)(type("Laplace", (Laplace,), {})))
    with pytest.raises(ValueError, match=r"model must have the likelihood that its key gives, .* got Laplace"):
        write(tmp_path / name, model)
    assert not list(tmp_path.iterdir())


def test_a_file_with_another_text_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write(path, conv_vae(Bernoulli()))
    saved = torch.load(path, weights_only=True)
    for likelihood in ("os:system('true')", 3, "Bernoulli"):
        saved["settings"]["likelihood"] = likelihood
        torch.save(saved, path)
        with pytest.raises(ValueError, match=r"is not a checkpoint of fastvae: .*likelihood"):
            read_checkpoint(path)


# Keys


def test_a_class_that_is_defined_anew_is_the_one_of_its_key(monkeypatch):
    assert type(from_key(Laplace(0.5).key)) is Laplace
    anew = dataclass(frozen=True)(type("Laplace", (Laplace,), {}))
    monkeypatch.setattr(sys.modules[__name__], "Laplace", anew)
    assert type(from_key(anew(0.5).key)) is anew


def test_only_modules_of_the_package_are_imported(monkeypatch):
    with pytest.raises(NotImported, match="is defined in antigravity, which is not imported: import antigravity first"):
        from_key("antigravity:Bernoulli()")
    assert "antigravity" not in sys.modules
    with pytest.raises(NotImported, match=r"is defined in fastvae.likelihoods_of_others, which is not imported"):
        from_key("fastvae.likelihoods_of_others:Bernoulli()")
    name = "fastvae.likelihoods.bernoulli"
    monkeypatch.setattr(likelihoods, "bernoulli", sys.modules[name])  # put back afterwards, as is the next
    monkeypatch.delitem(sys.modules, name)
    assert str(from_key(f"{name}:Bernoulli()")) == "Bernoulli()"
