"""Calls that are alike: the second one, which takes the plan of the first, gives what a first one would."""

import gc
import weakref

import numpy as np
import pytest
from conftest import bits, close

import nbloss
from nbloss import dispatch, plans

pytestmark = pytest.mark.cpu

SHAPE = (6, 9)
ROWWISE = {
    "cross_entropy": [
        {},
        {"reduction": "none"},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"weight": True, "ignore_index": 3},
        {"weight": True, "label_smoothing": 0.2},
    ],
    "nll_loss": [{}, {"reduction": "none"}, {"weight": True, "ignore_index": 3}],
}
POINTWISE = {
    "mse_loss": [{}, {"reduction": "none"}, {"weight": True}, {"weight": True, "reduction": "sum"}, {"weight": 2.0}],
    "binary_cross_entropy": [{}, {"weight": True}],
    "binary_cross_entropy_with_logits": [{}, {"weight": True, "pos_weight": True}, {"pos_weight": 3.0}],
}
CASES = [(name, options) for table in (ROWWISE, POINTWISE) for name, some in table.items() for options in some]
FORMS = ["value", "value_and_grad", "grad", "out", "in place", "grad_output"]


def arguments(rng, name, options, dtype, others=None):
    """`others` is the dtype of targets that are no labels, and of weights, where it is another one."""
    others = others or dtype
    x = rng.random(SHAPE).astype(dtype)
    target = rng.integers(0, SHAPE[1], SHAPE[0]) if name in ROWWISE else rng.random(SHAPE).astype(others)
    weights = {n: rng.uniform(0.5, 2, SHAPE[1]).astype(others) for n, v in options.items() if v is True}
    return x, target, {**options, **weights}


def run(name, form, x, target, options):
    loss = getattr(nbloss, name)
    if form == "value":
        return [loss(x, target, **options)]
    if form == "value_and_grad":
        return loss.value_and_grad(x, target, **options)
    if form == "grad_output":
        return [loss.grad(x, target, grad_output=0.3, **options)]
    if form == "grad":
        return [loss.grad(x, target, **options)]
    out = x.copy() if form == "in place" else np.empty_like(x)
    given = out if form == "in place" else x
    result = loss.grad(given, target, out=out, **options)
    assert result is out
    return [result]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_second_call(rng, name, options, dtype, form):
    first, second = (arguments(rng, name, options, dtype) for _ in range(2))
    expected = bits(run(name, form, *second))
    plans._plans.clear()
    run(name, form, *first)
    assert bits(run(name, form, *second)) == expected
    assert bits(run(name, form, *second)) == expected


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss", "softmax", "logsumexp"])
def test_second_calls_take_a_plan(rng, monkeypatch, name):
    x, target, _ = arguments(rng, name if name in ROWWISE else "mse_loss", {}, "float32")
    call = {"softmax": nbloss.softmax, "logsumexp": nbloss.logsumexp}.get(
        name, lambda x: getattr(nbloss, name)(x, target)
    )
    expected = call(x)
    monkeypatch.setattr(nbloss.losses, "choose", None)  # what every other call goes through
    np.testing.assert_array_equal(call(x.copy()), expected)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("others", [np.int32, np.float64])
def test_operands_of_other_dtypes_take_a_plan(rng, monkeypatch, name, options, others):
    first, second = (arguments(rng, name, options, "float32", others=others) for _ in range(2))
    expected = bits(run(name, "value_and_grad", *second))
    plans._plans.clear()
    run(name, "value_and_grad", *first)
    monkeypatch.setattr(nbloss.losses, "choose", None)  # what every other call goes through
    assert bits(run(name, "value_and_grad", *second)) == expected


WEIGHTS = {
    "strided": lambda w: np.repeat(w, 2)[::2],
    "reversed": lambda w: w[::-1].copy()[::-1],
    "repeated": lambda w: np.broadcast_to(w[:1], w.shape),
}


@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "option"),
    [*((name, "weight") for name in (*ROWWISE, *POINTWISE)), ("binary_cross_entropy_with_logits", "pos_weight")],
)
def test_weights_of_any_layout(rng, name, option, dtype, layout):
    """A later call reads them as the first does, in the dtype that is computed in and in another one."""
    x, target, _ = arguments(rng, name, {}, dtype)
    for kept in (dtype, "float16"):
        weight = WEIGHTS[layout](rng.uniform(0.5, 2, SHAPE[1]).astype(kept))
        expected = run(name, "value_and_grad", x, target, {option: weight.copy()})
        plans._plans.clear()
        for _ in range(3):
            for found, result in zip(run(name, "value_and_grad", x, target, {option: weight}), expected):
                np.testing.assert_allclose(found, result, 1e-5, 1e-7)


def test_arguments_by_name_and_any_number_take_a_plan(rng, monkeypatch):
    x, target, _ = arguments(rng, "cross_entropy", {}, "float32")
    value, gradient = nbloss.cross_entropy.value_and_grad(x, target, 2.0)
    nbloss.cross_entropy(x, target)
    monkeypatch.setattr(nbloss.losses, "choose", None)
    assert nbloss.cross_entropy(x, target=target) == nbloss.cross_entropy(target=target, logits=x) == value
    for factor in (2.0, 2, np.float32(2), np.float64(2)):
        np.testing.assert_array_equal(nbloss.cross_entropy.value_and_grad(x, target, factor)[1], gradient)


