"""Machine code: the hot loops are vector code of the machine's full width, with no library call for exp or log."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llvmlite import binding
from numba.core import config

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled with the JIT off"),
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 registers"),
]

# By register: what a machine must have to run the code, and the processor and features that are compiled for.
WIDTHS = {
    "zmm": ("avx512f", "skylake-avx512", "+avx512f,+avx512dq,+avx512vl,+avx512bw,+avx2,+fma,+avx,+sse4.2,+f16c"),
    "ymm": ("avx2", "haswell", "+avx2,+fma,+avx,+sse4.2,+f16c,-avx512f"),
}
KERNELS = {
    "rows": ("rowwise", "ROWS", "flf"),
    "rows of float64": ("rowwise", "ROWS", "dld"),
    "groups": ("rowwise", "GROUPS", "flf"),
    "tiles": ("rowwise", "TILES", "flf"),
    "streams": ("rowwise", "STREAMS", "flf"),
    "binary_cross_entropy": ("pointwise", "KERNELS['binary_cross_entropy']", "ffff"),
    "binary_cross_entropy_with_logits": ("pointwise", "KERNELS['binary_cross_entropy_with_logits']", "ffff"),
}
PRINT_ASSEMBLY = """
import sys
from importlib import import_module
module, name, codes = sys.argv[1:]
kernel = eval(name, vars(import_module("nbloss.cpu." + module)))
(text,) = kernel.dispatcher(False, *codes).inspect_asm().values()
print(text)
"""


def run_compiled_for(width, *arguments):
    """What Python prints where kernels are compiled for registers of this width, which this machine need not have."""
    _, cpu, features = WIDTHS[width]
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NBLOSS_CACHE": "0"}
    found = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def blocks_of(text):
    """The assembly as blocks of instructions, and the blocks that may follow each."""
    blocks, names = [[]], {}
    for line in map(str.strip, text.splitlines()):
        if re.fullmatch(r"\.?L\w+:", line):
            names[line[:-1]] = len(blocks)
            blocks.append([])
        elif line and not line.startswith((".", "#")) and not line.endswith(":"):
            blocks[-1].append(line)
    following = []
    for k, block in enumerate(blocks):
        targets = {names[line.split()[-1]] for line in block if line.startswith("j") and line.split()[-1] in names}
        ends = block and re.match(r"(jmp|ret)", block[-1])
        following.append(targets if ends or k + 1 == len(blocks) else targets | {k + 1})
    return blocks, following


def inner_loops(text):
    """The instructions of each loop that holds no other."""
    blocks, following = blocks_of(text)
    back, done = [], set()
    for start in range(len(blocks)):
        path = [(start, iter(following[start]))] if start not in done else []
        while path:
            done.add(path[-1][0])
            k = next(path[-1][1], None)
            if k is None:
                path.pop()
            elif any(k == open_block for open_block, _ in path):
                back.append((path[-1][0], k))
            elif k not in done:
                path.append((k, iter(following[k])))
    before = [[k for k, targets in enumerate(following) if block in targets] for block in range(len(blocks))]
    loops = []
    for last, head in back:
        body, reached = {head}, [last]
        while reached:
            k = reached.pop()
            if k not in body:
                body.add(k)
                reached += before[k]
        loops.append((head, body))
    for head, body in loops:
        if not any(other in body for other, _ in loops if other != head):
            yield [line for k in sorted(body) for line in blocks[k]]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_hot_loops(kernel, width):
    text = run_compiled_for(width, "-c", PRINT_ASSEMBLY, *KERNELS[kernel])
    assert not re.search(r"\b(exp|exp2|expm1|log|log2|log1p)f?\b", text), "a library call"
    kind = "pd" if "float64" in kernel else "ps"
    # A loop that computes has the polynomial of an exp or a log in it: five fused multiply-adds or more.
    hot = [loop for loop in inner_loops(text) if sum(line.startswith("vfmadd") for line in loop) >= 5]
    assert hot
    for loop in hot:
        fused = [line for line in loop if re.match(rf"vf(n?m)(add|sub)\d*{kind}\s", line)]
        assert fused, loop
        assert all(f"%{width}" in line for line in fused), loop
        assert not any(re.match(r"vfn?m\w*s[sd]\s", line) for line in loop), loop
        assert not any(line.startswith("call") for line in loop), loop
        assert not any(re.match(r"vmov(up|dqu).*\(%rsp\)", line) for line in loop), loop  # across two cache lines
        if width == "ymm":
            assert "zmm" not in "".join(loop)


@pytest.mark.parametrize("width", WIDTHS)
def test_functions_keep_their_digits(width):
    """Each width has a text of exp of its own: both are held to the same limits on one machine."""
    needed, _, _ = WIDTHS[width]
    if not binding.get_host_cpu_features().get(needed):
        pytest.skip(f"this processor has no {needed}")
    tests = [str(Path(__file__).with_name("test_vecmath.py")), "-k", "errors or scaled_exp or edges"]
    assert "6 passed" in run_compiled_for(width, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
