"""The documentation: its Python runs, its commands are accepted, its messages are the library's, its figures are those
that are committed, and the site builds without a warning.

Conventions of the pages. ```python: the blocks of a page run in sequence, as one program. ```text after a ```python
block: what that block prints, or the error it raises. ```text elsewhere: an error message, with ... where it varies.
```bash: commands, one to a line, whose files and arguments must be accepted by the programs they name.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import eager_cost
import fastvae
from conftest import Launches
from fastvae.kernels import INTERPRETED
from fastvae.operations import operations, table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
}
LANGUAGES = {"python", "bash", "text"}

# What a page leaves to its reader: images, an encoder, a decoder, and the logits of the README's second block.
MODEL = """
import torch
x = torch.rand(8, 1, 28, 28)
encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 32))
decoder = torch.nn.Sequential(torch.nn.Linear(16, 784), torch.nn.Unflatten(1, (1, 28, 28)))
logits = decoder(torch.randn(8, 16))
"""
SETUP = {
    "README.md": MODEL,
    "docs/kernel-hub.md": MODEL
    + f"""
import subprocess, sys
subprocess.run([sys.executable, {str(ROOT / "packaging" / "hub_kernel.py")!r}, "hub"], check=True, capture_output=True)
""",
}
# The pages whose Python needs another package.
OF_PACKAGES = {
    "docs/coming-from-diffusers.md": "diffusers",
    "docs/coming-from-pythae.md": "pythae",
    "docs/coming-from-scvi.md": "scvi",
    "docs/kernel-hub.md": "kernels.layer",  # from the checkout, fastvae's own folder is found as `kernels`
}


class Block(NamedTuple):
    line: int  # of its fence, from 1
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    assert text.count("```") == 2 * len(found), f"{page.name}: a fence that is indented or not closed"
    return found


def follows(page: Path, first: Block, second: Block) -> bool:
    """Whether there is nothing but empty lines between them."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return not "".join(lines[first.line + first.text.count("\n") + 1 : second.line - 1]).strip()


def python_with_output(page: Path) -> list[tuple[Block, str | None]]:
    """The Python blocks of a page, each with the text that it prints or raises, where the page shows one."""
    every = blocks(page)
    return [
        (block, after.text if after and after.language == "text" and follows(page, block, after) else None)
        for block, after in itertools.zip_longest(every, every[1:])
        if block.language == "python"
    ]


def flat(text: str) -> str:
    return " ".join(text.split())


# A window of 1280 pixels shows so many characters of mkdocs-material's code (13.6 pixels high, in 930 less 32 pixels).
# What a program prints breaks where the page ends (docs/style.css).
CHARACTERS = 108


@pytest.mark.parametrize("name", PAGES)
def test_code_fits_into_the_page(name):
    lines = [line for it in blocks(PAGES[name]) if it.language in ("python", "bash") for line in it.text.splitlines()]
    assert not [line for line in lines if len(line) > CHARACTERS]


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(name):
    assert {block.language for block in blocks(PAGES[name])} <= LANGUAGES


# --------------------------------------------------------------------------------------------------------- Python


def execute(page: Path, namespace: dict[str, object]) -> None:
    for block, expected in python_with_output(page):
        # As far down as on the page, so that a traceback shows the page's own line.
        code = compile("\n" * block.line + block.text, str(page), "exec")
        printed, raised = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                exec(code, namespace)
            except Exception as error:
                if expected is None or not re.match(r"\w+Error: ", expected):
                    raise
                raised = error
        if raised is not None:
            printed.write(f"{type(raised).__name__}: {raised}")
        if expected is not None:
            assert flat(printed.getvalue()) == flat(expected), f"{page.name}, line {block.line}"


def pages_with_python() -> list[object]:
    names = [name for name, page in PAGES.items() if python_with_output(page)]
    return [pytest.param(name, marks=pytest.mark.integrations) if name in OF_PACKAGES else name for name in names]


@pytest.mark.parametrize("name", pages_with_python())
def test_the_python_of_a_page_runs_and_prints_what_it_shows(name, monkeypatch, tmp_path):
    if package := OF_PACKAGES.get(name):
        pytest.importorskip(package, reason=f"needs {package.partition('.')[0]}")
    monkeypatch.chdir(tmp_path)  # where what a page writes goes
    # What torchrun would set for one process.
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    # The whole graph, its partition and its gradients, without minutes of a C++ compiler.
    partitioned = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partitioned)
    module = types.ModuleType("__page__")
    monkeypatch.setitem(sys.modules, "__page__", module)  # where dataclasses and keys of likelihoods look for it
    exec(SETUP.get(name, ""), vars(module))
    before = Launches.count
    execute(PAGES[name], vars(module))
    if name == "docs/likelihood-of-your-own.md":
        assert Launches.count > before  # its terms ran, not only their formulas


