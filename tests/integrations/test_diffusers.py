"""`fastvae.integrations.diffusers`: posteriors and trainings beside the library's, on the CPU and on the kernels."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

pytest.importorskip("diffusers", reason="needs diffusers==0.42.1: pip install diffusers==0.42.1")

from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderOobleck
from diffusers.models import autoencoders
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from diffusers.utils.torch_utils import randn_tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fastvae
from bounds import assert_within
from conftest import Launches
from eager_cost import Cost
from fastvae.functional.posterior import general
from fastvae.integrations import diffusers_posterior as posteriors
from fastvae.integrations.diffusers import (
    CorrectOobleckPosterior,
    CorrectPosterior,
    OobleckPosterior,
    Posterior,
    fuse,
    unfuse,
)
from fastvae.integrations.fusion import report_of
from fastvae.operations import Operation, named, operations
from oracle import oracle

pytestmark = pytest.mark.integrations

EVERY = named(operations())
CLAMP = {"scale_clamp": (-30.0, 20.0), "reduction": "none"}
PACKED = replace(EVERY["gaussian_sample_kl_packed"], options=CLAMP)
PRIOR = replace(EVERY["gaussian_sample_kl_packed_prior"], options=CLAMP)
SOFTPLUS = replace(
    EVERY["gaussian_sample_kl_packed"],
    roundings={**EVERY["gaussian_sample_kl_packed"].roundings, **EVERY["gaussian_sample_kl_softplus"].roundings},
    options={**EVERY["gaussian_sample_kl_softplus"].options, "reduction": "mean"},
)
IMAGE, VIDEO, AUDIO = (3, 8, 5, 6), (2, 8, 3, 4, 5), (3, 8, 7)


def image_vae(cls: type = AutoencoderKL, **options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return cls(block_out_channels=(8,), norm_num_groups=4, **options)


def video_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1
    )


def audio_vae() -> AutoencoderOobleck:
    torch.manual_seed(0)
    return AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_channels=4, decoder_input_channels=2,
        audio_channels=1, channel_multiples=[1, 2],
    )  # fmt: skip


def parameters_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """With logvar on both sides of the clamp, and at its bounds."""
    mean, logvar = torch.randn(shape).chunk(2, 1)
    logvar = logvar.contiguous()
    logvar.view(-1)[:5] = torch.tensor([-34.0, -30.0, 20.0, 24.0, -28.0])
    return torch.cat((mean, logvar), 1).to(dtype).requires_grad_()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def upstream(value: Tensor) -> Tensor:
    return torch.linspace(2.0, -1.5, value.numel()).view(value.shape).to(value.dtype)


def differentiated(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values, and the gradients in the leaves."""
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [*map(upstream, outputs.values())])
    return {name: value.detach() for name, value in outputs.items()} | dict(zip(leaves, grads, strict=True))


# ------------------------------------------------------------------------------------------- the object, and no other


def test_only_the_object_is_fused() -> None:
    vae, other, images = image_vae(), image_vae(), torch.rand(2, 3, 8, 8)
    state, methods = list(vae.state_dict()), dict(vars(AutoencoderKL))
    report = fuse(vae)
    assert report is not report_of(other) and report_of(vae) == report
    assert report.methods == ("encode", "tiled_encode") and not report.corrected
    assert {"encode", "tiled_encode", "posterior.sample", "posterior.kl", "posterior.nll"} <= report.fused.keys()
    for posterior in (vae.encode(images).latent_dist, *vae.encode(images, return_dict=False)):
        assert type(posterior) is Posterior and isinstance(posterior, DiagonalGaussianDistribution)
    assert type(vae.tiled_encode(images).latent_dist) is Posterior
    assert type(other.encode(images).latent_dist) is DiagonalGaussianDistribution
    assert dict(vars(AutoencoderKL)) == methods and list(vae.state_dict()) == state
    assert autoencoder_kl.DiagonalGaussianDistribution is DiagonalGaussianDistribution
    assert inspect.signature(vae.encode) == inspect.signature(other.encode)
    assert fuse(vae, correct=True).corrected
    assert type(vae.encode(images).latent_dist) is CorrectPosterior
    unfuse(vae)
    unfuse(vae)
    assert type(vae.encode(images).latent_dist) is DiagonalGaussianDistribution and report_of(vae) is None


