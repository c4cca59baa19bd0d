"""The losses of pythae's variational autoencoders on fused operations.

    from fastvae.integrations.pythae import fuse, unfuse

    print(fuse(model))  # what is fused, what is not and why
    BaseTrainer(model, train_dataset).train()

`fuse` takes a VAE, BetaVAE, DisentangledBetaVAE, BetaTCVAE, VAMP, INFOVAE_MMD, IWAE, CIWAE or MIWAE, or an object of a
subclass. It exchanges `forward`, which then draws z in one launch from the encoder's log-variance, together with the
divergence or the log-density of z, and computes the loss by fused operations. It exchanges `loss_function` too, for
subclasses that have a `forward` of their own. `save`, `get_nll`, the trainers and the samplers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pythae.models import CIWAE, IWAE, MIWAE, VAE, VAMP, BetaTCVAE

from fastvae.integrations.fusion import Report, class_name, exchange, restore
from fastvae.integrations.pythae_losses import FAMILIES, Settings, vamp_log_p_z
from fastvae.integrations.pythae_networks import ends_in_sigmoid


def fuse(model: VAE, *, correct: bool = False) -> Report:
    """Let a model of pythae draw z and compute its loss by fused operations.

    The values, the reductions and the fields of ModelOutput stay pythae's. A value that is not what pythae says it is
    stays too, and the report says so; with ``correct`` it is the right one. Settings of the model, such as ``beta``,
    are read at each call. Call `fuse` again after exchanging the decoder or changing ``use_mss``.

    Where no kernel runs, as on a CPU, pythae's own code runs as long as it is quicker: for a loss without pairs of
    samples, and for pairs of fewer than a million numbers.

    Args:
        model: an object of one of the classes above or of a subclass. A method that is the subclass's own, or that
            was replaced on the object, stays.
        correct: compute what the report lists under ``defects`` as it is documented.

    Returns:
        Report, with what is fused, and what stays pythae's code and why.

    Raises:
        TypeError: a model of another class.
    """
    host = next((each for each in type(model).__mro__ if each.__module__.startswith("pythae.")), None)
    if host not in FAMILIES:
        names = ", ".join(each.__name__ for each in FAMILIES)
        raise TypeError(f"model must be an object of pythae's {names} or of a subclass, got {class_name(model)}")
    restore(model)

    def is_pythaes(name: str) -> bool:
        return name not in vars(model) and getattr(type(model), name) is getattr(host, name)

    family = FAMILIES[host]
    wanted = ("forward", "_sample_gauss", *family.replaced)
    own = {name for name in wanted if is_pythaes(name)}
    kept = {name: "this object's is not pythae's" for name in wanted if name not in own}
    loss = own.issuperset(family.replaced)
    if loss and host is BetaTCVAE and model.use_mss and not correct:
        loss, kept["loss_function"] = False, "no fused operation has pythae's weights of use_mss; correct=True fuses it"
    forward = own >= {"forward", "_sample_gauss"} and (loss or family.loss_function is not None)
    of_bce = loss and model.model_config.reconstruction_loss == "bce"
    logits = of_bce and correct and forward and ends_in_sigmoid(model)
    settings = Settings(host, loss, logits, correct)

    methods: dict[str, Callable[..., Any]] = {}
    fused = {}
    if forward:
        methods["forward"] = partial(family.forward, settings)
        fused["forward"] = f"one launch draws z; {family.fused}" if loss else "one launch draws z"
    elif "forward" in own:
        kept["forward"] = "it calls a method that is not pythae's"
    if loss and family.loss_function is not None:
        methods["loss_function"] = partial(family.loss_function, settings)
        fused["loss_function"] = family.fused
    if host is VAMP and is_pythaes("_log_p_z"):
        methods["_log_p_z"] = vamp_log_p_z
        fused["_log_p_z"] = "gaussian_mixture_log_prob, in get_nll too"
    if of_bce and not logits:
        kept["binary cross-entropy"] = (
            "of probabilities: forward does not find the nn.Sigmoid whose output is the reconstruction"
            if correct
            else "of probabilities; correct=True computes it of the logits"
        )
    kept.setdefault("_sample_gauss", "it returns the noise too; only get_nll calls it")
    return exchange(model, Report(class_name(model), fused, kept, _defects(model, host), correct), methods)


def unfuse(model: VAE) -> None:
    """Give the model pythae's methods back. Nothing happens if it is not fused."""
    restore(model)


def _defects(model: VAE, host: type) -> dict[str, str]:
    found = {}
    if model.model_config.reconstruction_loss == "bce":
        found["binary cross-entropy"] = (
            "a float32 probability is 0 or 1 beyond a logit of about 17, so that a wrong pixel costs 100 nats with no "
            "gradient; of the logits it costs |logit|, with a gradient of 1"
        )
    if host is BetaTCVAE and model.use_mss:
        found["use_mss"] = (
            "the weight 1/N of a sample's own posterior is in the first column instead of on the diagonal, and the "
            "weights of a row do not sum to 1"
        )
    if host in (IWAE, CIWAE, MIWAE):
        found["loss"] = "the value is -sum_s w_s log w_s with normalised w_s, not the bound; the gradient is right"
    if host is MIWAE:
        found["weights"] = "w_s are normalised over number_gradient_estimates instead of number_samples"
    return found
