"""The report's figures as inline SVG: they take the page's text colour, and no colour alone carries a meaning."""

import io
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Span = tuple[int, int]

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
# Okabe and Ito's palette, told apart by every kind of colour vision.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
KINDS = ("interval", "text stream", "FFN")
"""What may be removed, each with a colour and a marker of its own."""
_STYLE: Any = MappingProxyType(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "ppcl",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.18,
        "lines.linewidth": 1.3,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
        ),
    }
)
_WIDTH = 10.4
"""Inches across the page."""


def tradeoff(points: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw score against share of parameters kept: (name, share in percent, score, deviation)."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels(1, height=2.3, width=4.6)
        for index, (name, share, score, deviation) in enumerate(points):
            color = INK if index == 0 else COLORS[(index - 1) % len(COLORS)]
            marker = MARKERS[index % len(MARKERS)]
            axes.errorbar(share, score, yerr=deviation or None, color=color, marker=marker, capsize=2.5, ms=5)
            axes.annotate(name, (share, score), xytext=(6, -3), textcoords="offset points", color=INK)
        axes.set(xlabel="transformer parameters kept, %", ylabel="score", xlim=(0, 108), ylim=(0, 1.03))
        return _svg(figure)


def methods(points: Sequence[tuple[str, float, float, float, bool]], labels: tuple[str, str]) -> str:
    """Draw methods beside each other: (name, share in percent, figure, deviation, whether modulation is of low rank).

    Open markers are those with whole modulation; every method has a colour and a marker of its own, as far as they go.
    """
    with matplotlib.rc_context(_STYLE):
        names = list(dict.fromkeys(name for name, *_ in points))
        figure, (axes,) = _panels(1, height=3.4 + 0.06 * len(names), width=8.6)
        for name, share, value, deviation, low in points:
            index = names.index(name)
            color = INK if name == "teacher" else COLORS[index % len(COLORS)]
            marker = MARKERS[(index + index // len(COLORS)) % len(MARKERS)]
            face = color if low or name == "teacher" else "none"
            axes.errorbar(
                share, value, yerr=deviation or None, color=color, marker=marker, markerfacecolor=face, capsize=2, ms=5,
                ls="none", label=None if name in axes.get_legend_handles_labels()[1] else name,
            )  # fmt: skip
        axes.set(xlabel=labels[0], ylabel=labels[1])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        return _svg(figure)


def heatmaps(maps: Sequence[tuple[str, Array]], boxes: Mapping[str, Sequence[Span]]) -> str:
    """Draw similarity matrices [M, M] side by side on one scale; `boxes` outlines blocks `first` to `last` by title."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        side = _WIDTH / max(len(maps), 3)
        figure, panels = _panels(len(maps), height=side + 0.35, width=side * len(maps) + 0.3)
        low = max(0.0, min(float(np.nanmin(values)) for _, values in maps))
        image = None
        for axes, (title, values) in zip(panels, maps, strict=True):
            image = axes.imshow(values, vmin=low, vmax=1, cmap="cividis", interpolation="nearest")
            for first, last in boxes.get(title, ()):
                extent = last - first + 1
                for color, width in (("#ffffff", 2.4), ("#d55e00", 1.2)):
                    corner = (first - 0.5, first - 0.5)
                    axes.add_patch(Rectangle(corner, extent, extent, fill=False, ec=color, lw=width, clip_on=False))
            axes.set_title(title)
            axes.set_xlabel("block")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        assert image is not None
        figure.colorbar(image, ax=panels, shrink=0.72, pad=0.012, aspect=22, label="CKA of block outputs")
        return _svg(figure)


def differences(curves: Sequence[tuple[str, Array, Sequence[tuple[int, int, bool]]]]) -> str:
    """Draw delta(u, k) over k, a line for each interval's start u: (title, delta, (first, last, chosen) of each)."""
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(curves), height=2.6)
        for axes, (title, delta, spans) in zip(panels, curves, strict=True):
            for index, (first, last, chosen) in enumerate(spans):
                color, stop = COLORS[index % len(COLORS)], min(last + 2, len(delta))
                k = np.arange(first + 1, len(delta))
                axes.plot(k, delta[first, first + 1 :], color=color, lw=0.7, alpha=0.35)
                axes.plot(np.arange(first + 1, stop), delta[first, first + 1 : stop], color=color)
                face = color if chosen else "none"
                axes.plot(last, delta[first, last], "o", color=color, markerfacecolor=face, ms=5)
                axes.annotate(
                    f"{first}–{last}", (last, delta[first, last]), xytext=(0, 6), textcoords="offset points",
                    ha="center", fontsize=7, color=INK,
                )  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("block k")
            axes.margins(y=0.16)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("Δ(u, k) = CKA(u, k−1) − CKA(u, k)")
        return _svg(figure)


def shares(panels_of: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> str:
    """Draw one value per block and stream, on a log scale: (title, values by stream)."""
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(panels_of), height=2.1)
        for axes, (title, streams) in zip(panels, panels_of, strict=True):
            for index, (stream, values) in enumerate(streams.items()):
                axes.plot(values, marker=MARKERS[index], color=COLORS[index], ms=3.5, lw=0.9, label=stream)
            axes.set_title(title)
            axes.set_xlabel("block")
            _logarithmic(axes, "y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("unexplained share")
        panels[-1].legend(loc="best")
        return _svg(figure)


def ranks(curve: Mapping[int, float], chosen: int, bound: float | None) -> str:
    """Draw the velocity error of the teacher with all its modulation of a rank, and what it may be at most."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels(1, height=2.3, width=4.6)
        points = sorted(curve)
        axes.plot(points, [curve[rank] for rank in points], "o-", color=COLORS[0], markerfacecolor="none", ms=5)
        axes.plot(chosen, curve[chosen], "o", color=COLORS[0], ms=5)
        notes = [(f"rank {chosen}: {curve[chosen]:.3g}", chosen, curve[chosen])]
        if bound is not None:
            axes.axhline(bound, color=COLORS[1], lw=0.9, ls="--")
            notes.append((f"at most {bound:g}", points[0], bound))
        for note, x, y in notes:
            axes.annotate(note, (x, y), xytext=(6, 4), textcoords="offset points", color=INK)
        _logarithmic(axes, "y")
        axes.set_xscale("log", base=2)
        axes.set_xticks(points, [str(rank) for rank in points])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="rank of all modulation layers", ylabel="relative velocity error")
        return _svg(figure)


def candidates(rows: Sequence[tuple[str, str, float, str, bool]]) -> str:
    """Draw the error of each operation when it alone is made: (label, kind, error, note, chosen), best first."""
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels(1, height=0.75 + 0.17 * len(rows), width=8.6)
        for y, (_, kind, error, note, chosen) in enumerate(rows):
            which = KINDS.index(kind)
            color, face = COLORS[which], COLORS[which] if chosen else "none"
            axes.plot(error, y, MARKERS[which], color=color, markerfacecolor=face, ms=5)
            axes.annotate(note, (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0),
                          textcoords="offset points", va="center", fontsize=7.5)  # fmt: skip
        for which, kind in enumerate(KINDS):
            axes.plot([], [], MARKERS[which], color=COLORS[which], ms=5, label=kind)
        axes.plot([], [], "o", color=INK, markerfacecolor="none", ms=5, label="not chosen (open)")
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set(xlabel="relative velocity error when this alone is done", ylim=(len(rows) - 0.4, -0.6))
        _logarithmic(axes, "x")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(KINDS) + 1)
        return _svg(figure)


def losses(panels_of: Sequence[tuple[str, Mapping[str, Sequence[Sequence[float]]]]]) -> str:
    """Draw training losses on a log scale, a line for each segment: (title, [step, loss] pairs by key)."""
    with matplotlib.rc_context(_STYLE):
        rows = max(len(curves) for _, curves in panels_of)
        figure, panels = _panels(len(panels_of), height=2.3 + 0.13 * rows)
        for axes, (title, curves) in zip(panels, panels_of, strict=True):
            for index, (key, points) in enumerate(curves.items()):
                steps, values = np.array([p for p in points if p[1] > 0], dtype=float).reshape(-1, 2).T
                color = COLORS[index % len(COLORS)]
                line = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
                axes.plot(steps, values, color=color, lw=0.5, alpha=0.3)
                axes.plot(steps, _smooth(values), line, color=color, label=key)
            axes.set(title=title, xlabel="step")
            _logarithmic(axes, "y")
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.25), borderaxespad=0, handlelength=1.6, fontsize=7)
        panels[0].set_ylabel("loss")
        return _svg(figure)


def _panels(count: int, *, height: float, width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Scale one axis by its logarithm, and write its numbers out."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    # Two decades have room for numbers between the powers of ten.
    marks = (1, 2, 5) if high / low < 100 else (1,)
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _smooth(values: Array) -> Array:
    reach = max(1, len(values) // 40)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML the namespaces are known, and the page promises to name no address.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    return text.replace(INK, "currentColor")
