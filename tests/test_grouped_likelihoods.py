"""What is particular to likelihoods whose element has an axis of its own; the contract tries them like all others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from contract import check as check_call
from contract import launching_nothing
from fastvae.evaluation import evaluate
from fastvae.likelihoods import Categorical, DiscretizedLogisticMixture, Multinomial, check
from fastvae.models import ConvVAE
from fastvae.operations import of_likelihood

MIXTURE = DiscretizedLogisticMixture(mixtures=3)


def operations_of(likelihood):
    """The loss, and the bound with its gradients."""
    every = of_likelihood(likelihood)
    return every[0], every[2]


def try_all(likelihood, parameters: Tensor, target: Tensor) -> None:
    loss, at_once = operations_of(likelihood)
    check_call(loss, (parameters, target), reduction="none")
    check_call(at_once, (parameters, target, torch.linspace(0.5, 2, len(parameters), device=parameters.device)))


def pixels(likelihood, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return likelihood.draw(shape, torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- mixtures


def vdvae(mixture: Tensor, target: Tensor, mixtures: int) -> Tensor:
    """-log p of each pixel, as vdvae has it (after PixelCNN++), without its fallback for small masses: [B, H, W, 10 M]
    and [B, H, W, 3], in float64.
    """
    x = (2 * target - 1)[..., None]
    logits, rest = mixture[..., :mixtures], mixture[..., mixtures:].unflatten(-1, (3, 3 * mixtures))
    means, log_scales, coefficients = rest.split(mixtures, -1)
    log_scales, coefficients = log_scales.clamp(min=-7), torch.tanh(coefficients)
    red, green, blue = means.unbind(-2)
    green = green + coefficients[..., 0, :] * x[..., 0, :]
    blue = blue + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    centred = x - torch.stack([red, green, blue], -2)
    inverse = torch.exp(-log_scales)
    above, below = torch.sigmoid(inverse * (centred + 1 / 255)), torch.sigmoid(inverse * (centred - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -torch.logsumexp(torch.log(mass).sum(-2) + torch.log_softmax(logits, -1), -1)


def test_the_formula_is_vdvaes() -> None:
    """Where that is accurate: means near the target, scales of some bins."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 256, (2, 5, 4, 3), generator=generator).double() / 255
    target[0, 0, 0], target[0, 0, 1] = 0.0, 1.0
    mixture = 0.3 * torch.randn(2, 5, 4, 30, generator=generator, dtype=torch.float64)
    _, *slots = mixture.split(3, -1)
    for k, x in enumerate((2 * target - 1).split(1, -1)):
        slots[3 * k] *= 0.01
        slots[3 * k] += x
        slots[3 * k + 1] -= 3
    slots[1][:] = -9.0  # below the least
    slots[0][:] = 2 * target[..., :1] - 1
    slots[3] -= torch.tanh(slots[2]) * (2 * target[..., :1] - 1)
    slots[6] -= torch.tanh(slots[5]) * (2 * target[..., :1] - 1) + torch.tanh(slots[8]) * (2 * target[..., 1:2] - 1)
    mixture.requires_grad_()
    expected = vdvae(mixture, target, 3)
    value = F.negative_log_likelihood(mixture, target, MIXTURE, reduction="sum")
    torch.testing.assert_close(value, expected.sum(), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(value, mixture)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), mixture)[0], rtol=1e-7, atol=1e-9)
    assert (gradient[..., 6:9] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 13, 65])
def test_mixture_layouts(size, triton_backend, device) -> None:
    """Of channels first, channels last in memory, and channels last in the shape; of 3 colours and of one."""
    mixture, target = (x.to(device) for x in pixels(MIXTURE, 2, size, 3))
    channels_last = mixture.contiguous(memory_format=torch.channels_last)
    try_all(MIXTURE, channels_last, target)
    if size == 65:  # where a sample takes several programs, whatever its layout
        return
    try_all(MIXTURE, channels_last, (255 * target).round().byte().contiguous(memory_format=torch.channels_last))
    last = DiscretizedLogisticMixture(mixtures=3, dim=-1)
    for likelihood in (MIXTURE, last):
        try_all(likelihood, mixture.movedim(1, -1).contiguous(), target.movedim(1, -1))
    gray, of_gray = mixture[:, :9].contiguous(), target[:, :1]
    try_all(MIXTURE, gray, of_gray)
    try_all(MIXTURE, gray.movedim(1, -1).contiguous().bfloat16(), of_gray.movedim(1, -1))
    try_all(MIXTURE, gray[..., 0, 0], of_gray[..., 0, 0])