def sources() -> list[tuple[type, list[str]]]:
    """The autoencoders of diffusers, and the methods of each whose text constructs a posterior."""
    found = []
    for module in pkgutil.iter_modules(autoencoders.__path__):
        module = importlib.import_module(f"{autoencoders.__name__}.{module.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                functions = [(name, it) for name, it in vars(cls).items() if inspect.isfunction(it)]
                made = re.compile(r"= \w*DiagonalGaussianDistribution\(")
                names = [name for name, it in functions if made.search(inspect.getsource(it))]
                if names:
                    found.append((cls, names))
    return found


def test_every_autoencoder_of_the_library_is_found() -> None:
    every = sources()
    assert len(every) > 25
    for cls, names in every:
        vae = cls.__new__(cls)
        nn.Module.__init__(vae)
        report = fuse(vae)
        if cls.__name__ == "AutoencoderKLMiniMaxH3Audio":
            assert report.methods == () and "MiniMaxH3AudioDiagonalGaussianDistribution" in report.kept["encode"]
            continue
        assert sorted(report.methods) == sorted(names), cls
        for name in names:
            function = vars(vae)[name].func._copy
            inner = [cell.cell_contents for cell in function.__closure__ or ()]
            functions = [it for it in (function, *inner) if inspect.isfunction(it)]
            seen = {value for it in functions for value in it.__globals__.values() if inspect.isclass(value)}
            assert seen & {Posterior, OobleckPosterior}, (cls, name)
            assert not seen & {DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution}, (cls, name)


class Overriding(AutoencoderKL):
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        return super().encode(x, return_dict)


class Inheriting(AutoencoderKL):
    def _encode(self, x: Tensor) -> Tensor:
        return 2 * super()._encode(x)


class Hidden:
    """A decorator that holds what it decorates in an attribute."""

    def __init__(self, method: Any) -> None:
        self.method = method


def hidden(method: Any) -> Any:
    holder = Hidden(method)

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        return holder.method(self, *arguments, **named)

    return wrapper


class Decorated(AutoencoderKL):
    encode = hidden(AutoencoderKL.encode)


class Mine(DiagonalGaussianDistribution):
    pass


class Constructing(AutoencoderKL):
    def encode(self, x: Tensor) -> Any:
        return Mine(self._encode(x))

    @staticmethod
    def posterior(parameters: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(parameters)


def test_subclasses() -> None:
    vae, images = image_vae(Overriding), torch.rand(2, 3, 8, 8)
    report = fuse(vae)
    assert report.methods == ("tiled_encode",) and "Overriding overrides it" in report.kept["encode"]
    assert type(vae.encode(images).latent_dist) is DiagonalGaussianDistribution
    report = fuse(image_vae(Constructing))
    assert report.kept["encode"] == "it constructs a Mine, for which there are no fused operations here"
    assert "is no plain method" in report.kept["posterior"] and report.methods == ("tiled_encode",)
    assert fuse(image_vae(Decorated)).kept["encode"].endswith("its decorator hides it")
    vae, plain = image_vae(Inheriting), image_vae()
    fuse(vae)
    posterior = vae.encode(images).latent_dist
    assert type(posterior) is Posterior and torch.equal(posterior.mean, 2 * plain.encode(images).latent_dist.mean)


def test_what_has_no_posterior_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^vae must be an autoencoder of diffusers .* got torch\.Linear$"):
        fuse(nn.Linear(2, 2))
    vae = image_vae()
    vae.encode = vae.encode
    with pytest.raises(ValueError, match=r"AutoencoderKL\.encode was replaced on this object"):
        fuse(vae)


def test_hooks_of_offloading_are_called() -> None:
    """The library calls them in a decorator of `encode`."""
    pytest.importorskip("accelerate")
    vae, called = image_vae(), []
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: called.append(module))
    fuse(vae)
    vae.encode(torch.rand(1, 3, 8, 8))
    assert called == [vae]


def test_copies() -> None:
    vae, images = image_vae(), torch.rand(2, 3, 8, 8)
    fuse(vae, correct=True)
    buffer = io.BytesIO()
    torch.save(vae, buffer)
    buffer.seek(0)
    for another in (copy.deepcopy(vae), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            another.quant_conv.bias += 1  # it must be the copy that encodes
        first, second = (it.encode(images).latent_dist for it in (vae, another))
        assert type(second) is CorrectPosterior
        assert torch.equal(second.mean, another.quant_conv(another.encoder(images)).chunk(2, 1)[0])
        assert not torch.equal(first.mean, second.mean)
        assert report_of(another) == report_of(vae)


def test_saving_and_average(tmp_path: Path) -> None:
    vae, images = image_vae(), torch.rand(2, 3, 8, 8)
    fuse(vae)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images).latent_dist.mean, vae.encode(images).latent_dist.mean)
    assert report_of(loaded) is None and "encode" not in vars(loaded)
    average = EMAModel(vae.parameters(), decay=0.5, model_cls=AutoencoderKL, model_config=vae.config)
    with torch.no_grad():
        vae.quant_conv.bias += 1
    average.step(vae.parameters())
    average.store(vae.parameters())
    average.copy_to(vae.parameters())
    assert type(vae.encode(images).latent_dist) is Posterior
    average.restore(vae.parameters())


