"""The functions of kernels against float64, under the options that kernels are compiled with."""

import numba
import numpy as np
import pytest

from longwave.ops import numba_math

X = np.concatenate([np.linspace(-90, 90, 20011), np.linspace(-1e-3, 1e-3, 1001)])
# What is nearer to 0 may come out as 0: in the last three e^-x overflows, or x multiplies what is 0.
SMALLEST = {"exp2": 2.5e-38, "exp": 2.5e-38, "softplus": 2.5e-38, "sigmoid": 3e-38, "silu": 4e-37, "silu_slope": 4e-37}


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu_slope(x):
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


# Truth, and the largest relative error in float32. The slope crosses 0, near -1.28: its error is absolute.
CASES = {
    "exp2": (np.exp2, 2e-7),
    "exp": (np.exp, 2e-7),
    "sigmoid": (_sigmoid, 3e-7),
    "silu": (lambda x: x * _sigmoid(x), 3e-7),
    "silu_slope": (_silu_slope, 4e-7),
    "softplus": (lambda x: np.logaddexp(0, x), 4e-7),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Name, the function over an array, truth, bound."""
    function = getattr(numba_math, request.param)

    @numba.njit(**numba_math.OPTIONS)
    def over(x):
        y = np.empty_like(x)
        for i in range(x.shape[0]):
            y[i] = function(x[i])
        return y

    return request.param, over, *CASES[request.param]


def test_float32_accuracy(case):
    name, over, truth, bound = case
    x = X.astype(np.float32)
    expected = truth(x.astype(np.float64))
    scale = np.maximum(np.abs(expected), 1) if name == "silu_slope" else np.abs(expected)
    normal = (np.abs(expected) > SMALLEST[name]) & (np.abs(expected) < np.finfo(np.float32).max)
    assert normal.sum() > 20000
    assert (np.abs(over(x) - expected)[normal] <= bound * scale[normal]).all()
    small = np.abs(expected) <= SMALLEST[name]
    assert (np.abs(over(x) - expected)[small] <= SMALLEST[name]).all()


def test_float64_is_libm(case):
    name, over, truth, _ = case
    # softplus is x above 20, as torch has it: off by e^-20 there.
    x = X[X <= 20] if name == "softplus" else X
    np.testing.assert_allclose(over(x), truth(x), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes(case, dtype):
    name, over, _, _ = case
    payload = np.array([0x7FC12345, 0x7F812345], np.uint32).view(np.float32)  # quiet and signalling, with bits set
    with np.errstate(invalid="ignore"):
        nans = np.append(payload, np.float32(np.nan)).astype(dtype)
    assert np.isnan(over(nans)).all()
    limits = {
        "exp2": (0, np.inf),
        "exp": (0, np.inf),
        "sigmoid": (0, 1),
        "softplus": (0, np.inf),
        "silu": (0, np.inf),
        "silu_slope": (0, 1),
    }
    low, high = limits[name]
    ends = over(np.array([-1e4, 1e4], dtype))
    assert ends[0] == low
    assert ends[1] == (1e4 if name in ("silu", "softplus") else high)
    if name in ("exp2", "exp", "sigmoid", "softplus"):
        np.testing.assert_array_equal(over(np.array([-np.inf, np.inf], dtype)), np.array([low, high], dtype))


@pytest.mark.parametrize("case", ["exp", "exp2"], indirect=True)
def test_exponentials_beside_zero(case):
    """A decay near 1 is off by no more than its rounding: a bias would add up over the memory."""
    _, over, truth, _ = case
    assert over(np.zeros(1, np.float32))[0] == 1
    x = np.linspace(-1e-4, -1e-7, 1000).astype(np.float32)
    assert (np.abs(over(x) - truth(x.astype(np.float64))) <= 1.01 * 2**-25).all()


@numba.njit(**numba_math.OPTIONS)
def turned(steps, rates):
    cosine, sine = np.empty_like(steps), np.empty_like(steps)
    for i in range(steps.shape[0]):
        cosine[i], sine[i] = numba_math.cos_sin(steps[i], rates[i])
    return cosine, sine


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_cos_sin_of_long_phases(size):
    """In float32 the product of step and rate is taken as it is: rounded, 6e6 radians would be off by 0.2."""
    rng = np.random.default_rng(0)
    steps = rng.uniform(0, 2, 20000).astype(np.float32)
    rates = (size * rng.uniform(-3, 3, 20000)).astype(np.float32)
    phases = steps.astype(np.float64) * rates
    for found, expected in zip(turned(steps, rates), (np.cos(phases), np.sin(phases)), strict=True):
        assert np.abs(found - expected).max() <= 2**-23
    cosine, sine = (x.astype(np.float64) for x in turned(steps, rates))
    assert abs((cosine**2 + sine**2 - 1).mean()) <= 1e-8  # a bias would add up over many turns


def test_cos_sin_extremes():
    steps = np.array([1, 1e30, 1e10, np.nan, 1, 0], np.float32)
    rates = np.array([1e30, 1, -1e10, 1, np.nan, 1e30], np.float32)
    cosine, sine = turned(steps, rates)
    assert (np.hypot(cosine[:3], sine[:3]) <= 1.000001).all()
    assert np.isnan(cosine[3:5]).all()
    assert np.isnan(sine[3:5]).all()
    assert (cosine[5], sine[5]) == (1, 0)
    double = turned(np.array([0.5]), np.array([3.0]))
    np.testing.assert_allclose(np.ravel(double), [np.cos(1.5), np.sin(1.5)], rtol=1e-15)


def test_in_python_they_are_themselves():
    assert numba_math.cos_sin(0.5, 3.0) == (np.cos(1.5), np.sin(1.5))
    for name, (truth, _) in CASES.items():
        assert getattr(numba_math, name)(0.7) == pytest.approx(truth(0.7), rel=1e-14)
