"""Arrays of any layout give what a contiguous float64 copy gives."""

import ctypes
import mmap
import sys
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import CUDA, POINTWISE, SIMULATED, close, few
from scipy import special

import nbloss
from nbloss import layout, plans
from nbloss.cpu import rowwise

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def strided(x):
    wide = np.full(tuple(2 * n for n in x.shape), 9, x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def unaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x):
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def padded(x):
    """Rows apart in memory, as where a vocabulary is padded."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 3), 9, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def in_record(x):
    """A field of a structured array: strides that are no multiple of the item."""
    records = np.zeros(x.shape, np.dtype([("tag", "u1"), ("x", x.dtype)]))
    records["x"] = x
    return records["x"]


LAYOUTS = {
    "strided": strided,
    "reversed": lambda x: x[(slice(None, None, -1),) * x.ndim].copy()[(slice(None, None, -1),) * x.ndim],
    "fortran": np.asfortranarray,
    "unaligned": unaligned,
    "read-only": read_only,
    "padded": padded,
    "in a record": in_record,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "middle axis first": lambda x: np.moveaxis(np.moveaxis(x, 1, 0).copy(), 0, 1),
    "subclass": lambda x: x.view(type("Named", (np.ndarray,), {})),
}
SHAPES = [(6, 5), (few(20, 6), 100), (few(20, 5), 300), (few(5, 3), 500), (3, 4, 5), (2, 7, 3, 18)]
if not SIMULATED:  # how rows are done on the CPU: tiles of two blocks, rows between which others lie, four axes of rows
    SHAPES += [(20, 17), (70, 3, 4), (2, 5, 3, 2, 18), (3, 450, 2, 2, 3)]


# Bytes from row to row and from class to class, given those of a row and of an element.
STEPS = {
    "rows reversed": lambda row, size: (-row, size),
    "rows apart": lambda row, size: (row + 3 * size, size),
    "rows reversed and apart": lambda row, size: (-row - 3 * size, size),
    "rows off elements": lambda row, size: (row + 1, size),
    "classes reversed": lambda row, size: (row, -size),
    "all reversed": lambda row, size: (-row, -size),
    "classes apart": lambda row, size: (2 * row, 2 * size),
}


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("classes", [1, 3, 8, 10, 16, 19, 37, 600])
def test_out_of_any_strides(rng, classes, steps, dtype):
    """Right, and no byte beside it is written; in place too."""
    size = np.dtype(dtype).itemsize
    for rows in (1, 4, 16, 21, 40):
        x, labels = rng.standard_normal((rows, classes)).astype(dtype), rng.integers(0, classes, rows)
        strides = steps(classes * size, size)
        raw = np.full(4 * rows * (classes + 3) * size + 4096, 170, np.uint8)
        # From its middle they go either way.
        out = np.ndarray(x.shape, dtype, raw, len(raw) // 2, strides)
        pattern = out[0, 0]
        for call in (nbloss.softmax, partial(nbloss.cross_entropy.grad, target=labels)):
            expected = call(x, out=None)
            for where in ("apart", "in place"):
                out[...] = x
                call(x if where == "apart" else out, out=out)
                close(out, np.float64(expected), dtype)
                out[...] = pattern
                assert (raw == 170).all(), (rows, where)


def test_axes_of_one_element_in_place(rng):
    """Their steps are never taken, and may be anything."""
    x = rng.standard_normal((5, 1))
    expected = nbloss.cross_entropy.grad(x.T, [1])
    out = x.reshape(1, 5)
    assert x.T.strides != out.strides
    assert nbloss.cross_entropy.grad(x.T, [1], out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_one_number_in_place():
    x = np.array(3.0)
    assert nbloss.log_softmax(x, out=x) is x
    assert x == 0
    swapped = np.array(3.0, ">f8")
    assert nbloss.log_softmax(swapped, out=swapped) is swapped
    assert swapped == 0
    assert nbloss.mse_loss.grad(x, np.array(1.0), out=x) is x
    assert x == -2


ORDERS = {"C": (0, 1, 2), "Fortran": (2, 1, 0), "classes last": (0, 2, 1), "classes first": (1, 0, 2)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_results_lie_as_their_input_does(rng, order):
    """As those of NumPy's own functions, afresh and again."""
    x = rng.random([(3, 7, 5)[k] for k in order]).transpose(np.argsort(order))
    labels, flat = rng.integers(0, 7, (3, 5)), np.ascontiguousarray(x)
    for call in (
        lambda x: nbloss.cross_entropy.grad(x, labels),
        lambda x: nbloss.mse_loss.value_and_grad(x, flat)[1],
        *([] if CUDA else [lambda x: nbloss.mse_loss(x, flat - 1, reduction="none")]),
        lambda x: nbloss.softmax(x, axis=1),
    ):
        for _ in range(2):
            assert call(x).strides == x.strides
            close(call(x), call(flat))
    row = np.broadcast_to(x[0], x.shape)
    assert nbloss.cross_entropy.grad(row, labels).flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rowwise(rng, layout, shape, dtype):
    x = (rng.standard_normal(shape) * 2).astype(dtype)
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    turned = LAYOUTS[layout](x)
    kept = turned.copy()
    expected = reference.cross_entropy(x, labels, reduction="none")
    loss, gradient = nbloss.cross_entropy.value_and_grad(
        turned, LAYOUTS[layout](labels) if labels.ndim > 1 else labels, reduction="none"
    )
    close(loss, expected[0], np.float32 if dtype == np.float16 else dtype)
    close(gradient, expected[1], dtype)
    np.testing.assert_array_equal(turned, kept)
    if layout != "read-only":
        out = LAYOUTS[layout](np.zeros(shape, dtype))
        assert nbloss.cross_entropy.grad(turned, labels, reduction="none", out=out) is out
        close(out, expected[1], dtype)
        nbloss.cross_entropy.grad(turned, labels, reduction="none", out=turned)
        close(turned, expected[1], dtype)
        nll = LAYOUTS[layout](x)
        nbloss.nll_loss.value_and_grad(nll, labels, out=nll)
        close(nll, reference.nll_loss(x, labels)[1], dtype)
    probabilities = rng.random(shape).astype(dtype)
    expected = reference.cross_entropy(x, probabilities)
    loss, gradient = nbloss.cross_entropy.value_and_grad(LAYOUTS[layout](x), LAYOUTS[layout](probabilities))
    close(loss, expected[0], np.float32 if dtype == np.float16 else dtype)
    close(gradient, expected[1], dtype)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (5, 1, 3)])