# ---------------------------------------------------------------------------------------- values, on the CPU: the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("posterior", "library", "shape"),
    [
        (Posterior, DiagonalGaussianDistribution, IMAGE),
        (Posterior, DiagonalGaussianDistribution, VIDEO),
        (OobleckPosterior, OobleckDiagonalGaussianDistribution, AUDIO),
    ],
)
def test_every_bit_is_the_library_s_where_no_kernels_run(posterior: Any, library: Any, shape: Any, dtype: Any) -> None:
    parameters, other = parameters_of(shape, dtype), torch.randn(shape).to(dtype)

    def everything(cls: Any) -> dict[str, Tensor]:
        q = cls(parameters)
        z = q.sample(seeded())
        outputs = {"z": z, "kl": q.kl(), "kl(other)": q.kl(cls(other)), "mode": q.mode()}
        outputs |= {name: getattr(q, name) for name in ("mean", "logvar", "std", "var")}
        if hasattr(q, "nll"):
            outputs |= {"nll": q.nll(z), "nll over 2": q.nll(z, dims=(2,))}
        # Each by itself, because the order in which several are added is that in which the attributes were made.
        grads = {
            f"{name}_grad": torch.autograd.grad(value, parameters, upstream(value), retain_graph=True)[0]
            for name, value in outputs.items()
        }
        return outputs | grads

    expected = everything(library)
    for name, value in everything(posterior).items():
        assert value.dtype is expected[name].dtype
        assert torch.equal(value.nan_to_num(), expected[name].nan_to_num()), name


def test_noise_of_the_default_generator_is_the_library_s_where_no_kernels_run() -> None:
    parameters = torch.randn(IMAGE)
    samples = []
    for cls in (Posterior, DiagonalGaussianDistribution):
        torch.manual_seed(3)
        samples.append(cls(parameters).sample())
    assert torch.equal(*samples)


# --------------------------------------------------------------------------------------------- values, on the kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_on_the_kernels(dtype: torch.dtype, triton_backend: type[Launches]) -> None:
    parameters = parameters_of(IMAGE, dtype)
    q, before = Posterior(parameters), Launches.count
    outputs = {"z": q.sample(seeded()), "kl": q.kl()}
    assert Launches.count - before == 1
    results = differentiated(outputs, {"moments_grad": parameters})
    assert Launches.count - before == 2
    assert [results[name].dtype for name in results] == [dtype] * 3
    assert_within_of_the_library(results, parameters)
    alone = Posterior(parameters)
    results = differentiated({"kl": alone.kl()}, {"moments_grad": parameters})
    assert_within_of_the_library(results, parameters)
    outside = ((parameters < -30) | (parameters > 20)).chunk(2, 1)[1]
    assert outside.sum() == 2 and not results["moments_grad"].chunk(2, 1)[1][outside].any()
    assert results["moments_grad"].chunk(2, 1)[1].flatten()[1:3].all()  # at the bounds the gradient passes


def assert_within_of_the_library(
    results: dict[str, Tensor],
    parameters: Tensor,
    library: Any = DiagonalGaussianDistribution,
    operation: Operation = PACKED,
    factor: float = 1.0,
) -> None:
    """Of the class's float64, with the noise in the parameters' dtype. Scales and roundings are those of fastvae's
    operation, whose divergence times the factor is the posterior's.
    """
    half = parameters.chunk(2, 1)[0].shape
    eps = randn_tensor(half, generator=seeded(), dtype=parameters.dtype).double()
    wide = parameters.detach().double().requires_grad_()
    q = library(wide)
    outputs = {name: value for name, value in (("z", q.mean + q.std * eps), ("kl", q.kl())) if name in results}
    grads = {name: upstream(results[name]) for name in outputs}
    exact = torch.autograd.grad(list(outputs.values()), wide, [grad.double() for grad in grads.values()])[0]
    if "kl" in grads:
        grads["kl"] = grads["kl"] * factor
    scales = oracle(operation, (parameters.detach(),), grads, eps=eps)
    for name, value in {**outputs, "moments_grad": exact}.items():
        of, size = scales[name], factor if name == "kl" else 1.0
        assert_within(results[name], value.detach(), size * of.scale, of.roundings + (factor != 1.0), name)


def test_videos_on_the_kernels(triton_backend: type[Launches]) -> None:
    """kl sums dimensions 1 to 3, as the library's."""
    parameters = parameters_of(VIDEO)
    library = DiagonalGaussianDistribution
    q, before = Posterior(parameters), Launches.count
    results = differentiated({"z": q.sample(seeded())}, {"moments_grad": parameters})
    assert_within_of_the_library(results, parameters)
    kl = q.kl()
    assert kl.shape == (2, 5) and Launches.count - before == 3
    results = differentiated({"kl": kl}, {"grad": parameters})
    wide = parameters.detach().double().requires_grad_()
    expected = differentiated({"kl": library(wide).kl()}, {"grad": wide})
    rows = parameters.detach().permute(0, 4, 1, 2, 3).flatten(0, 1)
    scales = oracle(PACKED, (rows,), {"kl": upstream(kl).flatten()})
    assert_within(results["kl"], expected["kl"], scales["kl"].scale.view(2, 5), scales["kl"].roundings)
    _, scale, roundings = (it.unflatten(0, (2, 5)).permute(0, 2, 3, 4, 1) for it in scales["moments_grad"])
    assert_within(results["grad"], expected["grad"], scale, roundings)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO, AUDIO])