@pytest.mark.skipif(not INTERPRETED, reason="the page's tensors are the CPU's, which the interpreter runs")
def test_what_is_said_of_random_numbers_is_true_of_the_kernels_too():
    before = Launches.count
    with fastvae.use_backend("triton"):
        execute(DOCS / "random-numbers.md", {"__name__": "__page__"})
    assert Launches.count > before


# ------------------------------------------------------------------------------------------------------- commands


class Parsed(BaseException):
    """The program has understood its arguments, and would begin."""


def assert_program_accepts(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program up to where it has parsed its arguments."""
    assert script.is_file(), f"{script} does not exist"
    if not re.search(r"\bParser\b|ArgumentParser", script.read_text(encoding="utf-8")):
        assert not arguments, f"{script} takes no arguments, got {arguments}"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        patch.chdir(ROOT)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def assert_pytest_accepts(arguments: list[str]) -> None:
    own = [
        option
        for folder in ("benchmarks", "tests")
        for option in re.findall(
            r'addoption\(\s*"(--\w+)"', (ROOT / folder / "conftest.py").read_text(encoding="utf-8")
        )
    ]
    assert {"--benchmark", "--slow"} <= set(own)
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-q", action="store_true")
    for option in ("-m", "-n", "--dist"):
        parser.add_argument(option)
    for option in own:
        parser.add_argument(option, action="store_true")
    for path in parser.parse_args(arguments).paths:
        assert (ROOT / path).exists(), path


def assert_installable(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-e", dest="what")
    parser.add_argument("what", nargs="?", default=argparse.SUPPRESS)
    what = re.fullmatch(r"(?:\.|fastvae)(?:\[([\w,]+)\])?", parser.parse_args(arguments).what)
    assert what, arguments
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE)
    assert set((what[1] or "test").split(",")) <= set(extras)


def assert_accepted(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    while command and re.match(r"[A-Z_]+=", command[0]):
        variable = command.pop(0).partition("=")[0]
        sources = [*ROOT.glob("fastvae/**/*.py"), *ROOT.glob("kernels/*.py")]
        assert any(variable in source.read_text(encoding="utf-8") for source in sources), variable
    program, *arguments = command
    if program == "accelerate":
        assert arguments.pop(0) == "launch"
        program = "python"
    if program == "torchrun":
        of_torchrun = ("--nnodes=", "--nproc-per-node=", "--rdzv-backend=", "--rdzv-endpoint=")
        program, arguments = "python", [word for word in arguments if not word.startswith(of_torchrun)]
    if program == "python":
        assert_program_accepts(ROOT / arguments[0], arguments[1:], monkeypatch)
    elif program == "pytest":
        assert_pytest_accepts(arguments)
    elif program == "pip":
        assert arguments.pop(0) == "install"
        assert_installable(arguments)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), arguments
    else:
        tools = "mkdocs serve", "mkdocs build --strict", "ruff check", "ruff format --check", "mypy"
        assert shlex.join(command) in tools, f"unknown command {command}"


def commands() -> list[str]:
    every = [block.text for page in PAGES.values() for block in blocks(page) if block.language == "bash"]
    return sorted({re.sub(r"\s+# .*", "", line) for text in every for line in text.splitlines() if line.strip()})


# What a program imports that `.[test]` does not install.
OF_OTHERS = {
    "examples/accelerate_loop.py": "accelerate",
    "examples/lightning_loop.py": "lightning",
    "benchmarks/integration_diffusers.py": "diffusers",
    "benchmarks/integration_pythae.py": "pythae",
    "benchmarks/integration_scvi.py": "scvi",
}


def package_of(line: str) -> str | None:
    return next((package for program, package in OF_OTHERS.items() if program in line), None)


@pytest.mark.parametrize(
    "line", [pytest.param(it, marks=[pytest.mark.integrations] if package_of(it) else []) for it in commands()]
)
def test_a_command_names_files_and_arguments_that_exist(line, monkeypatch):
    if package := package_of(line):
        pytest.importorskip(package, reason=f"needs {package}: pip install {package}")
    tokens = shlex.split(line)
    while "&&" in tokens:
        assert_accepted(tokens[: tokens.index("&&")], monkeypatch)
        tokens = tokens[tokens.index("&&") + 1 :]
    assert_accepted(tokens, monkeypatch)


# ------------------------------------------------------------------------------------------------------- messages


def source_messages() -> list[re.Pattern[str]]:
    """Every text in the sources that may be a message: of an f-string, what is between its braces is anything."""
    patterns = []
    for path in [*ROOT.glob("fastvae/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("examples/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [re.escape(node.value)]
            else:
                continue
            if len("".join(parts).replace(".+", "").replace("\\", "")) > 20:  # of text, besides the wildcards
                patterns.append(re.compile("".join(parts)))
    return patterns


def test_the_messages_in_troubleshooting_are_those_of_the_sources():
    page = DOCS / "troubleshooting.md"
    shown = {output for _, output in python_with_output(page)}
    messages = [flat(block.text) for block in blocks(page) if block.language == "text" and block.text not in shown]
    assert len(messages) > 5
    sources = source_messages()
    for message in messages:
        said = re.sub(r"^(\w+Error: |\w+\.py: (error: )?)", "", message)
        assert any(pattern.fullmatch(said) for pattern in sources), message


# -------------------------------------------------------------------------------------------------------- figures


def table_rows(page: Path) -> list[list[str]]:
    lines = page.read_text(encoding="utf-8").replace("\\|", "¦").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_compiled_code_in_performance_is_the_committed_one():
    tables = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "codegen").glob("triton-*.json"))]
    assert tables
    assert not any(code["spilled_bytes"] for table in tables for code in table["kernels"].values())
    newest = max(tables, key=lambda table: tuple(map(int, table["triton"].split("."))))
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert f"triton {newest['triton']}" in text
    kernels = {name.removeprefix("sm_90 "): code for name, code in newest["kernels"].items() if "sm_90" in name}
    rows = [row for row in table_rows(DOCS / "performance.md") if row[0] in kernels]
    assert len(rows) > 5
    for name, registers, load, store, body in rows:
        code = kernels[name]
        wide = [str(code[key]) if code[key] else "-" for key in ("widest_load", "widest_store")]
        assert [registers, load, store, body] == [str(code["registers"]), *wide, f"{code['body']:.1f}"], name


@pytest.mark.parametrize(("page", "computes"), [("README.md", True), ("docs/performance.md", False)])
def test_the_table_of_operations_is_the_one_made_from_the_list(page, computes):
    lines = table(operations(), computes)
    assert len(lines) > 5
    wanted = "\n".join(lines)
    assert f"\n\n{wanted}\n\n" in PAGES[page].read_text(encoding="utf-8"), f"the table should be:\n{wanted}"


def test_the_cost_of_eager_pytorch_is_the_one_that_is_counted():
    wanted = "\n".join(eager_cost.table())
    assert f"\n\n{wanted}\n\n" in PAGES["README.md"].read_text(encoding="utf-8"), f"the table should be:\n{wanted}"


def test_milliseconds_are_quoted_from_the_readme():
    """The only times that were measured."""
    readme = flat((ROOT / "README.md").read_text(encoding="utf-8"))
    text = flat((DOCS / "performance.md").read_text(encoding="utf-8"))
    times = re.findall(r"[\d.]+ to [\d.]+ ms", text)
    assert times
    assert all(time in readme for time in times)


# ----------------------------------------------------------------------------------------------- the site as built


def test_pictures_are_small_and_shown():
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    pictures = list((DOCS / "gallery").iterdir())
    assert pictures
    for picture in pictures:
        assert f"](gallery/{picture.name})" in gallery, f"{picture.name} is not shown"
        assert picture.stat().st_size < 150_000, picture.name


def test_the_scripts_of_the_site_are_shipped_with_it():
    """Formulas are set without a network."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("extra_javascript:\n")[2]
    scripts = [line.split()[1] for line in itertools.takewhile(lambda line: line.startswith("  - "), text.splitlines())]
    assert scripts == ["formulas.js", "mathjax/tex-svg.js"]
    assert all((DOCS / script).is_file() for script in scripts)
    assert "Apache License" in (DOCS / "mathjax" / "LICENSE").read_text(encoding="utf-8")


def test_the_site_builds_without_warnings_and_has_every_public_name(tmp_path):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip('needs mkdocs: pip install -e ".[docs]"')
    # A note of mkdocs-material about releases to come is no warning about these pages.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for html in tmp_path.rglob("*.html"):  # links lead elsewhere; what a page is made of does not
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]*)', html.read_text()
        )
        assert not fetched, (html, fetched)
    assert (tmp_path / "mathjax" / "LICENSE").is_file()
    for page in (DOCS / "api").glob("*.md"):
        module = importlib.import_module(page.read_text(encoding="utf-8").partition("::: ")[2].split()[0])
        html = (tmp_path / "api" / page.stem / "index.html").read_text(encoding="utf-8")
        # What a package exports, and what a module defines.
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        for name in {name for name in names if not name.startswith("_")} - {"functional", "nn"}:
            value = getattr(module, name)
            if callable(value):  # constants stand in the text of what takes them
                assert f'id="{module.__name__}.{name}"' in html, f"{module.__name__}.{name} is on no page"


def test_the_files_that_pages_name_exist():
    named = {
        path
        for page in PAGES.values()
        for path in re.findall(r"(?:fastvae|kernels|tests|benchmarks|examples)/[\w/]+\.(?:py|json)", page.read_text())
    }
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).is_file()]
