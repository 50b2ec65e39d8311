"""What must hold for any input: found by hypothesis, checked against mathematics rather than an oracle."""

import numpy as np
import pytest
import reference
from conftest import POINTWISE, close, few
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nbloss

LOGITS = st.floats(-50, 50, width=32)


@st.composite
def row_problems(draw, dtype=np.float64):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=few(20, 5)))
    axis = draw(st.integers(0, len(shape) - 1))
    x = draw(hnp.arrays(dtype, shape, elements=LOGITS))
    labels = draw(hnp.arrays(np.int64, shape[:axis] + shape[axis + 1 :], elements=st.integers(0, shape[axis] - 1)))
    return x, labels, axis


options = st.fixed_dictionaries(
    {"label_smoothing": st.sampled_from([0.0, 0.1, 1.0]), "reduction": st.sampled_from(["mean", "sum", "none"])}
)


@given(row_problems(), options, st.floats(-1e6, 1e6))
def test_shift_invariance(problem, options, shift):
    x, labels, axis = problem
    x = np.round(x, 3)
    shift = np.round(shift)
    loss, gradient = nbloss.cross_entropy.value_and_grad(x, labels, axis=axis, **options)
    moved_loss, moved_gradient = nbloss.cross_entropy.value_and_grad(x + shift, labels, axis=axis, **options)
    np.testing.assert_allclose(moved_loss, loss, rtol=1e-8, atol=1e-7)  # x + shift is rounded itself
    np.testing.assert_allclose(moved_gradient, gradient, rtol=1e-7, atol=1e-8)


@given(row_problems(), options)
def test_gradients_of_a_row_sum_to_zero(problem, options):
    x, labels, axis = problem
    gradient = nbloss.cross_entropy.grad(x, labels, axis=axis, **options)
    np.testing.assert_allclose(gradient.sum(axis=axis), 0, atol=1e-13)


@given(row_problems(), options)
def test_indices_equal_one_hot_probabilities(problem, options):
    x, labels, axis = problem
    one_hot = np.moveaxis(np.eye(x.shape[axis])[labels], -1, axis)
    by_index = nbloss.cross_entropy.value_and_grad(x, labels, axis=axis, **options)
    by_mass = nbloss.cross_entropy.value_and_grad(x, one_hot, axis=axis, **options)
    np.testing.assert_allclose(by_index[0], by_mass[0], rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(by_index[1], by_mass[1], rtol=1e-12, atol=1e-15)


@given(hnp.arrays(np.float64, st.integers(1, few(60, 20)), elements=LOGITS), st.sampled_from(["mean", "sum", "none"]))
def test_two_classes_equal_binary(x, reduction):
    labels = np.arange(x.size) % 2
    two = nbloss.cross_entropy.value_and_grad(np.stack([np.zeros_like(x), x], 1), labels, reduction=reduction)
    one = nbloss.binary_cross_entropy_with_logits.value_and_grad(x, labels, reduction=reduction)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-14)
    np.testing.assert_allclose(two[1][:, 1], one[1], rtol=1e-14)


@given(row_problems(), st.floats(0.1, 3), options)
def test_ignoring_equals_leaving_out(problem, weight, options):
    x, labels, axis = problem
    # Copied, as `rows[kept]` is: bits may differ between layouts.
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).copy()
    flat = labels.reshape(-1)
    weights = np.linspace(weight, 1, x.shape[axis])
    kept = flat != flat[0]
    masked = nbloss.cross_entropy.value_and_grad(rows, flat, ignore_index=int(flat[0]), weight=weights, **options)
    subset = nbloss.cross_entropy.value_and_grad(rows[kept], flat[kept], weight=weights, **options)
    if options["reduction"] == "none":
        np.testing.assert_array_equal(masked[0][kept], subset[0])
        np.testing.assert_array_equal(masked[0][~kept], 0)
    else:
        np.testing.assert_allclose(masked[0], subset[0], rtol=1e-13)
    np.testing.assert_array_equal(masked[1][~kept], 0)
    np.testing.assert_allclose(masked[1][kept], subset[1], rtol=1e-13, atol=1e-300)


@given(row_problems(), options)
def test_log_softmax_and_nll_make_cross_entropy(problem, options):
    x, labels, axis = problem
    log_probs = nbloss.log_softmax(x, axis=axis)
    np.testing.assert_allclose(np.exp(log_probs), nbloss.softmax(x, axis=axis), rtol=1e-12)
    reduction = options["reduction"]
    composed = nbloss.nll_loss(log_probs, labels, axis=axis, reduction=reduction)
    np.testing.assert_allclose(
        composed, nbloss.cross_entropy(x, labels, axis=axis, reduction=reduction), rtol=1e-12, atol=1e-12
    )


@given(row_problems(np.float32), options, st.booleans(), st.data())
def test_against_the_oracle(problem, options, weighted, data):
    x, labels, axis = problem
    options = dict(options, axis=axis)
    if weighted:
        options["weight"] = data.draw(hnp.arrays(np.float32, x.shape[axis], elements=st.floats(0.125, 4, width=32)))
    grad_output = data.draw(st.floats(-4, 4, width=16))
    expected = reference.cross_entropy(x, labels, grad_output=grad_output, **options)
    value, gradient = nbloss.cross_entropy.value_and_grad(x, labels, grad_output, **options)
    close(value, expected[0], np.float32, scale=50)
    close(gradient, expected[1], np.float32, scale=4)


@pytest.mark.parametrize("name", POINTWISE)
@given(data=st.data(), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_pointwise_against_the_oracle(name, data, reduction):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=few(40, 8)))
    elements = st.floats(0, 1, width=32) if name == "binary_cross_entropy" else LOGITS
    x = data.draw(hnp.arrays(np.float64, shape, elements=elements))
    t = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1, width=32)))
    weight = data.draw(hnp.arrays(np.float64, hnp.broadcastable_shapes(shape, max_dims=len(shape)).filter(
        lambda s: np.broadcast_shapes(s, shape) == shape), elements=st.floats(0.5, 2)))  # fmt: skip
    expected = getattr(reference, name)(x, t, weight=weight, reduction=reduction)
    value, gradient = getattr(nbloss, name).value_and_grad(x, t, weight=weight, reduction=reduction)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-15)  # two terms may cancel