def test_corrected_divergences_sum_all_but_the_batch(shape: Any, triton_backend: type[Launches]) -> None:
    parameters = parameters_of(shape)
    images = parameters.detach().flatten(2)[..., None].requires_grad_()  # the same numbers, of 4 dimensions
    every = tuple(range(1, len(shape)))
    q = CorrectPosterior(parameters)
    outputs = {"z": q.sample(seeded()), "kl": q.kl()}
    assert outputs["kl"].shape == (len(parameters),)
    results = differentiated(outputs, {"moments_grad": parameters})
    assert_within_of_the_library(
        {name: it if name == "kl" else it.flatten(2)[..., None] for name, it in results.items()}, images
    )
    library = differentiated({"kl": DiagonalGaussianDistribution(images).kl()}, {"grad": images})
    with fastvae.use_backend("reference"):
        plainly = differentiated({"kl": CorrectPosterior(parameters).kl()}, {"grad": parameters})
        half = CorrectPosterior(parameters.bfloat16())
        wide, sample = CorrectPosterior(half.parameters.float()), torch.randn(half.mean.shape)
        assert torch.equal(half.kl(), wide.kl()) and torch.equal(half.nll(sample), wide.nll(sample))
        assert torch.equal(wide.nll(sample), DiagonalGaussianDistribution(wide.parameters).nll(sample, every))
        prior = torch.randn(shape)
        of_images = DiagonalGaussianDistribution(prior.flatten(2)[..., None])
        for other in (Posterior(prior), DiagonalGaussianDistribution(prior)):
            kl = CorrectPosterior(parameters).kl(other)
            assert torch.equal(kl, DiagonalGaussianDistribution(images).kl(of_images))
    for name, value in library.items():
        assert torch.equal(plainly[name].view(value.shape), value)


def rms(errors: Tensor) -> Tensor:
    return errors.double().square().mean().sqrt()


@pytest.mark.parametrize("cls", [Posterior, CorrectPosterior])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_divergence_from_another_posterior(dtype: torch.dtype, cls: Any, triton_backend: type[Launches]) -> None:
    parameters = (0.5 * torch.randn(IMAGE)).to(dtype).requires_grad_()
    prior = (0.5 * torch.randn(IMAGE)).to(dtype).requires_grad_()
    for other in (cls(prior), DiagonalGaussianDistribution(prior)):
        before = Launches.count
        kl = cls(parameters).kl(other)
        assert Launches.count - before == 1 and kl.dtype is (torch.float32 if cls.correct else dtype)
        results = differentiated({"kl": kl}, {"moments_grad": parameters, "prior_grad": prior})
        wide = [it.detach().double().requires_grad_() for it in (parameters, prior)]
        value = DiagonalGaussianDistribution(wide[0]).kl(DiagonalGaussianDistribution(wide[1]))
        grads = torch.autograd.grad(value, wide, upstream(kl).double())
        scales = oracle(PRIOR, (parameters.detach(), prior.detach()), {"kl": upstream(kl)}, eps=torch.zeros(3, 4, 5, 6))
        for name, exact in zip(results, (value.detach(), *grads), strict=True):
            assert_within(results[name], exact, scales[name].scale, scales[name].roundings, name)


def test_what_no_operation_covers_is_the_library_s(triton_backend: type[Launches]) -> None:
    parameters, other = torch.randn(IMAGE), torch.randn(1, *IMAGE[1:])
    q, library = Posterior(parameters), DiagonalGaussianDistribution(parameters)
    sample, before = torch.randn(3, 4, 5, 6), Launches.count
    assert torch.equal(q.kl(Posterior(other)), library.kl(DiagonalGaussianDistribution(other)))
    fixed = DiagonalGaussianDistribution(parameters, deterministic=True)
    assert q.kl(fixed).isnan().all() and library.kl(fixed).isnan().all()  # a division by its variance of 0
    assert torch.equal(q.nll(sample, dims=(1, 2)), library.nll(sample, dims=(1, 2)))
    assert torch.equal(q.nll(sample[:1]), library.nll(sample[:1]))
    odd = [cls(torch.ones(2, 3, 2, 2)) for cls in (Posterior, CorrectPosterior, DiagonalGaussianDistribution)]
    assert torch.equal(odd[0].kl(), odd[2].kl()) and torch.equal(odd[1].kl(), odd[2].kl())
    assert torch.equal(odd[0].sample(seeded()), odd[2].sample(seeded()))
    for shape in (AUDIO, (3, 8)):
        with pytest.raises(IndexError):
            Posterior(torch.randn(shape)).kl()
        with pytest.raises(IndexError):
            DiagonalGaussianDistribution(torch.randn(shape)).kl()
    for cls in (Posterior, CorrectPosterior):
        fixed, library = cls(parameters, deterministic=True), DiagonalGaussianDistribution(parameters, True)
        for name in ("mean", "logvar", "std", "var", "parameters"):
            assert torch.equal(getattr(fixed, name), getattr(library, name)), name
        assert torch.equal(fixed.sample(), library.sample()) and torch.equal(fixed.sample(), fixed.mode())
        assert torch.equal(fixed.kl(), library.kl()) and torch.equal(fixed.nll(sample), library.nll(sample))
        assert fixed.kl().shape == (1,)
    assert Launches.count == before
    q.kl()  # the fixture asks for a launch


