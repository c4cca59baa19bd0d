"""pythae's models, fused and not: equal losses and gradients of equal noise, and everything else that they do."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("pythae", reason="needs pythae==0.1.2: pip install pythae==0.1.2")

import pythae.models as hosts
from pythae.data.datasets import BaseDataset
from pythae.models import AutoModel
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

from fastvae.integrations import pythae_losses
from fastvae.integrations.fusion import report_of
from fastvae.integrations.pythae import fuse, unfuse
from memory_meters import peak_memory

pytestmark = pytest.mark.integrations

LATENT, PICTURE = 3, (1, 4, 4)

# Name, class, settings of its config, and what forward is called with.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vae": ("VAE", {}, {}),
    "vae-bce": ("VAE", {"reconstruction_loss": "bce"}, {}),
    "beta": ("BetaVAE", {"beta": 3.5}, {}),
    "beta-bce": ("BetaVAE", {"beta": 3.5, "reconstruction_loss": "bce"}, {}),
    "disentangled": ("DisentangledBetaVAE", {"beta": 4.0, "C": 3.0, "warmup_epoch": 7}, {"epoch": 3}),
    "disentangled-default": ("DisentangledBetaVAE", {"beta": 4.0, "C": 3.0, "warmup_epoch": 7}, {}),
    "tc": ("BetaTCVAE", {"use_mss": False, "alpha": 0.5, "beta": 6.0, "gamma": 1.5}, {"dataset_size": 40}),
    "tc-default-size": ("BetaTCVAE", {"use_mss": False, "beta": 6.0}, {}),
    "tc-bce": ("BetaTCVAE", {"use_mss": False, "beta": 6.0, "reconstruction_loss": "bce"}, {"dataset_size": 40}),
    "tc-mss": ("BetaTCVAE", {"use_mss": True, "beta": 6.0}, {"dataset_size": 40}),
    "vamp": ("VAMP", {"number_components": 5}, {}),
    "vamp-warmup": ("VAMP", {"number_components": 5, "linear_scheduling_steps": 8}, {"epoch": 2}),
    "vamp-bce": ("VAMP", {"number_components": 5, "reconstruction_loss": "bce"}, {"epoch": 3}),
    "mmd-imq": ("INFOVAE_MMD", {"alpha": 0.3, "lbd": 20.0, "kernel_bandwidth": 1.5}, {}),
    "mmd-one-scale": ("INFOVAE_MMD", {"alpha": 0.3, "lbd": 20.0, "scales": None}, {}),
    "mmd-rbf": ("INFOVAE_MMD", {"alpha": 0.3, "lbd": 20.0, "kernel_choice": "rbf", "kernel_bandwidth": 0.7}, {}),
    "mmd-bce": ("INFOVAE_MMD", {"lbd": 20.0, "reconstruction_loss": "bce"}, {}),
    "iwae": ("IWAE", {"number_samples": 4}, {}),
    "iwae-bce": ("IWAE", {"number_samples": 4, "reconstruction_loss": "bce"}, {}),
    "ciwae": ("CIWAE", {"number_samples": 4, "beta": 0.3}, {}),
    "miwae": ("MIWAE", {"number_samples": 4, "number_gradient_estimates": 3}, {}),
    "miwae-bce": (
        "MIWAE",
        {"number_samples": 4, "number_gradient_estimates": 3, "reconstruction_loss": "bce"},
        {},
    ),
}  # fmt: skip
# One of each class, on default settings but for what makes it fused.
EACH = {
    "vae": {},
    "beta": {},
    "disentangled": {},
    "tc": {},
    "vamp": {},
    "mmd-imq": {},
    "iwae": {},
    "ciwae": {},
    "miwae": {},
}


def make(case: str, encoder: Any = None, decoder: Any = None, **settings: Any) -> Any:
    name, of_case, _ = CASES[case]
    config = getattr(hosts, {"INFOVAE_MMD": "INFOVAE_MMD_Config"}.get(name, f"{name}Config"))
    torch.manual_seed(1)
    given = {"input_dim": PICTURE, "latent_dim": LATENT, **of_case, **settings}
    return getattr(hosts, name)(config(**given), encoder, decoder)


def doubled(model: Any) -> Any:
    model.double()
    if hasattr(model, "idle_input"):  # which is no buffer
        model.idle_input = model.idle_input.double()
    return model


@pytest.fixture(autouse=True)
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small is fused also on the CPU, where pythae's code is quicker."""
    monkeypatch.setattr(pythae_losses, "PAIRS", 0)


