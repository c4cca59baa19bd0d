"""scvi-tools on fused operations: every number and gradient of its loss, and its own training, use and saving."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.integrations
scvi = pytest.importorskip("scvi", reason="needs scvi-tools==1.4.2: pip install scvi-tools==1.4.2")
# ruff: noqa: E402  # what is imported now needs it

import anndata
from scvi.distributions import NegativeBinomial, ZeroInflatedNegativeBinomial
from scvi.distributions._negative_binomial import log_nb_positive
from scvi.module import VAE

import fastvae
from bounds import assert_within
from conftest import Launches
from fastvae.integrations import scvi as integration
from fastvae.integrations.fusion import report_of
from fastvae.integrations.scvi import LIKELIHOODS, fuse, unfuse
from fastvae.likelihoods.checking import exact
from fastvae.operations import named, operations
from fastvae.operations.likelihoods import FACTOR
from oracle import levels

CELLS, GENES, EPOCHS, STEPS = 200, 50, 2, 6  # 180 cells are trained on, three batches of at most 64 in an epoch
HOSTS = {"nb": NegativeBinomial, "zinb": ZeroInflatedNegativeBinomial}
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")
ROUNDINGS = named(operations())["gaussian_kl_prior"].roundings


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_their_own(tmp_path_factory):
    """The host's trainings write their logs where Python runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("scvi"))
        yield


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Of data as small as these the host's own code would run on the CPU."""
    monkeypatch.setattr(integration, "SMALL", 0)


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    generator = np.random.default_rng(0)
    rate = generator.gamma(1.0, 1.0, (CELLS, GENES)) * generator.gamma(2.0, 2.0, (1, GENES))
    adata = anndata.AnnData(generator.poisson(rate).astype(np.float32))
    for name, count in {"batch": 2, "label": 3, "category": 3}.items():
        adata.obs[name] = generator.integers(0, count, CELLS).astype(str)
    adata.obs["number"] = generator.normal(size=CELLS)
    return adata


def made(adata: anndata.AnnData, kind: Any = scvi.model.SCVI, seed: int = 0, **options: Any) -> Any:
    """A model of this class, always with the same weights."""
    setup = {"batch_key": "batch"}
    if kind is scvi.model.SCVI:
        setup.update(labels_key="label", continuous_covariate_keys=["number"], categorical_covariate_keys=["category"])
    if kind is scvi.model.SCANVI:
        setup.update(labels_key="label", unlabeled_category="0")
    kind.setup_anndata(adata, **setup)
    scvi.settings.seed = seed
    return kind(adata, n_hidden=16, n_latent=5, **options)


def trained(model: Any, seed: int = 1, **options: Any) -> Any:
    scvi.settings.seed = seed
    chosen = {"accelerator": "cpu", "batch_size": 64, "enable_progress_bar": False, "check_val_every_n_epoch": 1}
    model.train(max_epochs=EPOCHS, **chosen, **options)
    return model


def assert_trained_alike(fused: Any, host: Any, unit: float) -> None:
    """Each number of the history, and each weight: a relative error of 40 roundings in every step. The steps are
    small and add up, they do not multiply: lr is 1e-3.
    """
    allowed = STEPS * 40 * unit
    assert list(fused.history) == list(host.history)
    assert len(host.history["train_loss"]) == EPOCHS and "elbo_validation" in host.history
    for name, values in host.history.items():
        expected = values.to_numpy().astype(float)
        assert np.abs(fused.history[name].to_numpy().astype(float) - expected).max() <= allowed * np.abs(expected).max()
    state = fused.module.state_dict()
    assert list(state) == list(host.module.state_dict())
    for name, expected in host.module.state_dict().items():
        assert (state[name] - expected).abs().max() <= allowed * max(1, expected.abs().max()), name