def test_an_empty_batch(triton_backend: type[Launches]) -> None:
    parameters = torch.randn(0, 8, 5, 6).requires_grad_()
    q = Posterior(parameters)
    z, kl = q.sample(), q.kl()
    assert z.shape == (0, 4, 5, 6) and kl.shape == (0,) and Posterior(torch.randn(0, 8, 3, 5, 6)).kl().shape == (0, 6)
    assert torch.autograd.grad(z.sum() + kl.sum(), parameters)[0].shape == parameters.shape
    Posterior(torch.randn(IMAGE)).kl()  # the fixture asks for a launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_log_likelihood(dtype: torch.dtype, triton_backend: type[Launches]) -> None:
    parameters = (0.5 * torch.randn(IMAGE)).to(dtype)
    parameters[0, 4, 0, :2] = torch.tensor([-31.0, 21.0])
    parameters.requires_grad_()
    sample = torch.randn(3, 4, 5, 6).to(dtype).requires_grad_()
    nll = Posterior(parameters).nll(sample)
    results = differentiated({"loss": nll}, {"grad": parameters, "target_grad": sample})
    wide = [it.detach().double().requires_grad_() for it in (parameters, sample)]
    value = DiagonalGaussianDistribution(wide[0]).nll(wide[1])
    expected = dict(zip(("grad", "target_grad"), torch.autograd.grad(value, wide, upstream(nll).double()), strict=True))
    mean, logvar = parameters.detach().chunk(2, 1)
    scales = oracle(
        EVERY["negative_log_likelihood_Gaussian_target"],
        (mean, logvar.clamp(-30, 20), sample.detach()),
        {"loss": upstream(nll)},
        reduction="none",
    )
    assert nll.dtype is dtype
    assert_within(nll, value, scales["loss"].scale, scales["loss"].roundings)
    assert_within(
        results["target_grad"], expected["target_grad"], scales["target_grad"].scale, scales["target_grad"].roundings
    )
    for k, name in enumerate(("mean_grad", "logvar_grad")):
        of = scales[name]
        assert_within(results["grad"].chunk(2, 1)[k], expected["grad"].chunk(2, 1)[k], of.scale, of.roundings, name)


def test_half_precision(triton_backend: type[Launches]) -> None:
    """Where the library's exp(logvar) overflows: its kl is infinite from a logvar of 11.09 on."""
    parameters = torch.zeros(3, 2, 1, 1, dtype=torch.float16)
    parameters[:, 1, 0, 0] = torch.tensor([11.5, 20.0, -20.0])
    exact = DiagonalGaussianDistribution(parameters.double()).kl()
    assert exact[0] < 65504 < exact[1]
    kl = Posterior(parameters).kl()
    assert DiagonalGaussianDistribution(parameters).kl().isinf().tolist() == [True, True, False]
    assert kl.dtype is torch.float16 and kl.isinf().tolist() == [False, True, False]
    right = CorrectPosterior(parameters).kl()
    assert right.dtype is torch.float32
    assert_within(right, exact, DiagonalGaussianDistribution(parameters.double()).kl() + 21, 14)
    far = parameters.chunk(2, 1)[0] + 0.1
    assert DiagonalGaussianDistribution(parameters).nll(far)[2].isinf()  # (z - mean)^2 / 0
    exact = DiagonalGaussianDistribution(parameters.double()).nll(far.double())
    assert_within(CorrectPosterior(parameters).nll(far), exact, (1 + 20) * exact.abs() + 21, 14)


# -------------------------------------------------------------------------------------------------------------- audio


def test_audio_on_the_kernels(triton_backend: type[Launches]) -> None:
    parameters = torch.randn(AUDIO).requires_grad_()
    library = OobleckDiagonalGaussianDistribution
    for cls, factor in ((OobleckPosterior, 8.0), (CorrectOobleckPosterior, 4.0)):
        q, before = cls(parameters), Launches.count
        outputs = {"z": q.sample(seeded()), "kl": q.kl()}
        assert Launches.count - before == 1 and outputs["kl"].shape == ()
        results = differentiated(outputs, {"moments_grad": parameters})

        def expected(wide: Tensor, factor: float = factor) -> Any:
            q = library(wide)
            return SimpleNamespace(mean=q.mean, std=q.std, kl=lambda: q.kl() * factor / 8)

        assert_within_of_the_library(results, parameters, expected, SOFTPLUS, factor)


