"""Every loss, option and entry point against the oracle."""

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import CUDA, POINTWISE, SIMULATED, close, few, on_backends, share
from scipy import special

import nbloss
from nbloss import arguments

DTYPES = ["float16", ml_dtypes.bfloat16, "float32", "float64"]
ROW_SHAPES = [  # (shape, class axis): few and many classes, with and without dimensions after the classes
    ((7,), 1),
    ((1, 1), 1),
    ((5, 3), 1),
    ((3, 5), 0),
    ((few(37), 10), -1),
    ((few(37), 100), 1),
    ((4, 300), 1),
    ((4, 500), 1),
    ((3, few(5000, 700)), 1),
    ((2, 6, 33), 1),
    ((3, 4, 2, 5), 1),
    ((2, 3, 300), 2),
    ((40, 3, 5), 1),
]
if not SIMULATED:  # how rows are done on the CPU: tiles of two blocks, groups of hardly more than a vector
    ROW_SHAPES += [((37, 17), 1), ((37, 20), 1)]


def check_entry_points(loss, expected, args, options, grad_output, dtype):
    """Value, value_and_grad and grad agree with the oracle, and with each other to the bit."""
    value, gradient = loss.value_and_grad(*args, grad_output=grad_output, **options)
    close(value, expected[0], "float32" if np.dtype(dtype).itemsize < 4 else dtype)
    close(gradient, expected[1], dtype, scale=np.abs(expected[1]).max(initial=0))
    assert gradient.dtype == dtype
    assert np.asarray(value).dtype == (np.float64 if dtype == np.float64 else np.float32)
    # On a device, the value of a row of more than 32 KB is added in another order than with its gradient.
    if CUDA and "axis" in options and max(np.shape(args[0])) * np.dtype(dtype).itemsize > 32 << 10:
        close(loss(*args, **options), expected[0], "float32" if np.dtype(dtype).itemsize < 4 else dtype)
    else:
        np.testing.assert_array_equal(loss(*args, **options), value)
    np.testing.assert_array_equal(loss.grad(*args, grad_output, **options), gradient)
    out = np.full_like(gradient, 7)
    assert loss.value_and_grad(*args, grad_output, out, **options)[1] is out
    np.testing.assert_array_equal(out, gradient)
    in_place = np.array(args[0], dtype)
    loss.grad(in_place, *args[1:], grad_output, in_place, **options)
    np.testing.assert_array_equal(in_place, gradient)


def row_case(rng, shape, axis, dtype, kind, reduction):
    axis = 0 if len(shape) == 1 else axis
    rows = np.delete(shape, axis)
    x = (rng.standard_normal(shape) * 3).astype(dtype)
    if kind == "probabilities":
        target = special.softmax(rng.standard_normal(shape), axis=axis).astype(dtype)
    else:
        target = rng.integers(0, shape[axis], rows)
    grad_output = rng.standard_normal(rows) if reduction == "none" else -1.5
    return x, target, grad_output


@pytest.mark.parametrize(("shape", "axis"), ROW_SHAPES)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy(backend, rng, shape, axis, kind, dtype):
    options = list(itertools.product(("mean", "sum", "none"), (0.0, 0.3), (False, True)))
    for reduction, smoothing, weighted in share(options, 0):
        x, target, grad_output = row_case(rng, shape, axis, dtype, kind, reduction)
        classes = shape[0 if len(shape) == 1 else axis]
        options = {"axis": axis, "reduction": reduction, "label_smoothing": smoothing}
        if weighted:
            options["weight"] = rng.uniform(0.2, 2, classes).astype(dtype)
        if kind == "index" and np.size(target) > 1:
            options["ignore_index"] = int(np.ravel(target)[0])
        expected = reference.cross_entropy(x, target, grad_output=grad_output, **options)
        check_entry_points(nbloss.cross_entropy, expected, (x, target), options, grad_output, x.dtype)


