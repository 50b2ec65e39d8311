"""README tables and plots from the stored results: ``python -m bench.report``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from bench import plots, store
from bench.cases import POINTWISE, ROWWISE, SMALL, VALUE, VALUE_AND_GRAD, WORKS, Case
from bench.peers import LABELS
from bench.peers_cuda import CASES, DTYPES, MAIN, OTHERS
from bench.plots import TIMES, rows_of, title_of
from bench.timing import time_of

MARKERS = {
    "cpu": ("<!-- bench:begin -->", "<!-- bench:end -->"),
    "cuda": ("<!-- bench:cuda:begin -->", "<!-- bench:cuda:end -->"),
}
README = Path(__file__).parent.parent / "README.md"

NOTES = """\
A share of the ceiling counts useful bytes only (logits and target read once, gradient written once), against reading
for a value and copying where an array is written. Arrays that fit a cache can pass 100%; below 2 MiB of logits, and
where not all of them are to be read, no share is given. The ceiling is measured beside each row, in turns with the
libraries and over as many bytes, for the bandwidth of a shared machine changes from minute to minute: compare shares
and ratios across rows, not times. All libraries use the same number of threads, take turns in the same rounds, and
agreed with SciPy in float64 on these very inputs before they were timed. Times and ratios are of the best
rounds; where the ratio of medians is less than 0.7 of that, it stands beside it.

What is unfair: in *value* and *value + gradient* a library allocates its results; memory up to 32 MiB is reused by
all that allocate with malloc, larger arrays pay for new pages. *Into a buffer* is a gradient alone, in a form of its
own where a library has one (torch: softmax or sigmoid and updates in place, without autograd); JAX has none.
scikit-learn takes class indices as floats, gives one loss a row, and leaves the division by the number of rows to its
user. Class weights with optax and BCE on probabilities with JAX are written out. NumPy computes half precision in
float32. Time against size leaves out what compiles for seconds a shape.

torch is large and not part of the extra `bench`; to add it:
`pip install torch`, the CPU-only build if there is no GPU."""

DEVICE_NOTES = """\
Times are the device's own, the best of 15 rounds in which all take turns: the host is ahead when a call begins on the
device, and 256 MB written before it leave nothing of the input in the L2 cache. Bytes and shares count what is useful
(logits and target read once, gradient written once); the ceiling is one of 2 GiB, a sum or maximum of it for a value
and a copy where an array is written, which arrays of a few MB do not reach. All agreed with float64 before they were
timed.

