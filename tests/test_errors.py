"""Bad input: the contracted error in one line, and every input as it was."""

import inspect
import io
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import POINTWISE
from ml_dtypes import float8_e5m2  # of the kind of floats, unlike other float8s

import nbloss

ROWWISE = ["cross_entropy", "nll_loss"]
FIRST_ARGUMENT = {
    "cross_entropy": "logits",
    "nll_loss": "log_probs",
    "binary_cross_entropy": "probs",
    "binary_cross_entropy_with_logits": "logits",
    "mse_loss": "input",
    "l1_loss": "input",
}


class Busy:
    """An array of a library that tells neither where it is nor what it holds."""

    def __dlpack_device__(self):
        raise ValueError("unknown device")

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not now,\nso")


def arguments(name):
    """Good arguments of a loss."""
    x = np.linspace(0.05, 0.95, 12).reshape(4, 3)
    return (x, np.array([0, 2, 1, 0])) if name in ROWWISE else (x, x[::-1].copy())


def refuses(error, message, loss, *args, **options):
    """All three entry points raise the same one-line error, in place too, and change nothing."""
    before = [np.array(a, copy=True) if isinstance(a, np.ndarray) else a for a in args]
    calls = [lambda: loss(*args, **options), lambda: loss.grad(*args, **options)]
    calls.append(lambda: loss.value_and_grad(*args, **options))
    if isinstance(args[0], np.ndarray) and args[0].flags.writeable:
        calls += [
            lambda: loss.value_and_grad(*args, out=args[0], **options),
            lambda: loss.grad(*args, out=args[0], **options),
        ]
    for call in calls:
        with pytest.raises(error, match=message) as info:
            call()
        assert "\n" not in str(info.value)
        assert type(info.value) is error or issubclass(type(info.value), error)
        for a, b in zip(args, before):
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.longlong, np.uint8, np.uint64, ">u8"])
def test_class_index_out_of_range(backend, name, dtype):
    x, _ = arguments(name)
    labels = np.array([0, 2, 3, 5], dtype)
    refuses(
        IndexError,
        r"target\[2\] is 3: class indices must be in \[0, 3\) or equal ignore_index \(-100\)",
        getattr(nbloss, name),
        x,
        labels,
    )
    if np.iinfo(dtype).min < 0:
        refuses(IndexError, r"target\[1\] is -1", getattr(nbloss, name), x, np.array([0, -1, 1, 2], dtype))
    huge = np.array([0, 1, 2, np.iinfo(dtype).max], dtype)
    refuses(IndexError, rf"target\[3\] is {huge[3]}:", getattr(nbloss, name), x, huge)


def test_class_index_position_in_many_dimensions():
    x = np.zeros((2, 3, 4, 5))
    labels = np.zeros((2, 4, 5), int)
    labels[1, 2, 3] = 7
    refuses(IndexError, r"target\[1, 2, 3\] is 7", nbloss.cross_entropy, x, labels)
    refuses(IndexError, r"target is 9", nbloss.cross_entropy, np.zeros(3), 9)


def test_ignore_index_is_compared_as_int64():
    x = np.zeros((2, 200))
    labels = np.array([156, 255], np.uint8)  # 156 is -100 in int8
    assert np.isfinite(nbloss.cross_entropy(x, np.array([156, 3], np.uint8)))
    refuses(IndexError, r"target\[1\] is 255", nbloss.cross_entropy, x, labels)
    assert nbloss.cross_entropy(x, labels, ignore_index=255) == nbloss.cross_entropy(x[:1], labels[:1])
    wrapped = np.array([0, 2**64 - 100], np.uint64)
    refuses(IndexError, rf"target\[1\] is {2**64 - 100}:", nbloss.cross_entropy, x, wrapped)
    for ignored in (-1, 2**63 - 1):
        losses = nbloss.cross_entropy(x, wrapped, ignore_index=ignored, reduction="none", check=False)
        np.testing.assert_array_equal(np.isnan(losses), [False, True])


@pytest.mark.parametrize("where", [0, 7, 11])
@pytest.mark.parametrize("value", [-0.1, 1.5, np.inf, -np.inf])
def test_probability_outside_its_range(backend, where, value):
    p, t = arguments("binary_cross_entropy")
    p.flat[where] = value
    place = re.escape(f"probs[{where // 3}, {where % 3}] = {value}")
    refuses(ValueError, rf"probs must be in \[0, 1\], got {place}", nbloss.binary_cross_entropy, p, t)


