"""FusedSGD against torch.nn.Linear and torch.optim.SGD in double precision, in all of its arithmetics."""
import os
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from graph_utils import FusedSGD, core, get_num_threads, set_num_threads  # noqa: E402
from graph_utils.product import aligned_zeros  # noqa: E402
from graph_utils.sgd import ARITHMETICS, padded, padded_images, rounding_norms  # noqa: E402
from test_logreg import cross_entropy, plain_torch  # noqa: E402

EXACT = ["float32", "split"] if core.sgd_has_tiles() else ["split"]
POINTS = [(0.01, 0), (0.01, 0.1), (0.1, 0.01), (0.001, 0.1), (0.3, 0.3), (0, 0.1)]


def random_data(n, d, C, seed=0):
    """Rows of about the same length for any d, so that no learning rate of POINTS diverges."""
    rs = np.random.RandomState(seed)
    y = np.concatenate([np.arange(C), rs.randint(C, size=n - C)])
    return ((rs.rand(n, d) + 0.3 * rs.rand(C, d)[y]) * min(1, (17 / d) ** 0.5)).astype(np.float32), y


def split(arithmetic):
    """Whether numbers are split in two, whose products have errors of 1e-5."""
    return arithmetic != "float32" and core.sgd_has_tiles()


def trained(points, x, y, batches, T, mom=0.9, arithmetic="split", C=None):
    model = FusedSGD(points, C or int(y.max()) + 1, x.shape[1], mom, arithmetic)
    for t in range(0, len(batches), T):
        model.steps(x, batches[t:t + T], y[batches[t:t + T]])
    return model


@pytest.mark.parametrize("arithmetic", EXACT)
@pytest.mark.parametrize("d, C, B, T", [(17, 7, 5, 4), (17, 7, 32, 8), (1, 2, 1, 3), (17, 7, 3, 1), (70, 40, 33, 3),
                                        (600, 37, 64, 4), (32, 32, 1, 16), (130, 5, 100, 2), (2, 3, 300, 1)])
def test_steps_are_those_of_torch_optim_sgd(d, C, B, T, arithmetic):
    x, y = random_data(400, d, C)
    batches = np.random.RandomState(1).randint(len(x), size=(50, B))        # T does not divide 50: a shorter group
    model = trained(POINTS, x, y, batches, T, arithmetic=arithmetic)
    for g, (lr, wd) in enumerate(POINTS):
        # large rates amplify the rounding of both arithmetics alike; that of the tiles is about 40 times larger
        tolerance = 1e-6 if not split(arithmetic) else 5e-6 if lr <= 0.01 else 5e-5
        for mine, want in zip(model.weights(g), plain_torch(lr, wd, x, y, batches, 0.9)):
            assert np.abs(mine - want).max() <= tolerance * max(1, np.abs(want).max()), (lr, wd)


def as_bfloat16(x):
    return torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()


@pytest.mark.parametrize("of_bfloat16", [True, False])
@pytest.mark.parametrize("G, C, d, B, B1", [(1, 1, 1, 1, 1), (3, 7, 33, 16, 5), (2, 40, 70, 33, 64), (1, 5, 600, 20, 40)])
def test_a_pass_in_bfloat16_is_exact_for_such_numbers_and_rounds_others(G, C, d, B, B1, of_bfloat16):
    given = as_bfloat16 if of_bfloat16 else lambda x: x
    rs, kind = np.random.RandomState(0), ARITHMETICS["bfloat16"]
    rows, dpad, Bpad, B1pad = padded(G * C), padded(d), padded_images(B, "bfloat16"), padded_images(B1, "bfloat16")
    W, M, X, P, X1 = (aligned_zeros(shape) for shape in ((rows, dpad), (rows, dpad), (Bpad, dpad), (rows, Bpad), (B1pad, dpad)))
    P[:G * C, :B], X[:B, :d], X1[:B1, :d] = (given(rs.randn(*s).astype("f4")) for s in ((G * C, B), (B, d), (B1, d)))
    one, b, Z = np.ones(G, np.float32), np.zeros((2, rows), np.float32), aligned_zeros((rows, B1pad))
    ahead = np.tile(np.array([1, 0], np.float32), (G, 1))
    scratch = aligned_zeros(core.sgd_scratch(G, C, dpad, 1, max(Bpad, B1pad)), np.uint8)
    core.sgd_pass(G, C, dpad, 0, one, 0 * one, W, M, *b, 1, Bpad, X, P, 0, 0, None, None, None, kind, scratch)
    np.testing.assert_allclose(-W, as_bfloat16(P).astype("f8") @ as_bfloat16(X), atol=1e-6 * d)
    np.testing.assert_allclose(-b[0], P.sum(1), atol=1e-5)
    W[...], b[0] = given(W), 0
    core.sgd_pass(G, C, dpad, 0, one, 0 * one, W, M, *b, 0, 0, None, None, 1, B1pad, X1, ahead, Z, kind, scratch)
    np.testing.assert_allclose(Z, as_bfloat16(W).astype("f8") @ as_bfloat16(X1).T, atol=1e-5 * d)


