"""The example's training step in JAX: the same network, loss and optimiser, jitted, several steps in one lax.scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

LATENT = 16
LAYOUT = ("NHWC", "HWIO", "NHWC")


def runs_on_gpu() -> bool:
    return bool(jax.default_backend() == "gpu")


def _initial_parameters(key: Any) -> dict[str, Any]:
    shapes = {
        "conv1": (3, 3, 1, 32),
        "conv2": (3, 3, 32, 64),
        "moments": (7 * 7 * 64, 2 * LATENT),
        "project": (LATENT, 7 * 7 * 64),
        "up1": (3, 3, 64, 64),
        "up2": (3, 3, 64, 32),
        "logits": (3, 3, 32, 1),
    }
    glorot = jax.nn.initializers.glorot_uniform()
    return {
        name: (glorot(key, shape), jnp.zeros(shape[-1]))
        for key, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    }


def _down(x: Any, layer: Any) -> Any:
    return jax.nn.relu(lax.conv_general_dilated(x, layer[0], (2, 2), "SAME", dimension_numbers=LAYOUT) + layer[1])


def _up(x: Any, layer: Any, stride: int) -> Any:
    return lax.conv_transpose(x, layer[0], (stride, stride), "SAME", dimension_numbers=LAYOUT) + layer[1]


def _loss(parameters: dict[str, Any], batch: Any, key: Any) -> Any:
    x = batch.astype(jnp.float32) / 255
    hidden = _down(_down(x, parameters["conv1"]), parameters["conv2"]).reshape(len(x), -1)
    mu, logvar = jnp.split(hidden @ parameters["moments"][0] + parameters["moments"][1], 2, axis=1)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape)
    kl = 0.5 * jnp.sum(mu**2 + jnp.expm1(logvar) - logvar) / len(x)
    hidden = (z @ parameters["project"][0] + parameters["project"][1]).reshape(-1, 7, 7, 64)
    hidden = jax.nn.relu(_up(jax.nn.relu(_up(hidden, parameters["up1"], 2)), parameters["up2"], 2))
    y = jax.nn.sigmoid(_up(hidden, parameters["logits"], 1))
    return 0.5 * jnp.sum((y - x) ** 2) / len(x) + kl


def build(batches: Sequence[NDArray[np.uint8]], learning_rate: float, steps: int) -> Callable[[int], float]:
    """A function of the batch's number that makes `steps` steps of Adam on it and returns the last loss."""
    device_batches = [jnp.asarray(batch.transpose(0, 2, 3, 1)) for batch in batches]
    parameters = _initial_parameters(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    state = (parameters, zeros, zeros, jnp.zeros(()), jax.random.key(1))

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        def step(state: Any, _: None) -> tuple[Any, Any]:
            parameters, first, second, count, key = state
            key, noise = jax.random.split(key)
            loss, gradients = jax.value_and_grad(_loss)(parameters, batch, noise)
            count += 1
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
            rate = learning_rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
            parameters = jax.tree.map(
                lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8 * jnp.sqrt(1 - 0.999**count)),
                parameters,
                first,
                second,
            )
            return (parameters, first, second, count, key), loss

        state, losses = lax.scan(step, state, None, length=steps)
        return state, losses[-1]

    compiled = jax.jit(run, donate_argnums=0)
    # The first state's moments are one array twice, which may not be donated twice.
    holder = [jax.tree.map(jnp.copy, state)]

    def call(index: int) -> float:
        holder[0], loss = compiled(holder[0], device_batches[index])
        return float(loss)

    return call