def test_one_class(shape):
    """Of which it cannot be said how it lies: nothing is left of what `out` held."""
    x, labels = np.zeros(shape), np.zeros(np.delete(shape, 1), int)
    labels.flat[0] = -100
    for loss in (nbloss.nll_loss, nbloss.cross_entropy):
        gradient = loss.grad(x, labels, reduction="sum", out=np.full(shape, 9.0))
        expected = np.full(shape, -1.0 if loss is nbloss.nll_loss else 0.0)
        expected.flat[0] = 0
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise(rng, layout, shape, dtype):
    x, t = rng.standard_normal(shape).astype(dtype), rng.random(shape).astype(dtype)
    weight = rng.random(shape)
    expected = reference.binary_cross_entropy_with_logits(x, t, weight=weight, reduction="none")
    turned = LAYOUTS[layout](x)
    options = {"weight": LAYOUTS[layout](weight), "reduction": "none"}
    loss, gradient = nbloss.binary_cross_entropy_with_logits.value_and_grad(turned, t, **options)
    close(loss, expected[0], np.float32 if dtype == np.float16 else dtype)
    close(gradient, expected[1], dtype)
    if layout != "read-only":
        nbloss.binary_cross_entropy_with_logits.grad(turned, LAYOUTS[layout](t), out=turned, **options)
        close(turned, expected[1], dtype)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("shape", [(3, 200), (150, 530), (2, 131, 40)])
