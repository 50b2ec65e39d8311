"""What kills or hangs Numba programs, each in a process of its own with a time limit."""

import compileall
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nbloss

pytestmark = pytest.mark.cpu

PACKAGE = Path(nbloss.__file__).parent
LAYERS = ["omp", "workqueue", "tbb"]

SETUP = """
import os, sys, threading
import numpy as np
import nbloss

rng = np.random.default_rng(0)
x = rng.standard_normal((3000, 100), dtype=np.float32)
t = rng.integers(0, 100, 3000)
def job(_=None):
    loss, grad = nbloss.cross_entropy.value_and_grad(x, t)
    return float(loss).hex(), hash(grad.tobytes())
"""


def run(code, check=True, seconds=100, cwd=None, **environment):
    """The output of Python code; hangs and crashes are failures."""
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", SETUP + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=cwd or PACKAGE.parent,
        env={**os.environ, "PYTHONHASHSEED": "0", **{k: str(v) for k, v in environment.items()}},
    )
    if check:
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.strip()
    return result


@pytest.fixture(scope="module")
def expected():
    return run("nbloss.set_num_threads(1); print(job())")


def layer_or_skip(layer):
    if run("from nbloss.cpu import launch; print(launch.layer())", NUMBA_THREADING_LAYER=layer) != layer:
        pytest.skip(f"no threading layer {layer} here")


def test_without_a_threading_layer(expected):
    """One thread computes, with one warning, where the layer that a user asks for cannot be loaded."""
    code = """
    import warnings
    from nbloss.cpu import launch
    launch.PARALLEL = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        print(job())
        assert job() == job()
    print(len(seen), "computes on one thread" in str(seen[0].message), launch.layer())
    """
    assert run(code, NUMBA_THREADING_LAYER="nonsense") == f"{expected}\n1 True None"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cold", [True, False])
def test_eight_threads_at_once(layer, cold, expected, tmp_path):
    """The first call included, which compiles in all of them."""
    layer_or_skip(layer)
    code = """
    from concurrent.futures import ThreadPoolExecutor
    barrier = threading.Barrier(8)
    def work(_):
        barrier.wait(); return {job() for _ in range(50)}
    with ThreadPoolExecutor(8) as pool:
        found = set().union(*pool.map(work, range(8)))
    print(*found) if len(found) == 1 else print(len(found), "answers")
    """
    folder = {"NUMBA_CACHE_DIR": tmp_path} if cold else {}
    assert run(code, NUMBA_THREADING_LAYER=layer, **folder) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_a_parallel_call(layer, expected):
    layer_or_skip(layer)
    code = """
    import multiprocessing, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    def child(depth):
        mine = job()
        assert nbloss.get_num_threads() == 1
        if depth:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                assert pool.map_async(child, [0]).get(60) == [mine]
        return mine
    before = job()
    multiprocessing.process.current_process()._config["daemon"] = False
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        found = set(pool.map(child, [0, 1, 0, 1]))
    assert found == {before} == {job()}
    print(before)
    """
    assert run(code, NUMBA_THREADING_LAYER=layer) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("library", ["torch", "sklearn"])