@pytest.mark.parametrize("name", ["log_softmax", "softmax", "logsumexp"])
@pytest.mark.parametrize("axis", [0, -1, None])
def test_row_functions(rng, name, axis):
    if axis is None and name != "logsumexp":
        axis = 1
    function = getattr(nbloss, name)
    first, second = rng.standard_normal((2, *SHAPE))
    expected = function(second.copy(), axis=axis)
    plans._plans.clear()
    function(first, axis=axis)
    np.testing.assert_array_equal(function(second, axis=axis), expected)
    if name != "logsumexp":
        for data in (first, second):
            assert function(data, axis=axis, out=data) is data
        np.testing.assert_array_equal(second, expected)


@pytest.mark.parametrize("form", FORMS)
def test_errors_after_a_plan(rng, form):
    x, target, options = arguments(rng, "cross_entropy", {}, "float32")
    run("cross_entropy", form, x, target, options)
    before = x.copy()
    target[2] = SHAPE[1]
    with pytest.raises(IndexError, match=r"target\[2\] is 9"):
        run("cross_entropy", form, x, target, options)
    if form == "in place":
        with pytest.raises(IndexError):
            nbloss.cross_entropy.grad(x, target, out=x)
    np.testing.assert_array_equal(x, before)
    assert np.isnan(nbloss.cross_entropy(x, target, check=False))
    p, t, options = arguments(rng, "binary_cross_entropy", {}, "float64")
    run("binary_cross_entropy", form, p, t, options)
    p[1, 2] = 2
    before = p.copy()
    with pytest.raises(ValueError, match=r"probs\[1, 2\] = 2"):
        run("binary_cross_entropy", form, p, t, options)
    np.testing.assert_array_equal(p, before)


def test_what_is_like_an_option_but_is_none(rng):
    x, target, _ = arguments(rng, "cross_entropy", {}, "float32")
    for good, bad in (({"ignore_index": -100}, {"ignore_index": -100.0}), ({"axis": 1}, {"axis": 1.0})):
        nbloss.cross_entropy(x, target, **good)
        with pytest.raises(TypeError):
            nbloss.cross_entropy(x, target, **bad)
    nbloss.mse_loss(x, x, reduction="mean")
    with pytest.raises(ValueError, match="reduction"):
        nbloss.mse_loss(x, x, reduction="means")


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("softmax", "axis", (0, 1)),
        ("logsumexp", "axis", (1, 0)),
        ("cross_entropy", "axis", (0, 1)),
        ("cross_entropy", "ignore_index", (1, 2)),
        ("cross_entropy", "label_smoothing", (0.1, 0.2)),
        ("nll_loss", "check", (True, False)),
        ("mse_loss", "reduction", ("sum", "mean")),
    ],
)
def test_options_that_are_arrays(rng, name, option, values):
    """A key would know their shape, not their value."""
    x = rng.random((4, 4))
    target = [] if "soft" in name or "sum" in name else [x + 1 if name == "mse_loss" else np.arange(4)]
    for value in (*values, *values):
        expected = getattr(nbloss, name)(x, *target, **{option: value})
        np.testing.assert_array_equal(getattr(nbloss, name)(x, *target, **{option: np.array(value)}), expected)


def test_the_sign_of_a_weight_of_zero(rng):
    x, target = rng.random((2, 5)) + [[1], [0]]
    for weight in (0.0, -0.0, 0.0):
        signs = np.signbit(nbloss.mse_loss.grad(x, target, weight=weight, reduction="sum"))
        assert (signs == np.signbit(weight)).all()


def test_outs_that_are_like_a_good_one(rng):
    x, target, _ = arguments(rng, "mse_loss", {}, "float32")
    good = np.empty_like(x)
    nbloss.mse_loss.grad(x, target, out=good)
    memory = np.zeros(2 * x.size, np.float32)
    overlapping = memory[: x.size].reshape(SHAPE), memory[1 : 1 + x.size].reshape(SHAPE)
    for a, t, out, message in (
        (x, target, target, "overlaps target"),
        (overlapping[0], target, overlapping[1], "overlaps the input"),
        (x, overlapping[0], overlapping[1], "overlaps target"),
    ):
        with pytest.raises(ValueError, match=message):
            nbloss.mse_loss.grad(a, t, out=out)
    weight = np.ones(SHAPE, np.float32)
    nbloss.mse_loss.grad(x, target, weight=weight, reduction="sum", out=good)
    with pytest.raises(ValueError, match="overlaps weight"):
        nbloss.mse_loss.grad(x, target, weight=weight, reduction="sum", out=weight)
    good.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        nbloss.mse_loss.grad(x, target, out=good)
    same = x[:]  # another object, in place all the same
    expected = nbloss.mse_loss.grad(x, target)
    np.testing.assert_array_equal(nbloss.mse_loss.grad(x, target, out=same), expected)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_plans_keep_no_array(rng, name, options, form):
    x, target, given = arguments(rng, name, options, "float32")
    results = [np.asarray(r) for r in run(name, form, x, target, given)]
    kept = [weakref.ref(a) for a in (x, target, *results, *given.values()) if isinstance(a, np.ndarray)]
    assert plans._plans or (name, form) == ("binary_cross_entropy", "in place")
    del x, target, given, results
    if any(r() is not None for r in kept):  # in a cycle; to look for those takes half a second
        gc.collect()
    assert not any(r() is not None for r in kept)