def test_more_classes_than_a_tile_holds(rng, monkeypatch, dtype, step, shape):
    """A block of classes at a time, in place too: ordinary logits, rising ones, and some that begin at -inf."""
    x = rng.standard_normal(shape).astype(dtype)
    q, weight = rng.random(shape).astype(dtype), rng.random(shape[1])
    rising, masked = x.swapaxes(1, -1)[0], x.swapaxes(1, -1)[1]
    rising += np.linspace(0, 600, shape[1])
    masked[..., : shape[1] - 50] = -np.inf
    q.swapaxes(1, -1)[1, ..., : shape[1] - 50] = 0
    labels = rng.integers(0, shape[1], np.delete(shape, 1))
    labels.flat[0] = -100
    x = np.asfortranarray(x)[::step] if x.ndim == 2 else x[..., ::step]
    streams, results = [], []
    variant = rowwise.STREAMS.variant
    monkeypatch.setattr(rowwise.STREAMS, "variant", lambda *kind: streams.append(kind) or variant(*kind))
    for tallest in (1 << 40, 0):
        monkeypatch.setattr(rowwise, "TALLEST", tallest)
        plans._plans.clear()
        found = [nbloss.softmax(x, axis=1), nbloss.log_softmax(x, axis=1), nbloss.logsumexp(x, axis=1)]
        for target, options in ((labels, {}), (labels, {"label_smoothing": 0.1, "weight": weight}), (q, {})):
            found += nbloss.cross_entropy.value_and_grad(x, target, reduction="none", **options)
            out = x.copy(order="K")
            found.append(nbloss.cross_entropy.grad(out, target, out=out, **options))
        results.append(found)
        assert bool(streams) == (tallest == 0)
    for result, expected in zip(*results):
        close(result, expected, dtype)


FEW_ROWS = {
    "one in reverse": lambda x: x[0][::-1],
    "every second class": lambda x: np.repeat(x[:3], 2, axis=1)[:, ::2],
    "one column": lambda x: np.repeat(x[:1].T, 3, axis=1)[:, 1],
    "three columns": lambda x: np.ascontiguousarray(x[:3].T).T,
    "three columns in reverse": lambda x: np.ascontiguousarray(x[:3].T)[::-1].T,
    "two of three": lambda x: np.ascontiguousarray(x[:3].T)[:, ::2].T,
    "eight columns": lambda x: np.ascontiguousarray(x[:8].T).T,
    "planes": lambda x: np.ascontiguousarray(x.reshape(4, 2, -1).swapaxes(1, 2)),
    "planes in reverse": lambda x: np.ascontiguousarray(x.reshape(4, 2, -1).swapaxes(1, 2))[..., ::-1],
}


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("layout", FEW_ROWS)
@pytest.mark.parametrize(("classes", "piece"), [(407, 1 << 16), (1111, 64), (416, 1)])
def test_few_rows(rng, monkeypatch, dtype, layout, classes, piece):
    """Classes that lie apart are folded into vectors, and cut into pieces; some are left over, and some are none's."""
    monkeypatch.setattr(rowwise, "PIECE", piece)
    streams, variant = [], rowwise.STREAMS.variant
    monkeypatch.setattr(rowwise.STREAMS, "variant", lambda *kind: streams.append(kind) or variant(*kind))
    logits, masses = 3 * rng.standard_normal((8, classes)), rng.random((8, classes))
    logits[2, : classes - 60] = -30  # of the reference, or of another's
    x, q = (FEW_ROWS[layout](a.astype(dtype)) for a in (logits, masses))
    axis = 0 if x.ndim == 1 else 1
    rows = np.delete(x.shape, axis)
    labels = rng.integers(0, classes, rows) if len(rows) else np.int64(classes - 1)
    if labels.size > 2:
        labels.flat[1], labels.flat[2] = -100, classes - 1
    weight = rng.random(classes)
    for target in (labels, q):
        for options in ({}, {"label_smoothing": 0.1}, {"weight": weight}, {"label_smoothing": 0.1, "weight": weight}):
            for reduction in ("none", "mean"):
                options = {**options, "reduction": reduction, "axis": axis}
                loss, gradient = nbloss.cross_entropy.value_and_grad(x, target, **options)
                expected = reference.cross_entropy(x, target, **options)
                close(loss, expected[0], np.float32 if dtype in (np.float16, BFLOAT16) else dtype)
                close(gradient, expected[1], dtype)
                assert np.array_equal(nbloss.cross_entropy(x, target, **options), loss)
                out = x.copy(order="K")
                nbloss.cross_entropy.grad(out, target, out=out, **options)
                close(out, expected[1], dtype)
    wide = np.asarray(x, np.float64)
    close(nbloss.softmax(x, axis=axis), special.softmax(wide, axis=axis), dtype)
    close(nbloss.log_softmax(x, axis=axis), special.log_softmax(wide, axis=axis), dtype)
    single = np.float32 if dtype in (np.float16, BFLOAT16) else dtype
    close(nbloss.logsumexp(x, axis=axis), special.logsumexp(wide, axis=axis), single)
    assert bool(streams) == (layout != "eight columns" or dtype != np.float64)  # which fill a vector