What is unfair: nbloss is called with `check=False`, so that it does not wait for the device; torch and QuACK never do.
A call with † does, and its time holds some of the host's. All allocate the gradient but Liger, which writes it over its
input. QuACK's one kernel for value and gradient leaves the division by the number of rows to its user. CuPy's
cross-entropy is written out. An empty cell is a case that a library does not have, or for which it gives an error: a
run says why."""

Results = dict[str, Any]
Row = dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"bench.report: {message}")


def times(ratio: float) -> str:
    """A ratio in figures that mean something."""
    digits = 0 if ratio >= 10 else 1 if ratio >= 1.95 else 2
    return f"{ratio:.{digits}f}{TIMES}"


def _table(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    if not lines:
        return ""
    align = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, align, *lines])


# --- tables -------------------------------------------------------------------------------------------------

APART = 0.7  # where the ratio of medians is less than this share of that of best times, both are shown


def _against_best_peer(rows: dict[str, Row]) -> str:
    peers = [row for name, row in rows.items() if name != "nbloss"]
    if not peers:
        return "no peer"
    best = min(peers, key=lambda row: row["ratio"])
    text = f"{times(best['ratio'])} {LABELS[best['library']]}"
    if best["ratio"] < 1:
        text = f"**slower:** {text}"
    by_medians = min(row["median"] for row in peers) / rows["nbloss"]["median"]
    return text if by_medians >= APART * best["ratio"] else f"{text}, by medians {times(by_medians)}"


def headline(results: Results, cases: list[Case]) -> str:
    """How many times faster than the best peer nbloss is, for each work."""
    lines = []
    for case in cases:
        cells = []
        for work in WORKS:
            rows = rows_of(results, case, work)
            if "nbloss" not in rows:
                cells.append("")
                continue
            own = rows["nbloss"]
            share = f", {own['share']:.0%}" if "share" in own else ""
            cells.append(f"{_against_best_peer(rows)} ({time_of(own['best'])}{share})")
        if any(cells):
            lines.append([title_of(case), *cells])
    return _table(["float32 where nothing else is said", *WORKS.values()], lines)


def full(results: Results) -> str:
    """Every measured row."""
    lines = []
    for row in results["rows"]:
        if "loss" not in row:
            continue
        case = case_of(row)
        count = row.get("threads")
        threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
        ratio = "" if row["library"] == "nbloss" or "ratio" not in row else times(row["ratio"])
        lines.append(
            [
                title_of(case) + threads,
                WORKS[row["work"]],
                LABELS.get(row["library"], row["library"]),
                time_of(row["best"]),
                time_of(row["median"]),
                f"{row['gbs']:.3g}",
                f"{row['share']:.0%}" if "share" in row else "",
                ratio,
            ]
        )
    head = ["loss and shape", "work", "library", "best", "median", "GB/s", "of ceiling", "time ÷ nbloss's"]
    return _table(head, lines, left=3)


def _megabytes(n: float) -> str:
    return f"{n:.3g} MB" if n < 999.5 else f"{n:.0f} MB"


def overhead(results: Results) -> str:
    """Import, first call, memory and disk, a column for each."""
    columns = ["import", "first call, cold", "first call, cached", "peak extra memory", "installed size"]
    cells: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        if row["test"] == "overhead" and row["work"] in columns:
            text = time_of(row["best"]) if "best" in row else _megabytes(row["megabytes"])
            if "input" in row:
                text += f" for {row['input']:.3g} MB of logits"
            if "with_requirements" in row:
                text += f"; {row['with_requirements']:.0f} MB with requirements"
            cells.setdefault(row["library"], {})[row["work"]] = text
    order = [name for name in LABELS if name in cells]
    return _table(["", *columns], [[LABELS[n], *(cells[n].get(c, "") for c in columns)] for n in order])


def case_of(row: dict[str, Any]) -> Case:
    return Case(row["loss"], tuple(int(n) for n in row["shape"].split("x")), row["dtype"], row.get("variant", ""))


def footnote(results: Results) -> str:
    """Machine, versions, command and bandwidth."""
    machine = results["machine"]
    shown = {row["run"] for row in results["rows"] if row["test"] != "shapes"}
    shown_runs = [run for run in results["runs"] if run["id"] in shown] or results["runs"]
    latest = max(shown_runs, key=lambda run: run["id"])
    versions = ", ".join(f"{name} {version}" for name, version in latest["versions"].items())
    ceilings: dict[str, list[float]] = {"copy": [], "read": []}
    for row in results["rows"]:
        if "ceiling" in row:
            ceilings["copy" if case_of(row).writes(row["work"]) else "read"].append(row["ceiling"])
    bandwidth = ", ".join(f"{name} {_range(min(v), max(v))} GB/s" for name, v in ceilings.items() if v)
    runs = "" if len(shown_runs) == 1 else f" (rows of {len(shown_runs)} runs; versions are the last one's)"
    threads = f"{machine['threads']} threads, " if machine["device"] == "cpu" else ""
    text = (
        f"{machine['name']}, {threads}{machine['system']}; {versions}; {latest['date']}; "
        f"`{latest['command']}`{runs}. Memory bandwidth beside these rows: {bandwidth or 'not measured'}."
    )
    return _small(text)


def _small(text: str) -> str:
    return "\n\n".join(f"<sub>{paragraph}</sub>" for paragraph in text.split("\n\n"))


def _range(low: float, high: float) -> str:
    return f"{low:.0f} to {high:.0f}" if f"{low:.0f}" != f"{high:.0f}" else f"{low:.0f}"


def _compared(results: Results, cases: list[Case]) -> tuple[list[tuple[list[str], dict[str, Row]]], list[str]]:
    """([([case, work], {library: row})], libraries) of a device, float32 first."""
    dtypes = dict.fromkeys([*DTYPES, *(case.dtype for case in cases)])
    order = [case for dtype in dtypes for case in cases if case.dtype == dtype]
    found = [
        ([title_of(case), WORKS[work]], rows)
        for case in order
        for work in (VALUE, VALUE_AND_GRAD)
        if "nbloss" in (rows := rows_of(results, case, work, "cuda"))
    ]
    return found, [name for name in LABELS if any(name in rows for _, rows in found)]


def _late(row: Row) -> str:
    return " †" if row.get("late") else ""


def _ratio(row: Row) -> str:
    if "ratio" not in row:  # measured where nbloss was not
        return ""
    text = times(row["ratio"]) + _late(row)
    return text if row["ratio"] >= 0.995 else f"**{text}**"


def device_headline(results: Results) -> str:
    """nbloss's time of each main case, and how many times as long its peers take."""
    found, libraries = _compared(results, MAIN)
    lines = []
    for title, rows in found:
        own = rows["nbloss"]
        speed = [f"{own['best'] * 1e3:.3g}{_late(own)}", f"{own['gbs'] / 1e3:.2f}", f"{own['share']:.0%}"]
        lines.append([*title, *speed, *(_ratio(rows[name]) if name in rows else "" for name in libraries[1:])])
    peers = [LABELS[name] for name in libraries[1:]]
    head = ["float32 where nothing else is said", "work", "ms", "TB/s", "of ceiling", *peers]
    return _table(head, lines, left=2)


