"""What only a GPU can show: graphs, streams, other devices, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import fastvae
import fastvae.functional as F
from fastvae import random
from fastvae.models import ConvVAE
from fastvae.operations import named, operations
from fastvae.training import Training, train
from fastvae.training.objectives import OBJECTIVES
from oracle import check_results, oracle

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fused():
    with fastvae.use_backend("triton"):
        yield


def captured(step):
    """A CUDA graph of `step`, after the warm-up that capture asks for, and what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), random.by_pointer():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_a_captured_training_step(device):
    """Two replays draw different noise, reseeding repeats it, and a beta on the device changes between replays."""
    moments = torch.randn(128, 32, device=device, requires_grad=True)
    logits = torch.randn(128, 1, 28, 28, device=device, requires_grad=True)
    target = torch.rand(128, 1, 28, 28, device=device)
    beta = torch.ones((), device=device)

    def step():
        z, kl = F.gaussian_sample_kl_packed(moments)
        values, (logits_grad, kl_grad) = F.elbo_value_and_grad(logits, target, kl, beta=beta)
        (moments_grad,) = torch.autograd.grad((kl, z), moments, (kl_grad, z.detach()))
        return z, values, logits_grad, moments_grad

    graph, (z, values, _, moments_grad) = captured(step)

    def replay(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        return z.clone(), moments_grad.clone(), values.loss.clone()

    first, second = replay(), replay()
    assert (first[0] != second[0]).any()
    for a, b in zip(replay(seed=5), replay(seed=5), strict=True):
        assert torch.equal(a, b)

    # Backward made the noise again: with z_grad = z and kl_grad = 1 / B, the gradient is known from z.
    mu, logvar = moments.detach().chunk(2, 1)
    expected_mu = z + beta / 128 * mu
    expected_logvar = 0.5 * (z * (z - mu) + beta / 128 * torch.expm1(logvar))
    torch.testing.assert_close(moments_grad, torch.cat((expected_mu, expected_logvar), 1), rtol=1e-4, atol=1e-5)

    with_beta_1 = replay(seed=5)[2]
    beta.fill_(3.0)
    with_beta_3 = replay(seed=5)[2]
    torch.testing.assert_close(with_beta_3 - with_beta_1, 2 * values.kl)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_as_a_graph(objective, device):
    """On two pictures, whose reconstruction loses four tenths or more in these epochs without a graph."""
    torch.manual_seed(0)
    pictures = torch.randint(0, 2, (2, 1, 8, 6), dtype=torch.uint8, device=device) * 255
    data = pictures[torch.arange(640, device=device) % 2]
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6)).to(device)
    settings = Training(epochs=4, batch_size=32, learning_rate=0.01, objective=objective, graph="on")
    rows = train(model, data, data[:64], settings)
    assert rows[-1].step == 80
    assert rows[-1].reconstruction < 0.8 * rows[0].reconstruction


