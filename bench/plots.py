"""SVG plots of one machine's results, for light and dark pages alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import CLASSES, OUT, POINTWISE, ROWS, ROWWISE, VALUE, VALUE_AND_GRAD, WORKS, Case
from bench.peers import LABELS
from bench.peers_cuda import CASES, DTYPES

GREY = "#808080"  # readable on white and on black
# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {
    "nbloss": "#D55E00",
    "torch": "#0072B2",
    "torch.compile": "#56B4E9",
    "jax": "#009E73",
    "sklearn": "#CC79A7",
    "numpy": "#E69F00",
    "numexpr": "#9467BD",
    "cupy": "#E69F00",
    "liger": "#CC79A7",
    "quack": "#009E73",
}

TIMES = "\N{MULTIPLICATION SIGN}"

Row = dict[str, Any]


def title_of(case: Case) -> str:
    """A case as people read it."""
    names = {
        "binary_cross_entropy": "BCE",
        "binary_cross_entropy_with_logits": "BCE with logits",
        "mse_loss": "MSE",
        "l1_loss": "L1",
        "nll_loss": "NLL",
    }
    size = {(1 << 24,): "2²⁴", (1 << 28,): "2²⁸"}.get(case.shape, f" {TIMES} ".join(map(str, case.shape)))
    extra = [case.dtype] if case.dtype != "float32" else []
    variants = {"probabilities": "class probabilities", "labels": "integer labels", "ignored": "85% of rows ignored"}
    extra += [variants.get(case.variant, case.variant)] if case.variant else []
    return f"{names.get(case.loss, case.loss.replace('_', '-'))} {size}" + (f", {', '.join(extra)}" if extra else "")


def rows_of(results: dict[str, Any], case: Case, work: str, test: str | None = None) -> dict[str, Row]:
    """{library: row} of one comparison."""
    return {
        row["library"]: row
        for row in results["rows"]
        if (row.get("loss"), row.get("shape"), row.get("dtype"), row.get("variant", ""), row["work"])
        == (case.loss, case.size, case.dtype, case.variant, work)
        and "threads" not in row
        and (test is None or row["test"] == test)
    }


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plots need matplotlib: pip install matplotlib, or add --no-plots") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "text.color": GREY,
            "axes.labelcolor": GREY,
            "axes.edgecolor": GREY,
            "axes.facecolor": "none",
            "axes.titlecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
            "svg.fonttype": "path",
            "svg.hashsalt": "nbloss",
        }
    )
    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    return path


def share_of_ceiling(results: dict[str, Any], path: Path) -> Path | None:
    """Bars: which share of the bandwidth ceiling each library reaches, by case."""
    pyplot = _pyplot()
    works = (VALUE, VALUE_AND_GRAD, OUT)
    cases = [case for case in [*ROWWISE, *POINTWISE] if rows_of(results, case, VALUE).get("nbloss", {}).get("share")]
    if not cases:
        return None
    libraries = [name for name in COLOURS if any(name in rows_of(results, c, w) for c in cases for w in works)]
    height = 0.8 / len(libraries)
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 0.6 * len(cases) + 1.2), sharey=True)
    for panel, work in zip(axes, works):
        for k, library in enumerate(libraries):
            places, shares = [], []
            for i, case in enumerate(cases):
                row = rows_of(results, case, work).get(library)
                if row and "share" in row:
                    places.append(i + (k - (len(libraries) - 1) / 2) * height)
                    shares.append(100 * row["share"])
            panel.barh(places, shares, height, color=COLOURS[library], label=LABELS[library])
        panel.axvline(100, color=GREY, linewidth=1, linestyle="--")
        panel.set_xlim(0, max(105, panel.get_xlim()[1]))
        panel.set_title(WORKS[work], fontsize=11)
        panel.set_xlabel("% of the read ceiling (softmax: copy)" if work == VALUE else "% of the copy ceiling")
        panel.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(cases)), [title_of(case) for case in cases])
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return _save(figure, path)


def time_by_size(results: dict[str, Any], path: Path) -> Path | None:
    """Lines: time of cross-entropy with its gradient against rows and classes, and what the bandwidth allows."""
    pyplot = _pyplot()
    bandwidth = max(
        (r["ceiling"] for r in results["rows"] if r["work"] == VALUE_AND_GRAD and "ceiling" in r), default=0
    )
    panels = ((ROWS, 0, "rows, of 1000 classes"), (CLASSES, 1, "classes, of 2²³ logits in all"))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4))
    drawn = False
    for panel, (cases, axis, label) in zip(axes, panels):
        found = [(case, rows_of(results, case, VALUE_AND_GRAD, "scaling")) for case in cases]
        for library, colour in COLOURS.items():
            points = [(case.shape[axis], rows[library]["best"] * 1e3) for case, rows in found if library in rows]
            if not points:
                continue
            drawn = True
            width = 2.4 if library == "nbloss" else 1.4
            panel.loglog(*zip(*points), "o-", color=colour, linewidth=width, markersize=4, label=LABELS[library])
        if bandwidth:
            sizes = [case.shape[axis] for case in cases]
            floor = [(8 * case.shape[0] * case.shape[1] + 8 * case.shape[0]) / bandwidth / 1e6 for case in cases]
            panel.loglog(sizes, floor, "--", color=GREY, linewidth=1.2, label="ceiling: memory bandwidth")
        panel.set_xlabel(label)
        panel.grid(True, color=GREY, alpha=0.2)
    axes[0].set_ylabel("cross-entropy, value + gradient: ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=max(1, len(labels)), frameon=False, bbox_to_anchor=(0.5, 1)
    )
    figure.tight_layout()
    return _save(figure, path) if drawn else None


def share_by_row_length(results: dict[str, Any], path: Path) -> Path | None:
    """Lines: which share of a device's bandwidth ceiling each library reaches with cross-entropy, by classes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    drawn: dict[str, Any] = {}
    for line, dtype in zip(axes, DTYPES):
        cases = [case for case in CASES if case.loss == "cross_entropy" and case.dtype == dtype]
        found = sorted(cases, key=lambda case: case.shape[1])
        for panel, work in zip(line, (VALUE, VALUE_AND_GRAD)):
            rows = [(case.shape[1], rows_of(results, case, work, "cuda")) for case in found]
            for library, colour in COLOURS.items():
                points = [(classes, 100 * of[library]["share"]) for classes, of in rows if library in of]
                if points:
                    width = 2.4 if library == "nbloss" else 1.4
                    (drawn[library],) = panel.semilogx(
                        *zip(*points), "o-", base=2, color=colour, linewidth=width, markersize=4
                    )
            panel.axhline(100, color=GREY, linewidth=1, linestyle="--")
            panel.set_title(
                f"{WORKS[work]}, {dtype}: % of the {'read' if work == VALUE else 'copy'} ceiling", fontsize=11
            )
            panel.grid(True, color=GREY, alpha=0.2)
    axes[0][0].set_ylim(bottom=0)
    for panel in axes[1]:
        panel.set_xlabel("classes")
    if not drawn:
        return None
    labels = [LABELS[library] for library in drawn]
    figure.legend(drawn.values(), labels, loc="lower center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    return _save(figure, path)