def by_torch(parameters: Tensor, other: Tensor | None = None) -> Tensor:
    """The divergence of Oobleck's posteriors: the sum over channels, and the mean of batch and time."""
    zero = torch.zeros_like(parameters.chunk(2, 1)[0])

    def normal(moments: Tensor) -> Normal:
        q = OobleckDiagonalGaussianDistribution(moments)
        return Normal(q.mean, q.std)

    prior = Normal(zero, zero + 1) if other is None else normal(other)
    return kl_divergence(normal(parameters), prior).sum(1).mean()


def test_corrected_audio_is_the_divergence(device: torch.device) -> None:
    parameters, other = torch.randn(AUDIO, dtype=torch.float64), torch.randn(AUDIO, dtype=torch.float64)
    right, q = CorrectOobleckPosterior(parameters), OobleckPosterior(parameters)
    torch.testing.assert_close(right.kl(), by_torch(parameters), rtol=1e-13, atol=0)
    torch.testing.assert_close(right.kl(OobleckPosterior(other)), by_torch(parameters, other), rtol=1e-13, atol=0)
    torch.testing.assert_close(q.kl(), 2 * by_torch(parameters), rtol=1e-13, atol=0)
    assert (q.kl(OobleckPosterior(other)) - 2 * by_torch(parameters, other)).abs() > 0.1  # the sign


# ------------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_list_of_generators(number: int, backend: str) -> None:
    """One for each image, as in the library; of a list of one, that one. Each is left where the library leaves it."""
    parameters = torch.randn(3, 8, 5, 6)
    ours, theirs = ([seeded(k) for k in range(number)] for _ in range(2))
    with fastvae.use_backend(backend):
        z = Posterior(parameters).sample(ours)
    q = DiagonalGaussianDistribution(parameters.double())
    spread = q.std * randn_tensor(z.shape, generator=theirs, dtype=torch.float32)
    assert_within(z, q.mean + spread, q.mean.abs() + spread.abs() * (1 + q.logvar.abs() / 2), 6)
    assert all(torch.equal(first.get_state(), second.get_state()) for first, second in zip(ours, theirs, strict=True))


def test_noise_of_the_kernels(triton_backend: type[Launches]) -> None:
    """Of the default generator: the same from a seed, another at each call, with mean 0 and variance 1."""
    q = Posterior(torch.randn(8, 8, 16, 16).requires_grad_())
    torch.manual_seed(5)
    first, second = q.sample(), q.sample()
    torch.manual_seed(5)
    assert torch.equal(first, q.sample()) and not torch.equal(first, second)
    eps = ((first - q.mean) / q.std).detach()
    n = eps.numel()
    assert abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5
    gradient = torch.autograd.grad(first.sum(), q.parameters)[0].chunk(2, 1)[1]
    torch.testing.assert_close(gradient, 0.5 * q.std.detach() * eps, rtol=0, atol=1e-5)


def test_the_divergence_comes_with_the_sample_only_where_it_is_of_use(triton_backend: type[Launches]) -> None:
    parameters = torch.randn(IMAGE).requires_grad_()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            posteriors, "general", lambda *given, **options: calls.append(given[2:4]) or general(*given, **options)
        )
        with torch.no_grad():
            Posterior(parameters).sample()  # nobody trains the encoder
        Posterior(parameters.detach()).sample()
        Posterior(torch.randn(VIDEO).requires_grad_()).sample()  # the library's divergence of a video is no sum
        assert calls == [(True, False)] * 3
        calls.clear()
        q = Posterior(parameters)
        z, first, second = q.sample(), q.kl(), q.kl()
        assert calls == [(True, True), (False, True)]
    first.mul_(0)  # a caller's own
    assert torch.equal(q.kl(), second) and second.all()
    q.sample()
    with torch.no_grad():
        assert not q.kl().requires_grad
    before = Launches.count
    torch.autograd.grad((z.sum(), second.sum()), parameters)
    assert Launches.count - before == 2


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def cost(cls: Any) -> int:
        parameters = torch.randn(IMAGE)
        with Cost() as counted:
            cls(parameters).mode()
        return counted.launches

    assert cost(Posterior) == cost(OobleckPosterior) == 0
    assert cost(DiagonalGaussianDistribution) > 3 and cost(OobleckDiagonalGaussianDistribution) > 2
    q = Posterior(torch.randn(IMAGE))
    for name in ("mean", "logvar", "std", "var"):
        assert getattr(q, name) is getattr(q, name)
        with pytest.raises(AttributeError):  # a fused operation would not see it
            setattr(q, name, torch.zeros(()))


