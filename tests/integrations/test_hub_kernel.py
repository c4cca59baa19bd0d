"""The layout of the Kernel Hub: written from these sources, loaded from a folder, equal to the installed package."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae.likelihoods import Bernoulli

PROGRAM = Path(__file__).parents[2] / "packaging" / "hub_kernel.py"
VARIANT = "build/torch-universal"

# As the package `kernels` loads it: under the name that is its id.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / sys.argv[2])
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
import torch
z, kl = kernel.functional.gaussian_sample_kl_packed(torch.zeros(2, 6))
assert kernel.likelihoods.ZeroInflatedNegativeBinomial() and kernel.priors.MixturePrior and kernel.nn.ELBOLoss
assert z.shape == (2, 3) and kl.tolist() == [0, 0]
assert not any(it == "fastvae" or it.startswith("fastvae.") for it in sys.modules)
"""


def build(out: Path) -> Path:
    subprocess.run([sys.executable, PROGRAM, out], check=True, capture_output=True)
    return out / VARIANT


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("file", ["__init__.py", "fastvae/__init__.py"])
def test_it_loads_under_another_name_without_the_installed_package(variant, file):
    done = subprocess.run([sys.executable, "-c", LOAD, variant, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_import_names_the_package(variant):
    texts = {path: path.read_text() for path in variant.rglob("*.py")}
    assert len(texts) > 80
    for path, text in texts.items():
        assert not re.search(r"^\s*(from|import) fastvae\b", text, re.MULTILINE), path


def test_another_source_has_another_id_and_a_second_build_replaces_the_first(variant, tmp_path):
    first = json.loads((variant / "metadata.json").read_text())
    assert json.loads((build(tmp_path) / "metadata.json").read_text()) == first
    (tmp_path / VARIANT / "left.py").write_text("")
    assert json.loads((build(tmp_path) / "metadata.json").read_text()) == first
    assert not (tmp_path / VARIANT / "left.py").exists()
    assert [it.name for it in (tmp_path / "build").iterdir()] == ["torch-universal"]

    spec = importlib.util.spec_from_file_location("hub_kernel", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.INIT += "# changed\n"
    other = json.loads((program.build(tmp_path) / "metadata.json").read_text())
    assert other["id"] != first["id"] and other["id"].isidentifier()


@pytest.mark.integrations
def test_get_local_kernel_loads_it_beside_the_installed_package(variant):
    kernels = pytest.importorskip("kernels", reason="needs kernels==0.17.2: pip install kernels==0.17.2")
    from kernels._rust import Digest, Metadata

    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))

    hub = kernels.get_local_kernel(variant.parents[1], backend="cuda" if torch.cuda.is_available() else "cpu")
    assert hub is not fastvae and hub.__name__ == metadata.id
    logits, target = torch.randn(3, 7), torch.rand(3, 7)

    def run(package, likelihood):
        x = logits.clone().requires_grad_()
        with package.use_backend("triton"):
            function = torch.compile(package.functional.negative_log_likelihood, backend="aot_eager", fullgraph=True)
            for it in (package.functional.negative_log_likelihood, function):
                value = it(x, target, likelihood)
            value.backward()
        return value, x.grad

    for ours, theirs in zip(run(fastvae, Bernoulli()), run(hub, hub.likelihoods.Bernoulli()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert hasattr(torch.ops, metadata.id) and hasattr(getattr(torch.ops, metadata.id), "negative_log_likelihood")