MODELS = {
    "nb": (scvi.model.SCVI, {"gene_likelihood": "nb"}),
    "zinb": (scvi.model.SCVI, {}),
    "zinb, for each cell": (scvi.model.SCVI, {"dispersion": "gene-cell"}),
    "poisson, ln, covariates": (
        scvi.model.SCVI,
        {"gene_likelihood": "poisson", "latent_distribution": "ln", "encode_covariates": True},
    ),
    "batch embedding": (scvi.model.SCVI, {"batch_representation": "embedding", "encode_covariates": True}),
    "another var_activation": (scvi.model.SCVI, {"var_activation": torch.nn.functional.softplus}),
    "SCANVI": (scvi.model.SCANVI, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_in_float64_has_the_host_s_losses_and_weights(adata, name):
    """In float64 another formula is beyond the bound, such as one without scvi-tools' 1e-8."""
    kind, options = MODELS[name]
    host, own = (made(adata, kind, **options) for _ in range(2))
    fuse(own)
    assert_trained_alike(trained(own, precision="64-true"), trained(host, precision="64-true"), 2.0**-53)


# Those that scvi-tools cannot compute in float64, because it casts the batch's one-hot code to float32.
IN_FLOAT32 = {
    "nb": (scvi.model.SCVI, {"gene_likelihood": "nb"}),
    "zinb": (scvi.model.SCVI, {}),
    "nb, for each batch": (scvi.model.SCVI, {"gene_likelihood": "nb", "dispersion": "gene-batch"}),
    "zinb, for each label": (scvi.model.SCVI, {"dispersion": "gene-label"}),
    "library size": (scvi.model.SCVI, {"use_observed_lib_size": False}),
    "LinearSCVI": (scvi.model.LinearSCVI, {}),
}


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_a_training_in_float32_has_them_too(adata, name):
    kind, options = IN_FLOAT32[name]
    host, own = (made(adata, kind, **options) for _ in range(2))
    fuse(own)
    assert_trained_alike(trained(own), trained(host), 2.0**-24)


# ------------------------------------------------------------------------------------------------ numbers of the loss


class Parts(NamedTuple):
    """What the loss depends on."""

    mu: Tensor
    dispersion: Tensor  # px_r [G], or theta
    zi_logits: Tensor
    loc: Tensor
    scale: Tensor
    library_loc: Tensor
    library_scale: Tensor


B, G, K = 6, 37, 5
PRIOR = 6.0, 0.5  # of the library size, mean and standard deviation
KL_WEIGHT = 0.3


def parts_and_counts(likelihood: str, dispersion: str) -> tuple[Parts, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mu, theta, *logits, x = LIKELIHOODS[likelihood].draw((B, G), generator)
    of_genes = theta[0].log() if dispersion == "gene" else theta
    more = [torch.randn(B, n, generator=generator) for n in (K, K, 1, 1)]
    loc, scale, library_loc, library_scale = more
    logits = logits[0] if logits else torch.zeros(B, G)
    return Parts(mu, of_genes, logits, loc, scale.exp(), PRIOR[0] + library_loc, library_scale.exp()), x


def vae(likelihood: str, dispersion: str) -> VAE:
    means, variances = np.full((1, 2), PRIOR[0]), np.full((1, 2), PRIOR[1] ** 2)
    library = {"use_observed_lib_size": False, "library_log_means": means, "library_log_vars": variances}
    options = {"dispersion": dispersion, "gene_likelihood": likelihood, "n_labels": 3, "n_hidden": 4, "n_latent": K}
    return VAE(G, n_batch=2, **options, **library)


def losses(module: VAE, parts: Parts, x: Tensor, loss: Any) -> tuple[Any, dict[str, Tensor]]:
    """What this loss returns, and its gradients."""
    leaves = Parts(*[part.clone().requires_grad_() for part in parts])
    if module.dispersion == "gene":
        module.px_r = torch.nn.Parameter(leaves.dispersion.detach())
        leaves = leaves._replace(dispersion=module.px_r)
        theta = torch.exp(module.px_r)
    else:
        theta = leaves.dispersion
    more = {"zi_logits": leaves.zi_logits} if module.gene_likelihood == "zinb" else {}
    px = HOSTS[module.gene_likelihood](mu=leaves.mu, theta=theta, **more)
    inference = {
        "qz": Normal(leaves.loc, leaves.scale),
        "ql": Normal(leaves.library_loc, leaves.library_scale),
        "z": leaves.loc,
    }
    one = torch.ones_like(leaves.loc)
    prior = Normal(PRIOR[0] * one[:, :1], PRIOR[1] * one[:, :1])
    found = loss({"X": x}, inference, {"px": px, "pz": Normal(0 * one, one), "pl": prior}, kl_weight=KL_WEIGHT)
    wanted = {name: it for name, it in leaves._asdict().items() if name != "zi_logits" or more}
    gradients = torch.autograd.grad(found.loss, list(wanted.values()))
    return found, dict(zip(wanted, gradients, strict=True))


def divergence(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    return kl_divergence(Normal(loc, scale), Normal(prior_loc, prior_scale))


def conditions(formula: Any, *inputs: Tensor) -> Any:
    return exact(SimpleNamespace(formula=formula, grouped=False, target_has_slope=True), inputs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("likelihood", HOSTS)
def test_each_number_and_gradient_is_within_the_bound_of_the_host_s_float64(likelihood, dispersion, backend):
    parts, x = parts_and_counts(likelihood, dispersion)
    wide = Parts(*[part.double() for part in parts])
    module = vae(likelihood, dispersion)
    expected, of_host = losses(module, wide, x.double(), module.loss)
    fuse(module)
    before = Launches.count
    with fastvae.use_backend(backend):
        found, own = losses(module, parts, x, module.loss)
    # Forward and backward of the likelihood and of two divergences.
    assert Launches.count - before == (6 if backend == "triton" else 0)

    theta = wide.dispersion.exp().expand(B, G) if dispersion == "gene" else wide.dispersion
    each = exact(LIKELIHOODS[likelihood], [wide.mu, theta, *[wide.zi_logits] * (likelihood == "zinb"), x.double()])
    of_likelihood = LIKELIHOODS[likelihood].roundings
    scales = [each.scale(k, roundings) for k, roundings in enumerate(of_likelihood)]
    more = 2 if dispersion == "gene" else 0  # exp(px_r) has an error of an ulp

    def check(name: str, actual: Tensor, wanted: Tensor, scale: Tensor, roundings: int) -> None:
        assert actual.dtype is torch.float32
        assert_within(actual, wanted, scale, roundings + FACTOR, name)

    of_cells = of_likelihood[0] + levels(G) + more
    reconstruction = found.reconstruction_loss["reconstruction_loss"]
    check(
        "reconstruction",
        reconstruction,
        expected.reconstruction_loss["reconstruction_loss"],
        scales[0].sum(-1),
        of_cells,
    )
    check("mu", own["mu"], of_host["mu"], scales[1] / B, of_likelihood[1] + more)
    by_theta = scales[2] / B
    if dispersion == "gene":
        by_theta = (theta * by_theta).sum(0)
        more += levels(B) + 5
    check("dispersion", own["dispersion"], of_host["dispersion"], by_theta, of_likelihood[2] + more)
    if likelihood == "zinb":
        check("zi_logits", own["zi_logits"], of_host["zi_logits"], scales[3] / B, of_likelihood[3] + more)
    total = scales[0].sum(-1)
    for key, loc, scale, prior, weight in (
        ("kl_divergence_z", "loc", "scale", (0.0, 1.0), KL_WEIGHT),
        ("kl_divergence_l", "library_loc", "library_scale", PRIOR, 1.0),
    ):
        inputs = [getattr(wide, loc), getattr(wide, scale)]
        condition = conditions(divergence, *inputs, *[torch.full_like(inputs[0], number) for number in prior])
        kl = condition.scale(0, ROUNDINGS["kl"]).sum(-1)
        check(key, found.kl_local[key], expected.kl_local[key], kl, ROUNDINGS["kl"] + levels(K))
        for k, name in ((1, loc), (2, scale)):
            slopes = condition.scale(k, ROUNDINGS["kl"]) * weight / B
            check(name, own[name], of_host[name], slopes, ROUNDINGS["kl"])
        total = total + weight * kl
    check("loss", found.loss, expected.loss, total.mean(), max(of_cells, ROUNDINGS["kl"] + levels(K)) + levels(B))
    assert list(found.kl_local) == list(expected.kl_local) and found.n_obs_minibatch == expected.n_obs_minibatch == B


def test_rare_counts_and_large_dispersions_are_those_of_the_host_s_formula():
    """The mean may be so small that 1e-8 counts. From a dispersion of 1e4 on log Gamma cancels in the host's float32,
    and of 1e6 in its float64, so the host's function is given numbers of 50 digits.
    """
    means, dispersions, counts = (
        [0.0, 1e-30, 1e-12, 1e-8, 1e-4, 1.0, 1e2],
        [1e-8, 1e-4, 1.0, 1e3, 1e6, 1e8],
        [0.0, 1.0, 1e2],
    )
    mu, theta, x = torch.cartesian_prod(*map(torch.tensor, (means, dispersions, counts))).split(1, 1)
    px = NegativeBinomial(mu=mu, theta=theta)
    with mpmath.workdps(50):
        numbers = zip(*([mpmath.mpf(number) for number in it[:, 0].tolist()] for it in (x, mu, theta)), strict=True)
        of_host = [log_nb_positive(*each, log_fn=mpmath.log, lgamma_fn=mpmath.loggamma) for each in numbers]
    expected = -torch.tensor([float(it) for it in of_host], dtype=torch.float64)
    module, latent = vae("nb", "gene-batch"), Normal(torch.zeros(len(x), K), torch.ones(len(x), K))
    module.use_observed_lib_size = True
    fuse(module)
    found = module.loss({"X": x}, {"qz": latent, "z": latent.loc}, {"px": px}).reconstruction_loss[
        "reconstruction_loss"
    ]
    assert_within(found, expected, exact(LIKELIHOODS["nb"], [mu, theta, x]).scale(0, 16)[:, 0], 16)
    assert (-px.log_prob(x)[:, 0] - expected).abs().max() > 10


# -------------------------------------------------------------------------------------------- the encoder's posterior


def test_the_sample_is_the_host_s_of_the_same_noise(adata):
    host, own = made(adata).module.eval(), made(adata).module.eval()
    fuse(own)
    x, batch = torch.from_numpy(adata.X), torch.zeros(CELLS, 1)
    scvi.settings.seed = 0
    expected = host.inference(x, batch)
    scvi.settings.seed = 0
    found = own.inference(x, batch)
    assert list(found) == list(expected) and isinstance(found["qz"], Normal)
    assert torch.equal(found["qz"].loc, expected["qz"].loc) and torch.equal(found["qz"].scale, expected["qz"].scale)
    scale = expected["qz"].loc.abs() + (expected["z"] - expected["qz"].loc).abs()
    k = named(operations())["gaussian_sample_kl"].roundings["z"] + 8  # the logarithm and exponential of a sum
    assert_within(found["z"], expected["z"].double(), scale, k, "z")
    scvi.settings.seed = 0
    several = own.inference(x, batch, n_samples=3)
    assert several["z"].shape == (3, CELLS, 5) and several["qz"].variance.shape == (CELLS, 5)
    # As scvi-tools collects and selects posteriors.
    store = scvi.distributions._utils.DistributionConcatenator()
    for _ in range(2):
        store.store_distribution(found["qz"])
    both = store.get_concatenated_distributions()
    assert torch.equal(both.scale, expected["qz"].scale.repeat(2, 1))
    some = scvi.distributions._utils.subset_distribution(found["qz"], torch.tensor([1, 3]))
    assert torch.equal(some.log_prob(expected["z"][[1, 3]]), expected["qz"].log_prob(expected["z"])[[1, 3]])


def test_the_kernels_run_a_step_of_the_training(adata):
    """The noise is another one than on the CPU, so z is given back to the host's code."""
    own, host = made(adata).module, made(adata).module
    fuse(own)
    tensors = batch_of(adata, 3)
    before = Launches.count
    with fastvae.use_backend("triton"):
        inference, generative, found = own(tensors)
        found.loss.backward()
    assert Launches.count - before == 4  # of the encoder's sample with its divergence, and of the likelihood
    again = VAE.loss(host, tensors, inference, generative)  # of the same samples
    for name in ("reconstruction_loss", "kl_local"):
        for key, expected in getattr(again, name).items():
            allowed = 40 * 2.0**-24 * (found.loss.abs() + expected.abs())
            assert ((getattr(found, name)[key] - expected).abs() <= allowed).all(), key
    assert own.px_r.grad.isfinite().all() and own.z_encoder.var_encoder.weight.grad.abs().sum() > 0


def batch_of(adata: anndata.AnnData, cells: int) -> dict[str, Tensor]:
    """As the host's loader makes it."""
    x = torch.from_numpy(adata.X[:cells])
    columns = {"batch": (cells, 1), "labels": (cells, 1), "extra_categorical_covs": (cells, 1)}
    return {"X": x, "extra_continuous_covs": torch.ones(cells, 1)} | {
        name: torch.zeros(shape, dtype=torch.long) for name, shape in columns.items()
    }


# ---------------------------------------------------------------------------------------- what models do after training


def seeded(function: Any, *arguments: Any, **options: Any) -> Any:
    scvi.settings.seed = 2
    return function(*arguments, **options)


@pytest.fixture(scope="module")
def pair(adata) -> tuple[Any, Any]:
    """A trained model, and its copy that is fused."""
    host = trained(made(adata, gene_likelihood="nb"))
    own = copy.deepcopy(host)
    fuse(own)
    return host, own


METHODS = {
    "get_elbo": {},
    "get_reconstruction_error": {},
    "get_latent_representation": {},
    "get_normalized_expression": {"return_numpy": True},
    "get_marginal_ll": {"n_mc_samples": 4, "n_mc_samples_per_pass": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_the_model_returns_the_host_s_numbers(pair, method):
    host, own = (np.asarray(as_numbers(seeded(getattr(it, method), **METHODS[method]))) for it in pair)
    assert host.shape == own.shape and host.dtype == own.dtype
    # z has 14 roundings, the decoder fewer for each number than a sum over 16 neurons has, the likelihood 16.
    np.testing.assert_allclose(own, host, rtol=2.0**-24 * 100, atol=2.0**-24 * 100 * np.abs(host).max())


def as_numbers(result: Any) -> Any:
    return list(result.values()) if isinstance(result, dict) else result


@pytest.mark.parametrize("options", [{"dispersion": "gene-cell"}, {"use_observed_lib_size": False}], ids=str)
def test_several_samples_of_z_have_the_host_s_shapes_and_numbers(adata, options):
    own, tensors = made(adata, **options).module, batch_of(adata, 8)
    fuse(own)
    inference, generative, found = own(tensors, inference_kwargs={"n_samples": 3})
    expected = VAE.loss(own, tensors, inference, generative)
    allowed = 100 * 2.0**-24 * expected.loss
    assert abs(found.loss - expected.loss) <= allowed and found.n_obs_minibatch == expected.n_obs_minibatch
    for name in ("reconstruction_loss", "kl_local"):
        for key, numbers in getattr(expected, name).items():
            own_numbers = getattr(found, name)[key]
            assert own_numbers.shape == numbers.shape and ((own_numbers - numbers).abs() <= allowed).all(), key


@pytest.mark.parametrize("per_pass", [1, 2, 4, 8])
def test_the_marginal_likelihood_is_corrected_where_that_is_asked_for(pair, per_pass):
    """Six samples, of which 4 a pass make eight, and 8 a pass are six."""
    host, own = pair[0], copy.deepcopy(pair[0])
    report = fuse(own, correct=True)
    assert list(report.defects) == ["marginal_ll"] and report.corrected and not fuse(pair[1]).corrected
    options = {"n_mc_samples": 6, "n_mc_samples_per_pass": per_pass}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the host, that six is fewer than eight
        expected, found = (seeded(it.get_marginal_ll, return_mean=True, **options) for it in (host, own))
        as_host = seeded(pair[1].get_marginal_ll, return_mean=True, **options)
    drawn = {1: 6, 2: 6, 4: 8, 8: 6}[per_pass]
    allowed = 2.0**-24 * 100 * abs(expected)
    assert abs(found - (expected + np.log(6 / drawn))) <= allowed
    assert abs(as_host - expected) <= allowed < 0.1


def test_samples_and_parameters_of_the_likelihood_are_as_before(pair, adata):
    host, own = (seeded(it.get_likelihood_parameters) for it in pair)
    assert list(host) == list(own) and [it.shape for it in host.values()] == [it.shape for it in own.values()]
    # What posterior_predictive_sample puts into a sparse array.
    host, own = (seeded(it.module.sample, batch_of(adata, 8), n_samples=2) for it in pair)
    assert own.shape == host.shape == (8, GENES, 2) and own.dtype is host.dtype
    assert (own >= 0).all() and torch.equal(own, own.round()) and own.sum() > 0


def test_a_saved_model_is_the_host_s_and_a_loaded_one_is_not_fused(pair, adata, tmp_path):
    host, own = pair
    own.save(str(tmp_path / "model"), save_anndata=False)
    loaded = scvi.model.SCVI.load(str(tmp_path / "model"), adata=adata)
    assert report_of(loaded.module) is None and report_of(own.module) is not None
    assert all(torch.equal(it, loaded.module.state_dict()[name]) for name, it in host.module.state_dict().items())
    assert fuse(loaded) == report_of(own.module)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_fused_and_has_weights_of_its_own(pair, adata, copied):
    own = pair[1].module
    twin = copied(own)
    assert twin.loss.args == (twin,) and twin.z_encoder.forward.args == (twin.z_encoder,)
    with torch.no_grad():
        twin.px_r.add_(1)
    tensors = batch_of(adata, 8)
    assert seeded(twin, tensors)[2].loss != seeded(own, tensors)[2].loss
    unfuse(twin)
    assert report_of(own) is not None and "forward" in vars(own.z_encoder) and "forward" not in vars(twin.z_encoder)


def test_minified_data_take_the_host_s_loss(adata, monkeypatch):
    host = trained(made(adata.copy()))
    mean, variance = host.get_latent_representation(return_dist=True)
    host.adata.obsm["X_latent_qzm"], host.adata.obsm["X_latent_qzv"] = mean, variance
    own = copy.deepcopy(host)
    fuse(own)
    for model in (host, own):
        model.minify_adata(minified_data_type="latent_posterior_parameters_with_counts")
    monkeypatch.setattr(integration, "_reconstruction", None)
    expected, found = (seeded(it.get_elbo) for it in (host, own))
    assert expected == found
    assert np.array_equal(*(seeded(it.get_latent_representation) for it in (host, own)))
    for model in (host, own):
        model.minify_adata(minified_data_type="latent_posterior_parameters")
        with pytest.raises(ValueError, match=r"VAE\.loss function currently does not support minified data"):
            model.module.loss({}, {}, {})


# ------------------------------------------------------------------------------------------------- around the module


def test_under_autocast_the_dtypes_are_the_host_s_and_the_numbers_those_of_float32(adata):
    host, own = (made(adata).module.eval() for _ in range(2))
    fuse(own)
    tensors = batch_of(adata, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inference, generative, found = own(tensors)
        expected = host(tensors)
        again = VAE.loss(host, tensors, inference, generative)
    assert inference["z"].dtype is expected[0]["z"].dtype
    assert inference["qz"].loc.dtype is expected[0]["qz"].loc.dtype is torch.bfloat16
    assert inference["qz"].scale.dtype is expected[0]["qz"].scale.dtype
    assert found.loss.dtype is expected[2].loss.dtype is torch.float32
    found.loss.backward()
    assert all(it.grad.isfinite().all() for it in own.parameters() if it.grad is not None)
    assert abs(found.loss - again.loss) <= 100 * 2.0**-24 * again.loss  # of the same outputs of the networks


def test_bfloat16_weights_train(adata):
    own = made(adata)
    fuse(own)
    trained(own, precision="bf16-true")
    assert (
        own.module.px_r.dtype is torch.bfloat16
        and np.isfinite(own.history["train_loss"].to_numpy().astype(float)).all()
    )


class Step(torch.nn.Module):
    """What Lightning gives to DistributedDataParallel: a module whose forward is the loss."""

    def __init__(self, module: VAE) -> None:
        super().__init__()
        self.module = module

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.module(tensors)[2].loss


def test_distributed_data_parallel_and_torch_compile_run_the_fused_loss(adata, tmp_path, monkeypatch):
    # torch.compile turns off the checks of distributions, for good.
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)
    own = made(adata, gene_likelihood="nb").module
    fuse(own)
    tensors = batch_of(adata, 8)
    expected = seeded(Step(own), tensors)
    wanted = torch.autograd.grad(expected, own.z_encoder.parameters())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(Step(own), find_unused_parameters=True)
        seeded(parallel, tensors).backward()
    finally:
        torch.distributed.destroy_process_group()
    for weight, gradient in zip(own.z_encoder.parameters(), wanted, strict=True):
        assert torch.equal(weight.grad, gradient)
    assert own.decoder.px_dropout_decoder.weight.grad is None  # as it has none in the host's own training
    torch.compiler.reset()
    compiled = torch.compile(own, backend="eager")
    assert inspect.signature(compiled.loss).parameters.keys() == inspect.signature(VAE.loss).parameters.keys() - {
        "self"
    }
    assert torch.equal(seeded(compiled, tensors)[2].loss, expected)


def test_the_payload_for_the_tuner_is_returned(adata):
    own = made(adata).module
    own.extra_payload_autotune = True
    tensors = batch_of(adata, 4)
    fuse(own)
    inference, _, found = own(tensors)
    assert list(found.extra_metrics) == ["z", "batch", "labels"] and found.extra_metrics["z"] is inference["z"]


# -------------------------------------------------------------------------------------------------- report and errors


def test_the_loss_waits_for_no_device_and_warns_of_no_counts(adata):
    """`ZeroInflatedNegativeBinomial.log_prob` checks the counts in each step, and that waits for the device."""
    own = made(adata).module
    tensors = batch_of(adata, 8)
    tensors["X"] = tensors["X"] + 0.5
    with pytest.warns(UserWarning, match="within the support"):
        inference, generative, expected = seeded(own, tensors)
    fuse(own)
    with warnings.catch_warnings(), Waits() as waits:
        warnings.simplefilter("error")
        found = own.loss(tensors, inference, generative)
        assert waits.count == 0
        warnings.simplefilter("ignore")
        VAE.loss(own, tensors, inference, generative)
        assert waits.count > 0
    assert abs(found.loss - expected.loss) <= 100 * 2.0**-24 * expected.loss


class Waits(TorchDispatchMode):
    """Counts what reads a number from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*arguments, **(keywords or {}))


def test_the_dispersion_of_each_gene_is_not_expanded(adata, monkeypatch):
    own = made(adata).module
    fuse(own)
    given = []
    function = fastvae.functional.negative_log_likelihood

    def recorded(parameters, *others, **options):
        given.extend(parameters)
        return function(parameters, *others, **options)

    monkeypatch.setattr(fastvae.functional, "negative_log_likelihood", recorded)
    _, generative, _ = own(batch_of(adata, 8))
    assert [list(it.shape) for it in given] == [[8, GENES], [GENES], [8, GENES]]
    assert generative["px"].theta.shape == (8, GENES)  # what the host's code reads stays


class Scaled(VAE):
    """With a px of its own, the host's loss would be right, and a fused one wrong."""

    def generative(self, *arguments: Any, **options: Any) -> Any:
        outputs = super().generative(*arguments, **options)
        outputs["px"] = ZeroInflatedNegativeBinomial(mu=outputs["px"].mu, theta=outputs["px"].theta * 2)
        return outputs


def test_few_numbers_take_the_host_s_code_where_no_kernel_runs(adata, monkeypatch):
    own, tensors = made(adata).module, batch_of(adata, 8)
    fuse(own)
    called = []
    log_prob = ZeroInflatedNegativeBinomial.log_prob
    monkeypatch.setattr(ZeroInflatedNegativeBinomial, "log_prob", lambda *given: called.append(0) or log_prob(*given))
    for small, calls in ((8 * GENES, 0), (8 * GENES + 1, 1)):
        monkeypatch.setattr(integration, "SMALL", small)
        own(tensors)
        assert len(called) == calls
    with fastvae.use_backend("triton"):
        own(tensors)
    assert len(called) == calls


def test_the_report_says_what_is_fused_and_what_stays(adata):
    def keys(model: Any) -> tuple[set[str], set[str]]:
        report = fuse(model)
        assert report is report_of(getattr(model, "module", model)) and not report.corrected
        return set(report.fused), set(report.kept)

    every = {"reconstruction", "divergences", "sample of z"}
    assert keys(made(adata)) == (every, set())
    assert keys(made(adata, gene_likelihood="nb")) == (every | {"px_dropout_decoder"}, set())
    assert keys(made(adata, gene_likelihood="poisson")) == (
        {"divergences", "sample of z", "px_dropout_decoder"},
        {"reconstruction"},
    )
    assert keys(made(adata, scvi.model.LinearSCVI)) == (every, {"px_dropout_decoder", "sample of the library size"})
    assert keys(made(adata, scvi.model.SCANVI)) == ({"reconstruction"}, {"divergences and sample of z"})
    assert keys(scvi.module.AutoZIVAE(GENES)) == (set(), {"loss"})
    assert keys(Scaled(GENES)) == (set(), {"loss"})
    assert "scvi.VAE: 3 fused, 0 kept" in str(fuse(made(adata)))


def test_unfuse_gives_every_method_back(adata):
    own = made(adata, gene_likelihood="nb")
    before = [dict(vars(part)) for part in own.module.modules()]
    assert fuse(own).methods == ("loss",) and fuse(own).methods == ("loss",)
    assert "forward" in vars(own.module.decoder.px_dropout_decoder)
    unfuse(own)
    assert [dict(vars(part)) for part in own.module.modules()] == before
    unfuse(own)


def test_other_objects_raise_an_error_that_names_them(adata):
    with pytest.raises(TypeError, match=r"module must be a scvi\.module\.VAE.* got scvi\.PEAKVAE$"):
        fuse(scvi.module.PEAKVAE(20))
    with pytest.raises(TypeError, match=r"got builtins\.int"):
        unfuse(3)
    own = made(adata).module
    own.z_encoder.forward = own.z_encoder.forward  # as a profiler puts one there
    with pytest.raises(ValueError, match=r"Encoder\.forward was replaced"):
        fuse(own)
    assert report_of(own) is None and "loss" not in vars(own)