def test_attributes_have_the_gradient_and_dtype_of_when_the_posterior_was_made() -> None:
    parameters = torch.randn(IMAGE).requires_grad_()
    q = Posterior(parameters)
    with torch.no_grad():
        q.std, q.var  # noqa: B018  read first where there is no gradient
    assert q.logvar.requires_grad and q.std.requires_grad and q.var.requires_grad
    with torch.no_grad():
        q, library = Posterior(parameters), DiagonalGaussianDistribution(parameters)
    assert not q.std.requires_grad and not library.std.requires_grad


def test_autocast_on_the_cpu() -> None:
    vae, plain, images = image_vae(), image_vae(), torch.rand(2, 3, 8, 8)
    fuse(vae)
    results = []
    for each in (vae, plain):
        with torch.autocast("cpu", torch.bfloat16):
            q = each.encode(images).latent_dist
            results.append((q.sample(seeded()), q.kl(), q.std))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype is torch.bfloat16 and torch.equal(ours, theirs)


def test_results_are_float32_where_autocast_promotes(monkeypatch: pytest.MonkeyPatch, triton_backend: Any) -> None:
    """As on a GPU, whose autocast runs exp and sum in float32."""
    monkeypatch.setattr(posteriors, "_autocasts", lambda parameters: True)
    parameters = parameters_of(IMAGE, torch.bfloat16)
    q = Posterior(parameters)
    results = differentiated({"z": q.sample(seeded()), "kl": q.kl()}, {"moments_grad": parameters})
    assert [it.dtype for it in results.values()] == [torch.float32, torch.float32, torch.bfloat16]
    assert q.kl(Posterior(parameters)).dtype is q.nll(q.sample()).dtype is torch.float32
    assert_within_of_the_library(results, parameters)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cls", [Posterior, OobleckPosterior])
def test_autocast_on_a_gpu(cls: Any) -> None:
    """exp and sum run in float32 there, so z and kl are float32."""
    parameters = torch.randn(IMAGE, device="cuda", dtype=torch.bfloat16).requires_grad_()
    results = []
    for each in (cls, cls.library):
        with torch.autocast("cuda", torch.bfloat16):
            q = each(parameters)
            generator = torch.Generator("cuda").manual_seed(1)
            results.append((q.sample(generator), q.kl(), q.mean, q.logvar, q.std, q.var))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs)


# ----------------------------------------------------------------------------------------------------------- trainings


def losses(vae: Any, inputs: Tensor, draw: Callable[[Any], Tensor], kl_scale: float) -> Tensor:
    """As the library's script for AutoencoderKL: sums, by the batch."""
    q = vae.encode(inputs).latent_dist
    z = draw(q)
    reconstruction = vae.decode(z).sample
    error = torch.nn.functional.mse_loss(reconstruction.to(inputs.dtype), inputs, reduction="none").sum() / len(inputs)
    kl = q.kl()
    return error + kl_scale * (kl.sum() / len(kl) if kl.ndim else kl)


