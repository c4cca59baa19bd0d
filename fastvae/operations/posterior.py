"""The operations of the posterior."""

from __future__ import annotations

from dataclasses import replace

from fastvae.operations.operation import REDUCTIONS, Operation


def of_posterior() -> list[Operation]:
    halves, packed = ("mu", "logvar"), ("moments",)
    reductions = (*REDUCTIONS, "per_dimension")
    of_dimensions = {
        "forward": ("posterior.dimensions_forward_kernel",),
        "backward": ("posterior.dimensions_backward_kernel",),
    }
    sample = Operation(
        name="gaussian_sample",
        function="gaussian_sample",
        arguments=halves,
        gradients=halves,
        outputs=("z",),
        roots=1,
        forward="mu + logvar -> z",
        backward="logvar + z_grad -> mu_grad + logvar_grad",
        kernels={
            "forward": ("posterior.gaussian_forward_kernel",),
            "backward": ("posterior.gaussian_backward_kernel",),
        },
        roundings={"z": 6, "kl": 10, "mu_grad": 4, "logvar_grad": 10},  # mu_grad: 3, and one for the upstream factor
        launches={"forward": 1, "backward": 1},
        draws_noise=True,
        computes="z = mu + exp(logvar / 2) · eps",
    )
    divergence = replace(
        sample,
        name="gaussian_kl",
        function="gaussian_kl",
        outputs=("kl",),
        forward="mu + logvar ->",
        backward="mu + logvar -> mu_grad + logvar_grad",
        reductions=reductions,
        draws_noise=False,
        computes="KL(N(mu, exp(logvar)) ‖ N(0, I))",
    )
    both = replace(
        sample,
        name="gaussian_sample_kl",
        function="gaussian_sample_kl",
        outputs=("z", "kl"),
        roots=2,
        backward="mu + logvar + z_grad -> mu_grad + logvar_grad",
        options={"reduction": "batchmean"},
        reductions=reductions,
        computes="z and its divergence",
    )
    of_packed = replace(
        both,
        name="gaussian_sample_kl_packed",
        function="gaussian_sample_kl_packed",
        arguments=packed,
        gradients=packed,
        computes="z and its divergence, from [mu \\| logvar] along any dimension, without a copy",
    )
    general = {
        "forward": ("general_posterior.general_forward_kernel",),
        "backward": ("general_gradients.general_backward_kernel",),
    }
    prior_halves = ("prior_mu", "prior_logvar")
    of_prior = {"kl": 26, "mu_grad": 26, "logvar_grad": 13, "prior_mu_grad": 26, "prior_logvar_grad": 28}
    to_prior = replace(
        divergence,
        name="gaussian_kl_prior",
        arguments=(*halves, *prior_halves),
        gradients=(*halves, *prior_halves),
        forward="mu + logvar + prior_mu + prior_logvar ->",
        backward="mu + logvar + prior_mu + prior_logvar -> mu_grad + logvar_grad + prior_mu_grad + prior_logvar_grad",
        kernels=general,
        roundings={**sample.roundings, **of_prior},
        call=lambda function, mu, logvar, *prior, **options: function(mu, logvar, prior=prior, **options),
        computes="KL(N(mu, exp(logvar)) ‖ N(prior_mu, exp(prior_logvar)))",
        measured=False,
    )
    return [
        sample,
        divergence,
        replace(
            divergence,
            name="gaussian_kl_free_bits",
            kernels=of_dimensions,
            launches={"forward": 2, "backward": 1},  # and a sum
            options={"free_bits": 0.5},
            reductions=("batchmean", "per_dimension"),
            computes="the same; each dimension counts as at least `free_bits`",
        ),
        to_prior,
        both,
        of_packed,
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_eps",
            arguments=("moments", "eps"),
            forward="mu + logvar + eps -> z",
            backward="mu + logvar + eps + z_grad -> mu_grad + logvar_grad",
            call=lambda function, moments, eps, **options: function(moments, eps=eps, **options),
            draws_noise=False,
            computes=None,
            measured=False,
        ),
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_per_dimension",
            kernels=of_dimensions,
            options={"reduction": "per_dimension", "free_bits": 0.5},
            reductions=("per_dimension", "batchmean"),
            computes="z, and the batch mean of each dimension's divergence, at least `free_bits`",
            measured=False,
        ),
        replace(
            of_packed,
            name="gaussian_sample_kl_packed_prior",
            arguments=("moments", "prior"),
            gradients=("moments", "prior"),
            forward="mu + logvar + prior_mu + prior_logvar -> z",
            backward="mu + logvar + prior_mu + prior_logvar + z_grad "
            "-> mu_grad + logvar_grad + prior_mu_grad + prior_logvar_grad",
            kernels=general,
            roundings=to_prior.roundings,
            call=lambda function, moments, prior, **options: function(moments, prior=prior, **options),
            computes="z and its divergence from a packed prior: a block of a hierarchical VAE",
            measured=False,
        ),
        replace(
            both,
            name="gaussian_sample_kl_softplus",
            kernels=general,
            roundings={"z": 14, "kl": 26, "mu_grad": 4, "logvar_grad": 26},
            options={"scale": "softplus", "scale_eps": 1e-4, "reduction": "batchmean"},
            computes="z and its divergence, with std = log(1 + exp(logvar)) + `scale_eps`",
            measured=False,
        ),
        replace(
            sample,
            name="gaussian_sample_samples",
            outputs=("z", "log_q"),
            roots=2,
            forward="mu + logvar -> z + z + z",
            backward="logvar + z_grad + z_grad + z_grad -> mu_grad + logvar_grad",
            kernels=general,
            # Two for each sample: its factor, and the sum.
            roundings={**sample.roundings, "log_q": 4, "mu_grad": 9, "logvar_grad": 16},
            options={"samples": 3, "log_prob": True},
            computes="three samples of each posterior, and their log-densities",
            measured=False,
        ),
    ]