def test_fork_after_the_openmp_work_of_another_library(library, expected):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    work = {
        "torch": "import torch; torch.ones(2000, 2000).exp().sum()",
        "sklearn": "from sklearn.cluster import KMeans; KMeans(3, n_init=1).fit(x)",
    }
    code = f"""
    import warnings
    warnings.simplefilter("ignore")
    {work[library]}
    before = job()
    child = os.fork()
    if not child:
        import signal
        signal.alarm(60)
        os._exit(0 if job() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    print(before)
    """
    assert run(code) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_other_threads_compute_and_compile(expected, tmp_path):
    code = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    before = job()
    stop = threading.Event()
    def compute():
        while not stop.is_set(): job()
    def compile_():
        for dtype in ("float64", "float16"):
            nbloss.mse_loss(x.astype(dtype), x.astype(dtype)); nbloss.softmax(x.astype(dtype))
    threads = [threading.Thread(target=compute), threading.Thread(target=compile_)]
    for thread in threads: thread.start()
    for _ in range(6):
        child = os.fork()
        if not child:
            import signal
            signal.alarm(60)
            wide = x.astype(np.float64)
            os._exit(0 if job() == before and np.isfinite(nbloss.l1_loss(wide, 0 * wide)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads: thread.join()
    print(before)
    """
    assert run(code, NUMBA_CACHE_DIR=tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_the_parallel_work_of_another_package(expected):
    """nbloss has been imported, and has computed nothing yet."""
    layer_or_skip("omp")
    code = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    from numba import njit, prange
    @njit(parallel=True)
    def total(a):
        s = 0.0
        for i in prange(a.size): s += a[i]
        return s
    total(np.ones(100_000))
    child = os.fork()
    if not child:
        import signal
        signal.alarm(60)
        from nbloss.cpu import launch
        launch.PARALLEL = 0
        print(job(), nbloss.get_num_threads(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    """
    assert run(code, NUMBA_THREADING_LAYER="omp") == f"{expected} 1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_fork_while_another_thread_imports_numba(seconds):
    """The child would wait for a module's lock, of which the owner did not come along."""
    code = f"""
    import time, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    thread = threading.Thread(target=lambda: nbloss.mse_loss(x, x))
    thread.start()
    time.sleep({seconds})
    assert thread.is_alive()
    child = os.fork()
    if not child:
        import signal
        signal.alarm(60)
        os._exit(0 if nbloss.mse_loss(x, x) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    """
    run(code)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(method, expected, tmp_path):
    if method == "forkserver" and not hasattr(os, "fork"):
        pytest.skip("no forkserver here")
    script = tmp_path / "script.py"
    body = """
    if __name__ == "__main__":
        import multiprocessing
        before = job()
        with multiprocessing.get_context("{}").Pool(2) as pool:
            assert set(pool.map(job, range(4))) == {{before}}
        print(before)
    """
    script.write_text(SETUP + textwrap.dedent(body.format(method)))
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=100, check=True, env=environment
    )
    assert done.stdout.strip() == expected


# --- the cache ----------------------------------------------------------------------------------------------

COMPILED = "print(nbloss.mse_loss(np.float32([3]), np.float32([1])))"  # the kernel that takes least time to compile


def kernels(folder):
    return sorted(Path(folder).glob("nbloss/*.kernel"))


def test_the_cache_is_used_and_heals(tmp_path):
    hits = """
    from nbloss.cpu import compile as c
    made = []
    original = c._DiskCache.save_overload
    c._DiskCache.save_overload = lambda self, *a: (made.append(1), original(self, *a))
    three, one = np.float32([3]), np.float32([1])
    print(nbloss.mse_loss(three, one), nbloss.l1_loss(three, one), len(made))
    """
    assert run(hits, NUMBA_CACHE_DIR=tmp_path) == "4.0 2.0 2"
    assert len(kernels(tmp_path)) == 2
    assert run(hits, NUMBA_CACHE_DIR=tmp_path) == "4.0 2.0 0"
    one, two = kernels(tmp_path)
    whole = one.read_bytes(), two.read_bytes()
    for damage in (
        lambda: (one.write_bytes(whole[0][:1000]), two.write_bytes(b"")),
        lambda: (one.unlink(), two.write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))),
        lambda: (one.write_bytes(whole[1]), two.write_bytes(whole[0])),
    ):
        damage()
        assert run(hits, NUMBA_CACHE_DIR=tmp_path) == "4.0 2.0 2"
        assert run(hits, NUMBA_CACHE_DIR=tmp_path) == "4.0 2.0 0"


@pytest.mark.parametrize("parallel", [False, True])
def test_a_cached_kernel_takes_a_part_of_numba(expected, parallel):
    """Of what Numba loads to compile, a kernel that is there already takes the runtime alone: half the time."""
    code = f"""
    from nbloss.cpu import launch
    launch.PARALLEL *= {not parallel}
    losses = nbloss.mse_loss(x, x + 1), nbloss.nll_loss(x, t), nbloss.logsumexp(x[:, ::2])[0]
    print(job(), *losses, "numba.np.linalg" in sys.modules)
    """
    first, second = run(code), run(code)
    assert second.startswith(expected)
    assert second.split()[:-1] == first.split()[:-1]
    assert second.endswith("False")