def test_masses_sum_to_one(triton_backend, device) -> None:
    mixture = pixels(MIXTURE, 1, 5)[0][:, :9].to(device).expand(256, 9, 5)
    every = torch.arange(256, dtype=torch.uint8, device=device)[:, None, None].expand(256, 1, 5)
    mixture = mixture.clone()
    mixture[:, 6:] = torch.linspace(-8, 2, 15, device=device).view(3, 5)
    values = [F.negative_log_likelihood(mixture[..., i], every[..., i], MIXTURE, reduction="none") for i in range(5)]
    torch.testing.assert_close(torch.exp(-torch.stack(values)).sum(1), torch.ones(5, device=device), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # numpy's
def test_extreme_mixtures(triton_backend, device) -> None:
    """One number of a pixel is extreme; each pixel is a sample."""
    extremes = (0.0, 30.0, -30.0, 1e4, -1e4, math.nan)
    for colours, slots in ((3, 10), (1, 3)):
        cases = list(itertools.product(extremes, range(slots), (0, 2)))
        mixture, target = (x.to(device) for x in pixels(MIXTURE, len(cases)))
        mixture, target = mixture[:, : 3 * slots].clone(), target[:, :colours].clone()
        target[::5] = 0.0
        target[1::5] = 1.0
        for i, (extreme, slot, component) in enumerate(cases):
            # torch's slope of tanh is 0 in float64 beyond 19, and the kernel's is not. A logit of 30 leaves the others
            # weights of e^-30, and its slope is the difference of two masses, times these.
            limit = 8.0 if slot in (0, 3, 6, 9) and abs(extreme) == 30.0 else math.inf
            mixture[i, 3 * slot + component] = extreme if math.isnan(extreme) else max(-limit, min(limit, extreme))
        check_call(operations_of(MIXTURE)[0], (mixture, target), reduction="none")


def test_a_value_next_to_0_is_right(triton_backend, device) -> None:
    """Black pixels of which every component is sure: log-sum-exps would differ by what rounds to 0."""
    mixture = torch.zeros(4, 9, device=device)
    mixture[:, 3:6] = torch.tensor([[-1.02], [-1.03], [-1.05], [-1.1]])
    mixture[:, 6:] = -5.5
    target = torch.zeros(4, 1, device=device)
    value = F.negative_log_likelihood(mixture, target, MIXTURE, reduction="none")
    assert 0 < value.min() < 1e-10
    assert value.max() < 0.1
    check_call(operations_of(MIXTURE)[0], (mixture, target), reduction="none")


@pytest.mark.parametrize("colours", [1, 3])
def test_samples_of_a_mixture(colours) -> None:
    """Are bins, and have the mean that the value says."""
    likelihood = DiscretizedLogisticMixture(mixtures=2, bins=16, min_log_scale=-3.0)
    slots = 3 if colours == 1 else 10
    mixture = torch.tensor([0.3, -0.4, -0.5, 0.4, -2.0, -1.5, 0.5, -0.7, 0.1, -0.3, -2.2, -1.2, 0.8, -0.2])
    mixture = torch.cat([mixture, torch.tensor([0.2, 0.1, -1.8, -1.0, -0.6, 0.9])])[: 2 * slots]
    many = mixture[None, :, None, None].expand(50, -1, 40, 25)
    drawn = likelihood.sample(many, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, colours, 40, 25)
    assert (15 * drawn - (15 * drawn).round()).abs().max() < 1e-5
    grid = torch.arange(16, dtype=torch.float64) / 15
    every = torch.cartesian_prod(*[grid] * colours).view(-1, colours)
    wide = mixture.double().expand(len(every), -1)
    mass = torch.exp(-F.negative_log_likelihood(wide, every, likelihood, reduction="none"))
    torch.testing.assert_close(mass.sum(), torch.ones((), dtype=torch.float64))
    expected = (mass[:, None] * every).sum(0)
    torch.testing.assert_close(drawn.double().mean((0, 2, 3)), expected, rtol=0, atol=0.008)  # 4.5 standard errors
    centres = likelihood.mean(mixture[None, :, None, None])
    torch.testing.assert_close(centres.double()[0, :, 0, 0], expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("colours", [1, 3])
def test_a_convolutional_model_of_a_mixture(colours) -> None:
    """Its decoder has as many channels as a pixel's numbers."""
    model = ConvVAE((colours, 8, 5), latent_dim=3, channels=(2,), likelihood=DiscretizedLogisticMixture(2))
    images = torch.randint(0, 256, (4, colours, 8, 5), dtype=torch.uint8)
    output = model(images)
    assert output.logits.shape == (4, 6 if colours == 1 else 20, 8, 5)
    F.elbo_loss(output.logits, images, output.kl, likelihood=model.likelihood).loss.backward()
    assert model.decoder.logits.weight.grad.isfinite().all()
    assert model.sample(2).shape == (2, colours, 8, 5)
    assert math.isfinite(evaluate(model, images).loss)


@pytest.mark.parametrize(
    ("colours", "dim", "message"),
    [(2, None, r"images of .* must have 3 channels or 1, got 2"), (3, -1, "dim must be 1 or None where the decoder")],
)
def test_images_that_a_mixture_is_not_of(colours, dim, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConvVAE((colours, 8, 5), likelihood=DiscretizedLogisticMixture(2, dim=dim))


# -------------------------------------------------------------------------------------------------------------- classes


CLASSES = [(shape, torch.float32) for shape in ((5, 7), (3, 1), (2, 17, 3), (2, 6, 3, 5))]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*CLASSES, ((2, 17, 3), torch.bfloat16), ((2, 17, 3), torch.float16)], ids=str
)
def test_classes(shape, dtype, triton_backend, device) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator).to(device)
    last = Categorical(dim=-1)
    for classes in (target, target.byte()):
        try_all(Categorical(), logits, classes)
        try_all(last, logits.movedim(1, -1), classes)
        try_all(last, logits.movedim(1, -1).contiguous(), classes)
        if logits.ndim == 4:
            try_all(Categorical(), logits.contiguous(memory_format=torch.channels_last), classes.transpose(1, 2).mT)
    expected = torch.nn.functional.cross_entropy(logits.float(), target)
    torch.testing.assert_close(F.negative_log_likelihood(logits, target, Categorical(), reduction="mean"), expected)
    one_hot = torch.nn.functional.one_hot(target, shape[1]).movedim(-1, 1)
    for soft in (one_hot.byte(), one_hot.to(dtype)):
        try_all(Categorical(), logits, soft)
        found = F.negative_log_likelihood(logits, soft, Categorical(), reduction="mean")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [5, 4100])