@pytest.mark.cpu
def test_one_call(rng, monkeypatch):
    """Three axes that memory does not let merge are one call of a kernel: 8 x 21 x 64 x 64 took 2.7 times as long."""
    calls, prepare = [], rowwise.prepare
    monkeypatch.setattr(rowwise, "prepare", lambda *how: calls.append(how) or prepare(*how))
    x = rng.standard_normal((4, 5, 9, 40))[:, :, 1:, 1:]
    labels = rng.integers(0, 5, (4, 8, 39))
    labels[3, 7, 38] = -100
    for turned in (x, x.transpose(3, 1, 0, 2)):
        own = labels if turned is x else labels.transpose(2, 0, 1)
        expected = reference.cross_entropy(turned, own)
        for result, wanted in zip(nbloss.cross_entropy.value_and_grad(turned, own), expected):
            close(result, wanted)
        assert len(calls) == 1
        calls.clear()
    wide, weight = rng.random((10, 20, 12, 8)), rng.random((20, 1, 1))
    assert len(list(layout.pointwise_pieces([wide, np.broadcast_to(weight, wide.shape)], dims=3))) == 1


def test_few_pieces(rng):
    """A short axis is looped over, not a long one: 100000 x 2 x 2 with a weight for two took 90 times as long."""
    x = rng.random((1000, 2, 3))
    turned = rng.random((2, 3, 1000)).transpose(2, 0, 1)
    for weight in (rng.random((1000, 1, 3)), rng.random((2, 1)), np.asfortranarray(turned), turned):
        assert len(list(layout.pointwise_pieces([x, np.broadcast_to(weight, x.shape)]))) <= 3
        weighted = nbloss.mse_loss(x, np.zeros(x.shape), weight=weight, reduction="sum")
        np.testing.assert_allclose(weighted, (x * x * weight).sum(), rtol=1e-14)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">u8"]
)
@pytest.mark.parametrize("shape", [(30, 2), (5, 100), (5, 400)])
def test_label_dtypes(rng, dtype, shape):
    x = rng.standard_normal(shape)
    labels = rng.integers(0, 2, shape[0])
    expected = nbloss.cross_entropy(x, labels, reduction="none")
    np.testing.assert_array_equal(nbloss.cross_entropy(x, labels.astype(dtype), reduction="none"), expected)
    apart = np.repeat(labels.astype(dtype), 2)[::2]
    for _ in range(2):
        np.testing.assert_array_equal(nbloss.cross_entropy(x, apart, reduction="none"), expected)
    np.testing.assert_array_equal(nbloss.nll_loss(x, labels.astype(dtype)), nbloss.nll_loss(x, labels))
    one = np.array(1, dtype)
    np.testing.assert_array_equal(nbloss.cross_entropy(x[0], one), nbloss.cross_entropy(x[0], 1))
    np.testing.assert_array_equal(nbloss.nll_loss(x[0], one), nbloss.nll_loss(x[0], 1))


def test_memory_mapped(rng, tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(50, 30))
    x[...] = rng.standard_normal((50, 30))
    x.flush()
    labels = rng.integers(0, 30, 50)
    again = np.memmap(tmp_path / "x", np.float32, "r", shape=(50, 30))
    loss, gradient = nbloss.cross_entropy.value_and_grad(again, labels)
    expected = reference.cross_entropy(x, labels)
    close(loss, expected[0], np.float32)
    close(gradient, expected[1], np.float32)
    assert type(gradient) is np.ndarray


def test_lists_and_scalars():
    assert nbloss.cross_entropy([[1.0, 2.0]], [1]) == nbloss.cross_entropy(np.array([[1.0, 2.0]]), np.array([1]))
    assert nbloss.cross_entropy([1.0, 2.0], 1) == nbloss.cross_entropy([[1.0, 2.0]], [1])
    assert nbloss.cross_entropy(np.empty((0, 3)), [], reduction="sum") == 0
    assert nbloss.nll_loss(np.empty((0, 3)), [], reduction="sum") == 0
    assert nbloss.mse_loss(1.5, 1) == 0.25
    assert nbloss.mse_loss.grad(1.5, 1).shape == ()
    assert nbloss.binary_cross_entropy_with_logits.grad(0.0, True) == -0.5