def test_the_cache_can_be_turned_off(tmp_path):
    assert run(COMPILED, NUMBA_CACHE_DIR=tmp_path, NBLOSS_CACHE=0) == "4.0"
    assert not kernels(tmp_path)


def test_a_parallel_kernel_becomes_machine_code_once():
    """Not each of the functions that Numba makes of its loop too: a first call would take 1.5 times as long."""
    code = """
    from numba.core.codegen import JITCodeLibrary
    from nbloss.cpu.pointwise import KERNELS
    finished, usual = [], JITCodeLibrary._finalize_specific
    def finish(self):
        finished.append(self.name.lower())
        usual(self)
    JITCodeLibrary._finalize_specific = finish
    KERNELS["mse_loss"].variant(True, "f", "f", "f", "f")
    print(sum("driver" in name for name in finished), sum("gufunc" in name for name in finished))
    """
    assert run(code, NBLOSS_CACHE=0) == "1 0"


def test_a_first_call_imports_little_of_numba():
    """Not what looks for SciPy's BLAS; what is compiled for somebody else, before or after, has all of Numba."""
    code = """
    import numba
    def others():
        return numba.njit(lambda a: max(np.median(a) + a.dot(a), a[0]))(np.ones(3))
    def ours():
        return nbloss.mse_loss(x, x), job() == job()
    print(%s)
    """
    before = '*ours(), "numba.np.arraymath" in sys.modules, others(), nbloss.l1_loss(x, x), others()'
    assert run(code % before, NBLOSS_CACHE=0) == "0.0 True False 4.0 0.0 4.0"
    assert run(code % "others(), *ours(), others()", NBLOSS_CACHE=0) == "4.0 0.0 True 4.0"


def test_a_part_is_linked_whoever_calls_it_first():
    """Its first caller turns out not to need it, the next one does; unlinked, it would be a call of address 0."""
    code = """
    from numba import njit
    from nbloss.cpu.assembly import kernel_compiler
    from nbloss.cpu.parts import inline
    @inline
    def leaf(x):
        return 3 * x
    @inline
    def middle(x, sign):
        return x if sign < 0 else leaf(x)
    def kernel(x):
        return middle(x, -1) + middle(x, x)
    print(njit("int64(int64)", pipeline_class=kernel_compiler(False, True))(kernel)(5))
    """
    assert run(code, NBLOSS_CACHE=0) == "20"


@pytest.mark.parametrize("setting", ["NUMBA_DEBUGINFO", "NUMBA_BOUNDSCHECK"])
def test_settings_for_a_debugger(expected, setting):
    """Numba compiles other code then, in which kernels find what they found."""
    code = """
    from nbloss.cpu import launch
    launch.PARALLEL = 0
    print(job())
    """
    assert run(code, NBLOSS_CACHE=0, **{setting: 1}) == expected


@pytest.mark.parametrize("trouble", ["no home", "unwritable", "full disk", "a file in the way", "open to others"])
def test_no_cache_trouble_breaks_a_call(tmp_path, trouble):
    """Warnings are errors in these processes, and a call works all the same."""
    before = ""
    environment = {"NUMBA_CACHE_DIR": tmp_path / "cache"}
    if trouble == "no home":
        environment = {"HOME": "/nonexistent/home", "XDG_CACHE_HOME": ""}
    elif trouble == "unwritable":
        before = "import tempfile\ndef no(*a, **k): raise PermissionError(13, 'no')\ntempfile.mkstemp = no\n"
    elif trouble == "full disk":
        before = "def full(*a): raise OSError(28, 'No space left on device')\nos.replace = full\n"
    elif trouble == "a file in the way":
        environment["NUMBA_CACHE_DIR"].write_text("")
    else:
        (environment["NUMBA_CACHE_DIR"] / "nbloss").mkdir(parents=True)
        (environment["NUMBA_CACHE_DIR"] / "nbloss").chmod(0o777)
    assert run(before + COMPILED, **environment) == "4.0"
    if trouble not in ("no home", "a file in the way"):
        assert not kernels(environment["NUMBA_CACHE_DIR"])
        assert not list(Path(environment["NUMBA_CACHE_DIR"]).glob("nbloss/*"))