def pictures(count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, *PICTURE, generator=torch.Generator().manual_seed(2)).to(dtype)


# ------------------------------------------------------------------ equal losses and gradients, of equal noise


class DyadicEncoder(BaseEncoder):
    """Its outputs, of data that are multiples of 1/16, are exact in float32."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randint(-8, 9, (16, 2 * LATENT), generator=generator) / 16)

    def forward(self, x: Tensor) -> ModelOutput:
        mu, log_var = (x.reshape(len(x), -1) @ self.weight).chunk(2, 1)
        return ModelOutput(embedding=mu, log_covariance=log_var)


class RepeatingDecoder(BaseDecoder):
    """Without a rounding."""

    def __init__(self, sigmoid: bool = False) -> None:
        super().__init__()
        self.last = nn.Sigmoid() if sigmoid else nn.Identity()

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.last(z.repeat(1, 6)[:, :16].reshape(-1, *PICTURE)))


def rounded(tensor: Tensor, perturbation: float = 0.0, seed: int | torch.Generator = 0) -> Tensor:
    """Each element changed by so much of itself, up or down."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.dtype) * 2 - 1
    return tensor * (1 + perturbation * signs)


@contextmanager
def watched(model: Any, perturbation: float = 0.0, seed: int = 0) -> Iterator[dict[str, list[Tensor]]]:
    """The tensors between the networks and the loss, in the order of the calls, each changed by so much of itself."""
    seen: dict[str, list[Tensor]] = {"embedding": [], "log_covariance": [], "reconstruction": [], "z": []}
    generator = torch.Generator().manual_seed(seed)

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: ModelOutput) -> ModelOutput:
        found = ModelOutput()
        for name, tensor in output.items():
            if perturbation:
                tensor = rounded(tensor, perturbation, generator)
            if tensor.requires_grad:
                tensor.retain_grad()
            seen[name].append(tensor)
            found[name] = tensor
        return found

    hooks = [
        model.encoder.register_forward_hook(keep),
        model.decoder.register_forward_hook(keep),
        model.decoder.register_forward_pre_hook(lambda module, arguments: seen["z"].append(arguments[0].detach())),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def randn_like(replacement: Callable[..., Tensor]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", replacement)
        yield


def run(
    model: Any, x: Tensor, options: dict[str, Any], draw: Callable[..., Tensor] = torch.randn_like, **change: Any
) -> tuple[ModelOutput, dict[str, Tensor], list[Tensor]]:
    """The output; all values and gradients by name; and what the decoder was given and what was drawn last."""
    drawn: list[Tensor] = []

    def keep(*arguments: Any, **options: Any) -> Tensor:
        drawn.append(draw(*arguments, **options))
        return drawn[-1]

    with watched(model, **change) as seen, randn_like(keep):
        torch.manual_seed(4)
        output = model({"data": x}, **options)
        model.zero_grad()
        output.loss.backward()
    found = {name: value.detach() for name, value in output.items()}
    for name in ("embedding", "log_covariance", "reconstruction"):
        each = [tensor.grad for tensor in seen[name]]
        if report_of(model) is not None and name == "reconstruction" and each[0] is not None:  # its samples come first
            each = [each[0].unflatten(0, (-1, len(x))).transpose(0, 1).flatten(0, 1)]
        found |= {f"{name}{k} grad": gradient for k, gradient in enumerate(each) if gradient is not None}
    return output, found, [seen["z"][0], *drawn[-1:]]


def of_host(model: Any, x: Tensor, options: dict[str, Any], noise: list[Tensor], **change: Any) -> dict[str, Tensor]:
    """What pythae's code finds in float64 for the noise that gives z, and for the same sample of the prior."""
    with torch.no_grad():
        encoded = model.encoder(x)
    mu, std = encoded.embedding, torch.exp(0.5 * encoded.log_covariance)
    eps = ((noise[0].double().view(-1, *mu.shape) - mu) / std).transpose(0, 1)  # [B, samples, K]

    def given(mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        noise = eps.reshape(std.shape)
        return rounded(mu + noise * std, **change), noise

    model._sample_gauss = given
    try:
        return run(model, x, options, lambda like, **options: noise[-1].double(), **change)[1]
    finally:
        del model._sample_gauss


# More than there are on the longest way from an input to a result of these shapes: 60 for the discrepancy, 46 for the
# total correlation (`test_discrepancy.py`, `test_total_correlation.py`), and 32 in the list of operations.
ROUNDINGS = 64


def assert_equal_but_for_roundings(
    found: dict[str, Tensor], expected: dict[str, Tensor], moved: list[dict[str, Tensor]], of_case: float = 0.0
) -> None:
    """As far as pythae's results move when what comes out of the networks changes by so many roundings."""
    assert list(found) == list(expected)
    unit = torch.finfo(found["recon_loss"].dtype).eps / 2
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        allowed = max(float((each[name] - expected[name]).abs().max()) for each in moved)
        allowed += 2 * unit * float(expected[name].abs().max())
        if not name.endswith("grad"):
            allowed += of_case
        error = float((value.double() - expected[name]).abs().max())
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"


def constants_of(case: str, unit: float) -> float:
    """Of numbers that pythae rounds to float32: log of the number of components, and of B times the size of the data,
    which counts 1 time in log q(z) and K times in the product of the marginals. Of what is added and taken away: here
    log 2 pi, and the kernels of the discrepancy.
    """
    if case.startswith("vamp"):
        return 2**-24 * math.log(5) + 8 * unit * 0.92 * LATENT
    if case.startswith("tc") and case != "tc-mss":
        return 2**-24 * 8 * (1 + 6 * (LATENT + 1) + 1.5 * LATENT)
    if case.startswith("mmd"):  # four means of up to 7 kernels of at most 1, of which little remains, times the weight
        return ROUNDINGS * unit * 4 * 7 * 20
    return 0.0


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_pythae(case):
    model, x, options = doubled(make(case)), pictures(), CASES[case][2]
    reference = copy.deepcopy(model)
    fuse(model)
    _, found, noise = run(model, x, options)
    expected = of_host(reference, x, options, noise)
    moved = [of_host(reference, x, options, noise, perturbation=ROUNDINGS * 2.0**-53, seed=seed) for seed in range(3)]
    assert_equal_but_for_roundings(found, expected, moved, constants_of(case, 2.0**-53))


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("bce") and case != "tc-mss"])
def test_and_on_the_kernels(case, triton_backend):
    sixteenths = (pictures() * 16).round() / 16
    model, options = make(case, DyadicEncoder(), RepeatingDecoder()), CASES[case][2]
    if case.startswith("vamp"):
        with torch.no_grad():
            for parameter in model.pseudo_inputs.parameters():
                parameter.copy_((parameter * 64).round() / 16)
    reference = doubled(copy.deepcopy(model))
    fuse(model)
    before = triton_backend.count
    _, found, noise = run(model, sixteenths.float(), options)
    assert triton_backend.count > before + 2
    expected = of_host(reference, sixteenths, options, noise)
    moved = [
        of_host(reference, sixteenths, options, noise, perturbation=ROUNDINGS * 2.0**-24, seed=seed)
        for seed in range(3)
    ]
    assert_equal_but_for_roundings(found, expected, moved, constants_of(case, 2.0**-24))


@pytest.mark.parametrize("case", ["vae", "disentangled", "tc", "vamp-warmup", "mmd-imq"])
def test_loss_function_alone_is_that_of_pythae(case):
    """As a forward of one's own calls it."""
    model, options = doubled(make(case)), CASES[case][2]
    reference = copy.deepcopy(model)
    fuse(model)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, recon_x, tensors = pictures(), draw(6, *PICTURE), [draw(6, LATENT) for _ in range(4)]
    mu, log_var, z, prior_z = tensors
    given = (recon_x, x, z, prior_z, mu, log_var) if case == "mmd-imq" else (recon_x, x, mu, log_var, z)
    results = []
    for each in (model, reference):
        values = each.loss_function(*given, **options)
        gradients = torch.autograd.grad(values[0], [recon_x, z, mu, log_var], allow_unused=True)
        results.append((values, [torch.zeros(()) if it is None else it for it in gradients]))
    for found, expected in zip(*results, strict=True):
        for value, wanted in zip(found, expected, strict=True):
            # Sums of fewer than 2^8 terms that are not larger than the sum of squares, of 4 roundings each.
            bound = 2.0**-53 * 4 * 2**8 * max(1.0, float(wanted.detach().abs().max())) + constants_of(case, 2.0**-53)
            assert (value - wanted).abs().max() <= bound


def test_the_warmup_of_the_penalty_is_one_of_training():
    model, x = doubled(make("vamp-warmup")).eval(), pictures()
    losses = []
    for _ in range(2):
        torch.manual_seed(4)
        losses.append(model({"data": x}, epoch=2).loss)
        fuse(model)
    assert (losses[0] - losses[1]).abs() <= 2.0**-24 * math.log(5) + 2.0**-45


# ------------------------------------------------------------------------------------------- pythae's own training


def samples_last(like: Tensor, draw: Callable[..., Tensor] = torch.randn_like, **options: Any) -> Tensor:
    """Noise of several samples in the order in which pythae draws it, [B, samples, K]."""
    return draw(like.transpose(0, 1).contiguous()).transpose(0, 1) if like.ndim == 3 else draw(like, **options)


class Epochs(TrainingCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, training_config: Any, logs: dict[str, float], **others: Any) -> None:
        self.losses += logs.values()


def trained(model: Any, folder: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Any]:
    """The losses of two epochs of training and test data, and the weights after them; and pythae's trainer."""
    logging.disable(logging.INFO)
    data = [BaseDataset(pictures(count), torch.zeros(count)) for count in (24, 12)]
    for each in data:
        each.data = each.data.to(dtype)  # which BaseDataset makes float32
    config = BaseTrainerConfig(
        output_dir=str(folder), num_epochs=2, per_device_train_batch_size=8, per_device_eval_batch_size=6,
        learning_rate=1e-2, optimizer_cls="SGD", steps_saving=1, no_cuda=True,
    )  # fmt: skip
    epochs = Epochs()
    trainer = BaseTrainer(model, *data, config, [epochs])
    trainer.train()
    logging.disable(logging.NOTSET)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.tensor(epochs.losses, dtype=torch.float64), weights, trainer


@pytest.mark.parametrize("case", EACH)
def test_pythaes_trainer_finds_the_same_losses_and_weights(case, tmp_path):
    model = doubled(make(case))
    perturbed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter.copy_(rounded(parameter, ROUNDINGS * 2.0**-53))
    plain = trained(copy.deepcopy(model), tmp_path / "plain")
    moved = trained(perturbed, tmp_path / "moved")
    fuse(model)
    with randn_like(samples_last):
        *fused, trainer = trained(model, tmp_path / "fused")
    assert len(fused[0]) == 4
    for found, expected, other, more in zip(fused, plain, moved, (constants_of(case, 2.0**-53), 0.0), strict=False):
        assert (found - expected).abs().max() <= (other - expected).abs().max() + more
    # What it has saved is a model of pythae, with the weights of the best epoch.
    (saved,) = (tmp_path / "fused").glob("*/final_model")
    loaded = AutoModel.load_from_folder(str(saved))
    assert type(loaded) is type(model)
    assert report_of(loaded) is None
    best = trainer._best_model.state_dict()
    assert all(torch.equal(value, best[name].float()) for name, value in loaded.state_dict().items())
    assert len(list((tmp_path / "fused").glob("*/checkpoint_epoch_*/model.pt"))) == 2


def test_the_noise_of_the_kernels_trains_too(tmp_path, triton_backend):
    model = make("vae")
    fuse(model)
    losses, weights, _ = trained(model, tmp_path, torch.float32)
    assert losses.isfinite().all()
    assert weights.isfinite().all()


# ------------------------------------------------------------------------------------------ the right numbers


def test_the_cross_entropy_of_logits_has_a_gradient_where_that_of_probabilities_has_none(monkeypatch):
    monkeypatch.undo()  # of few numbers too
    model = make("vae-bce", DyadicEncoder(), RepeatingDecoder(sigmoid=True))
    with torch.no_grad():
        model.encoder.weight.zero_()
        model.encoder.weight[:, :LATENT] = 40.0 / 16  # mu = 40
    x = torch.ones(2, *PICTURE)
    target = torch.zeros_like(x)
    model.encoder.register_forward_pre_hook(lambda module, arguments: (x,))
    assert "binary cross-entropy" in fuse(model).kept
    torch.manual_seed(4)
    plain = model({"data": target})
    plain.recon_loss.backward()
    assert plain.recon_loss == 16 * 100
    assert not model.encoder.weight.grad.any()
    report = fuse(model, correct=True)
    assert report.corrected
    assert "binary cross-entropy" in report.defects
    assert "binary cross-entropy" not in report.kept
    torch.manual_seed(4)
    right = model({"data": target})
    z = right.z.detach().repeat(1, 6)[:, :16]
    torch.testing.assert_close(right.recon_loss.detach(), z.sum(1).mean(), rtol=16 * 2.0**-23, atol=0)
    assert torch.equal(right.recon_x, plain.recon_x)
    right.recon_loss.backward()
    assert model.encoder.weight.grad.any()


@pytest.mark.parametrize("case", ["vae-bce", "tc-bce", "vamp-bce", "mmd-bce", "iwae-bce", "miwae-bce"])
def test_where_no_probability_saturates_the_logits_have_pythaes_cross_entropy(case):
    model, x, options = doubled(make(case)), pictures(), CASES[case][2]
    fuse(model)
    if case.startswith("miwae"):  # whose loss differs
        options = {}
    torch.manual_seed(4)
    plain = model({"data": x}, **options)
    assert "binary cross-entropy" not in fuse(model, correct=True).kept
    torch.manual_seed(4)
    right = model({"data": x}, **options)
    # Of each of 16 pixels: log p and log(1 - p) are off by a rounding of p over 1 - p, and |logit| < 3 here.
    bound = 16 * 8 * math.exp(3) * 2.0**-53
    assert (right.recon_loss - plain.recon_loss).abs().max() <= bound * plain.recon_loss.abs().max()


@pytest.mark.parametrize("case", ["vae-bce", "iwae-bce"])
def test_the_cross_entropy_of_logits_on_the_kernels(case, triton_backend):
    sixteenths = (pictures() * 16).round() / 16
    model = make(case, DyadicEncoder(), RepeatingDecoder(sigmoid=True))
    reference = doubled(copy.deepcopy(model))
    fuse(model, correct=True)
    _, found, noise = run(model, sixteenths.float(), {})
    del found["recon_x"]  # which torch computes
    assert not any(name.startswith("reconstruction") for name in found)  # the gradient goes to the logits
    if case == "iwae-bce":
        del found["loss"]
    moved = [
        of_host(reference, sixteenths, {}, noise, perturbation=k * ROUNDINGS * 2.0**-24, seed=seed)
        for k, seed in ((0, 0), (1, 0), (1, 1), (1, 2))
    ]
    expected, *moved = ({name: each[name] for name in found} for each in moved)
    assert_equal_but_for_roundings(found, expected, moved)


class Permuted(RepeatingDecoder):
    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=super().forward(z).reconstruction.transpose(2, 3))