@on_backends(DTYPES)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((37, 10), 1), ((20, 100), 1), ((4, 300), 1), ((4, 500), 1), ((2, 6, 33), 1)]
)
def test_cross_entropy_of_every_dtype(backend, rng, dtype, kind, shape, axis):
    x, target, grad_output = row_case(rng, shape, axis, dtype, kind, "none")
    options = {"axis": axis, "reduction": "none", "label_smoothing": 0.1}
    expected = reference.cross_entropy(x, target, grad_output=grad_output, **options)
    check_entry_points(nbloss.cross_entropy, expected, (x, target), options, grad_output, x.dtype)


@pytest.mark.parametrize(("shape", "axis"), ROW_SHAPES)
@on_backends(DTYPES)
def test_nll_loss(backend, rng, shape, axis, dtype):
    options = list(itertools.product(("mean", "sum", "none"), (False, True)))
    for reduction, weighted in share(options, DTYPES.index(dtype), of=3):
        x, target, grad_output = row_case(rng, shape, axis, dtype, "index", reduction)
        options = {"axis": axis, "reduction": reduction}
        if weighted:
            options["weight"] = rng.uniform(0.2, 2, shape[0 if len(shape) == 1 else axis])
        if np.size(target) > 1:
            options["ignore_index"] = int(np.ravel(target)[0])
        expected = reference.nll_loss(x, target, grad_output=grad_output, **options)
        check_entry_points(nbloss.nll_loss, expected, (x, target), options, grad_output, x.dtype)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (9, 30), (3, 5, 7), (few(5000, 150),), (2, few(4100, 150))])
@on_backends(DTYPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(backend, rng, name, dtype, shape):
    options = list(itertools.product(("mean", "sum", "none"), (None, shape, shape[-1:], ())))
    for reduction, weight_shape in share(options, DTYPES.index(dtype) + POINTWISE.index(name)):
        x = np.asarray(rng.uniform(0.05, 0.95, shape) if name == "binary_cross_entropy" else rng.normal(0, 3, shape))
        x, target = x.astype(dtype), np.asarray(rng.random(shape)).astype(dtype)
        grad_output = rng.standard_normal(shape) if reduction == "none" else 2.5
        options = {"reduction": reduction}
        if weight_shape is not None:
            options["weight"] = rng.uniform(0.2, 2, weight_shape)
            if name.endswith("logits"):
                options["pos_weight"] = rng.uniform(0.2, 2, shape[-1:])
        expected = getattr(reference, name)(x, target, grad_output=grad_output, **options)
        check_entry_points(getattr(nbloss, name), expected, (x, target), options, grad_output, x.dtype)


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(3000, 2), (700, 3), (401, 10), (5, 1000), (2, 6, 21)])
@on_backends(["float16", "float32", "float64"])
def test_weights_of_short_lines(backend, rng, dtype, shape):
    """A weight a column, a row, or of a layout of its own, beside arrays of which several lines are one."""
    x, target = rng.normal(0, 3, shape).astype(dtype), rng.random(shape).astype(dtype)
    column, row = rng.uniform(0.2, 2, shape[-1]), rng.uniform(0.2, 2, (*shape[:-1], 1))
    full = np.asfortranarray(rng.uniform(0.2, 2, shape).astype(np.result_type(dtype, "f4")))
    for weight, pos_weight in ((column, row), (row, column), (full, column), (row[:1], 2.0), (column, full)):
        for reduction in ("mean", "none"):
            grad_output = np.asfortranarray(rng.standard_normal(shape)) if reduction == "none" else 2.5
            options = {"reduction": reduction, "weight": weight, "pos_weight": pos_weight}
            loss, arguments = nbloss.binary_cross_entropy_with_logits, (x, target)
            expected = reference.binary_cross_entropy_with_logits(*arguments, grad_output=grad_output, **options)
            check_entry_points(loss, expected, arguments, options, grad_output, x.dtype)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, "float32", "float64"])
