"""Options, and the fixtures that compare, time and store.

``python -m pytest bench`` measures everything, ``--quick`` a part of it that is for looking and is not kept.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import machine, oracle, peers, peers_cuda, store, timing
from bench.cases import KNOWN, WORKS, Case, inputs_of, useful_bytes

STARTED = pytest.StashKey[float]()
STORE = pytest.StashKey[store.Store]()
CEILING_FROM = 1 << 21  # bytes of input below which a share of the memory bandwidth says nothing
BUDGET, QUICK_BUDGET = 3.5, 0.4  # seconds that the contestants of one comparison share


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nbloss benchmarks")
    group.addoption("--quick", action="store_true", help="a small part, in under two minutes; results are not kept")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--libraries", default="", help=f"peers to compare with, such as {','.join(peers.MODULES)}")
    group.addoption("--shapes", default="", help="shapes to measure, such as 8192x1000,65536x10")


def _listed(config: pytest.Config, option: str, known: list[str]) -> list[str]:
    chosen = [name.strip() for name in config.getoption(option).split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise pytest.UsageError(f"{option}: unknown {name!r}; choose from {', '.join(known)}")
    return chosen


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('the benchmarks need pytest-benchmark: pip install ".[bench]"')
    config.stash[STARTED] = time.perf_counter()
    if not any(str(a).startswith("--benchmark-columns") for a in config.invocation_params.args):
        config.option.benchmark_columns = ["min", "median", "rounds"]  # the others say little about skewed times
    # Warnings of third parties are not ours to fix; nbloss's own stay errors.
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", "error:.*nbloss")
    config.addinivalue_line("markers", "full: left out by --quick")
    config.addinivalue_line("markers", "cuda: needs --device cuda")
    device = config.getoption("--device")
    if device not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: unknown {device!r}; choose from cpu, cuda")
    if device == "cuda":
        reason = peers_cuda.why_not()
        if reason:
            raise pytest.UsageError(f"--device cuda: {reason}")
    _libraries(config)
    _shapes(config)


def _libraries(config: pytest.Config) -> list[str]:
    """nbloss first, then the peers that were asked for; all of the device's where none was."""
    known = list(peers.MODULES)
    if config.getoption("--device") == "cuda":
        known = list(peers_cuda.PEERS)
    chosen = _listed(config, "--libraries", known) or known
    return ["nbloss", *(name for name in chosen if name != "nbloss")]


def _shapes(config: pytest.Config) -> list[str]:
    cases = [*peers_cuda.CASES, *peers_cuda.OTHERS] if config.getoption("--device") == "cuda" else KNOWN
    return _listed(config, "--shapes", list(dict.fromkeys(case.size for case in cases)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shapes = _shapes(config)
    cuda = config.getoption("--device") == "cuda"

    def kept(item: pytest.Item) -> bool:
        if "bench" not in item.nodeid.split("::")[0].split("/"):
            return True
        if config.getoption("--quick") and item.get_closest_marker("full"):
            return False
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if shapes and (case is None or case.size not in shapes):
            return False
        return bool(item.get_closest_marker("cuda")) == cuda

    dropped = [item for item in items if not kept(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if kept(item)]


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.config.getoption("verbose") <= 0:
        reporter.showfspath = False  # lines of figures show the progress


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dot between the lines of figures."""
    if report.when == "call" and report.passed and config.getoption("verbose") <= 0:
        return "passed", "", ""
    return None


def _say(config: pytest.Config, line: str) -> None:
    """One line of progress, past pytest's capture."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if reporter is None:
        return
    if capture is None:
        reporter.write_line(line)
        return
    with capture.global_and_fixture_disabled():
        reporter.write_line(line)


# --- fixtures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest) -> list[str]:
    return _libraries(request.config)


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, quick: bool) -> store.Store:
    config = request.config
    run = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "pytest", *config.invocation_params.args]),
        "quick": quick,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": machine.versions(config.getoption("--device")),
    }
    try:
        opened = store.Store(machine.describe(config.getoption("--device")), run, lambda s: _say(config, s), not quick)
    except store.BadResults as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    config.stash[STORE] = opened
    return opened


@pytest.fixture(scope="session")
def ceilings(libraries: list[str], quick: bool) -> dict[str, Any]:
    from bench.ceilings import measure

    return measure(libraries, 4 if quick else 12)


@pytest.fixture
def report(request: pytest.FixtureRequest, results: store.Store) -> Callable[[str, list[store.Row]], None]:
    """Store rows, and print a line about them."""

    def add(line: str, rows: list[store.Row]) -> None:
        results.add(rows)
        place = request.session.items.index(request.node) + 1
        _say(request.config, f"[{place}/{len(request.session.items)}] {line}")

    return add