class Scaled(RepeatingDecoder):
    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=super().forward(z).reconstruction * 0.5)


def hooked() -> BaseDecoder:
    decoder = RepeatingDecoder(sigmoid=True)
    decoder.last.register_forward_hook(lambda module, arguments, output: output * 0.5)
    return decoder


@pytest.mark.parametrize("decoder", [lambda: Permuted(True), lambda: Scaled(True), hooked, RepeatingDecoder])
def test_without_logits_the_cross_entropy_stays_pythaes(decoder):
    model = doubled(make("vae-bce", DyadicEncoder(), decoder()))
    if not isinstance(model.decoder.last, nn.Sigmoid):
        model.decoder.last = nn.Hardsigmoid()
    x = pictures()
    torch.manual_seed(4)
    plain = model({"data": x})
    report = fuse(model, correct=True)
    assert "nn.Sigmoid" in report.kept["binary cross-entropy"]
    torch.manual_seed(4)
    assert torch.equal(model({"data": x}).recon_loss, plain.recon_loss)


def test_looking_for_the_logits_leaves_the_decoder_as_it_was():
    model = make("vae-bce")
    model.decoder.layers.insert(1, nn.Sequential(nn.BatchNorm1d(512), nn.Dropout()))
    model.decoder.depth = 3
    model.decoder.layers[1][1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not fuse(model, correct=True).kept.get("binary cross-entropy")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [each.training for each in model.decoder.layers[1]] == [True, False]
    assert not any(module._forward_hooks for module in model.modules())


def densities(model: Any, x: Tensor, output: ModelOutput, z: Tensor) -> Tensor:
    """log w of z [samples, B, K], by torch.distributions, without the constant of the reconstruction."""
    encoded = model.encoder(x)
    posterior = torch.distributions.Normal(encoded.embedding, torch.exp(encoded.log_covariance / 2))
    recon = model.decoder(z.flatten(0, 1)).reconstruction.view(*z.shape[:2], -1)
    prior = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), torch.ones((), dtype=z.dtype))
    likelihood = -0.5 * (recon - x.flatten(1)).square().sum(-1)
    return likelihood + prior.log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)