def test_pointwise_targets_of_other_dtypes(backend, rng, kind):
    x = rng.standard_normal(50).astype(np.float32)
    target = (rng.random(50) < 0.5).astype(kind)
    expected = reference.binary_cross_entropy_with_logits(x, target)
    close(nbloss.binary_cross_entropy_with_logits(x, target), expected[0], "float32")


OTHERS = {  # the input's dtype, and some of those that may stand beside it
    "float16": ["bool", "f8"],
    "float32": ["bool", "i1", "u4", "i8", "u8", "f8", "u2", "f2", ">i8"],
    "float64": ["u1", "i4", "f4"],
}


SMALL, LARGE = (few(9, 3), 30), (few(3001, 47),)  # the large one for a few only: kernels of each are compiled for it


@pytest.mark.parametrize(
    ("dtype", "kind", "shape"),
    [(dtype, kind, SMALL) for dtype, kinds in OTHERS.items() for kind in kinds]
    + [("float16", "bool", LARGE), ("float32", "i8", LARGE), ("float32", "f8", LARGE), ("float64", "f4", LARGE)],
)
def test_targets_and_weights_of_other_dtypes(rng, dtype, kind, shape):
    """They count as if they had been converted to what is computed in, whatever their layout."""
    x = rng.normal(0, 3, shape).astype(dtype)
    computed = np.result_type(dtype, "f4")
    for order in (1, -2) if SIMULATED else (1, 2, -1):
        wide = (2, *shape[:-1], shape[-1] * abs(order))
        given = (rng.random(wide) * np.reshape([1.9, 5], (2, *[1] * len(shape)))).astype(kind)
        if np.dtype(kind).kind in "iu":
            given[1].flat[3 * abs(order)] = np.iinfo(kind).max
        pairs = [given.astype(computed)[..., ::order], given[..., ::order]]
        for name, reduction, weights in (
            ("binary_cross_entropy_with_logits", "mean", ["weight", "pos_weight"]),
            ("binary_cross_entropy_with_logits", "none", []),
            ("mse_loss", "mean", ["weight"]),
            ("mse_loss", "none", ["weight"]),
        ):
            loss = getattr(nbloss, name)
            for _ in range(2):  # afresh, and as planned
                results = []
                for target, weight in pairs:
                    options = {"reduction": reduction, **dict.fromkeys(weights, weight)}
                    results.append([loss(x, target, **options), *loss.value_and_grad(x, target, **options)])
                for expected, result in zip(*results):  # those that are converted after all are summed in another order
                    np.testing.assert_array_max_ulp(result, expected, 2)


@pytest.mark.cpu  # how it sums weights
@pytest.mark.parametrize("kind", [*DTYPES, "i4", ">f4"])
def test_mean_over_many_weights(rng, kind):
    """From 2^19 on, a kernel sums those of floating types, of any layout and sign."""
    x, t = rng.standard_normal((2, 1100, 600)).astype(np.float32)
    weight = (rng.random((1100, 1200)) * 100 - 5).astype(kind)
    for some in (weight[:, :600], weight[::-1, ::2], weight[:, 600:].reshape(600, 1100).T):
        expected = np.average((x - t).astype(np.float64) ** 2, weights=some.astype(np.float64))
        loss, gradient = nbloss.mse_loss.value_and_grad(x, t, weight=some)
        np.testing.assert_allclose(loss, expected, rtol=3e-7)
        share = some.astype(np.float64) / some.astype(np.float64).sum()
        np.testing.assert_allclose(gradient, 2 * share * (x - t), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "f2"), ("float32", "f8"), ("float32", ">f8"), ("float64", "f4")]
)
@pytest.mark.parametrize("shape", [(30, 7), (18, few(300, 70)), (2, few(6000, 700)), (3, 6, 40)])
def test_class_probabilities_of_other_dtypes(rng, dtype, kind, shape):
    x, target = rng.normal(0, 3, shape).astype(dtype), rng.random(shape).astype(kind)
    expected = nbloss.cross_entropy.value_and_grad(x, target.astype(dtype))
    for _ in range(2):
        for result, wanted in zip(nbloss.cross_entropy.value_and_grad(x, target), expected):
            np.testing.assert_array_equal(result, wanted)


