"""The number of threads of a CPU's steps."""

from __future__ import annotations

import pytest
import torch

from fastvae.models import ConvVAE
from fastvae.training import Training, threads, train
from listening import listener


class Machine:
    """A clock, and a step that takes the time that is given for torch's number of threads."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.steps = 0.0, seconds, []
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def step(self):
        number = torch.get_num_threads()
        self.steps.append(number)
        self.now += self.seconds[number]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({1: 0.0158, 2: 0.0119}, 2),  # an idle machine
        ({1: 0.0160, 2: 0.034}, 1),  # beside a busy process
        ({1: 0.01, 2: 0.01}, 1),
        ({1: 3.0, 2: 2.0, 4: 2.5}, 2),
    ],
)
def test_the_fastest_is_taken(monkeypatch, seconds, number):
    machine = Machine(monkeypatch, seconds)
    before = torch.get_num_threads()
    assert threads.fastest(list(seconds), machine.step) == number
    assert torch.get_num_threads() == before
    assert machine.now <= 3 * sum(max(0.4, it) for it in seconds.values())


def test_numbers_take_turns(monkeypatch):
    """A load that comes and goes meets all numbers."""
    machine = Machine(monkeypatch, {1: 0.25, 2: 0.25})
    threads.fastest([1, 2], machine.step)
    assert machine.steps == [1, 2, 1, 2, 1, 2]


def test_a_choice_leaves_the_model_and_the_random_numbers_alone(monkeypatch, two_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_SECONDS", 0.0)
    model = ConvVAE((1, 8, 8), 2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert threads.choose_threads(model, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 4) in (1, 2)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.get_num_threads() == 2


def test_a_model_that_cannot_be_copied_has_the_threads_of_torch(monkeypatch, two_threads):
    """torch.nn.utils.weight_norm leaves a weight that is computed, which deepcopy refuses."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "fastest", None)
    model = ConvVAE((1, 8, 8), 2)
    model.encoder[0].computed = 2 * model.encoder[0].weight
    assert threads.choose_threads(model, torch.zeros(4, 1, 8, 8), 4) == 2


@pytest.mark.parametrize("before", [0, -1, "2", 1.5])
def test_what_is_no_number_of_threads_is_refused(monkeypatch, two_threads, before):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(ValueError, match="resume does not fit: threads"):
        threads.choose_threads(ConvVAE((1, 8, 8), 2), torch.zeros(4, 1, 8, 8), 4, before=before)


def test_more_threads_than_there_are_now_are_chosen_anew(monkeypatch, two_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "fastest", lambda numbers, step: 1)
    assert threads.choose_threads(ConvVAE((1, 8, 8), 2), torch.zeros(4, 1, 8, 8), 4, before=64) == 1


def test_the_users_number_wins(monkeypatch, two_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "fastest", None)
    assert threads.choose_threads(ConvVAE((1, 8, 8), 2), torch.zeros(4, 1, 8, 8), 4) == 2


# ------------------------------------------------------------------------------------------------------------- training

DATA = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trained(monkeypatch, two_threads):
    """Train an epoch; returns the threads of its steps, and its state."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "fastest", lambda numbers, step: 1)

    def run(epochs=1, resume=None, **settings):
        seen, states = [], []

        def look(*arguments):
            seen.append(torch.get_num_threads())

        torch.manual_seed(0)
        model = ConvVAE((1, 8, 8), 2, channels=(2,))
        model.register_forward_hook(look)
        settings = Training(epochs=epochs, batch_size=4, **settings)
        train(model, DATA, DATA, settings, listeners=[listener(state=states.append)], resume=resume)
        return set(seen), states[-1]

    return run


def test_steps_have_the_threads_that_were_chosen(trained):
    seen, state = trained()
    assert seen == {1} and state.threads == 1
    assert torch.get_num_threads() == 2


def test_steps_have_the_threads_that_are_asked_for(trained):
    seen, state = trained(threads=2)
    assert seen == {2} and state.threads == 2


def test_training_goes_on_with_the_threads_that_it_had(trained):
    _, state = trained(threads=2)
    seen, later = trained(epochs=2, resume=state)
    assert seen == {2} and later.threads == 2
    # A state of before the number was kept.
    seen, _ = trained(epochs=2, resume=state._replace(threads=None))
    assert seen == {1}


def test_the_users_number_wins_over_that_of_a_state(trained, monkeypatch):
    _, state = trained()
    assert state.threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    seen, _ = trained(epochs=2, resume=state)
    assert seen == {2}


@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_threads_must_be_a_number_of_threads(trained, number, error):
    with pytest.raises(error, match="threads must be"):
        trained(threads=number)
