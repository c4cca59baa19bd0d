"""Where Python finds fastvae: in a checkout, and from a script in the folder that holds one."""

from __future__ import annotations

import shutil
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[1]


def test_a_checkout_finds_its_kernels_by_its_path_alone():
    """As `python -c` in the checkout does, where what pip installed is elsewhere, and PYTHONPATH."""
    if not (ROOT / "fastvae").samefile(Path(fastvae.__file__).parent):
        pytest.skip("the installed package is tested, not the checkout")
    spec = PathFinder.find_spec("fastvae.kernels", fastvae.__path__)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).samefile(ROOT / "kernels" / "__init__.py")


def test_a_script_beside_the_clone_finds_what_pip_installed(tmp_path):
    """The clone is named fastvae too: to Python a package without files, taken only where there is no other."""
    clone, installed = tmp_path / "beside" / "fastvae", tmp_path / "site-packages" / "fastvae"
    clone.mkdir(parents=True)
    for name in ("fastvae", "kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "fastvae", installed, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels", installed / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    spec = PathFinder.find_spec("fastvae", [str(clone.parent), str(installed.parent)])
    assert spec is not None and spec.origin == str(installed / "__init__.py")


def test_the_parts_are_there_without_an_import_of_their_own(monkeypatch):
    for name in ("data", "evaluation", "export", "models", "plots", "training"):
        monkeypatch.delattr(fastvae, name, raising=False)
        assert getattr(fastvae, name).__name__ == f"fastvae.{name}"
    assert fastvae.models.VAE.__name__ == "VAE"
    with pytest.raises(AttributeError, match="module 'fastvae' has no attribute 'nothing'"):
        _ = fastvae.nothing