@on_backends(DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((), -1), ((6,), 0), ((3, 4), 0), ((3, 4), -1), ((2, 700), 1), ((2, 5, 40), 1)]
)
def test_row_functions(backend, rng, shape, axis, dtype):
    x = np.asarray(rng.normal(0, 4, shape)).astype(dtype)
    wide = np.atleast_1d(x.astype(np.float64))
    half = "float32" if x.itemsize < 4 else dtype
    close(
        nbloss.logsumexp(x, axis=axis),
        special.logsumexp(wide, axis=axis).reshape(np.sum(x, axis=axis if x.ndim else None).shape),
        half,
        4,
    )
    close(nbloss.softmax(x, axis=axis), special.softmax(wide, axis=axis).reshape(shape), dtype)
    close(nbloss.log_softmax(x, axis=axis), special.log_softmax(wide, axis=axis).reshape(shape), dtype, 4)
    assert nbloss.softmax(x, axis=axis).dtype == x.dtype
    out = x.copy()
    assert nbloss.softmax(out, axis=axis, out=out) is out
    np.testing.assert_array_equal(out, nbloss.softmax(x, axis=axis))


def test_logsumexp_over_several_axes(backend, rng):
    x = rng.standard_normal((3, 4, 5))
    for axis in (None, (0, 1), (2, 0), (-1,), [0, 2]):
        expected = special.logsumexp(x, axis=axis if axis is None else tuple(axis))
        close(nbloss.logsumexp(x, axis=axis), expected)
        turned = x.transpose(2, 1, 0)[:, ::-1]
        expected = special.logsumexp(turned, axis=axis if axis is None else tuple(axis))
        close(nbloss.logsumexp(turned, axis=axis), expected)
    assert isinstance(nbloss.logsumexp(x, axis=None), np.float64)
    assert np.shares_memory(arguments.with_axes_last(x.T, None), x)
    assert np.shares_memory(arguments.with_axes_last(x.T, (0, 1)), x)


@pytest.mark.parametrize(
    ("criterion", "loss"),
    [
        (
            nbloss.CrossEntropyLoss(weight=[1.0, 2.0, 0.5], label_smoothing=0.1, ignore_index=2, reduction="sum"),
            "cross_entropy",
        ),
        (nbloss.NLLLoss(weight=[1.0, 2.0, 0.5], ignore_index=2), "nll_loss"),
        (nbloss.BCELoss(weight=2.0), "binary_cross_entropy"),
        (nbloss.BCEWithLogitsLoss(pos_weight=3.0, reduction="sum"), "binary_cross_entropy_with_logits"),
        (nbloss.MSELoss(weight=[1.0, 2.0, 3.0]), "mse_loss"),
        (nbloss.L1Loss(reduction="none"), "l1_loss"),
    ],
)
def test_criteria(rng, criterion, loss):
    x = rng.random((4, 3))
    target = rng.integers(0, 3, 4) if loss in ("cross_entropy", "nll_loss") else rng.random((4, 3))
    options = dict(vars(criterion))
    function = getattr(nbloss, loss)
    np.testing.assert_array_equal(criterion(x, target), function(x, target, **options))
    value, gradient = criterion.value_and_grad(x, target, grad_output=2.0)
    np.testing.assert_array_equal(value, criterion(x, target))
    np.testing.assert_array_equal(gradient, function.grad(x, target, 2.0, **options))
    out = np.empty_like(x)
    assert criterion.grad(x, target, 2.0, out) is out
    with pytest.raises(AttributeError):
        criterion.reduction = "mean"


