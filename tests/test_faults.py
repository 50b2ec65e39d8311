"""Faults anywhere: hypothesis chooses where, in what dtype and layout, and into which `out`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_layouts import LAYOUTS

import nbloss

pytestmark = pytest.mark.cpu

REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
FORMS = st.sampled_from(["value", "apart", "framed", "in place"])
layouts = st.sampled_from(sorted(set(LAYOUTS) - {"read-only"}))


def call(loss, x, target, form, **options):
    """One entry point, and the frame around `out` that nothing may write to."""
    if form == "value":
        return loss(x, target, **options)
    if form == "in place":
        return loss.value_and_grad(x, target, out=x, **options)
    if form == "apart":
        return loss.grad(x, target, **options)
    buffer = np.full([n + 2 for n in x.shape], 7, x.dtype.newbyteorder("="))
    inside = tuple(slice(1, -1) for _ in x.shape)
    try:
        return loss.value_and_grad(x, target, out=buffer[inside], **options)
    finally:
        frame = np.ones(buffer.shape, bool)
        frame[inside] = False
        assert (buffer[frame] == 7).all()


@given(
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=24),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from([np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64]),
    st.sampled_from(["cross_entropy", "nll_loss"]),
    layouts,
    FORMS,
    REDUCTIONS,
    st.data(),
)
def test_class_indices(shape, dtype, label_dtype, name, layout, form, reduction, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = LAYOUTS[layout](np.linspace(-3, 3, int(np.prod(shape))).reshape(shape).astype(dtype))
    labels = np.zeros(shape[:axis] + shape[axis + 1 :], label_dtype)
    labels[...] = data.draw(st.integers(0, shape[axis] - 1))
    where = tuple(data.draw(st.integers(0, n - 1)) for n in labels.shape)
    info = np.iinfo(label_dtype)
    wrong = st.integers(shape[axis], info.max)
    if info.min < 0:
        wrong |= st.integers(info.min, -1).filter(lambda v: v != -100)
    labels[where] = data.draw(wrong)
    before, kept = x.copy(), labels.copy()
    place = ", ".join(map(str, where))
    with pytest.raises(
        IndexError, match=rf"^target\[{place}\] is -?\d+: class indices must be in \[0, {shape[axis]}\).*$"
    ):
        call(getattr(nbloss, name), x, labels, form, axis=axis, reduction=reduction)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(labels, kept)


@given(
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=40),
    st.sampled_from([np.float16, np.float32, np.float64]),
    layouts,
    FORMS,
    REDUCTIONS,
    st.data(),
)
def test_probabilities(shape, dtype, layout, form, reduction, data):
    p = np.full(shape, 0.25, dtype)
    where = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    p[where] = data.draw(st.floats(1.01, 6e4) | st.floats(-6e4, -0.01) | st.sampled_from([np.inf, -np.inf]))
    p = LAYOUTS[layout](p)
    before = p.copy()
    place = ", ".join(map(str, where))
    with pytest.raises(ValueError, match=rf"^probs must be in \[0, 1\], got probs\[{place}\] = .*$"):
        call(nbloss.binary_cross_entropy, p, np.zeros(shape, dtype), form, reduction=reduction)
    np.testing.assert_array_equal(p, before)
