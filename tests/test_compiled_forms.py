"""Everything that the interpreter runs, the compiler compiles: `compiled_forms.py`, in a process of its own, because a
kernel is decorated for one of the two.
"""

from __future__ import annotations

import json
from itertools import combinations, product
from pathlib import Path

import pytest

from compiled_forms import covering
from conftest import compiling
from fastvae.operations import all_kernel_names

KERNELS = {name.split(".")[1] for name in all_kernel_names()} | {"score_kernel", "gather_batch_kernel"}


@pytest.fixture(scope="module")
def compiled() -> dict:
    return json.loads(compiling(Path(__file__).with_name("compiled_forms.py")))


@pytest.mark.slow
def test_every_form_of_every_kernel_compiles(compiled):
    assert set(compiled["forms"]) == KERNELS
    assert sum(compiled["forms"].values()) > 500
    assert not compiled["wrong"], "\n".join(compiled["wrong"])


@pytest.mark.slow
def test_a_form_that_only_the_interpreter_runs_is_found(compiled):
    right, wrong = compiled["planted"]
    assert right is None
    assert wrong.startswith("planted_kernel") and "'RUN': 1" in wrong


def test_every_pair_of_choices_is_covered():
    forms = [("kernel", *choices) for choices in product("ab", "cd", "ef", "gh")]
    chosen = list(covering(forms))
    assert len(chosen) < len(forms)
    for (i, first), (j, second) in combinations(enumerate(("ab", "cd", "ef", "gh"), start=1), 2):
        assert {(form[i], form[j]) for form in chosen} == set(product(first, second))