@pytest.mark.parametrize("case", ["iwae", "ciwae", "miwae"])
def test_the_right_loss_of_several_samples_is_the_bound(case):
    model, x = doubled(make(case)), pictures()
    report = fuse(model, correct=True)
    assert report.corrected
    assert "loss" in report.defects
    output, _, (z, *_) = run(model, x, {})
    z = z.view(-1, len(x), LATENT)
    log_w = densities(model, x, output, z)
    if case == "miwae":
        log_w = log_w.view(3, 4, len(x))
    bound = (torch.logsumexp(log_w, -2) - math.log(4)).mean()
    expected = -bound if case != "ciwae" else -0.3 * log_w.mean() - 0.7 * bound
    torch.testing.assert_close(output.loss, expected, rtol=2.0**-53 * 2**8, atol=0)
    fuse(model)
    assert (run(model, x, {})[0].loss - expected).abs() > 0.01


@pytest.mark.parametrize("pairs", [0, 1 << 20])
def test_the_right_weights_of_use_mss_are_on_the_diagonal(pairs, monkeypatch):
    monkeypatch.setattr(pythae_losses, "PAIRS", pairs)
    model, x, size = doubled(make("tc-mss")), pictures(), 40
    assert "correct=True" in fuse(model).kept["loss_function"]
    report = fuse(model, correct=True)
    assert {"forward", "loss_function"} <= set(report.fused)
    assert "use_mss" in report.defects
    output, _, (z, *_) = run(model, x, {"dataset_size": size})
    encoded = model.encoder(x)
    others = len(x) - 1
    weights = torch.full((len(x), len(x)), 1 / others, dtype=torch.float64)
    for row in range(len(x)):
        weights[row, row], weights[row, (row + 1) % len(x)] = 1 / size, (size - others) / (size * others)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(x), dtype=torch.float64))
    posterior = torch.distributions.Normal(encoded.embedding, torch.exp(encoded.log_covariance / 2))
    each = posterior.log_prob(z[:, None])
    joint = torch.logsumexp(weights.log() + each.sum(2), 1)
    marginals = torch.logsumexp(weights.log()[:, :, None] + each, 1).sum(1)
    prior = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0).log_prob(z).sum(1)
    own = posterior.log_prob(z).sum(1)
    expected = ((own - joint) + 6 * (joint - marginals) + (marginals - prior)).mean()
    torch.testing.assert_close(output.reg_loss, expected, rtol=2.0**-53 * 2**8, atol=0)
    assert model.embed(x[:1]).shape == (1, LATENT)  # pythae divides by zero