@pytest.mark.cpu  # it would be 8 GB on a device
def test_more_elements_than_int32_counts():
    """2^31 elements and more, through rows that are all one row in memory."""
    row = np.linspace(-1, 1, 1 << 12, dtype=np.float32)
    rows = (1 << 19) + 3
    x = np.broadcast_to(row, (rows, row.size))
    assert x.size > 2**31
    labels = np.zeros(rows, np.uint8)
    one = reference.cross_entropy(row, 0)[0]
    assert nbloss.cross_entropy(x, labels) == pytest.approx(one, rel=1e-7)
    assert nbloss.cross_entropy(x, labels, reduction="sum") == pytest.approx(one * rows, rel=1e-7)
    t = np.broadcast_to(np.float32(0), x.shape)
    assert nbloss.l1_loss(x, t) == nbloss.l1_loss(row, np.zeros_like(row))


class Tensor:
    """What torch's tensors of bfloat16 do, where torch is not there."""

    bfloat16, int16 = "torch.bfloat16", "torch.int16"

    def __init__(self, bits, dtype):
        self.bits, self.dtype = bits, dtype

    def view(self, dtype):
        return Tensor(self.bits, dtype)

    def numpy(self):
        if self.dtype == self.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.bits

    def __array__(self, dtype=None, copy=None):
        return self.numpy()


@pytest.mark.parametrize("installed", [True, False])
def test_bfloat16_tensors(rng, monkeypatch, installed):
    """Without a copy, as input, as target and as weight; `out` is a NumPy array."""
    x, t, weight = rng.random((3, 4, 5)).astype(BFLOAT16)
    if installed:
        torch = pytest.importorskip("torch")
        tensors = [torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in (x, t, weight)]
    else:
        torch = Tensor
        torch.Tensor = Tensor
        monkeypatch.setitem(sys.modules, "torch", torch)
        tensors = [Tensor(a.view(np.int16), torch.bfloat16) for a in (x, t, weight)]
    expected = nbloss.mse_loss.value_and_grad(x, t, weight=weight)
    loss, gradient = nbloss.mse_loss.value_and_grad(tensors[0], tensors[1], weight=tensors[2])
    assert loss == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    assert nbloss.softmax(tensors[0]).dtype == BFLOAT16
    with pytest.raises(TypeError, match="out must be"):
        nbloss.softmax(x, out=tensors[0])
    before = t.copy()
    for factor in (np.ones((4, 5)).tolist(), np.float16(1)):  # of which there are no plans
        with pytest.raises(ValueError, match=r"out must be .* overlaps target"):
            nbloss.mse_loss.grad(x, tensors[1], factor, t, reduction="none")
    with pytest.raises(ValueError, match=r"out must be .* overlaps grad_output"):
        nbloss.mse_loss.grad(x, x, tensors[1], t, reduction="none")
    np.testing.assert_array_equal(t, before)
    nbloss.mse_loss.grad(tensors[0], t, out=x)
    np.testing.assert_array_equal(tensors[0].view(torch.int16).numpy(), x.view(np.int16))  # x is its memory


def test_bfloat16_of_the_other_byte_order(rng):
    x, q = rng.random((2, 4, 5)).astype(BFLOAT16)
    swapped = [a.astype(BFLOAT16.newbyteorder(">")) for a in (x, q)]
    labels = np.array([0, 4, 2, 1])
    for loss, target, others in (
        (nbloss.mse_loss, q, swapped),
        (nbloss.cross_entropy, q, swapped),
        (nbloss.cross_entropy, labels, (swapped[0], labels)),
    ):
        expected, gradient = loss.value_and_grad(x, target)
        found, given = loss.value_and_grad(*others)
        assert found == expected
        np.testing.assert_array_equal(given, gradient)
    for function in (nbloss.softmax, nbloss.logsumexp):
        np.testing.assert_array_equal(function(swapped[0]), function(x))