@pytest.mark.parametrize("d, C, B, T", [(17, 7, 5, 4), (70, 40, 33, 3), (600, 37, 16, 16), (32, 32, 1, 16)])
def test_training_in_bfloat16_is_near_that_in_float32(d, C, B, T):
    x, y = random_data(400, d, C)
    batches = np.random.RandomState(1).randint(len(x), size=(300, B))
    points = [(0.01, 0), (0.01, 0.1), (0.1, 0.01)]
    exact, near = (trained(points, x, y, batches, T, arithmetic=a) for a in ("split", "bfloat16"))
    for g in range(len(points)):
        for a, b in zip(exact.weights(g), near.weights(g)):
            assert 0 < np.abs(a - b).max() < .02 * np.abs(a).max()


@pytest.mark.parametrize("points,C,d", [([], 2, 3), (POINTS, 0, 3), (POINTS, 2, 0)])
def test_nothing_to_train(points, C, d):
    with pytest.raises(ValueError, match="at least one of each"):
        FusedSGD(points, C, d, 0.9)


def test_unknown_arithmetic():
    with pytest.raises(KeyError):
        FusedSGD(POINTS, 2, 2, 0.9, "float16").steps(np.zeros((1, 2), np.float32), np.array([[0]]), np.array([[0]]))


@pytest.mark.parametrize("arithmetic", EXACT)
@pytest.mark.parametrize("mom", [0, 0.5])
def test_other_momenta_and_many_steps(mom, arithmetic):
    x, y = random_data(60, 4, 3)
    batches = np.random.RandomState(1).randint(len(x), size=(1000, 4))
    model = trained([(0.01, 0.1)], x, y, batches, 7, mom, arithmetic)
    for mine, want in zip(model.weights(0), plain_torch(0.01, 0.1, x, y, batches, mom)):
        assert np.abs(mine - want).max() < (1e-5 if split(arithmetic) else 1e-6)


@pytest.mark.parametrize("arithmetic", [*EXACT, "bfloat16"])
def test_grid_equals_separate_runs_on_any_number_of_threads(arithmetic):
    x, y = random_data(300, 33, 11)
    batches = np.random.RandomState(2).randint(len(x), size=(60, 16))
    together = trained(POINTS, x, y, batches, 8, arithmetic=arithmetic)
    threads = get_num_threads()
    try:
        for g, point in enumerate(POINTS):
            set_num_threads(1 + g % 3)
            alone = trained([point], x, y, batches, 8, arithmetic=arithmetic)
            assert all(np.array_equal(a, b) for a, b in zip(together.weights(g), alone.weights(0)))
    finally:
        set_num_threads(threads)


def test_looking_at_the_weights_changes_nothing():
    x, y = random_data(100, 40, 9)
    batches = np.random.RandomState(2).randint(len(x), size=(12, 10))
    want = trained(POINTS, x, y, batches, 4)
    model = FusedSGD(POINTS, 9, 40, 0.9)
    for t in range(0, 12, 4):
        model.steps(x, batches[t:t + 4], y[batches[t:t + 4]])
        state = {k: v.copy() for k, v in model.state().items()}
        model.ranks(x, y)
        model = FusedSGD(POINTS, 9, 40, 0.9)            # as after a resumption
        model.restore(state)
    assert all(np.array_equal(model.state()[k], v) for k, v in want.state().items())


def test_one_class_has_nothing_to_learn():
    x, y = random_data(20, 17, 1)
    model = trained([(0.1, 0.1)], x, y, np.array([[0, 1], [2, 3]]), 2)
    assert not model.weights(0)[0].any() and not model.ranks(x, y).any()


@pytest.mark.parametrize("T", [1, 3])
def test_losses_are_those_before_each_step(T):
    x, y = random_data(200, 17, 5)
    batches = np.random.RandomState(3).randint(len(x), size=(6, 9))
    model, other = (FusedSGD(POINTS, 5, 17, 0.9) for _ in range(2))
    losses = np.concatenate([model.steps(x, batches[t:t + T], y[batches[t:t + T]], loss=True) for t in range(0, 6, T)])
    assert losses.shape == (6, len(POINTS)) and np.allclose(losses[0], np.log(5), atol=1e-6)
    for t, b in enumerate(batches):
        want = [cross_entropy(x[b], y[b], *other.weights(g)) for g in range(len(POINTS))]
        assert np.allclose(losses[t], want, atol=1e-5)
        other.steps(x, b[None], y[b][None])