# ------------------------------------------------------------------------------------------- what else a model does


@pytest.mark.parametrize("case", EACH)
def test_what_else_a_model_does_is_unchanged(case):
    model, x = make(case).eval(), pictures(4, torch.float32)
    other = copy.deepcopy(model)
    fuse(other)

    def all_of(model: Any) -> list[Any]:
        torch.manual_seed(6)
        with torch.no_grad():
            return [
                model.predict(x).recon_x, model.predict(x).embedding, model.reconstruct(x), model.embed(x),
                model.interpolate(x[:2], x[2:], granularity=3),
                torch.as_tensor(model.get_nll(x[:2], n_samples=8, batch_size=4)),
            ]  # fmt: skip

    with randn_like(samples_last):
        found = all_of(other)
    for value, expected in zip(found, all_of(model), strict=True):
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        # One path of the decoder, of a z whose few roundings it does not magnify.
        torch.testing.assert_close(value, expected, rtol=2.0**-18, atol=2.0**-18)


@pytest.mark.parametrize("case", EACH)
def test_a_copy_has_its_own_weights_and_unfuse_undoes_it(case):
    model, x, options = make(case), pictures(4, torch.float32), CASES[case][2]
    before = dict(vars(model))
    state = model.state_dict()
    fuse(model)
    assert list(model.state_dict()) == list(state)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in duplicate.parameters():
                parameter.zero_()
        assert not duplicate({"data": x}, **options).recon_x.sub(0.5).any()
        assert report_of(duplicate) == report_of(model)
    assert model({"data": x}, **options).recon_x.sub(0.5).any()
    unfuse(model)
    assert vars(model) == before
    unfuse(model)