def device_full(results: Results) -> str:
    """Every case of a device: time and share of the ceiling."""
    by_classes = sorted(CASES, key=lambda case: (case.loss != "cross_entropy", case.shape[1:]))
    found, libraries = _compared(results, [*by_classes, *OTHERS])

    def cell(row: Row | None) -> str:
        return f"{time_of(row['best'])}{_late(row)}, {row['share']:.0%}" if row else ""

    lines = [[*title, *(cell(rows.get(name)) for name in libraries)] for title, rows in found]
    return _table(["loss and shape", "work", *(LABELS[name] for name in libraries)], lines, left=2)


def launches(results: Results) -> str:
    """What a small call takes of the host."""
    cells: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        if row["test"] == "launch":
            cells.setdefault(row["work"], {})[row["library"]] = time_of(row["best"])
    columns = [name for name in LABELS if any(name in of for of in cells.values())]
    lines = [[work, *(of.get(name, "") for name in columns)] for work, of in cells.items()]
    return _table(["", *(LABELS[name] for name in columns)], lines)


def section(results: Results, images: list[str]) -> str:
    """The README's text about one machine."""
    if results["machine"]["device"] == "cuda":
        return device_section(results, images)
    tables = [
        headline(results, [*ROWWISE, *POINTWISE, *SMALL]),
        *images,
        _folded("Import, first call, memory, disk", overhead(results)),
        _folded("All figures", full(results)),
        footnote(results),
    ]
    machine = results["machine"]
    vectors = f", {machine['vectors']}" if "vectors" in machine else ""
    intro = (
        f"How many times faster nbloss is than the best peer on {machine['name']} "
        f"({machine['threads']} threads{vectors}), with nbloss's time and share of the bandwidth ceiling:"
    )
    return "\n\n".join(text for text in [intro, *tables] if text)


def device_section(results: Results, images: list[str]) -> str:
    """The README's text about one CUDA device."""
    tables = [
        device_headline(results),
        *images,
        _folded(f"Time of the host for a call of 32 {TIMES} 10, until it returns", launches(results)),
        _folded("All figures", device_full(results)),
        footnote(results),
    ]
    intro = (
        f"nbloss on one {results['machine']['name']}, with its share of the bandwidth ceiling, and how many times as "
        "long its peers take (**bold:** less than nbloss):"
    )
    return "\n\n".join(text for text in [intro, *tables] if text)


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


# --- files --------------------------------------------------------------------------------------------------


def draw(results: Results, folder: Path, readme: Path) -> list[str]:
    """Markdown for the plots that were drawn."""
    slug = results["machine"]["slug"]
    of_a_device = ((plots.share_by_row_length, f"{slug}-share.svg", "Share of the bandwidth ceiling by classes"),)
    of_a_processor = (
        (plots.share_of_ceiling, f"{slug}-share.svg", "Share of the bandwidth ceiling by shape and library"),
        (plots.time_by_size, f"{slug}-size.svg", "Time against rows and classes, with the bandwidth ceiling"),
    )
    images = []
    for plot, name, text in of_a_device if results["machine"]["device"] == "cuda" else of_a_processor:
        path = plot(results, folder / name)
        if path:
            images.append(f"![{text}]({Path(os.path.relpath(path.resolve(), readme.resolve().parent)).as_posix()})")
    return images


def insert(readme: Path, text: str, device: str) -> None:
    """Put the text between the device's markers."""
    content = readme.read_text()
    first, last = MARKERS[device]
    before, begin, rest = content.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{readme}: no {first} … {last}; put the two markers where the tables belong")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="results files; all of bench/results where none is given")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the README alone")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    chosen = parser.parse_args(arguments)
    files = chosen.files or sorted(store.FOLDER.glob("*.json"))
    if not files:
        raise SystemExit(f"{store.FOLDER}: no results yet; run `python -m pytest bench` first")
    sections: dict[str, list[str]] = {}
    for path in files:
        try:
            results = store.load(path)
        except store.BadResults as error:
            raise SystemExit(str(error)) from None
        try:
            images = [] if chosen.no_plots else draw(results, path.parent, chosen.readme)
        except OSError as error:
            raise SystemExit(f"{path.parent}: plots cannot be written ({error.strerror}); try --no-plots") from None
        sections.setdefault(results["machine"]["device"], []).append(section(results, images))
    notes = {"cpu": NOTES, "cuda": DEVICE_NOTES}
    texts = {device: "\n\n".join([*some, _small(notes[device])]) for device, some in sections.items()}
    if chosen.print:
        sys.stdout.write("\n\n".join(texts.values()) + "\n")
        return
    try:
        for device, text in texts.items():
            insert(chosen.readme, text, device)
    except OSError as error:
        raise SystemExit(f"{chosen.readme}: {error.strerror}") from None
    print(f"{chosen.readme}: tables of {len(files)} machine(s)")


if __name__ == "__main__":
    main()