def test_plans_are_few(rng):
    for n in range(1, 2 * plans.MOST_PLANS):
        x = np.zeros((n, 2), np.float32)
        assert nbloss.mse_loss(x, x) == 0
    assert 0 < len(plans._plans) <= plans.MOST_PLANS


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_gradients_beyond_their_dtype_are_infinite_and_warn_of_nothing(rng, name):
    x, target, _ = arguments(rng, name, {}, "float32")
    for _ in range(2):
        gradient = getattr(nbloss, name).grad(x, target, 1e300)
        assert np.isinf(gradient).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", [*ROWWISE, *POINTWISE])
def test_a_factor_for_each(rng, name, dtype):
    """An upstream gradient of each row or element: 10000 elements took five times as long without a plan."""
    x, target, _ = arguments(rng, name, {}, dtype)
    loss, shape = getattr(nbloss, name), SHAPE[:1] if name in ROWWISE else SHAPE
    ones = loss.grad(x.astype(float), target, np.ones(shape), reduction="none")
    for kind in (np.float32, np.float64, int):
        plans._plans.clear()
        for _ in range(3):
            factor = rng.integers(1, 9, shape).astype(kind)
            wanted = ones * (factor[:, None] if name in ROWWISE else factor)
            out = np.empty_like(x)
            for found in (
                loss.grad(x, target, factor, reduction="none"),
                loss.value_and_grad(x, target, grad_output=factor, reduction="none")[1],
                loss.grad(x, target, factor, out, reduction="none"),
            ):
                close(found, wanted, dtype, 8)
        assert len(plans._plans) == 3
    strided = np.repeat(factor.astype(float), 2, axis=-1)[..., ::2]
    for _ in range(2):
        assert bits([loss.grad(x, target, strided, reduction="none")]) == bits([found])
    with pytest.raises(ValueError, match="grad_output must be a scalar, got shape"):
        loss.grad(x, target, factor)
    kept = weakref.ref(strided.base)
    del strided
    gc.collect()
    assert kept() is None
    if name in POINTWISE and dtype == np.float64:
        with pytest.raises(ValueError, match="overlaps grad_output"):
            loss.grad(x, target, out, out, reduction="none")


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_a_class_index_that_is_a_number(rng, kind):
    """A call with one makes a plan as one with an array does: for 50257 classes it took six times as long without."""
    x, out = rng.standard_normal(9), np.empty(9)
    plans._plans.clear()
    loss = nbloss.cross_entropy(x, kind(5))
    assert nbloss.cross_entropy.grad(x, kind(5), 0.5, out) is out
    assert len(plans._plans) == 2
    assert nbloss.cross_entropy(x, np.array(kind(5))) == loss
    assert bits([nbloss.cross_entropy.grad(x, np.array(kind(5)), 0.5, np.empty(9))]) == bits([out])
    assert len(plans._plans) == 2  # the same ones
    with pytest.raises(IndexError, match="target"):
        nbloss.cross_entropy(x, kind(9))


class Foreign:
    """An array of another library on the host."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_device_arrays_are_not_asked_where_they_are():
    """By their type they may be on a device: that their DLPack says so is left to the CUDA backend."""

    class OnDevice(Foreign):
        __cuda_array_interface__ = None

        def __dlpack_device__(self):
            raise AssertionError

    value = OnDevice(np.ones(3))
    assert dispatch.plain_array("x", value) is value


def test_arrays_of_other_libraries(rng):
    """Calls with them take the plans of NumPy's: PyTorch's tensors took 38 µs a call."""
    x, labels, weight = rng.standard_normal((6, 9)), rng.integers(0, 9, 6), rng.random(9)
    given = Foreign(x), Foreign(labels)
    plans._plans.clear()
    found = nbloss.cross_entropy.value_and_grad(*given, weight=Foreign(weight))
    rows = [nbloss.softmax(given[0]), nbloss.log_softmax(given[0]), nbloss.logsumexp(given[0])]
    assert len(plans._plans) == 4
    assert bits(found) == bits(nbloss.cross_entropy.value_and_grad(x, labels, weight=weight))
    assert bits(rows) == bits([nbloss.softmax(x), nbloss.log_softmax(x), nbloss.logsumexp(x)])
    assert len(plans._plans) == 4  # the same ones
    assert nbloss.cross_entropy.grad(*given, out=x, weight=Foreign(weight)) is x
    assert bits([x]) == bits(found[1:])
    masked = np.ma.masked_array(x, x > 0)
    with pytest.raises(TypeError, match="logits must not be a masked array"):
        nbloss.cross_entropy(masked, given[1])