def test_own_networks_are_saved_without_a_trace_of_fastvae(tmp_path):
    model = make("vae-bce", DyadicEncoder(), RepeatingDecoder(sigmoid=True))
    fuse(model, correct=True)
    model({"data": pictures(4, torch.float32)})
    model.save(str(tmp_path))
    assert all(b"fastvae" not in path.read_bytes() for path in tmp_path.iterdir())
    loaded = AutoModel.load_from_folder(str(tmp_path))
    assert torch.equal(loaded.encoder.weight, model.encoder.weight)


def test_of_a_subclass_what_it_overrides_stays():
    class OwnLoss(hosts.BetaVAE):
        def loss_function(self, recon_x, x, mu, log_var, z):
            return tuple(recon_x.mean() + z.mean() * k for k in range(3))

    class OwnForward(hosts.DisentangledBetaVAE):
        def forward(self, inputs, **kwargs):
            x = inputs["data"]
            output = self.encoder(x)
            mu, log_var = output.embedding, output.log_covariance
            recon_x = self.decoder(mu).reconstruction
            return ModelOutput(loss=self.loss_function(recon_x, x, mu, log_var, mu, epoch=2)[0])

    class OwnNoise(hosts.VAE):
        def _sample_gauss(self, mu, std):
            return mu, torch.zeros_like(std)

    class OwnWeights(hosts.BetaTCVAE):
        def _log_importance_weight_matrix(self, batch_size, dataset_size):
            return torch.zeros(batch_size, batch_size)

    class OwnBound(hosts.IWAE):
        def loss_function(self, recon_x, x, mu, log_var, z):
            return super().loss_function(recon_x, x, mu, log_var, z)

    x = pictures(4, torch.float32)
    for kind, case, fused, kept in (
        (OwnLoss, "beta", {"forward"}, {"loss_function"}),
        (OwnForward, "disentangled", {"loss_function"}, {"forward"}),
        (OwnNoise, "vae", {"loss_function"}, {"_sample_gauss", "forward"}),
        (OwnWeights, "tc-mss", {"forward"}, {"_log_importance_weight_matrix"}),
        (OwnBound, "iwae", set(), {"loss_function", "forward"}),
    ):
        model = kind(make(case).model_config)
        torch.manual_seed(7)
        expected = model({"data": x})
        report = fuse(model, correct=True)
        assert set(report.fused) == fused, kind
        assert kept <= set(report.kept), kind
        torch.manual_seed(7)
        torch.testing.assert_close(model({"data": x}).loss, expected.loss, rtol=2.0**-20, atol=0)