def test_unchecked_values_give_nan_and_no_gradient(backend):
    x, _ = arguments("cross_entropy")
    for name in ROWWISE:
        loss, gradient = getattr(nbloss, name).value_and_grad(x, [0, 5, -3, 1], reduction="none", check=False)
        np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
        np.testing.assert_array_equal(gradient[1:3], np.zeros((2, 3)))
        assert np.isnan(getattr(nbloss, name)(x, [0, 5, -3, 1], check=False))
        nowhere, loss = np.zeros((3, 0)), getattr(nbloss, name)
        for value in (loss, lambda *args, loss=loss, **options: loss.value_and_grad(*args, **options)[0]):
            unchecked = value(nowhere, [0, -100, 1], reduction="none", check=False)
            np.testing.assert_array_equal(unchecked, [np.nan, 0, np.nan])
            assert np.isnan(value(nowhere, [0, -100, 1], reduction="sum", check=False))
            assert value(nowhere, [-100] * 3, reduction="sum") == 0
    wide = np.zeros((2, 300))
    loss, gradient = nbloss.cross_entropy.value_and_grad(wide, [0, 300], reduction="none", check=False)
    assert np.isnan(loss[1])
    np.testing.assert_array_equal(gradient[1], np.zeros(300))
    loss, gradient = nbloss.binary_cross_entropy.value_and_grad(
        [0.5, 1.5, -2.0], [1, 0, 1], reduction="none", check=False
    )
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True])
    np.testing.assert_array_equal(gradient[1:], [0, 0])
    for size in (3, 100):
        probs = np.full(size, 1.5, np.float32)
        for options in ({"grad_output": np.inf}, {"weight": np.full(size, np.nan, np.float32)}):
            gradient = nbloss.binary_cross_entropy.grad(probs, np.ones(size, np.float32), check=False, **options)
            np.testing.assert_array_equal(gradient, np.zeros(size))


def test_numbers_beyond_float32_without_a_warning():
    """As weights, targets and `grad_output` they are inf, or 0, whatever NumPy is told to do about such numbers."""
    x, t = np.full((2, 3), 2, np.float32), np.zeros((2, 3), np.float32)
    with np.errstate(all="raise"):
        for weight in (1e300, [1e300, 1, 1], np.array([[1e300], [1.0]])):
            assert nbloss.binary_cross_entropy(t, t + 1, weight=weight, reduction="sum") == np.inf
            assert nbloss.binary_cross_entropy_with_logits(x, t + 1, pos_weight=weight, reduction="sum") == np.inf
        assert nbloss.mse_loss(x, t, weight=1e-60, reduction="sum") == 0
        assert np.isnan(nbloss.mse_loss(x, t, weight=[np.inf, -np.inf, 1]))
        assert nbloss.mse_loss(x, np.full((2, 3), 1e300, ">f8")) == np.inf
        assert not np.isfinite(nbloss.cross_entropy(x, [0, 0], weight=[1e300, 1, 1], reduction="sum"))
        assert np.isinf(nbloss.mse_loss.grad(x, t, grad_output=1e300, reduction="sum")).all()
        assert np.isinf(nbloss.cross_entropy.grad(x, [0, 1], grad_output=1e300, reduction="sum")).all()
        gradient = nbloss.mse_loss.grad(x, t, grad_output=np.full((2, 3), 1e-60), reduction="none")
        np.testing.assert_array_equal(gradient, 0 * x)
        probs = np.array([np.nan, 1.5], ml_dtypes.bfloat16)
        with pytest.raises(ValueError, match=r"probs must be in \[0, 1\], got probs\[1\] = 1.5"):
            nbloss.binary_cross_entropy(probs, [0, 1])


