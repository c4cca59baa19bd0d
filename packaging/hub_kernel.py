"""Write fastvae in the layout of the Hugging Face Kernel Hub, from the sources of this checkout.

    python packaging/hub_kernel.py OUT

makes ``OUT/build/torch-universal``, which `kernels.get_kernel` downloads from a repository of the Hub, and which
`kernels.get_local_kernel(OUT)` loads from a folder. It is written under a temporary name first; a build that is there
already is replaced.

It has the operations, modules, likelihoods, distributions and priors (`ROOTS`), and what they import. The Hub loads a
kernel under a name of its own, so that two versions do not meet in one process. Therefore imports become relative, and
the id, which is also the namespace of the registered operations, holds a hash of the files.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOTS = ("backend", "distributions", "functional", "likelihoods", "nn", "priors")
# Where each package of a checkout lies.
FOLDERS = {"fastvae": ROOT / "fastvae", "fastvae.kernels": ROOT / "kernels"}
VERSION = 0  # by the Hub's convention, of a kernel whose interface may still change

INIT = '''"""fastvae's fused operations for training variational autoencoders, from the Kernel Hub."""

from . import functional, likelihoods, nn, priors
from .backend import Backend, backend_for, use_backend
from .distributions import DiagonalGaussian

__version__ = "{version}"

__all__ = [
    "Backend", "DiagonalGaussian", "__version__", "backend_for", "functional", "likelihoods", "nn", "priors",
    "use_backend",
]
'''

# Older versions of the package `kernels` load the folder of the kernel's name.
COMPATIBILITY = '''"""The same names as the folder above has."""

import importlib.util
import sys
from pathlib import Path

_name = f"_{__name__}_kernel"
_spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
_kernel = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _kernel
_spec.loader.exec_module(_kernel)
globals().update({name: getattr(_kernel, name) for name in _kernel.__all__})
__all__ = _kernel.__all__
'''


def path_of(module: str) -> Path | None:
    """The file of a module of fastvae, None if there is none."""
    package = "fastvae.kernels" if f"{module}.".startswith("fastvae.kernels.") else "fastvae"
    path = FOLDERS[package].joinpath(*module.removeprefix(package).strip(".").split("."))
    return next((it for it in (path / "__init__.py", path.with_suffix(".py")) if it.is_file()), None)


def imports_of(source: str, module: str, run: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """The statements that import from fastvae, at the top or in a function, each with the module that it names. run:
    only those that run, and not those for type checkers.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if run and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            names = [(package + (node.module or "")).rstrip(".")]
        else:
            names = []
        yield from ((node, name) for name in names if f"{name}.".startswith("fastvae."))  # type: ignore[misc]
        waiting += ast.iter_child_nodes(node)


def relative(source: str, module: str, depth: int) -> str:
    """The source of a module with relative imports. depth: how far below fastvae the module's package lies, from 1."""
    lines = source.splitlines(keepends=True)
    for node, name in imports_of(source, module, run=False):
        line = lines[node.lineno - 1]
        package, _, last = name.removeprefix("fastvae").rpartition(".")
        if isinstance(node, ast.Import):
            old, new = f"import {name} as", f"from {'.' * depth}{package.strip('.')} import {last} as"
        elif node.level:
            continue
        else:
            old, new = f"from {name} import", f"from {'.' * depth}{name.removeprefix('fastvae').strip('.')} import"
        if line.count(old) != 1:
            raise ValueError(f"{module}, line {node.lineno}: this import cannot be made relative: {line.strip()}")
        lines[node.lineno - 1] = line.replace(old, new)
    return "".join(lines)


def files() -> dict[str, str]:
    """The text of each file of the package, by its path."""
    found: dict[str, str] = {}
    waiting = [f"fastvae.{name}" for name in ROOTS]
    # `fastvae.likelihoods` imports them by their names.
    waiting += [f"fastvae.likelihoods.{path.stem}" for path in (ROOT / "fastvae/likelihoods").glob("[a-z]*.py")]
    while waiting:
        module = waiting.pop()
        below = module.split(".")[1:]
        path = path_of(module) if below else None  # fastvae itself has a text of its own
        if path is None:
            continue  # an attribute of a module
        is_package = path.name == "__init__.py"
        name = "/".join(below) + ("/__init__.py" if is_package else ".py")
        if name in found:
            continue
        source = path.read_text()
        inside = module + ".__init__" * is_package
        found[name] = relative(source, inside, inside.count("."))
        for node, target in imports_of(source, inside, run=True):
            waiting += [target, target.rpartition(".")[0]]
            waiting += [f"{target}.{alias.name}" for alias in node.names if isinstance(node, ast.ImportFrom)]
    return found


def build(out: Path) -> Path:
    """Write the variant below ``out`` and return its folder."""
    version = next(
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "fastvae/__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    texts = files() | {"__init__.py": INIT.format(version=version), "fastvae/__init__.py": COMPATIBILITY}
    whole = hashlib.sha256("".join(f"{name}\0{texts[name]}\0" for name in sorted(texts)).encode()).hexdigest()
    metadata = {
        "name": "fastvae",
        "id": f"_fastvae_{whole[:12]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {
                name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                for name, text in sorted(texts.items())
            },
        },
    }
    folder = out / "build" / "torch-universal"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        new = Path(temporary) / "new"
        for name, text in texts.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text)
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the repository for the Hub")
    folder = build(parser.parse_args().out)
    print(f"{folder}: {sum(1 for _ in folder.rglob('*.py'))} files")


if __name__ == "__main__":
    main()