def test_at_most_one_warning(tmp_path):
    code = """
    import warnings
    def full(source, target): raise OSError(28, 'No space left on device', source)
    os.replace = full
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        nbloss.mse_loss(x, x); nbloss.l1_loss(x, x); nbloss.mse_loss(x.astype(np.float64), x)
    print(len(seen), seen[0].category.__name__)
    """
    assert run(code, NUMBA_CACHE_DIR=tmp_path) == "1 RuntimeWarning"


def test_six_cold_processes_at_once(tmp_path):
    code = SETUP + "print(float(nbloss.mse_loss(*x[:2].astype(sys.argv[1]))).hex())"
    warm = run("print(float(nbloss.mse_loss(*x[:2])).hex())")
    environment = {**os.environ, "PYTHONHASHSEED": "0", "NUMBA_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, dtype], stdout=subprocess.PIPE, text=True, env=environment, cwd=PACKAGE.parent
        )
        for dtype in ["float32", "float64", "float16"] * 2
    ]
    answers = [process.communicate(timeout=120)[0].strip() for process in running]
    assert all(answers)
    assert answers[0] == warm
    assert answers[:3] == answers[3:]
    assert len(kernels(tmp_path)) == 3


def test_edited_sources_are_compiled_anew(tmp_path):
    """An edit, or an upgrade, of a module that a kernel is made of; Numba's own cache would run the old code."""
    shutil.copytree(PACKAGE, tmp_path / "nbloss", ignore=shutil.ignore_patterns("__pycache__"))
    cache = tmp_path / "cache"
    assert run(COMPILED, cwd=tmp_path, NUMBA_CACHE_DIR=cache) == "4.0"
    for module, old, new in (
        ("formulas.py", "return d * d, TWO * d, d < d", "return d * d * TWO, TWO * d, d < d"),
        ("problem.py", "WANT_VALUE, WANT_GRADIENT = 1, 2", "WANT_GRADIENT, WANT_VALUE = 1, 2"),
    ):
        source = tmp_path / "nbloss" / module
        text = source.read_text()
        assert old in text
        source.write_text(text.replace(old, new))
        assert run(COMPILED, cwd=tmp_path, NUMBA_CACHE_DIR=cache) == "8.0"
    assert len(kernels(cache)) == 3
    other_version = "from nbloss.cpu import compile as c\nc._versions = lambda: ('another Numba',)\n"
    assert run(other_version + COMPILED, cwd=tmp_path, NUMBA_CACHE_DIR=cache) == "8.0"
    assert len(kernels(cache)) == 4


def test_what_numba_is_told_of_compiling_has_kernels_of_its_own(tmp_path):
    """One debugging session would make every later process slow."""
    for told in ({}, {"NUMBA_OPT": 0}, {"NUMBA_OPT": 3}):
        run(COMPILED, NUMBA_CACHE_DIR=tmp_path, **told)
    assert len(kernels(tmp_path)) == 2


def test_a_relative_folder_is_that_of_the_first_call(tmp_path):
    (tmp_path / "elsewhere" / "kept" / "nbloss").mkdir(parents=True)
    code = f"""
    nbloss.mse_loss(x, x)
    os.chdir({str(tmp_path / "elsewhere")!r})
    nbloss.mse_loss(x.astype(np.float64), x)
    """
    run(code, cwd=tmp_path, NUMBA_CACHE_DIR="kept", PYTHONPATH=PACKAGE.parent)
    assert len(kernels(tmp_path / "kept")) == 2
    assert not any((tmp_path / "elsewhere" / "kept" / "nbloss").iterdir())