@pytest.mark.parametrize("name", ROWWISE + POINTWISE)
class TestEveryLoss:
    def test_reduction(self, name):
        refuses(
            ValueError,
            r"reduction must be 'none', 'mean' or 'sum', got 'average'",
            getattr(nbloss, name),
            *arguments(name),
            reduction="average",
        )
        for wrong in (np.array([1, 2]), [[1], [1, 2]], None):
            refuses(ValueError, r"reduction must be", getattr(nbloss, name), *arguments(name), reduction=wrong)

    def test_backend(self, name):
        refuses(
            ValueError,
            r"backend must be 'auto', 'cpu' or 'cuda', got 'gpu'",
            getattr(nbloss, name),
            *arguments(name),
            backend="gpu",
        )

    @pytest.mark.cpu
    def test_backend_that_cannot_be_used(self, name):
        refuses(RuntimeError, r"backend='cuda' cannot be used", getattr(nbloss, name), *arguments(name), backend="cuda")

    @pytest.mark.cpu
    def test_stream(self, name):
        refuses(ValueError, r"stream applies to device arrays", getattr(nbloss, name), *arguments(name), stream=1)

    @pytest.mark.parametrize(
        "bad",
        [np.ones((4, 3), kind) for kind in (int, bool, complex, object, "U1", "M8[s]", float8_e5m2)],
        ids=["int", "bool", "complex", "object", "str", "datetime", "float8"],
    )
    def test_dtype_of_the_input(self, name, bad):
        _, target = arguments(name)
        refuses(
            TypeError,
            rf"{FIRST_ARGUMENT[name]} must be float16, bfloat16, float32 or float64, got",
            getattr(nbloss, name),
            bad,
            target,
        )

    def test_masked_arrays(self, name):
        x, target = arguments(name)
        refuses(
            TypeError,
            rf"{FIRST_ARGUMENT[name]} must not be a masked array",
            getattr(nbloss, name),
            np.ma.array(x),
            target,
        )
        refuses(TypeError, r"target must not be a masked array", getattr(nbloss, name), x, np.ma.array(target))
        with pytest.raises(TypeError, match="out must not be a masked array"):
            getattr(nbloss, name).grad(x, target, out=np.ma.array(x.copy()))

    def test_ragged_list(self, name):
        refuses(TypeError, r"cannot be made an array", getattr(nbloss, name), [[1.0, 2.0], [3.0]], arguments(name)[1])

    def test_arrays_that_their_library_does_not_give(self, name):
        """Whatever it raises is told in one line, with the argument's name."""
        argument = FIRST_ARGUMENT[name]
        x, target = arguments(name)
        refuses(TypeError, rf"{argument} cannot be made an array: not now, so", getattr(nbloss, name), Busy(), target)
        refuses(TypeError, r"target cannot be made an array: not now, so", getattr(nbloss, name), x, Busy())
        with pytest.raises(TypeError, match=r"grad_output cannot be made an array: not now, so"):
            getattr(nbloss, name).grad(x, target, Busy())

    def test_dtype_of_the_target(self, name):
        x, target = arguments(name)
        refuses(TypeError, r"target must be .*, got complex128", getattr(nbloss, name), x, target.astype(complex))

    def test_shape_of_the_target(self, name):
        x, target = arguments(name)
        refuses(ValueError, r"\(4, 3\).*\(3,", getattr(nbloss, name), x, target[:3])

    @pytest.mark.parametrize("weight", [np.ones(5), np.ones((2, 2)), np.ones((4, 1, 3))])
    def test_shape_of_the_weight(self, name, weight):
        refuses(ValueError, r"weight must", getattr(nbloss, name), *arguments(name), weight=weight)

    def test_dtype_of_the_weight(self, name):
        refuses(
            TypeError,
            r"weight must be integer, bool, float",
            getattr(nbloss, name),
            *arguments(name),
            weight=np.full(3, 1j),
        )

    @pytest.mark.parametrize(
        ("reduction", "factor"), [("mean", np.ones(2)), ("sum", np.ones((4, 3))), ("none", np.ones(2))]
    )
    def test_shape_of_grad_output(self, name, reduction, factor):
        x, target = arguments(name)
        with pytest.raises(ValueError, match="grad_output must be a scalar"):
            getattr(nbloss, name).grad(x, target, factor, reduction=reduction)

    @pytest.mark.parametrize("factor", [2**70, 10**400, "1", 1j])
    def test_dtype_of_grad_output(self, name, factor):
        x, target = arguments(name)
        for _ in range(2):  # the second one after a plan
            with pytest.raises(TypeError, match="grad_output must be"):
                getattr(nbloss, name).grad(x, target, factor)
            getattr(nbloss, name).grad(x, target, 1)

    def test_arguments_given_twice(self, name):
        x, target = arguments(name)
        loss = getattr(nbloss, name)
        with pytest.raises(TypeError, match="got multiple values for argument 'grad_output'"):
            loss.grad(x, target, 1.0, grad_output=2.0)
        with pytest.raises(TypeError, match="got multiple values for argument 'out'"):
            loss.grad(x, target, None, np.empty_like(x), out=np.empty_like(x))
        with pytest.raises(TypeError, match="got multiple values for argument 'target'"):
            loss(x, target, target=target)
        with pytest.raises(TypeError, match="too many positional arguments"):
            loss.grad(x, target, 1.0, None, None)

    def test_out(self, name):
        x, target = arguments(name)
        frozen = np.empty_like(x)
        frozen.flags.writeable = False
        bands = np.lib.stride_tricks.as_strided(np.zeros(3), (4, 3), (0, 8))
        windows = np.lib.stride_tricks.sliding_window_view(np.zeros(6), 3, writeable=True)
        buffer = np.zeros(13)
        cases = [
            (ValueError, r"out must have the input's shape \(4, 3\), got \(3, 4\)", np.empty((3, 4)), x),
            (TypeError, r"out must have the input's dtype float64, got float32", np.empty((4, 3), np.float32), x),
            (TypeError, r"out must be a NumPy array, got list", [[0.0] * 3] * 4, x),
            (ValueError, r"out must be writable", frozen, x),
            (ValueError, r"out must not overlap itself", bands, x),
            (ValueError, r"out must not overlap itself", windows, x),
            (ValueError, r"overlaps the input", x[::-1], x),
            (ValueError, r"overlaps the input", buffer[1:].reshape(4, 3), buffer[:-1].reshape(4, 3)),
        ]
        if name in POINTWISE:
            cases.append((ValueError, r"overlaps target", target, x))
        for error, message, out, values in cases:
            kept = values.copy()
            for entry in (getattr(nbloss, name).grad, getattr(nbloss, name).value_and_grad):
                with pytest.raises(error, match=message):
                    entry(values, target, out=out)
            np.testing.assert_array_equal(values, kept)

    def test_out_over_an_argument_that_is_converted(self, name):
        """What is read then is a copy, and what it was made of must not be written all the same."""
        x, target = arguments(name)
        swapped = np.zeros((4, 4), ">f8")
        swapped[:, :3] = x
        kept = swapped.copy()
        for out in (swapped[:, 1:], swapped[:, :3].view("<f8")):
            with pytest.raises(ValueError, match="overlaps the input"):
                getattr(nbloss, name).grad(swapped[:, :3], target, out=out)
            np.testing.assert_array_equal(swapped, kept)
        loss = getattr(nbloss, name).grad
        np.testing.assert_array_equal(loss(swapped[:, :3], target, out=swapped[:, :3]), loss(x, target))
        memory = np.zeros(12, np.uint64 if target.dtype.kind == "i" else np.float64)
        wide = memory[: target.size].reshape(target.shape)
        wide[...] = target
        single = x.astype(np.float32)
        kept = memory.copy()
        if target.dtype.kind == "f":
            with pytest.raises(ValueError, match="overlaps target"):
                loss(single, memoryview(wide), out=memory.view(np.float32)[:12].reshape(4, 3))
        with pytest.raises(ValueError, match="overlaps target"):
            loss(single, wide, out=memory.view(np.float32)[:12].reshape(4, 3))
        np.testing.assert_array_equal(memory, kept)
        if "weight" in inspect.signature(loss).parameters:
            weight = np.ones(12)[:3]
            with pytest.raises(ValueError, match="overlaps weight"):
                loss(single, target, weight=weight, out=weight.base.view(np.float32)[:12].reshape(4, 3))
            np.testing.assert_array_equal(weight, 1)

    def test_out_beside_the_input_in_one_buffer(self, name):
        x, target = arguments(name)
        buffer = np.zeros((4, 6))
        buffer[:, ::2] = x
        gradient = getattr(nbloss, name).grad(buffer[:, ::2], target, out=buffer[:, 1::2])
        np.testing.assert_array_equal(gradient, getattr(nbloss, name).grad(x, target))
        np.testing.assert_array_equal(buffer[:, ::2], x)

    def test_positional_options(self, name):
        with pytest.raises(TypeError):
            getattr(nbloss, name)(*arguments(name), None)
        with pytest.raises(TypeError):
            getattr(nbloss, name).grad(*arguments(name), None, None, "sum")


