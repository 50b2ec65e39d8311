"""What the CUDA kernels compile to, without a GPU: ``python tests/codegen.py`` prints registers, spills, the width of
memory accesses and instructions of every kernel. It needs numba-cuda with its compilers (extra cu13), and no driver.
"""

import heapq
import itertools
import math
import re
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher, types

from nbloss import formulas
from nbloss.cuda import pointwise, rowwise, solve, sums
from nbloss.cuda.intrinsics import REAL, STORED, TYPE, VECTOR_BYTES
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

TARGETS = ((8, 0), (9, 0))
DTYPES = {"f": "float32", "h": "bfloat16", "H": "float16", "d": "float64"}
FORMS = {LOSS_ONLY: "value", GRADIENT: "gradient", LOG_SOFTMAX: "log-softmax"}
I64 = types.int64


def ints(count):
    return types.UniTuple(I64, count)


def variants():
    """(what it is called, its dtype, how to make it, argument types, threads of a block, elements of a thread)."""
    rowwise_arguments = [ints(7), ints(5), ints(5), ints(7), ints(5)]
    for code, (form, form_name) in itertools.product(DTYPES, FORMS.items()):
        real = TYPE[REAL[code]]
        for dense in (False, True):
            mass = ", dense target" if dense else ""
            if dense and form == LOG_SOFTMAX:
                continue
            for _, threads, height, most in solve.ROW_SHAPES:
                values = solve.values_of(most, code, dense)
                options = (code, code, form, dense, threads, height, values, solve.WARP)
                name = f"rows {threads}x{height}, {form_name}{mass}"
                yield name, code, (rowwise.rows, options), [*rowwise_arguments, *[real] * 3], threads * height, values
            for wide in (False, True):
                name = f"planes{' wide' if wide else ''}, {form_name}{mass}"
                options = (code, code, form, dense, wide)
                lanes = VECTOR_BYTES // STORED[code].itemsize if wide else 1
                arguments = [*rowwise_arguments, *[real] * 3]
                yield name, code, (rowwise.planes, options), arguments, solve.PLANE_THREADS, lanes
        if form != LOG_SOFTMAX:
            picks = (rowwise.picks, (code, form))
            yield f"picks, {form_name}", code, picks, [*rowwise_arguments, real], solve.PLANE_THREADS, 1
    for name, code in itertools.product(formulas.POINTWISE, DTYPES):
        for want, label in ((1, "value"), (2, "gradient"), (3, "value and gradient")):
            options = (name, code, code, want, (), True, solve.POINT_THREADS, solve.WARP)
            arguments = [*[ints(3)] * 7, ints(4), ints(3), TYPE[REAL[code]], I64]
            lanes = VECTOR_BYTES // STORED[code].itemsize
            yield f"{name}, {label}", code, (pointwise.pointwise, options), arguments, solve.POINT_THREADS, lanes
    for code in DTYPES:  # every operand there is, in rows that lie apart
        given = ("weight", "pos_weight", "grad_output")
        options = ("binary_cross_entropy_with_logits", code, code, 3, given, False, solve.POINT_THREADS, solve.WARP)
        arguments = [*[ints(3)] * 7, ints(4), ints(3), TYPE[REAL[code]], I64]
        lanes = VECTOR_BYTES // STORED[code].itemsize
        pointwise_rows = (pointwise.pointwise, options)
        yield "binary, weighted, in rows", code, pointwise_rows, arguments, solve.POINT_THREADS, lanes
    few = (solve.SUM_THREADS, solve.WARP)
    f64 = types.float64
    for code in "fd":
        total = (sums.total, (code, *few, solve.SUM_EACH))
        yield "sum", code, total, [ints(3), ints(3), ints(4), f64, f64], few[0], solve.SUM_EACH
        scan = (sums.scan_labels, (code, *few, solve.SUM_EACH))
        yield "scan of labels", code, scan, [ints(5), ints(3), I64, ints(3), ints(4), f64], few[0], solve.SUM_EACH
        yield "convert", code, (sums.convert, ("d", code)), [ints(3), ints(3), I64, I64], solve.POINT_THREADS, 1