def test_a_method_that_was_replaced_on_the_object_stays():
    model = make("vae")
    model._sample_gauss = lambda mu, std: (mu, std)
    report = fuse(model)
    assert set(report.fused) == {"loss_function"}
    assert {"forward", "_sample_gauss"} <= set(report.kept)
    assert torch.equal(model.embed(pictures(2, torch.float32)), model.predict(pictures(2, torch.float32)).embedding)


def test_the_report_says_what_is_what():
    text = str(fuse(make("tc-mss", reconstruction_loss="bce")))
    assert text.startswith("pythae.BetaTCVAE: 1 fused, 2 kept")
    assert "kept: loss_function: no fused operation has pythae's weights of use_mss; correct=True fuses it" in text
    assert "as the library has it: use_mss:" in text
    assert "corrected: use_mss:" in str(fuse(make("tc-mss"), correct=True))
    assert not fuse(make("vae")).defects


@pytest.mark.parametrize("model", [nn.Linear(2, 2), hosts.AE(hosts.AEConfig(input_dim=PICTURE, latent_dim=2))])
def test_another_class_is_refused(model):
    with pytest.raises(TypeError, match=f"VAE, BetaVAE, .*, MIWAE or of a subclass, got .*{type(model).__name__}"):
        fuse(model)


def test_another_class_of_pythae_is_refused_although_it_is_a_vae():
    model = hosts.FactorVAE(hosts.FactorVAEConfig(input_dim=PICTURE, latent_dim=2))
    assert isinstance(model, hosts.VAE)
    with pytest.raises(TypeError, match=r"got pythae\.FactorVAE"):
        fuse(model)