def test_loss_of_a_class_without_probability_is_finite():
    model = FusedSGD([(0, 0)], 2, 1, 0)
    state = model.state()
    state["b"][:] = [0, 300]
    x = np.zeros((1, 1), np.float32)
    assert model.steps(x, np.array([[0]]), np.array([[0]]), loss=True)[0, 0] == pytest.approx(300)


@pytest.mark.parametrize("arithmetic", [*EXACT, "bfloat16"])
@pytest.mark.parametrize("m, d, C", [(1, 1, 1), (600, 70, 40), (257, 520, 3)])
def test_ranks_and_scores(m, d, C, arithmetic):
    x, y = random_data(max(m, C), d, C)
    batches = np.random.RandomState(0).randint(len(x), size=(10, 8))
    model = trained(POINTS, x, y, batches, 5, arithmetic=arithmetic, C=C)
    store = [np.empty((len(x), C), np.float32) for _ in POINTS]
    ranks = model.ranks(x, y, store)
    for g in range(len(POINTS)):
        weight, bias = model.weights(g)
        want = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        assert np.abs(store[g] - want).max() <= (3e-5 if split(arithmetic) else 2e-6) * max(1, np.abs(want).max())
        own = store[g][np.arange(len(x)), y][:, None]
        before = (store[g] > own) | ((store[g] == own) & (np.arange(C) < y[:, None]))
        assert np.array_equal(ranks[g], before.sum(1))
    assert model.ranks(x[:0], y[:0]).shape == (len(POINTS), 0)


def exact_top(model, x, y, g, most):
    weight, bias = model.weights(g)
    scores = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    own = scores[np.arange(len(x)), y][:, None]
    return ((scores > own) | ((scores == own) & (np.arange(model.C) < y[:, None]))).sum(1) < most


@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("spread", [1, 0.1, 1e-5])
@pytest.mark.parametrize("m, d, C", [(1, 1, 1), (600, 70, 40), (257, 520, 3), (300, 2048, 97)])
def test_top_is_that_of_exact_scores(m, d, C, spread, most):
    """Also where rows differ by less than what rounding to bfloat16 takes; by so little that all is in doubt: float32's."""
    x, y = random_data(max(m, C), d, C)
    model = FusedSGD([(0.1, 0.1), (0.2, 0)], C, d, 0.9, "float32")
    rs, state = np.random.RandomState(0), model.state()
    state["W"][...] = rs.randn(d) + spread * rs.randn(2 * C, d)
    state["b"][...] = spread * rs.randn(2 * C)
    model.screens = True
    found = model.top(x, y, most)
    assert found.shape == (2, len(x)) and found.dtype == bool
    for g in range(2):
        want = exact_top(model, x, y, g, most) if spread > 1e-5 else model.ranks(x, y)[g] < most
        assert np.array_equal(found[g], want)
    assert model.top(x[:0], y[:0]).shape == (2, 0)


u = 2.0 ** -7       # bfloat16 holds 1 and 1 + u


@pytest.mark.parametrize("W, x", [
    ([[1 + .51 * u] * 32 + [1] * 32, [1 + .49 * u] * 64], [1] * 64),
    ([[0] * 32 + [1] * 32, [1] * 32 + [0] * 32], [1 + .49 * u] * 32 + [1 + .51 * u] * 16 + [1] * 16)], ids=["weights", "image"])
def test_top_where_rounding_puts_another_class_first(W, x):
    model = FusedSGD([(0.1, 0)], 2, 64, 0.9, "float32")
    model.state()["W"][...] = W
    model.screens = True
    assert model.top(np.array([x], np.float32), np.array([1]), 1).all()


def test_top_of_equal_scores_and_of_those_that_are_not_finite():
    x, y = random_data(200, 40, 12)
    model = FusedSGD([(0.1, 0)] * 4, 12, 40, 0.9, "float32")
    W = model.state()["W"].reshape(4, 12, 40)
    W[0] = np.random.RandomState(0).randn(12, 40)
    W[0, 7:] = W[0, 6]                              # the first ones of six equal classes
    W[2], W[3, 3] = np.nan, np.inf                  # and W[1] is zero
    model.screens = True
    found = model.top(x, y)
    for g in range(2):
        assert np.array_equal(found[g], exact_top(model, x, y, g, 5)), g
    assert not found[2].any()
    model.screens = False
    assert np.array_equal(found[3], model.top(x, y)[3])


def test_a_diverged_point_leaves_the_others_alone():
    x, y = random_data(100, 20, 11)
    batches = np.random.RandomState(0).randint(len(x), size=(60, 8))
    model = trained([(1e30, 1e8), (0.1, 0.1)], x, y, batches, 4)
    alone = trained([(0.1, 0.1)], x, y, batches, 4)
    assert np.isnan(model.weights(0)[0]).any() and (model.ranks(x, y)[0] >= 11).any()
    assert np.array_equal(model.weights(1)[0], alone.weights(0)[0])


