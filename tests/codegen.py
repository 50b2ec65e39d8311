"""What the CUDA kernels compile to, without a GPU: ``python tests/codegen.py`` prints a table of registers, spills,
width of memory accesses and instructions. It needs numba-cuda with its compilers (extra cu13 or cu12), and no driver.
"""

import re
from functools import cache
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher, types

TARGETS = ((8, 0), (9, 0))


@cache
def pretend(target):
    """Device functions ask for the current device when they are compiled; there is none here."""
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)


def compiled(kernel, signature, target):
    """(PTX, what the assembler says of it) of a kernel."""
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    ptx, _ = cuda.compile_ptx(kernel, types.void(*signature), cc=target)
    text = ptx if isinstance(ptx, str) else ptx.decode()
    options = [f"-arch=sm_{target[0]}{target[1]}", "-verbose", "-Xptxas=-v"]
    handle = nvjitlink.create(len(options), options)
    try:
        data = text.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, data, len(data), "kernel.ptx")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return text, log.decode()


def figures(ptx, log):
    """The numbers that tests hold a kernel to."""

    def number(pattern):
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    body = [line for line in ptx.splitlines() if line.startswith("\t") and not line.startswith("\t.")]
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "wide loads": len(re.findall(r"ld\.global\.v[24]\.[uf](?:32|64)", ptx)),
        "wide stores": len(re.findall(r"st\.global\.v[24]\.[uf](?:32|64)", ptx)),
        "float64": len(re.findall(r"\.f64", ptx)),
        "instructions": len(body),
    }


I64 = types.int64


def ints(count):
    return types.UniTuple(I64, count)


def row_signature(real):
    return [ints(7), ints(5), ints(5), ints(7), ints(5), real, real, real]