def test_latents_of_another_shape_are_refused():
    model = make("vae")
    fuse(model)
    model.encoder.register_forward_hook(
        lambda module, arguments, output: ModelOutput({name: value[:, :, None] for name, value in output.items()})
    )
    with pytest.raises(ValueError, match=r"embedding must have shape \[B, latent_dim\], got \[2, 3, 1\]"):
        model({"data": pictures(2, torch.float32)})


@pytest.mark.parametrize("case", ["vae", "disentangled", "tc", "tc-mss", "vamp", "mmd-rbf"])
def test_of_few_pairs_a_cpu_runs_pythaes_code(case, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(pythae_losses, "moments", None)  # which fused code begins with
    model, x, options = make(case), pictures(6, torch.float32), CASES[case][2]
    outputs = []
    for _ in range(2):
        torch.manual_seed(4)
        outputs.append(model({"data": x}, **options))
        fuse(model)
    assert all(torch.equal(value, outputs[1][name]) for name, value in outputs[0].items())


def test_a_batch_of_one_has_no_discrepancy():
    model = make("mmd-imq")
    x = pictures(1, torch.float32)
    expected = model({"data": x})
    fuse(model)
    found = model({"data": x})
    for name in expected:
        assert found[name].isnan().any() == expected[name].isnan().any(), name


def test_bytes_are_numbers_as_pythae_reads_them(triton_backend):
    model = make("vae")
    x = torch.randint(0, 4, (4, *PICTURE), dtype=torch.uint8)
    recon_x, latents = torch.rand(4, *PICTURE), torch.zeros(4, LATENT)
    expected = model.loss_function(recon_x, x, latents, latents, latents)[1]
    fuse(model)
    found = model.loss_function(recon_x, x, latents, latents, latents)[1]
    torch.testing.assert_close(found, expected, rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("case", EACH)
def test_under_autocast_and_without_gradients(case):
    model, x, options = make(case), pictures(4, torch.float32), CASES[case][2]
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model({"data": x}, **options)
    output.loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        assert not model({"data": x}, **options).loss.requires_grad


def test_through_distributed_data_parallel():
    model, x = make("beta"), pictures(4, torch.float32)
    expected = copy.deepcopy(model)
    fuse(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for each in (wrapped, expected):
            torch.manual_seed(8)
            each({"data": x}).loss.backward()
    finally:
        dist.destroy_process_group()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=2.0**-16, atol=2.0**-20)


# ------------------------------------------------------------------------------------------------------ what it saves


def loss_of(case: str, fused: bool, batch: int, latent: int, **settings: Any) -> Callable[[], None]:
    """Forward and backward of a loss of large latents, whose networks take little."""
    model = make(case, latent_dim=latent, **settings)
    if fused:
        fuse(model)
    x = pictures(batch, torch.float32)
    return lambda: model({"data": x}, dataset_size=10 * batch).loss.backward()


@pytest.mark.parametrize(("case", "settings"), [("tc", {}), ("vamp", {"number_components": 256}), ("mmd-imq", {})])
def test_nothing_of_the_size_of_all_pairs_is_kept(case, settings):
    batch, latent = 512, 32  # up to 2^22 terms the total correlation has all at once on a CPU
    peaks = {fused: peak_memory(loss_of(case, fused, batch, latent, **settings)) for fused in (True, False)}
    one_of_pairs = batch * batch * latent * 4
    assert peaks[False] > 3 * one_of_pairs
    assert peaks[True] < 2.5 * one_of_pairs < peaks[False]


def test_moments_and_pictures_are_not_repeated_for_samples():
    peaks = {
        fused: peak_memory(loss_of("iwae", fused, 128, 4, number_samples=32, input_dim=(1, 4, 4))) for fused in (1, 0)
    }
    assert peaks[1] < peaks[0]
