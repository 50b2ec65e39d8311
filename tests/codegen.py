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
from nbloss.cuda import choices, planes, pointwise, rows, rowwise, sums
from nbloss.cuda.compile import own_way
from nbloss.cuda.intrinsics import REAL, STORED, TYPE, VECTOR_BYTES
from nbloss.cuda.labels import LABEL_CODE
from nbloss.problem import GRADIENT, LOG_SOFTMAX, LOSS_ONLY

TARGETS = ((8, 0), (9, 0))
DTYPES = {"f": "float32", "h": "bfloat16", "H": "float16", "d": "float64"}
FORMS = {LOSS_ONLY: "value", GRADIENT: "gradient", LOG_SOFTMAX: "log-softmax"}
I64 = types.int64
FEW = (choices.WHOLE[6], choices.AGAIN[1])
# One shape of each kind: of float64 and float16; of float32 and bfloat16.
KINDS = (
    (*FEW, choices.STAGED[0], choices.SHARED),
    (*FEW, *choices.WHOLE[:6:3], *choices.STAGED[:3], choices.SHARED, choices.AGAIN[0]),
)
LOAD = r"ld\.(?:global(?:\.L1::no_allocate)?|shared)\.v"
PREDICATED = "{ .reg .pred"  # how a load that may be left out begins
NO_INSTRUCTION = (".", "//", "$", "{", "}", "(", ")", "mov", "neg", "ld.param")


def ints(count):
    return types.UniTuple(I64, count)


ROW_ARGUMENTS = [ints(7), ints(5), ints(5), ints(7), ints(5)]


def variants(target, alike=True):
    """(what it is called, its dtype, how to make it, argument types, launch bounds, elements of a thread).

    If not `alike`, those are left out that differ from others in their threads or their dtype, in how rows are read or
    in what is written of them, alone.

    Bounds are (threads of a block, blocks that a multiprocessor is to have registers for), 0 where none are given.
    """
    for code, (form, form_name) in itertools.product(DTYPES, FORMS.items()):
        real = TYPE[REAL[code]]
        for dense in (False, True):
            mass = ", dense target" if dense else ""
            if form == LOG_SOFTMAX and (dense or not (alike or code != "H")):
                continue
            shapes = choices.OTHERS if dense else choices.VALUES if form == LOSS_ONLY else choices.ROWS
            for shape, even in itertools.product(shapes, (True, False)):
                other_form = dense or form == LOG_SOFTMAX
                kinds = KINDS[code in "fh"] if not other_form else FEW if even else FEW[:1]
                if not shape.serves(code, dense, target) or not (alike or shape in kinds):
                    continue
                threads, height, _, parts, room = shape
                values = shape.held(code, dense)
                warp, chained = choices.WARP, target >= (9, 0)
                options = (code, code, form, dense, threads, height, values, parts, room > 0, even, warp, chained)
                kind = "".join(
                    word
                    for word, holds in (
                        (" again", parts == 0),
                        (" staged", room > 0),
                        (f" in {parts} parts", parts > 1),
                        (" odd", not even),
                    )
                    if holds
                )
                name = f"rows {threads}x{height}x{values}{kind}, {form_name}{mass}"
                bounds = shape.bounds(code, form, dense, even, target)
                yield name, code, (rows.rows, options), [*ROW_ARGUMENTS, *[real] * 3], bounds, values
            for wide in (False, True):
                name = f"planes{' wide' if wide else ''}, {form_name}{mass}"
                options = (code, code, form, dense, wide)
                lanes = VECTOR_BYTES // STORED[code].itemsize if wide else 1
                arguments = [*ROW_ARGUMENTS, *[real] * 3]
                yield name, code, (planes.planes, options), arguments, (choices.PLANE_THREADS, 0), lanes
        if form != LOG_SOFTMAX:
            picks = (rowwise.picks, (code, form))
            yield f"picks, {form_name}", code, picks, [*ROW_ARGUMENTS, real], (choices.PLANE_THREADS, 0), 1
    for name, code in itertools.product(formulas.POINTWISE, DTYPES):
        for want, label in ((1, "value"), (2, "gradient"), (3, "value and gradient")):
            options = (name, code, code, want, (), True, choices.POINT_THREADS, choices.WARP)
            arguments = [*[ints(3)] * 7, ints(4), ints(3), TYPE[REAL[code]], I64]
            lanes = VECTOR_BYTES // STORED[code].itemsize
            yield f"{name}, {label}", code, (pointwise.pointwise, options), arguments, (choices.POINT_THREADS, 0), lanes
    for code in DTYPES:  # every operand there is, in rows that lie apart
        given = ("weight", "pos_weight", "grad_output")
        options = ("binary_cross_entropy_with_logits", code, code, 3, given, False, choices.POINT_THREADS, choices.WARP)
        arguments = [*[ints(3)] * 7, ints(4), ints(3), TYPE[REAL[code]], I64]
        lanes = VECTOR_BYTES // STORED[code].itemsize
        pointwise_rows = (pointwise.pointwise, options)
        yield (
            "binary, weighted, value and gradient in rows",
            code,
            pointwise_rows,
            arguments,
            (choices.POINT_THREADS, 0),
            lanes,
        )
    few = (choices.SUM_THREADS, choices.WARP)
    f64 = types.float64
    for code in "fd":
        for parts in (1, choices.SUM_PARTS) if target >= (9, 0) else (1,):
            options = (code, *few, choices.SUM_EACH, choices.SUM_ROUNDS, parts, target >= (9, 0))
            arguments = [ints(3), ints(3), ints(4), f64, f64]
            yield f"sum of {parts}", code, (sums.total, options), arguments, (few[0], 1), choices.SUM_EACH
            arguments = [ints(5), ints(3), I64, ints(3), ints(3), ints(4), f64]
            yield f"scan of labels {parts}", code, (sums.scan_labels, options), arguments, (few[0], 1), choices.SUM_EACH
        for source in ("d", *LABEL_CODE.values()):
            convert = (sums.convert, (source, code))
            yield f"convert {source}", code, convert, [ints(3), ints(3), I64, I64], (choices.POINT_THREADS, 0), 1