def compiled(factory, options, signature, target):
    """(PTX, what the assembler says of it) of a kernel."""
    # Device functions ask for the current device when they are compiled; there may be none.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    ptx, _ = cuda.compile_ptx(factory(*options), types.void(*signature), cc=target)
    text = ptx if isinstance(ptx, str) else ptx.decode()
    flags = [f"-arch=sm_{target[0]}{target[1]}", "-verbose", "-Xptxas=-v"]
    handle = nvjitlink.create(len(flags), flags)
    try:
        data = text.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel.ptx")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return text, log.decode()


def parameters(ptx):
    """The types of a kernel's parameters, in order."""
    return re.findall(r"^\t\.param \.(\w+) ", ptx.partition(".entry")[2].partition(")\n{")[0], re.MULTILINE)


def flat(signature):
    """What a launch gives a kernel of this signature: one parameter for each number, of eight bytes if an integer."""
    numbers = [t for argument in signature for t in (argument if isinstance(argument, types.UniTuple) else [argument])]
    return [{I64: "u64", types.float32: "f32", types.float64: "f64"}[t] for t in numbers]


def round_trip(ptx):
    """PTX instructions once around a pointwise kernel's loop, on the way that takes in all its wide loads and stores.

    The machine code has about a tenth fewer. An H100 issues 132 · 128 · 1.7e9 of them a second, 9.6 in the time that a
    byte takes at 3 TB/s.
    """
    body = ptx.partition(".entry")[2]
    blocks, label = {"": []}, ""
    for line in body.splitlines():
        found = re.match(r"(\$\w+):", line)
        if found:
            label = found[1]
            blocks[label] = []
        elif line.startswith("\t") and not line.startswith("\t."):
            blocks[label].append(line)
            if "bra" in line:  # what follows is a block of its own
                label = f"{label}'"
                blocks[label] = []
    names = list(blocks)
    after = {}
    for name, following in zip(names, [*names[1:], None]):
        last = blocks[name][-1] if blocks[name] else ""
        target = re.search(r"bra(?:\.uni)?\s+(\$\w+);", last)
        falls = not re.search(r"^\t(bra|ret)", last)
        after[name] = ([target[1]] if target else []) + ([following] if falls and following else [])

    def distances(start):
        """Instructions from the beginning of one block to those of all that can be reached."""
        reached, waiting = {}, [(len(blocks[start]), n) for n in after[start]]
        while waiting:
            so_far, name = heapq.heappop(waiting)
            if name not in reached:
                reached[name] = so_far
                for n in after[name]:
                    heapq.heappush(waiting, (so_far + len(blocks[name]), n))
        return reached

    wide = [n for n in names if any(re.search(r"(ld|st)\.global\.v[24]", line) for line in blocks[n])]
    ways = {n: distances(n) for n in wide}
    wide = [n for n in wide if n in ways[n]]
    trips = [sum(ways[a].get(b, math.inf) for a, b in zip(t, [*t[1:], t[0]])) for t in itertools.permutations(wide)]
    return min(trips) if wide else 0


def figures(ptx, log):
    """What tests hold a kernel to. Instructions are those of the program text: all branches, unrolled loops once."""

    def number(pattern):
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "wide loads": len(re.findall(r"ld\.global\.v[24]\.[ufb](?:32|64)", ptx)),
        "wide stores": len(re.findall(r"st\.global\.v[24]\.[ufb](?:32|64)", ptx)),
        "float64": len(re.findall(r"\.f64", ptx)),
        "instructions": sum(line.startswith("\t") and not line.startswith("\t.") for line in ptx.splitlines()),
    }


def main():
    heading = "registers spills stack wide-loads wide-stores float64 instructions a-value on-the-straight-path"
    print(f"{'kernel for sm_90':<62}{'dtype':<10}{heading}")
    for name, code, (factory, options), signature, _, values in variants():
        ptx, log = compiled(factory, options, signature, (9, 0))
        found = figures(ptx, log)
        numbers = [*found.values(), round(found["instructions"] / values)]
        if factory is pointwise.pointwise and code != "d":
            numbers.append(round(round_trip(ptx) / values))
        cells = "".join(f"{n:>{len(title) + 1}}" for n, title in zip(numbers, heading.split()))
        print(f"{name:<62}{DTYPES[code]:<9}{cells}", flush=True)


if __name__ == "__main__":
    main()