@pytest.mark.parametrize("images, classes, message", [
    ([[0, 9]], [[0, 0]], "no such image"), ([[-1]], [[0]], "no such image"), ([[0]], [[3]], "not in 0 .. 2"),
    ([[0]], [[-1]], "not in 0"), ([0], [0], r"must both be \(T, B\)"), ([[]], [[]], "must both be"),
])
def test_bad_batches(images, classes, message):
    model = FusedSGD([(0.1, 0)], 3, 2, 0.9)
    with pytest.raises(ValueError, match=message):
        model.steps(np.zeros((9, 2), np.float32), np.array(images), np.array(classes))
    with pytest.raises(ValueError, match=r"float32 \(n, 2\) expected"):
        model.steps(np.zeros((9, 3), np.float32), np.array([[0]]), np.array([[0]]))
    for evaluate in (model.ranks, model.top):
        with pytest.raises(ValueError, match=r"labels \(1,\) for 9 images"):
            evaluate(np.zeros((9, 2), np.float32), [0])


def test_what_was_pending_is_forgotten_by_restore():
    x, y = np.random.RandomState(0).rand(8, 5).astype("f4"), np.arange(8)[None] % 3
    model = FusedSGD([(0.1, 0)], 3, 5, 0.9)
    state = {name: a.copy() for name, a in model.state().items()}
    model.steps(x, np.arange(8)[None], y)
    model.restore(state)
    assert not model.weights(0)[0].any()


def test_norms_are_those_of_rounded_rows_as_well():
    u = 2.0 ** -7                       # 1 + .51 u is rounded up to 1 + u
    assert rounding_norms(np.full((1, 64), 1 + .51 * u, "f4"))[0, 0] >= 8 * (1 + u)


@pytest.mark.parametrize("w, rounded", [(1 + 2 ** -8, 1), (1 + 3 * 2 ** -8, 1 + 2 ** -6)])
def test_ties_are_rounded_to_even(w, rounded):
    model = FusedSGD([(0, 0)], 2, 1, 0, "bfloat16")
    model.state()["W"][0] = w
    loss = model.steps(np.ones((1, 1), "f4"), np.array([[0]]), np.array([[0]]), loss=True)
    assert loss == pytest.approx(np.log1p(np.exp(-rounded)), abs=1e-6)


@pytest.mark.parametrize("screens", [False, True])
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label, screens):
    model = FusedSGD([(0.1, 0)], 3, 2, 0.9)
    model.screens = screens
    with pytest.raises(ValueError, match="a class is out of range"):
        model.top(np.zeros((9, 2), np.float32), np.full(9, label))


def test_top_where_float32_sums_lose_what_decides():
    model = FusedSGD([(0.1, 0)], 16, 64, 0.9, "float32")
    state = model.state()
    state["W"][:2], state["b"][1:] = [[1] + [2 ** -25] * 63, [1] + [0] * 63], [2 ** -20] + [-9] * 14
    model.screens = True
    assert model.top(np.ones((1, 64), "f4"), np.array([0]), 1)


def test_top_where_biases_swallow_what_decides():
    model, x = FusedSGD([(0.1, 0)], 16, 1024, 0.9, "float32"), np.zeros((1, 1024), "f4")
    state, x[0, ::128] = model.state(), 1
    state["W"][0], state["b"][:] = 2 ** -25, [1, 1 + 2 ** -23] + [-9] * 14
    model.screens = True
    assert model.top(x, np.array([0]), 1)


def test_top_of_an_image_that_is_not_finite():
    model, x = FusedSGD([(0.1, 0)], 12, 40, 0.9, "float32"), np.random.RandomState(0).rand(200, 40).astype("f4")
    model.state()["W"][...] = np.random.RandomState(0).randn(12, 40)
    x[7], y = np.nan, np.arange(200) % 12
    model.screens = True
    found = model.top(x, y)
    assert not found[0, 7] and np.array_equal(found, model.ranks(x, y) < 5)


@pytest.mark.parametrize("w,b,top", [(.49, .3, False), (.51, .7, True)])
def test_top_where_rounding_hides_another_class_or_puts_it_first(w, b, top):
    u, model = 2. ** -7, FusedSGD([(0.1, 0)], 16, 64, 0.9, "float32")
    state = model.state()
    state["W"][0], state["b"][1:] = 1 + w * u, [64 * (1 + b * u)] + [-9] * 14
    model.screens = True
    assert model.top(np.ones((1, 64), "f4"), np.array([1]), 1) == top