def test_long_sums_in_a_captured_graph(device):
    """Each capture owns its ticket: replays on two streams at once do not disturb each other or eager launches."""
    logits, target = torch.randn(64, 3, 128, 128, device=device), torch.rand(64, 3, 128, 128, device=device)
    expected = F.sigmoid_mse_loss(logits, target, reduction="none")
    graphs = [captured(lambda: F.sigmoid_mse_loss(logits, target, reduction="none")) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = F.sigmoid_mse_loss(logits, target, reduction="none")
    torch.cuda.synchronize()
    for loss in (eager, *[loss for _, loss in graphs]):
        assert torch.equal(loss, expected)


@pytest.mark.slow
def test_a_hundred_thousand_launches_on_four_streams(device):
    """The ticket holds: every result is bit for bit that of the same call alone, whatever runs beside it."""
    sizes = [(3, 5000), (16, 8192), (7, 20_001), (64, 4097), (2, 100_000)]
    cases = [(torch.randn(size, device=device), torch.rand(size, device=device)) for size in sizes]
    expected = [F.sigmoid_mse_loss(*case, reduction="none") for case in cases]
    operation = named(operations())["sigmoid_mse_loss"]
    for case, loss in zip(cases, expected, strict=True):
        exact = oracle(operation, case, {"loss": torch.ones_like(loss)}, reduction="none")
        check_results({"loss": loss}, exact)
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = [torch.zeros((), dtype=torch.int64, device=device) for _ in streams]
    torch.cuda.synchronize()
    for i in range(100_000):
        with torch.cuda.stream(streams[i % 4]):
            case = (i * 7919) % len(cases)
            loss = F.sigmoid_mse_loss(*cases[case], reduction="none")
            if i % 50 < 4:
                wrong[i % 4] += (loss != expected[case]).sum()
    torch.cuda.synchronize()
    assert sum(int(count) for count in wrong) == 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device):
    elements = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 5 * 2 * elements:
        pytest.skip("needs 21 GB of free memory on the device")
    logits = torch.zeros(2, elements // 2, dtype=torch.bfloat16, device=device)
    target = torch.zeros_like(logits)
    logits[1, -1] = 1e4
    losses = F.sigmoid_mse_loss(logits, target, reduction="none")
    torch.testing.assert_close(
        losses, torch.tensor([0.25 * (elements // 2), 0.25 * (elements // 2 - 1) + 1], device=device)
    )
    _, (gradient, _) = F.elbo_value_and_grad(logits, target, torch.zeros(2, device=device))
    assert gradient[1, -1] == 0 and gradient[0, 0] == gradient[1, -2] == torch.tensor(0.0625).to(torch.bfloat16)
    del target, gradient
    logits[1, -1] = 0
    z = F.gaussian_sample(logits, logits)
    # The noise far out is noise: no repetition of the beginning, which an overflowing counter would be.
    assert z[1, -4096:].float().std() > 0.9 and not torch.equal(z[1, -4096:], z[0, :4096])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    model = torch.nn.Linear(16, 32, device=device)
    decoder = torch.nn.Linear(16, 64, device=device)
    x, target = torch.randn(8, 16, device=device), torch.rand(8, 64, device=device)
    with torch.autocast("cuda", dtype=dtype):
        z, kl = F.gaussian_sample_kl_packed(model(x))
        logits = decoder(z)
        values = F.elbo_loss(logits, target, kl)
    assert z.dtype is dtype and logits.dtype is dtype
    assert kl.dtype is torch.float32 and values.loss.dtype is torch.float32
    values.loss.backward()
    assert model.weight.grad.dtype is torch.float32 and model.weight.grad.isfinite().all()


def test_a_grad_scaler_step(device):
    """The fast path under float16 with a GradScaler: its scale goes in as grad_scale, its step and update follow as
    usual.
    """
    model = torch.nn.Linear(16, 64, device=device)
    optimizer = torch.optim.Adam(model.parameters())
    scaler = torch.amp.GradScaler("cuda")
    x, target = torch.randn(8, 16, device=device), torch.rand(8, 64, device=device)
    scale = scaler.scale(torch.ones((), device=device))
    with torch.autocast("cuda", dtype=torch.float16):
        logits = model(x)
    kl = torch.zeros(8, device=device, requires_grad=True)
    _, gradients = F.elbo_value_and_grad(logits, target, kl, grad_scale=scale)
    torch.autograd.backward((logits, kl), gradients)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert (model.weight != before).any()


def test_another_device_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    torch.cuda.set_device(0)
    moments = torch.randn(8, 32, device="cuda:1", requires_grad=True)
    z, kl = F.gaussian_sample_kl_packed(moments)
    (z.sum() + kl.sum()).backward()
    loss = F.sigmoid_mse_loss(torch.zeros(4, 9000, device="cuda:1"), torch.zeros(4, 9000, device="cuda:1"))
    assert loss.item() == 0.25 * 9000 and moments.grad.isfinite().all() and torch.cuda.current_device() == 0


def test_nothing_synchronises(device):
    moments = torch.randn(128, 32, device=device, requires_grad=True)
    logits = torch.randn(128, 3, 64, 64, device=device, requires_grad=True)
    target = torch.randint(0, 256, logits.shape, dtype=torch.uint8, device=device)

    def step():
        z, kl = F.gaussian_sample_kl_packed(moments)
        F.elbo_value_and_grad(logits, target, kl)
        (F.elbo_loss(logits, target, kl).loss + z.sum()).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
