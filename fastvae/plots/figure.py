"""Code that every figure needs: matplotlib without a display, and files that are written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastvae.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150


def require_matplotlib() -> None:
    """Raise ``ImportError`` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "fastvae[examples]"') from error


def new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> tuple[Figure, Axes]:
    """A figure of a size in inches. It does not use pyplot, which keeps global state and may choose a backend that
    needs a display.

    layout: use "compressed" for axes with a fixed aspect ratio, because "constrained" would cut off their labels.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout=layout)
    return figure, figure.add_subplot()


def tick_integers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    # With one tick at least: to have two, a range of less than one would get fractions.
    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png")
