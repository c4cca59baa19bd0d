"""The tables of the pages on other libraries have the numbers that the programs count."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import compiling

ROOT = Path(__file__).parents[2]
# Of each program a few parts, because the largest take long.
WORDS = {"diffusers": ["training"], "pythae": ["`VAE,", "VAMP"], "scvi": ["for each gene and batch", "poisson"]}


@pytest.mark.integrations
@pytest.mark.parametrize("library", WORDS)
def test_a_page_has_the_counts_of_its_program(library):
    pytest.importorskip(library, reason=f"needs {library}: pip install fastvae[integrations]")
    program = ROOT / "benchmarks" / f"integration_{library}.py"
    printed = compiling(program, *WORDS[library], "--rounds=0").decode().splitlines()
    titles, _, *rows = [line for line in printed if line.startswith("|")]
    page = (ROOT / "docs" / f"coming-from-{library}.md").read_text(encoding="utf-8").splitlines()
    assert titles in page
    assert len(rows) > 3
    counted = [row.split(" | ")[:5] for row in page]  # the peak depends on torch's allocations
    rows = [row for row in rows if "a whole step" not in row]  # which is only timed
    assert not [row for row in rows if row.split(" | ")[:5] not in counted]
