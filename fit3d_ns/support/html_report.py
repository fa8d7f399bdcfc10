"""A report as one HTML file: text, tables, pictures and curves, with everything embedded and no network needed."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from fit3d_ns.support.files import atomic_write_text

ImageLike = np.ndarray | torch.Tensor
"""[H, W, 3] or [H, W]: uint8, or float in [0, 1] (clamped; NaN is black)."""

_CONTENT_WIDTH = 1080
"""Width of the page's content in CSS pixels; rows of pictures are made to fit it."""

_LARGEST_SIDE = 640
"""Pictures are scaled down to this many pixels before they are embedded."""

_SMALL_SIDE = 128
"""Pictures with no side above this are maps of patches: their pixels are shown as crisp squares."""

_CURVE_COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
"""Readable on white and on near-black."""
_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Report:
    """Collects the parts of a page, in order, and writes it as one self-contained file.

    The page needs no script and no network, follows the reader's light or dark setting, and fits a phone; a picture
    grows to the page's width when tapped. All text is escaped.
    """

    def __init__(self, title: str) -> None:
        """Starts an empty page under ``title``.

        Args:
            title: Heading of the page and name of its tab, plain text.
        """
        self._title = title
        self._parts: list[dict[str, Any]] = []

    def add_heading(self, text: str) -> None:
        """Starts a section.

        Args:
            text: Title of the section, plain text.
        """
        self._parts.append({"kind": "heading", "text": text})

    def add_text(self, text: str) -> None:
        """Adds a paragraph; line breaks are kept.

        Args:
            text: Plain text.
        """
        self._parts.append({"kind": "text", "text": text})

    def add_code(self, text: str) -> None:
        """Adds a block in a fixed-width font, such as a command to copy.

        Args:
            text: Plain text; line breaks and spaces are kept.
        """
        self._parts.append({"kind": "code", "text": text})

    def add_table(self, rows: Sequence[Sequence[object]], header: Sequence[object] | None = None) -> None:
        """Adds a table.

        Args:
            rows: cells; floats are shown with four significant digits, None as a dash, anything else by ``str``.
            header: names of the columns, if they need any.
        """
        lines = [[_cell("td", value, _is_number(value)) for value in row] for row in rows]
        if header is not None:
            columns = ([row[k] for row in rows if k < len(row)] for k in range(len(header)))
            numbers = (bool(column) and all(map(_is_number, column)) for column in columns)
            lines.insert(0, [_cell("th", name, number) for name, number in zip(header, numbers)])
        self._parts.append({"kind": "table", "rows": lines})

    def add_pictures(self, pictures: Sequence[tuple[str, ImageLike]], title: str | None = None) -> None:
        """Adds a row of pictures of the same height, each with its caption below; the row wraps on a narrow screen.

        Maps of patches (no side above 128) keep their crisp squares when they are shown larger than they are.

        Args:
            pictures: (caption, image [H, W, 3] or [H, W]), uint8 or float in [0, 1].
            title: a line above the row.

        Raises:
            ValueError: if an image has another shape.
        """
        images = [(caption, _to_uint8(image)) for caption, image in pictures]
        aspects = sum(image.shape[1] / image.shape[0] for _, image in images)
        gaps, aspects = 12 * (len(images) - 1), max(aspects, 1e-6)
        height = int(np.clip((_CONTENT_WIDTH - gaps) / aspects, 112, 320))
        # As high as lets the row fit the window, whose width is less by margins and a scroll bar; then it wraps.
        fitting = f"clamp(112px, calc((100vw - {64 + gaps}px) / {aspects:.3f}), {height}px)"
        figures = [_figure(caption, image) for caption, image in images]
        self._parts.append({"kind": "pictures", "title": title, "height": fitting, "figures": figures})

    def add_curve(
        self, title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str
    ) -> None:
        """Adds one diagram.

        Args:
            title: a line above it.
            curves: name to (x, y), each of the same length; NaN leaves a gap.
            xlabel: name of the x axis.
            ylabel: name of the y axis.

        Raises:
            ValueError: if an x and its y differ in length.
        """
        legend = list(zip(curves, _cycle(len(curves))))
        svg = _curve_svg(curves, xlabel, ylabel)
        self._parts.append({"kind": "curve", "title": title, "legend": legend, "svg": svg})

    def to_html(self) -> str:
        """Returns the whole page."""
        return _PAGES.get_template("report.html.jinja").render(title=self._title, parts=self._parts)

    def write(self, path: Path | str) -> None:
        """Writes the page as one step: ``path`` holds either the whole report or what it held before.

        Args:
            path: The HTML file; its folder exists.

        Raises:
            UserError: if the file cannot be written.
        """
        atomic_write_text(path, self.to_html())


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def _cell(tag: str, value: object, number: bool) -> dict[str, Any]:
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return {"tag": tag, "text": text, "number": number}


def _to_uint8(image: ImageLike) -> np.ndarray:
    """[H, W, 3] uint8, no larger than the report shows it."""
    array = image.detach().cpu().float().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        array = array.astype(np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"expected a picture [H, W, 3] or [H, W], got {list(array.shape)}")
    if array.dtype != np.uint8:
        array = np.round(np.nan_to_num(array.astype(np.float32)).clip(0, 1) * 255).astype(np.uint8)
    scale = _LARGEST_SIDE / max(array.shape[:2])
    if scale < 1:
        size = (max(1, round(array.shape[1] * scale)), max(1, round(array.shape[0] * scale)))
        array = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
    return array


def _figure(caption: str, image: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return {
        "caption": caption,
        "data": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "crisp": max(image.shape[:2]) <= _SMALL_SIDE,
        # The natural size is given as the aspect ratio, because a small map must still fill the row's height.
        "aspect": f"{image.shape[1]}/{image.shape[0]}",
    }


def _cycle(count: int) -> list[str]:
    return [_CURVE_COLORS[k % len(_CURVE_COLORS)] for k in range(count)]


def _curve_svg(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str) -> str:
    # Imported here: only the commands that write reports need it, and it takes a while.
    import matplotlib as mpl
    from matplotlib.figure import Figure

    text_color = "#0a0b0c"  # stands for the page's own colour, put in below
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.size": 10,
        "axes.edgecolor": text_color,
        "axes.labelcolor": text_color,
        "xtick.color": text_color,
        "ytick.color": text_color,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.0, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for (x, y), color in zip(curves.values(), _cycle(len(curves))):
            axes.plot(x, y, color=color, linewidth=1.8, marker="o" if len(x) <= 20 else None, markersize=4)
        axes.grid(color=text_color, alpha=0.15, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(xlabel, parse_math=False)
        axes.set_ylabel(ylabel, parse_math=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(text_color, "currentColor")
    # Names of groups are not referred to, and would repeat from diagram to diagram.
    return re.sub(r'<g id="[^"]*"', "<g", svg)