@pytest.fixture
def contest(
    benchmark: Any,
    libraries: list[str],
    quick: bool,
    ceilings: dict[str, Any],
    report: Callable[[str, list[store.Row]], None],
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Compare all libraries on one work of one case: first their results, then their times."""

    def compete(
        case: Case, work: str, *, only: tuple[str, ...] = (), threads: int | None = None, budget: float = 1.0
    ) -> None:
        test = request.path.stem.removeprefix("test_")
        contestants, left_out = agreed(case, work, [name for name in libraries if not only or name in only])
        data = inputs_of(case)
        moved = useful_bytes(data.x, data.target, case.writes(work), case.read)
        whole = case.read == 1 and data.x.nbytes >= CEILING_FROM
        ceiling = ceilings["copy" if case.writes(work) else "read"] if whole else None
        if ceiling:
            # The ceiling takes its turns too: bandwidth drifts on a shared machine.
            move, size = ceiling.moving(moved)
            contestants["ceiling"] = (move, ceiling.seconds)
        benchmark.group = f"{case.loss}: {WORKS[work]}"
        seconds = (QUICK_BUDGET if quick else BUDGET) * budget
        times = timing.alternate(benchmark, "nbloss", contestants, seconds, quick)
        if "nbloss" not in times:
            return  # the harness was told to time nothing
        bandwidth = size / times.pop("ceiling").best if ceiling else None
        rows = [
            _row(test, case, work, library, t, times["nbloss"], moved, bandwidth, threads)
            for library, t in times.items()
        ]
        benchmark.extra_info.update(rows=rows, left_out=left_out)
        report(_line(case, work, rows, threads), rows)

    return compete


def agreed(case: Case, work: str, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """{library: (callable, seconds of its first call)} and {library: why not}; fails where a result is wrong."""
    data, contestants, left_out = inputs_of(case), {}, {}
    for library in names:
        try:
            contestant = peers.set_up(library, case, data, work)
        except peers.Absent as reason:
            if library == "nbloss":
                raise
            left_out[library] = str(reason)
            continue
        start = time.perf_counter()
        result = contestant.run()
        first = time.perf_counter() - start
        problem = oracle.disagreement(case, contestant.read(result))
        if problem:
            pytest.fail(f"{library} disagrees on {case} ({WORKS[work]}): {problem}", pytrace=False)
        del result
        contestants[library] = (contestant.run, first)
    return contestants, left_out


def _row(
    test: str,
    case: Case,
    work: str,
    library: str,
    t: timing.Timing,
    nbloss: timing.Timing,
    moved: int,
    bandwidth: float | None,
    threads: int | None,
) -> store.Row:
    row: store.Row = case.row(test, work, library)
    if threads:
        row["threads"] = threads
    row |= {
        "best": float(f"{t.best:.4g}"),
        "median": float(f"{t.median:.4g}"),
        "rounds": len(t.seconds),
        "first": float(f"{t.first:.3g}"),
        "gbs": float(f"{moved / t.best / 1e9:.3g}"),
    }
    if bandwidth:
        row |= {
            "ceiling": float(f"{bandwidth / 1e9:.3g}"),
            "share": round(moved / t.best / bandwidth, 3),
        }
    if library != "nbloss":
        row["ratio"] = float(f"{t.best / nbloss.best:.3g}")
    return row


def _line(case: Case, work: str, rows: list[store.Row], threads: int | None) -> str:
    own = rows[0]
    share = f" {own['share']:4.0%} of {'copy' if case.writes(work) else 'read'}" if "share" in own else ""
    others = sorted(rows[1:], key=lambda row: row["best"])
    ratios = ", ".join(f"{row['library']} {row['ratio']:.3g}x" for row in others)
    title = f"{case}{f'-{threads} threads' if threads else ''}, {WORKS[work]}"
    return f"{title:<68} {timing.time_of(own['best']):>8} {own['gbs']:5.1f} GB/s{share}  {ratios}"


@pytest.fixture(autouse=True, scope="session")
def _settled() -> Iterator[None]:
    """All threads, and an allocator whose state does not depend on which test ran before."""
    peers.use_threads(peers.available_threads())
    _keep_freed_memory()
    yield
    peers.use_threads(0)


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of arrays up to 32 MiB, the most it can, instead of returning it to the system.

    By its own adaptive limits the same call pays for new pages or not, a factor of five for a library with several
    temporary arrays, depending on what the process freed before. Larger arrays get new pages in any case.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(mmap_threshold, 1 << 25)
    mallopt(trim_threshold, 1 << 30)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    opened = config.stash.get(STORE, None)
    if opened is None:
        return
    minutes = (time.perf_counter() - config.stash[STARTED]) / 60
    rows = opened.new_rows()
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    terminalreporter.section("nbloss benchmarks")
    terminalreporter.write_line(f"{len(rows)} figures in {minutes:.1f} minutes, in {opened.path}")
    terminalreporter.write_line(f"nbloss is slower in {sum(r < 1 for r in ratios)} of {len(ratios)} comparisons")
    load = opened.run["load"]
    if load and load > 0.5:
        terminalreporter.write_line(f"the machine was busy before this run (load {load}): measure on a quiet one")
    if config.getoption("--quick"):
        terminalreporter.write_line("quick figures are rough and are not kept: leave --quick out for those of a report")