# The contract's worked numbers, to the digits shown there.
WORKED = [
    (
        lambda: nbloss.binary_cross_entropy(
            [0.3440, 0.7944, 0.8919, 0.3551, 0.9817, 0.8871], [0.1639, 0.4745, 0.1537, 0.5444, 0.6933, 0.1129]
        ),
        "1.2200143699",
    ),
    (
        lambda: nbloss.binary_cross_entropy(
            [
                [0.5080, 0.5674, 0.1960, 0.7617, 0.9675],
                [0.8497, 0.4167, 0.4464, 0.6646, 0.7448],
                [0.4477, 0.6700, 0.0358, 0.8317, 0.9484],
            ],
            [
                [0.0821, 0.2900, 0.1864, 0.1480, 0.2935],
                [0.1719, 0.3426, 0.0729, 0.3616, 0.0510],
                [0.1284, 0.1542, 0.1338, 0.1779, 0.4057],
            ],
        ),
        "1.0688616679",
    ),
    (lambda: nbloss.binary_cross_entropy([0.8, 0.2, 0.4], [1, 0, 0]), "0.3190375754648034"),
    (lambda: nbloss.binary_cross_entropy([0.1582, 0.4139, 0.2287], [0.0, 1.0, 0.0]), "0.4380071930"),
    (
        lambda: nbloss.binary_cross_entropy_with_logits([0.8269, -0.7197, -0.6237, 0.1657], [0, 0, 0, 1]),
        "0.6573274536",
    ),
    (
        lambda: nbloss.binary_cross_entropy(special.expit([0.8269, -0.7197, -0.6237, 0.1657]), [0, 0, 0, 1]),
        "0.6573274536",
    ),
    (
        lambda: nbloss.binary_cross_entropy_with_logits(
            np.full((12, 66), 1.7), np.ones((12, 66)), pos_weight=np.ones(66)
        ),
        "0.1677860294",
    ),
    (lambda: nbloss.cross_entropy([[2.0, 1.0, 0.1], [0.5, 2.0, 0.3]], [0, 2]), "1.2288231430"),
    (lambda: nbloss.cross_entropy([[3.4, 1.5, 0.4, 0.10]], [0]), "0.2120735887"),
    (lambda: nbloss.cross_entropy([[3.0, 4.0], [6.0, 9.0]], [1, 0], weight=[0.6, 0.38]), "1.9879508696"),
    (lambda: segmentation("sum"), "769570.4401420974"),
    (lambda: segmentation("mean"), "0.7339195634"),
]


def segmentation(reduction):
    state = np.random.RandomState(0)
    o = state.rand(16, 1, 256, 256)
    o = np.hstack((o, 1.0 - o))
    if SIMULATED:
        pytest.skip("a million rows are too much for a simulated device")
    return nbloss.cross_entropy(o, state.randint(2, size=(16, 256, 256)), reduction=reduction)


@pytest.mark.parametrize(("call", "digits"), WORKED, ids=[w[1] for w in WORKED])
def test_worked_numbers(call, digits):
    value = call()
    if digits == "769570.4401420974":  # 16 digits of a sum over a million rows: the last ones are its rounding
        assert value == pytest.approx(float(digits), rel=1e-14)
        assert f"{value:.9f}" == "769570.440142097"
    else:
        assert f"{value:.{len(digits) - 2}f}" == digits