def trained(vae: Any, inputs: Tensor, steps: int = 3, kl_scale: float = 1e-6) -> list[Tensor]:
    """The losses, and the weights after."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    generator, found = seeded(), []
    for _ in range(steps):
        loss = losses(vae, inputs, lambda q: q.sample(generator), kl_scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return [*found, *(weight.detach() for weight in vae.parameters())]


IMAGES, VIDEOS, SOUNDS = (4, 3, 8, 8), (2, 3, 9, 8, 16), (2, 1, 64)


@pytest.mark.parametrize(("make", "shape"), [(image_vae, IMAGES), (video_vae, VIDEOS)])
def test_a_training_is_the_library_s_bit_for_bit_where_no_kernels_run(make: Any, shape: Any) -> None:
    inputs, vae = torch.rand(shape), make()
    fuse(vae)
    steps = 1 if make is video_vae else 3
    for ours, theirs in zip(trained(vae, inputs, steps), trained(make(), inputs, steps), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kl_scale", [1e-6, 1.0])
@pytest.mark.parametrize(
    ("make", "shape", "backend"),
    [
        (image_vae, IMAGES, "triton"),
        (video_vae, VIDEOS, "triton"),
        (audio_vae, SOUNDS, "triton"),
        # Without kernels the gradients of audio are added in another order than the library adds them.
        (audio_vae, SOUNDS, "reference"),
    ],
)
def test_losses_and_gradients(make: Any, shape: Any, backend: str, kl_scale: float) -> None:
    """With the generator's noise, from the same weights at each step: as near to float64 as the library's float32."""
    inputs, steps = torch.rand(shape), 1 if make is video_vae else 3
    fused, library, exact = make(), make(), make().double()
    fuse(fused)
    optimizer = torch.optim.AdamW(library.parameters(), lr=1e-3)
    errors: list[list[Tensor]] = [[], []]  # of the gradients, fused and the library's
    before = Launches.count
    for step in range(steps):

        def sampled(q: Any, step: int = step) -> Tensor:
            return q.sample(seeded(step))

        def drawn(q: Any, step: int = step) -> Tensor:
            return q.mean + q.std * randn_tensor(q.mean.shape, generator=seeded(step), dtype=torch.float32)

        results = []
        for vae, dtype, draw in (
            (fused, torch.float32, sampled),
            (library, torch.float32, sampled),
            (exact, torch.float64, drawn),
        ):
            with fastvae.use_backend(backend):
                loss = losses(vae, inputs.to(dtype), draw, kl_scale)
                grads = torch.autograd.grad(loss, list(vae.parameters()))
            results.append((loss.detach().double(), torch.cat([grad.flatten() for grad in grads]).double()))
        (loss, gradient), (loss_of_library, gradient_of_library), (value, right) = results
        # A loss is one number, which the library's float32 may have right by chance: the rounding of a sum is allowed.
        rounding = 2.0**-24 * math.log2(inputs.numel()) * value
        assert abs(loss - value) <= 2 * abs(loss_of_library - value) + rounding
        errors[0].append(gradient - right)
        errors[1].append(gradient_of_library - right)
        for weight, grad in zip(library.parameters(), grads, strict=True):
            weight.grad = grad.float()
        optimizer.step()
        for vae in (fused, exact):
            vae.load_state_dict(library.state_dict())
    assert rms(torch.stack(errors[0])) <= 2 * rms(torch.stack(errors[1]))
    assert Launches.count - before == steps * {"reference": 0, "triton": 4 if make is video_vae else 2}[backend]


@pytest.mark.parametrize("what", ["slicing", "tiling"])
def test_slicing_and_tiling(what: str) -> None:
    torch.manual_seed(0)
    options = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae, images = (
        AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **options),
        torch.rand(2, 3, 24, 24),
    )
    plain = copy.deepcopy(vae)
    fuse(vae)
    for it in (vae, plain):
        getattr(it, f"enable_{what}")()
    whole = vae.encode(images[:, :, :16, :16]).latent_dist
    ours, theirs = vae.encode(images).latent_dist, plain.encode(images).latent_dist
    assert type(ours) is type(whole) is Posterior and torch.equal(ours.parameters, theirs.parameters)
    assert torch.equal(ours.sample(seeded()), theirs.sample(seeded()))
    for each in (vae, plain):
        each.zero_grad()
        losses(each, images, lambda q: q.sample(seeded()), 1e-6).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(vae.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype: torch.dtype, triton_backend: type[Launches]) -> None:
    vae, images = image_vae().to(dtype), torch.rand(IMAGES).to(dtype)
    fuse(vae)
    q = vae.encode(images).latent_dist
    z, kl = q.sample(seeded()), q.kl()
    assert z.dtype is kl.dtype is q.parameters.dtype is dtype
    (vae.decode(z).sample.float().sum() + kl.sum()).backward()
    assert all(it.grad.isfinite().all() for it in vae.parameters())
    library = DiagonalGaussianDistribution(q.parameters.detach().double())
    assert_within(kl, library.kl(), library.kl() + library.logvar.abs().sum((1, 2, 3)), 24)


def test_forward_of_the_model_and_inference_mode() -> None:
    vae, plain, images = image_vae(), image_vae(), torch.rand(IMAGES)
    fuse(vae)
    for sample_posterior in (False, True):
        with torch.inference_mode():
            ours, theirs = (it.eval()(images, sample_posterior, generator=seeded()).sample for it in (vae, plain))
        assert torch.equal(ours, theirs)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        vae, plain, images = image_vae(), image_vae(), torch.rand(IMAGES)
        fuse(vae)
        for it in (vae, plain):
            wrapped = nn.parallel.DistributedDataParallel(it)
            wrapped(images, sample_posterior=True, generator=seeded()).sample.sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(vae.parameters(), plain.parameters(), strict=True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("backend", "compiler"), [("reference", "eager"), ("triton", "aot_eager")])
def test_torch_compile(backend: str, compiler: str) -> None:
    """In one graph, whose posterior is a fused one outside of it too."""
    vae, images = image_vae(), torch.rand(2, 3, 8, 8)
    fuse(vae)

    def step(images: Tensor) -> tuple[Any, Tensor, Tensor]:
        q = vae.encode(images).latent_dist
        return q, q.sample(), q.kl()

    torch.compiler.reset()
    with fastvae.use_backend(backend):
        q, z, kl = torch.compile(step, fullgraph=True, backend=compiler)(images)
        assert type(q) is Posterior
        expected = vae.encode(images).latent_dist
        torch.testing.assert_close(kl, expected.kl())
        gradient = torch.autograd.grad(kl.sum() + (z - z).sum(), vae.quant_conv.weight)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.kl().sum(), vae.quant_conv.weight)[0])
        torch.testing.assert_close(q.kl(), expected.kl())
    torch.compiler.reset()