@pytest.mark.parametrize("name", ["cross_entropy", *POINTWISE])
def test_out_of_a_subclass(rng, name):
    """It is written to, and returned, as it is; one that has two axes whatever is done with it, too."""
    x, t = rng.random((2, 4, 6), np.float32)
    target = np.array([5, 0, 1, 2]) if name == "cross_entropy" else t
    loss = getattr(nbloss, name)
    for reduction in ("mean", "none"):
        expected = loss.value_and_grad(x, target, reduction=reduction)
        for kind in (np.matrix, np.recarray, np.memmap):
            out = np.zeros((4, 6), np.float32).view(kind)
            found, gradient = loss.value_and_grad(x, target, out=out, reduction=reduction)
            assert gradient is out
            np.testing.assert_array_equal(found, expected[0])
            np.testing.assert_array_equal(np.asarray(out), expected[1])
    with pytest.raises(ValueError, match=r"out must have the input's shape \(4, 6\), got \(6, 4\)"):
        loss.grad(x, target, out=np.zeros((4, 6), np.float32).view(np.matrix).T)
    assert nbloss.softmax(x, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), nbloss.softmax(x))


class Places:
    """An array-like with an attribute that arrays on a device have, as a table's column of this name is one."""

    home = "a column"

    def __array__(self, dtype=None, copy=None):
        return np.array([[1.0, 2.0], [3.0, 5.0]])


def test_attributes_of_other_objects():
    assert nbloss.cross_entropy(Places(), [0, 1]) == nbloss.cross_entropy(np.asarray(Places()), [0, 1])
    assert nbloss.mse_loss(Places(), Places()) == 0


def test_a_number_and_an_array_of_one_are_not_of_one_shape():
    for x, out in ((np.array(3.0), np.empty(1)), (np.array([3.0]), np.empty(()))):
        with pytest.raises(ValueError, match=r"out must have the input's shape"):
            nbloss.softmax(x, out=out)
    out = np.empty(())
    assert nbloss.softmax(np.array(3.0), out=out) is out
    assert out == 1


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", BFLOAT16], ids=str)
@pytest.mark.parametrize("classes", [3, 257, 500])
def test_no_write_outside_out(rng, dtype, classes):
    x = rng.standard_normal((7, classes)).astype(dtype)
    buffer = np.full((9, classes + 2), 5, dtype)
    out = buffer[1:-1, 1:-1]
    gradient = nbloss.cross_entropy.grad(x, rng.integers(0, classes, 7), out=out)
    assert gradient is out
    frame = np.ones(buffer.shape, bool)
    frame[1:-1, 1:-1] = False
    assert (buffer[frame].astype(float) == 5).all()


@pytest.fixture
def at_the_end():
    """A function that copies an array to where its last byte is the last that may be read or written."""
    if CUDA or sys.platform != "linux":
        pytest.skip("about memory that Linux guards")
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    kept = []

    def copied(a):
        pages = -(-a.nbytes // mmap.PAGESIZE)
        kept.append(memory := mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE))
        end = pages * mmap.PAGESIZE
        guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
        assert protect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        copy = np.frombuffer(memory, np.uint8)[end - a.nbytes : end].view(a.dtype).reshape(a.shape)
        copy[...] = a
        return copy

    return copied


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", BFLOAT16], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 10, 16, 19, 40, 100, 500, 1001])
def test_nothing_past_the_end_is_touched(rng, at_the_end, classes, dtype):
    """Whole vectors are read and written where a row ends within them, but for the last rows, or here is a crash."""
    for rows in (1, 15, 16, 33, 129):
        x, labels = rng.standard_normal((rows, classes)).astype(dtype), rng.integers(0, classes, rows)
        given, out = at_the_end(x), at_the_end(np.zeros_like(x))
        loss, _ = nbloss.cross_entropy.value_and_grad(given, at_the_end(labels), out=out)
        expected, kept = nbloss.cross_entropy.value_and_grad(x, labels)
        assert loss == expected
        np.testing.assert_array_equal(out, kept)
        nbloss.cross_entropy.grad(given, labels, out=given)
        np.testing.assert_array_equal(given, kept)
        given = at_the_end(x)
        windows = np.lib.stride_tricks.sliding_window_view(at_the_end(x[0].repeat(2)), classes)[-rows:]
        rows_apart = at_the_end(np.zeros((rows, 2 * mmap.PAGESIZE // x.itemsize), dtype))[:, -classes:]
        for view in (given[::-1], windows, np.broadcast_to(given[-1], x.shape), rows_apart):
            expected = nbloss.logsumexp(view.copy())
            np.testing.assert_array_equal(nbloss.logsumexp(view), expected)