def test_a_class_out_of_range_is_nan(size, triton_backend, device) -> None:
    logits = torch.linspace(-1, 1, 3 * size, device=device).view(3, size)
    target = torch.tensor([-1, size, 1], device=device)
    value = F.negative_log_likelihood(logits, target, Categorical(), reduction="none")
    assert value.isnan().tolist() == [True, True, False]
    with fastvae.use_backend("reference"):
        value = F.negative_log_likelihood(logits, target, Categorical(), reduction="none")
    assert value.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("size", [5, 4100])
def test_a_class_that_is_nearly_sure(size, triton_backend, device) -> None:
    """log(1 + e^-20) is not lost."""
    logits = torch.full((1, size), -40.0, device=device)
    logits[0, 2], logits[0, 3] = 1.0, -19.0
    value = F.negative_log_likelihood(logits, torch.tensor([2], device=device), Categorical(), reduction="none")
    assert value.item() == pytest.approx(math.exp(-20), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ long rows


def check_long(likelihood, logits: Tensor, target: Tensor, launches) -> None:
    """All that comes out, within the bound of `ROUNDINGS`. The condition of softmax is written down here, because that
    of `exact` takes a derivative for each class.
    """
    dim = likelihood.dim
    classes = logits.shape[dim]
    l, t = logits.detach().double().cpu(), target.cpu()
    if t.ndim < l.ndim:
        t = torch.nn.functional.one_hot(t.long(), classes).movedim(-1, dim)
    t = t.double()
    share, total = torch.softmax(l, dim), t.sum(dim, keepdim=True)
    below = torch.logsumexp(l, dim, keepdim=True) - l
    value, slope = (t * below).sum(dim, keepdim=True), total * share - t
    condition = 2 * value + (l * slope).abs().sum(dim, keepdim=True)
    moved = total * share * (2 + l.abs() + (share * l.abs()).sum(dim, keepdim=True)) + 2 * t
    batch, k = len(l), likelihood.roundings
    upstream = torch.linspace(1, -2, batch, dtype=torch.float64)
    each = upstream.view(-1, *[1] * (l.ndim - 1))
    logits = logits.detach().requires_grad_()
    before = launches.count
    found = F.negative_log_likelihood(logits, target, likelihood, reduction="none")
    assert launches.count == before + 1
    (gradient,) = torch.autograd.grad(found, logits, upstream.to(found))
    assert launches.count == before + 3
    assert_within(found, value.flatten(1).sum(1), condition.flatten(1).sum(1), k[0] + 12)
    assert_within(gradient, each * slope, each.abs() * moved, k[1] + 5)
    kl = torch.ones(batch, device=logits.device)
    values, (gradient, kl_grad) = F.elbo_value_and_grad(logits.detach(), target, kl, likelihood=likelihood)
    assert launches.count == before + 5
    assert_within(values.reconstruction, value.sum() / batch, condition.sum() / batch, k[0] + 16)
    assert_within(gradient, slope / batch, moved / batch, k[1] + 5)
    assert torch.equal(kl_grad, torch.full_like(kl, 1 / batch))
    loss, *_ = F.elbo_loss(logits, target, kl.requires_grad_(), likelihood=likelihood)
    assert torch.equal(loss, values.loss)
    gradients = torch.autograd.grad(loss, (logits, kl))
    assert all(map(torch.equal, gradients, (gradient, kl_grad)))


LONG = {
    "counts": (Multinomial(), (2, 4099), None),
    "counts of bytes": (Multinomial(), (3, 8192), torch.uint8),
    "classes": (Categorical(), (3, 6000), torch.int64),
    "classes of tokens": (Categorical(dim=-1), (2, 2, 4097), torch.int64),
    "a dimension that is not the last": (Categorical(), (2, 4097, 2), torch.int64),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*[(case, torch.float32) for case in LONG], ("counts", torch.bfloat16)], ids=str
)
def test_long_rows(case, dtype, triton_backend, device) -> None:
    likelihood, shape, target_dtype = LONG[case]
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    if target_dtype is torch.int64:
        dim = likelihood.dim % len(shape)
        target = torch.randint(0, shape[dim], (*shape[:dim], *shape[dim + 1 :]), generator=generator)
    else:
        target = torch.poisson(torch.rand(shape, generator=generator), generator).to(target_dtype or dtype)
    check_long(likelihood, logits, target.to(device), triton_backend)


