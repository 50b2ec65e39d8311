"""Copy and read bandwidth of all threads, as every share of the ceiling uses them."""

import pytest

from bench.ceilings import BYTES, COUNT


@pytest.mark.parametrize("name", ["copy", "read"])
def test_ceiling(name, ceilings, benchmark, report):
    ceiling = ceilings[name]
    benchmark.group = "ceiling"
    benchmark.pedantic(ceiling.run, args=(0, COUNT), rounds=10, warmup_rounds=1)
    if benchmark.stats is None:
        return
    ceiling.seconds = benchmark.stats.stats.min
    row = {
        "test": "ceiling",
        "work": name,
        "library": ceiling.library,
        "shape": str(BYTES),
        "best": float(f"{ceiling.seconds:.4g}"),
        "median": float(f"{benchmark.stats.stats.median:.4g}"),
        "gbs": float(f"{ceiling.bandwidth / 1e9:.3g}"),
    }
    report(f"{name} ceiling: {row['gbs']} GB/s ({ceiling.library}, {BYTES >> 20} MiB)", [row])