@pytest.mark.parametrize("name", ROWWISE)
class TestRowwise:
    def test_axis(self, name):
        refuses(
            np.exceptions.AxisError, r"axis must be between -2 and 1", getattr(nbloss, name), *arguments(name), axis=2
        )
        refuses(
            np.exceptions.AxisError, r"axis must be between -2 and 1", getattr(nbloss, name), *arguments(name), axis=-3
        )
        for wrong in (0.5, np.array([0, 1])):
            refuses(TypeError, r"axis must be an integer", getattr(nbloss, name), *arguments(name), axis=wrong)
            refuses(TypeError, r"axis must be an integer", getattr(nbloss, name), np.ones(3), 0, axis=wrong)

    def test_no_dimension(self, name):
        refuses(ValueError, r"must have at least one dimension", getattr(nbloss, name), np.array(1.0), 0)

    def test_ignore_index(self, name):
        loss, good = getattr(nbloss, name), arguments(name)
        refuses(TypeError, r"ignore_index must be an integer", loss, *good, ignore_index=1.5)
        refuses(TypeError, r"ignore_index must be an integer", loss, *good, ignore_index=np.zeros((40, 2)))
        refuses(ValueError, rf"ignore_index must be an int64, got {2**63}", loss, *good, ignore_index=2**63)