@pytest.mark.parametrize("kind", ["zip", "pyc"])
def test_an_upgrade_is_compiled_anew_without_files_of_source(tmp_path, kind):
    """Imported from an archive, or with compiled files alone."""
    shutil.copytree(PACKAGE, tmp_path / "new" / "nbloss", ignore=shutil.ignore_patterns("__pycache__"))
    formulas = tmp_path / "new" / "nbloss" / "formulas.py"
    place = tmp_path / ("nbloss.zip" if kind == "zip" else "bare")
    code = "print(nbloss.mse_loss(np.float32([3]), np.float32([1])), nbloss.__file__)"
    for factor, expected in (("d * d", "4.0"), ("d * d * TWO", "8.0")):
        formulas.write_text(formulas.read_text().replace("return d * d, TWO", f"return {factor}, TWO"))
        if kind == "zip":
            shutil.make_archive(str(place.with_suffix("")), "zip", tmp_path / "new")
        else:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / "new", place)
            assert compileall.compile_dir(place, legacy=True, quiet=1)
            for source in place.rglob("*.py"):
                source.unlink()
        for _ in range(2):
            found = run(code, cwd=tmp_path, PYTHONPATH=place, NUMBA_CACHE_DIR=tmp_path / "cache")
            assert found.startswith(f"{expected} {place}")
        assert len(kernels(tmp_path / "cache")) == (1 if expected == "4.0" else 2)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users")
def test_whose_cache_is_used(tmp_path):
    """One's own or root's, as of an image that was built by root and runs as another user; nobody else's."""
    code = """
    me = os.getuid() + int(os.environ["OTHER"])
    os.getuid = lambda: me
    from nbloss.cpu import compile as c
    import warnings
    warnings.simplefilter("ignore")
    print(bool(c.cache_folder()))
    """
    folder = tmp_path / "nbloss"
    folder.mkdir(mode=0o755)
    assert run(code, OTHER=0, NUMBA_CACHE_DIR=tmp_path) == "True"
    assert run(code, OTHER=1, NUMBA_CACHE_DIR=tmp_path) == str(os.getuid() == 0)
    if os.getuid() == 0:
        os.chown(folder, 4242, -1)
        assert run(code, OTHER=0, NUMBA_CACHE_DIR=tmp_path) == "False"


# --- long work, memory, settings ----------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_arrives_within_a_second():
    code = """
    import itertools, signal, time
    big = np.broadcast_to(x[0], (30_000_000, 100))
    labels = np.zeros(len(big), np.uint8)
    job()
    nbloss.cross_entropy(big[:20_000], labels[:20_000])  # compiled before the clock starts
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    start = time.perf_counter()
    try:
        # Not `while True`: what CPython 3.11 raises at its jump back is outside of a `try` right before it.
        for _ in itertools.count(): nbloss.cross_entropy(big, labels)
    except KeyboardInterrupt:
        assert time.perf_counter() - start < 1.5, time.perf_counter() - start
    print(job())
    """
    assert run(code) == run("print(job())")


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGALRM"])
@pytest.mark.parametrize("seconds", [0.1, 0.25])
def test_a_signal_waits_for_the_import_of_numba(number, seconds):
    """A module that is imported by half breaks every later call."""
    code = f"""
    import signal
    number = signal.{number}
    signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(number)
    threading.Timer({seconds}, signal.raise_signal, [number]).start()
    try: nbloss.mse_loss(x, x)
    except KeyboardInterrupt: print("heard", signal.getsignal(number) is before)
    print(nbloss.mse_loss(x, x + 1))
    """
    assert run(code) == "heard True\n1.0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_interrupt_while_a_fork_waits(tmp_path):
    """It is heard after the fork, which waits all the same for what another thread compiles."""
    code = """
    import signal, time, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nbloss.set_num_threads(1)
    thread = threading.Thread(target=lambda: nbloss.l1_loss(x, x))
    thread.start()
    time.sleep(0.3)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    try:
        child = os.fork()
        if not child:
            signal.alarm(60)
            os._exit(0 if nbloss.mse_loss(x, x) == 0 else 1)
        time.sleep(2)
    except KeyboardInterrupt:
        print("heard")
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    """
    assert run(code, NUMBA_CACHE_DIR=tmp_path) == "heard"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_waits_for_a_compilation(expected, tmp_path):
    """Where LLVM calls Python back it would be dropped; amid Numba's registries, they would stay broken."""
    code = """
    import signal
    from numba.core.codegen import JITCodeLibrary
    usual, signals = JITCodeLibrary._object_compiled_hook.__func__, [signal.SIGINT]
    def hook(cls, *args):
        if signals: signal.raise_signal(signals.pop())
        usual(cls, *args)
    JITCodeLibrary._object_compiled_hook = classmethod(hook)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    before = signal.getsignal(signal.SIGINT)
    try: job()
    except KeyboardInterrupt: print("heard", signal.getsignal(signal.SIGINT) is before)
    print(job())
    """
    assert run(code, NUMBA_CACHE_DIR=tmp_path) == f"heard True\n{expected}"