# --------------------------------------------------------------------------------------------------- the description


@pytest.mark.parametrize("likelihood", [MIXTURE, DiscretizedLogisticMixture(1)], ids=repr)
def test_check_finds_nothing(likelihood) -> None:
    """Of other numbers of components than the list of likelihoods has."""
    check(likelihood)


@pytest.mark.parametrize(
    ("likelihood", "parameters", "target", "error", "message"),
    [
        (MIXTURE, (2, 30, 4, 4), (2, 1, 4, 4), ValueError, r"must have shape \[2, 3, 4, 4\].* got \[2, 1, 4, 4\]"),
        (MIXTURE, (2, 9, 4, 9), (2, 3, 4, 9), ValueError, r"shape \[2, 1, 4, 9\] or \[2, 9, 4, 1\], which goes with"),
        (MIXTURE, (2, 31, 4, 4), (2, 3, 4, 4), ValueError, "must have 30 numbers for three colours, or 9 for one"),
        (DiscretizedLogisticMixture(3, dim=-1), (2, 30, 4, 4), (2, 3, 4, 4), ValueError, "along dimension -1"),
        (Categorical(), (2, 5, 4), (2, 5), ValueError, r"\[2, 5, 4\], or \[2, 4\] for classes, got \[2, 5\]"),
        (Categorical(), (2, 5, 4), torch.zeros(2, 4), TypeError, "must be int64 or uint8 where it holds classes"),
        (Categorical(), (2, 5, 4), torch.zeros(2, 5, 4, dtype=torch.int64), TypeError, "target must be uint8"),
        (Categorical(3), (2, 5, 4), (2, 5, 4), ValueError, "a dimension of logits other than the batch, got 3"),
        (Multinomial(), (2, 5, 4), (2, 4), ValueError, r"must have the shape of logits, \[2, 5, 4\], got \[2, 4\]"),
        (Multinomial(), (2, 0), (2, 0), ValueError, "logits must have a number along dimension 1"),
    ],
)  # fmt: skip
def test_what_is_refused(likelihood, parameters, target, error, message) -> None:
    target = target if isinstance(target, Tensor) else torch.zeros(target)
    with launching_nothing(), pytest.raises(error, match=message):
        F.negative_log_likelihood(torch.zeros(parameters), target, likelihood)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DiscretizedLogisticMixture(0), ValueError, "mixtures must be 1 to 32, got 0"),
        (lambda: DiscretizedLogisticMixture(2.0), TypeError, "mixtures must be an integer"),
        (lambda: DiscretizedLogisticMixture(bins=1), ValueError, "bins must be at least 2"),
        (lambda: DiscretizedLogisticMixture(dim=2), ValueError, "dim must be 1, -1 or None"),
        (lambda: Categorical(0), ValueError, "dim must name a dimension other than the batch"),
        (lambda: Multinomial(1.0), TypeError, "dim must be an integer"),
    ],
)
def test_settings_that_are_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_both_dimensions_may_hold_a_mixture() -> None:
    mixture = torch.zeros(2, 9, 9)
    with pytest.raises(ValueError, match="dim must be given"):
        MIXTURE.mean(mixture)
    assert DiscretizedLogisticMixture(3, dim=-1).mean(mixture).shape == (2, 9, 1)


def test_events_without_elements_lie_in_any_order(device, triton_backend):
    logits = torch.empty(1, 5, 0, 0, device=device).contiguous(memory_format=torch.channels_last)
    assert F.negative_log_likelihood(logits, logits, Multinomial()) == 0
    assert F.elbo_loss(logits, logits, torch.ones(1, device=device), likelihood=Multinomial()).loss == 1