def test_gradients_against_central_differences(rng):
    """One class at a time, so that no formula is compared with itself."""
    weight = rng.uniform(0.5, 2, 4)
    x = rng.standard_normal((3, 4))
    probabilities = special.softmax(rng.standard_normal((3, 4)), axis=1)
    cases = [
        (nbloss.cross_entropy, [0, 3, 2], {"weight": weight, "label_smoothing": 0.2}),
        (nbloss.cross_entropy, [0, 3, 2], {"ignore_index": 3}),
        (nbloss.cross_entropy, probabilities, {"weight": weight, "label_smoothing": 0.2}),
        (nbloss.nll_loss, [0, 3, 2], {"weight": weight}),
        (nbloss.binary_cross_entropy, probabilities, {"weight": weight}),
        (nbloss.binary_cross_entropy_with_logits, probabilities, {"weight": weight, "pos_weight": 1 / weight}),
        (nbloss.mse_loss, probabilities, {"weight": weight}),
        (nbloss.l1_loss, probabilities, {"weight": weight}),
    ]
    for loss, target, options in cases:
        at = special.expit(x) if loss is nbloss.binary_cross_entropy else x
        gradient = loss.grad(at, target, **options)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-6
            slope = (loss(at + step, target, **options) - loss(at - step, target, **options)) / 2e-6
            assert gradient[index] == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_half_precision_is_rounded_to_nearest(rng, dtype):
    """A gradient of 16 bits is that of float32, rounded as NumPy and ml_dtypes round it, ties and NaN too."""
    bits = rng.integers(0, 1 << 32, few(10_007, 1003), np.uint64).astype(np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # half-way between two of bfloat16
    bits[1::3] = bits[1::3] & 0xFFFFE000 | 0x1000  # and of float16
    upstream = bits.view(np.float32)
    upstream = upstream[~(np.abs(upstream) < np.finfo(np.float32).tiny)]  # which some processors take for 0
    upstream[np.isnan(upstream)] = np.nan  # none that signal
    half = np.full(upstream.shape, 0.5, dtype)
    gradient = nbloss.mse_loss.grad(half, np.zeros_like(half), grad_output=upstream, reduction="none")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = upstream.astype(dtype)
    np.testing.assert_array_equal(gradient.astype(np.float32), expected.astype(np.float32))


def test_upstream_gradient_of_each_element(rng):
    """It counts as a weight does, whatever its layout; one beyond the type that is computed in is inf."""
    rows = few(40, 2)
    x, t, upstream = rng.standard_normal((3, rows, 50)).astype(np.float32)
    expected = nbloss.mse_loss.grad(x, t, weight=upstream, reduction="none")
    wide = np.full((2 * rows, 100), 9, np.float32)
    wide[::2, ::2] = upstream
    for array in (
        upstream,
        wide[::2, ::2],
        np.asfortranarray(upstream),
        upstream.astype(">f4"),
        upstream.astype(float),
    ):
        np.testing.assert_array_equal(nbloss.mse_loss.grad(x, t, grad_output=array, reduction="none"), expected)
    huge = nbloss.mse_loss.grad(x, t, grad_output=np.full(x.shape, 1e300), reduction="none")
    np.testing.assert_array_equal(huge, np.where(x > t, np.inf, -np.inf))


def peak_of(call):
    """Bytes of memory that a second call takes at once."""
    call()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy_with_logits"])
def test_an_upstream_gradient_is_not_copied(rng, name):
    x, t, upstream = rng.random((3, 1 << 18)).astype(np.float32)
    loss, out = getattr(nbloss, name), np.empty_like(x)
    assert peak_of(lambda: loss.grad(x, t, grad_output=upstream, out=out, reduction="none")) < x.nbytes // 4


@pytest.mark.cpu
@pytest.mark.parametrize("kind", [bool, np.int64, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_operands_of_other_dtypes_are_not_copied(rng, kind, reduction):
    x, out = rng.random((2, 1 << 18)).astype(np.float32)
    t, weight = rng.integers(0, 2, (2, x.size)).astype(kind)
    loss = nbloss.mse_loss
    assert peak_of(lambda: loss.grad(x, t, out=out, weight=weight, reduction=reduction)) < x.nbytes // 4
    if kind is np.float64:
        x, t, out = (a.reshape(-1, 64) for a in (x, t, out))
        assert peak_of(lambda: nbloss.cross_entropy.grad(x, t, out=out, reduction=reduction)) < x.nbytes // 4