def test_kernels_release_the_gil():
    code = """
    import time
    big = np.broadcast_to(x[0], (2_000_000, 100))
    labels = np.zeros(len(big), np.uint8)
    nbloss.set_num_threads(1); nbloss.cross_entropy(big, labels)
    ticks = []
    worker = threading.Thread(target=nbloss.cross_entropy, args=(big, labels))
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter()); time.sleep(0.001)
    print(len(ticks) > 3 and max(b - a for a, b in zip(ticks, ticks[1:])) < 0.3)
    """
    assert run(code) == "True"


def test_nothing_leaks():
    code = """
    import gc, resource
    def resident():
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    small, labels = x[:32, :10].copy(), t[:32] % 10
    wrong = labels.copy(); wrong[3] = 10
    def calls(good, bad):
        for _ in range(good): nbloss.cross_entropy.value_and_grad(small, labels)
        for _ in range(bad):
            try: nbloss.cross_entropy.value_and_grad(small, wrong)
            except IndexError: pass
    calls(2000, 200)
    before = resident()
    calls(100_000, 1000)
    print(resident() - before)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    assert int(run(code)) < 1 << 20


def test_peak_memory_of_a_mapped_input(tmp_path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    code = """
    import resource
    path = sys.argv[1] if len(sys.argv) > 1 else os.environ["BIG"]
    with open(path, "wb") as file: file.truncate(2 << 30)  # a sparse file: zeros
    big = np.memmap(path, np.float32, "r", shape=(2 << 20, 256))
    labels = np.zeros(len(big), np.uint8)
    job(); nbloss.cross_entropy(big[:5000], labels[:5000])
    def anonymous():
        return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
    before = anonymous()
    loss = nbloss.cross_entropy(big, labels)
    print(abs(loss - np.log(256)) < 1e-5, anonymous() - before < 40_000)
    tall = big[: 1 << 18].reshape(-1, 8)
    nbloss.logsumexp(tall[: 1 << 17], axis=0)  # by the kernel for several threads, which takes memory of its own
    before = anonymous()
    total = nbloss.logsumexp(tall, axis=0)
    print(np.ptp(total - np.log(len(tall))) < 1e-5, anonymous() - before < 4_000)
    """
    assert run(code, BIG=tmp_path / "big").split() == ["True"] * 4


def test_thread_settings_from_several_threads():
    code = """
    import numba
    users = numba.get_num_threads()
    def work(n):
        for _ in range(20):
            nbloss.set_num_threads(n); job()
    threads = [threading.Thread(target=work, args=(1 + k % nbloss.get_num_threads(),)) for k in range(6)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert numba.get_num_threads() == users
    print(job())
    """
    assert run(code) == run("print(job())")


def test_a_share_of_processor_time(tmp_path):
    code = """
    from pathlib import Path
    from nbloss.cpu import launch
    launch.Path = lambda name: Path(os.environ["QUOTA"])
    print(nbloss.get_num_threads())
    """
    for text, threads in (("100000 100000", "1"), ("50000 100000", "1"), ("max 100000", None), ("800000 100000", None)):
        (tmp_path / "cpu.max").write_text(text)
        assert run(code, QUOTA=tmp_path / "cpu.max") == (
            threads or run("from nbloss.cpu import launch; print(launch.max_threads())")
        )