def compiled(factory, options, signature, target, bounds=(0, 0)):
    """(PTX, what the assembler says of it) of a kernel."""
    # Device functions ask for the current device when they are compiled; there may be none.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    with own_way():
        ptx, _ = cuda.compile_ptx(
            factory(*options), types.void(*signature), cc=target, launch_bounds=bounds if bounds[1] else None
        )
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


def control_flow(ptx):
    """{label: lines of a basic block} and {label: labels of what may follow it}, the first of which has no label."""
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
    return blocks, after


def before_waiting(ptx):
    """Lines that write, or end the kernel, on some way before it waits for the last one, which it may begin before."""
    blocks, after = control_flow(ptx)
    found, reached, left = [], set(), [""]
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached.add(name)
        lines = list(itertools.takewhile(lambda line: "griddepcontrol.wait" not in line, blocks[name]))
        found += [line for line in lines if re.search(r"\bst\.global|\bret\b", line)]
        left += after[name] if len(lines) == len(blocks[name]) else []
    return found


def round_trip(ptx, accesses):
    """PTX instructions for a vector, with so many wide loads and stores, on the way around a pointwise kernel's loop
    that takes in all of those there are in it.

    The machine code has about a tenth fewer. An H100 issues 132 · 128 · 1.7e9 of them a second, 9.6 in the time that a
    byte takes at 3 TB/s.
    """
    blocks, after = control_flow(ptx)

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

    wide = [n for n in blocks if any(re.search(r"(ld|st)\.global\.v[24]", line) for line in blocks[n])]
    ways = {n: distances(n) for n in wide}
    # One loop may have become several: unrolled, and what is left of that; for a number in place of an array.
    loops = [[n for n in wide if n in ways[first] and first in ways[n]] for first in wide]
    loop = max(loops, key=len, default=[])
    trips = [sum(ways[a].get(b, math.inf) for a, b in zip(t, [*t[1:], t[0]])) for t in itertools.permutations(loop)]
    return min(trips) * accesses / len(loop) if loop else 0


def figures(ptx, log):
    """What tests hold a kernel to. Instructions are those of the program text: all branches, unrolled loops once."""

    def number(pattern):
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared": number(r"(\d+) bytes smem"),
        "stack": number(r"(\d+) bytes stack frame"),
        "wide loads": len(re.findall(LOAD + r"[24]\.[ufb](?:32|64)", ptx)),
        "wide copies": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
        "wide stores": len(re.findall(r"st\.global\.v[24]\.[ufb](?:32|64)", ptx)),
        "float64": len(re.findall(r"\.f64", ptx)),
        "loads first": loads_come_first(ptx),
        "instructions": sum(1 for _ in instructions(ptx)),
    }


def instructions(ptx):
    """Lines of PTX that machine instructions come of; moves and negations become operands of others."""
    for line in ptx.splitlines():
        text = re.sub(r"^@!?%p\d+\s+", "", line.strip())
        if text.startswith(PREDICATED) or (text and not text.startswith(NO_INSTRUCTION)):
            yield line


def loads_come_first(ptx):
    """Whether all 16-byte loads stand before the first use of anything that one of them loads."""
    lines = ptx.splitlines()
    wide = [k for k, line in enumerate(lines) if re.search(LOAD + "4", line)]
    loaded = {k: re.findall(r"%\w+", lines[k].split("{")[-1].split("}")[0]) for k in wide}
    registers = {register for some in loaded.values() for register in some}
    used = (k for k, line in enumerate(lines) if k not in loaded and registers & set(re.findall(r"%\w+", line)))
    return bool(loaded) and max(loaded) < next(used)


def instructions_a_value(code, form, room):
    """What one more value costs in a row that a block holds: kernels of 32 and of 16 values a thread compared.

    What no thread but those at a maximum runs is counted too, about 4.
    """
    counts = {}
    for words in (16, 32):
        shape = choices.RowShape(256, 1, words, 1, room)
        values = shape.held(code, False)
        options = (code, code, form, False, *shape[:2], values, shape.parts, room > 0, True, choices.WARP, True)
        ptx, _ = compiled(rows.rows, options, [*ROW_ARGUMENTS, *[TYPE[REAL[code]]] * 3], (9, 0))
        counts[values] = sum(1 for _ in instructions(ptx))
    (few, least), (many, most) = sorted(counts.items())
    return (most - least) / (many - few)


def main():
    heading = (
        "registers spills shared stack wide-loads wide-copies wide-stores float64 loads-first instructions a-value "
        "on-the-straight-path"
    )
    print(f"{'kernel for sm_90':<62}{'dtype':<10}{heading}")
    for name, code, (factory, options), signature, bounds, values in variants((9, 0)):
        ptx, log = compiled(factory, options, signature, (9, 0), bounds)
        found = figures(ptx, log)
        numbers = [*found.values(), round(found["instructions"] / values)]
        if factory is pointwise.pointwise and code != "d":
            numbers.append(round(round_trip(ptx, 2 + ("gradient" in name)) / values))
        cells = "".join(f"{n:>{len(title) + 1}}" for n, title in zip(numbers, heading.split()))
        print(f"{name:<62}{DTYPES[code]:<9}{cells}", flush=True)


if __name__ == "__main__":
    main()