def test_label_smoothing():
    for value in (-0.1, 1.1, np.nan, 10**400):
        refuses(
            ValueError,
            r"label_smoothing must be between 0 and 1",
            nbloss.cross_entropy,
            *arguments("cross_entropy"),
            label_smoothing=value,
        )
    refuses(
        TypeError,
        r"label_smoothing must be a number",
        nbloss.cross_entropy,
        *arguments("cross_entropy"),
        label_smoothing="0.1",
    )


def test_probabilities_as_target():
    x, _ = arguments("cross_entropy")
    refuses(
        ValueError,
        r"target must be class indices of shape \(4,\) or probabilities of the logits' shape \(4, 3\)",
        nbloss.cross_entropy,
        x,
        np.ones(4),
    )
    refuses(ValueError, r"ignore_index applies to class indices", nbloss.cross_entropy, x, x, ignore_index=1)
    refuses(TypeError, r"target must be class indices", nbloss.nll_loss, x, x)


@pytest.mark.parametrize("function", [nbloss.softmax, nbloss.log_softmax, nbloss.logsumexp])
def test_row_functions(function):
    with pytest.raises(TypeError, match="x must be float16"):
        function(np.arange(3))
    with pytest.raises(TypeError, match="masked"):
        function(np.ma.array([1.0, 2.0]))
    with pytest.raises(np.exceptions.AxisError, match="axis must be between -1 and 0"):
        function(np.ones(3), axis=1)
    with pytest.raises(ValueError, match="backend must be"):
        function(np.ones(3), backend="tpu")
    if function is not nbloss.logsumexp:
        with pytest.raises(ValueError, match="out must have the input's shape"):
            function(np.ones(3), out=np.ones(4))
        x = np.ones(4)
        with pytest.raises(ValueError, match="overlaps the input"):
            function(x[:3], out=x[1:])


@pytest.mark.parametrize("bad", [0, -1, 10**6])
def test_thread_counts(bad):
    before = nbloss.get_num_threads()
    with pytest.raises(ValueError, match=r"n must be between 1 and \d+"):
        nbloss.set_num_threads(bad)
    with pytest.raises(TypeError, match="n must be an integer"):
        nbloss.set_num_threads(1.5)
    assert nbloss.get_num_threads() == before


def test_advice_on_targets():
    image = np.zeros((2, 4, 5, 3))
    for target, advice in (
        (np.zeros((2, 4, 5), int), "it fits axis=3"),
        (np.zeros((2, 4, 5, 3), int), r"class probabilities are floating, target.astype\(float\)"),
        (np.zeros((2, 5, 3)), r"class indices are integers, target.astype\(int\)"),
    ):
        refuses(ValueError, advice, nbloss.cross_entropy, image, target)
    refuses(
        TypeError, r"target must be of an integer dtype", nbloss.cross_entropy, np.zeros((2, 3)), np.array(["a", "b"])
    )


def test_axes_named_twice():
    with pytest.raises(ValueError, match=r"axis must not name a dimension twice, got \(0, -2\)"):
        nbloss.logsumexp(np.zeros((2, 3)), axis=(0, -2))


def test_warmup_names():
    with pytest.raises(ValueError, match="unknown dtype 'float8'"):
        nbloss.warmup(dtypes=["float8"])
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        nbloss.warmup(losses=["hinge"])
    with pytest.raises(ValueError, match="no dtype to warm up: choose from float16"):
        nbloss.warmup(dtypes=[])
    with pytest.raises(ValueError, match="no loss to warm up: choose from"):
        nbloss.warmup(losses=())
    for dtype in ("float32", np.float32, [np.dtype("f4")]):
        said = io.StringIO()
        nbloss.warmup(dtype, "mse_loss", file=said)
        assert "mse_loss float32" in said.getvalue()


class FakeDeviceArray:
    """What the CPU sees of a CuPy or torch array on a GPU."""

    __cuda_array_interface__ = {"shape": (4, 3), "typestr": "<f8", "data": (0, False), "version": 3}  # noqa: RUF012


@pytest.mark.cpu
@pytest.mark.parametrize("name", ROWWISE + POINTWISE)
def test_device_arrays(name):
    x, target = arguments(name)
    with pytest.raises(RuntimeError, match=r"is a device array, and the CUDA backend cannot be used"):
        getattr(nbloss, name)(FakeDeviceArray(), target)
    with pytest.raises(RuntimeError, match=r"target is a device array"):
        getattr(nbloss, name)(x, FakeDeviceArray())
