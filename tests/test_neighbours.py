"""graph_utils/neighbours.py: candidate search and NN-descent against dense numpy, by all kinds of products."""
import contextlib
import functools
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from graph_utils import core
from graph_utils import neighbours as nb
from lowshot.file_arrays import scratch

SIZES = [(1, 1, 5, 1), (5, 7, 33, 1), (37, 61, 40, 30), (64, 32, 32, 32), (2100, 1333, 64, 17), (3, 40, 256, 50),
         (33, 65, 100, 8)]


pytestmark = pytest.mark.usefixtures("products")


@contextlib.contextmanager
def with_threads(n):
    old = core.get_num_threads()
    core.set_num_threads(n)
    try:
        yield
    finally:
        core.set_num_threads(old)


def unit_vectors(n, d, seed=0):
    x = np.random.RandomState(seed).randn(n, d).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rounded(x):
    """x as bfloat16 holds it, round to nearest even, by its definition."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7fff + (bits >> 16 & 1)
    return (bits >> 16 << 16).astype(np.uint32).view(np.float32)


def in_levels(x):
    """x as bytes hold it: each row in 255 levels, by its definition, float64."""
    step = (np.abs(x).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float64)
    return np.rint(x / np.where(step == 0, 1, step)) * step


FORMATS = {"float32": (nb.to_float32, lambda x: x), "bfloat16": (nb.to_bfloat16, rounded), "bytes": (nb.to_bytes, in_levels)}


def unpacked(words, d):
    """float32 of what to_bfloat16 returns."""
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[:, :d]


def clustered(n, d, clusters, seed=0):
    rs = np.random.RandomState(seed)
    x = rs.randn(clusters, d)[rs.randint(0, clusters, n)] + 0.5 * rs.randn(n, d)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("n,d", [(1, 1), (7, 32), (33, 100), (2050, 256)])
def test_bfloat16(n, d):
    x = np.random.RandomState(n).randn(n, d).astype(np.float32) * 10 ** np.random.RandomState(1).uniform(-9, 9, (n, 1)).astype("f4")
    scale = np.random.RandomState(2).uniform(.1, 3, n).astype(np.float32)
    residual = np.empty(n, np.float32)
    words = nb.to_bfloat16(x, scale, residual=residual)
    want = rounded(x * scale[:, None])
    assert words.shape == (n, -(-d // 32) * 16)
    assert np.array_equal(unpacked(words, d), want)
    assert not words.view(np.uint16)[:, d:].any()
    np.testing.assert_allclose(residual, np.linalg.norm(x * scale[:, None] - want, axis=1), rtol=1e-5)


@pytest.mark.parametrize("n,d", [(1, 1), (7, 64), (33, 100), (2050, 256)])
def test_bytes(n, d):
    rs = np.random.RandomState(n)
    x = rs.randn(n, d).astype(np.float32) * 10 ** rs.uniform(-9, 9, (n, 1)).astype("f4")
    scale = rs.uniform(.1, 3, n).astype(np.float32)
    x[n // 2] = 0
    if n > 1:
        x[0] = 1e-44                        # less than what has a step: zero
        x[1], scale[1] = x[1] * 1e-30, 1e30
    residual = np.empty(n, np.float32)
    words = nb.to_bytes(x, scale, residual)
    assert np.array_equal(words, nb.to_bytes(x, scale))
    assert words.shape == (n, -(-d // 64) * 16 + 1) and nb.words_of_bytes(d) == words.shape[1]
    step = words[:, -1:].copy().view(np.float32)
    levels = words[:, :-1].copy().view(np.uint8).astype(np.float64) - 128
    assert not levels[:, d:].any() and np.abs(levels).max() <= 127 and not step[n // 2]
    got = levels[:, :d] * step
    largest = np.abs(x).max(axis=1, keepdims=True) * scale[:, None]
    assert (np.abs(got - x * scale[:, None]) <= largest * (.5 / 127 + 1e-6) + 1e-36).all()
    np.testing.assert_allclose(residual, np.linalg.norm(got - x * scale[:, None], axis=1), rtol=1e-4, atol=1e-36)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("nq,n,d,K", SIZES)
def test_search_all_finds_the_best_products_of_rounded_vectors(nq, n, d, K, stored):
    q, x = unit_vectors(nq, d, 1), unit_vectors(n, d, 2)
    convert, rounded = FORMATS[stored]
    keys = nb.search_all(convert(q), convert(x), K)
    S = rounded(q).astype(np.float64) @ rounded(x).T.astype(np.float64)
    found = nb.numbers(keys)
    kk = min(K, n)
    assert ((found >= 0).sum(axis=1) == kk).all()
    best = -np.sort(-S, axis=1)[:, :kk]
    for i in range(nq):
        mine = found[i][found[i] >= 0]
        assert len(set(mine)) == kk
        np.testing.assert_allclose(-np.sort(-S[i, mine]), best[i], atol=2e-6)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n,d,K,block", [(1, 4, 3, 16), (7, 33, 9, 3), (700, 40, 12, 100), (2600, 32, 70, 1 << 14),
                                         (3300, 64, 20, 1100)])
def test_search_self_finds_what_search_all_finds(n, d, K, block, threads, stored):
    X = FORMATS[stored][0](unit_vectors(n, d, 1))
    done = []
    with with_threads(threads):
        keys = nb.search_self(X, K, done.append, block)
    np.testing.assert_array_equal(np.sort(keys), np.sort(nb.search_all(X, X, K)))
    assert done[-1] == n and len(done) == -(-n // block)


def test_among_equals_the_number_of_threads_does_not_choose():
    X = nb.to_bfloat16(np.repeat(unit_vectors(40, 32), 40, axis=0))
    found = []
    for threads in (1, 2, 5):
        with with_threads(threads):
            found.append(np.sort(nb.search_self(X, 10)))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert (nb.numbers(found[0]) // 40 == np.arange(1600)[:, None] // 40).all()


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nq,n,d,K,L", [(1, 1, 5, 1, 1), (37, 61, 40, 30, 5), (2100, 1333, 64, 17, 40), (5, 300, 32, 9, 20)])
def test_queries_enter_the_lists_of_all_rows(nq, n, d, K, L, threads, stored):
    """Bars keep the worse out; every third row takes all that come while it has room."""
    convert, rounded = FORMATS[stored]
    q, x = unit_vectors(nq, d, 1), unit_vectors(n, d, 2)
    bound = np.linspace(-.1, .2, n).astype(np.float32)
    bound[::3] = -np.inf
    x_keys = np.repeat(nb.make_keys(bound, np.full(n, nb.NONE))[:, None], L, axis=1)
    with with_threads(threads):
        keys = nb.search_all(convert(q), convert(x), K, insert=(x_keys, bound))
    np.testing.assert_array_equal(np.sort(keys), np.sort(nb.search_all(convert(q), convert(x), K)))
    np.testing.assert_array_equal(bound, nb.worst_products(x_keys))
    S = rounded(x).astype(np.float64) @ rounded(q).T.astype(np.float64)
    for i in range(n):
        number = nb.numbers(x_keys[i])
        number = number[number >= 0]
        bar = -np.inf if i % 3 == 0 else np.linspace(-.1, .2, n)[i]
        want = -np.sort(-S[i][S[i] > bar])[:L]
        assert len(set(number)) == len(number) and abs(len(number) - len(want)) <= (S[i] > bar - 1e-5).sum() - (S[i] > bar + 1e-5).sum()
        np.testing.assert_allclose(-np.sort(-S[i, number])[:len(want)], want[:len(number)], atol=2e-6)
        assert (number.size > 0) == (nb.numbers(x_keys[i, 0]) >= 0)


def test_blocks_give_the_same_as_one_call():
    q, x = nb.to_bfloat16(unit_vectors(50, 64, 1)), nb.to_bfloat16(unit_vectors(300, 64, 2))
    whole = nb.search_all(q, x, 12)
    keys = np.zeros((50, 12), np.int64)
    for i in (0, 100, 101, 250):
        j = {0: 100, 100: 101, 101: 250, 250: 300}[i]
        nb.search_all(q, np.ascontiguousarray(x[i:j]), 12, keys, i)
    assert np.array_equal(np.sort(whole, axis=1), np.sort(keys, axis=1))


def test_all_negative_products_are_neighbours_too():
    x = np.abs(unit_vectors(50, 32))
    keys = nb.search_all(nb.to_bfloat16(-x[:5].copy()), nb.to_bfloat16(x), 7)
    D, I = nb.exact_products(keys, -x[:5].copy(), x, 7)
    S = -x[:5] @ x.T
    assert (D < 0).all() and np.array_equal(I, np.argsort(-S, axis=1)[:, :7])


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("nprobe", [1, 3, 20])
@pytest.mark.parametrize("nq,n,d,nlist,K", [(300, 700, 48, 20, 10), (1, 50, 32, 7, 3), (2500, 900, 32, 20, 12)])
def test_search_cells_compares_with_the_nearest_cells_that_hold_enough(nq, n, d, nlist, K, nprobe, stored):
    convert, rounded = FORMATS[stored]
    q, x = unit_vectors(nq, d, 1), unit_vectors(n, d, 2)
    centroids = unit_vectors(nlist, d, 3)
    sizes = np.random.RandomState(4).multinomial(n, np.ones(nlist) / nlist)
    sizes[-1] += sizes[0]
    sizes[0] = 0                                    # an empty cell
    end = np.cumsum(sizes)
    begin = end - sizes
    keys = np.zeros((nq, K), np.int64)
    nb.search_cells(convert(q), convert(centroids), nprobe, begin, end, convert(x), keys)
    S = rounded(q).astype(np.float64) @ rounded(x).T
    coarse = rounded(q).astype(np.float64) @ rounded(centroids).T
    found = nb.numbers(keys)
    for i in range(nq):
        cells = np.argsort(-coarse[i])
        cells = cells[:max(nprobe, np.searchsorted(np.cumsum(sizes[cells]), K) + 1)]
        there = np.concatenate([np.arange(begin[c], end[c]) for c in cells])
        want = -np.sort(-S[i, there])[:K]
        mine = found[i][found[i] >= 0]
        np.testing.assert_allclose(-np.sort(-S[i, mine]), want, atol=2e-6)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("ordered,threads", [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("nq,n,d,ngroup,m,K", [(1, 1, 32, 1, 1, 1), (300, 70, 48, 9, 33, 5), (2500, 40, 32, 2, 40, 3),
                                               (50, 30, 32, 7, 4, 6)])
def test_search_near_compares_with_the_rows_listed_for_the_group(nq, n, d, ngroup, m, K, ordered, threads, stored):
    convert, rounded = FORMATS[stored]
    q, x, rs = unit_vectors(nq, d, 1), unit_vectors(n, d, 2), np.random.RandomState(3)
    listed = np.stack([rs.permutation(n)[:m] for _ in range(ngroup)]).astype(np.int32)
    group = rs.randint(0, ngroup, nq).astype(np.int32)
    order = np.argsort(group, kind="stable").astype(np.int32) if ordered else None
    S = rounded(q).astype(np.float64) @ rounded(x).T
    # as many for each, or some for some, and none for the last
    some = [row[:rs.randint(m + 1)] for row in listed[:-1]] + [listed[0, :0]]
    ragged = np.cumsum([0] + [len(row) for row in some]), np.concatenate(some)
    with with_threads(threads):
        results = [(nb.search_near(convert(q), group[order] if ordered else group, given, convert(x), K, order), rows)
                   for given, rows in ((listed, listed), (ragged, some))]
    for keys, rows in results:
        found = nb.numbers(np.sort(keys.view(np.uint64))[:, ::-1].view(np.int64))
        for i in range(nq):
            want = -np.sort(-S[i, rows[group[i]]])[:K]
            assert (found[i, len(want):] == -1).all() and np.isin(found[i, :len(want)], rows[group[i]]).all()
            assert len(set(found[i, :len(want)])) == len(want)
            np.testing.assert_allclose(S[i, found[i, :len(want)]], want, atol=2e-6)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nprobe", [1, 3, 6])
def test_search_cells_looks_at_listed_cells_only(nprobe, threads, stored):
    convert, rounded = FORMATS[stored]
    nq, n, d, nlist, K, m = 2300, 700, 48, 20, 10, 6
    q, x, centroids = unit_vectors(nq, d, 1), unit_vectors(n, d, 2), unit_vectors(nlist, d, 3)
    end = np.cumsum(np.random.RandomState(4).multinomial(n, np.ones(nlist) / nlist))
    begin = np.concatenate([[0], end[:-1]])
    own = np.sort(np.random.RandomState(5).randint(0, nlist, nq)).astype(np.int32)
    listed = np.argsort(-(centroids @ centroids.T), axis=1)[:, :m].astype(np.int32)
    keys = np.zeros((nq, K), np.int64)
    with with_threads(threads):
        nb.search_cells(convert(q), convert(centroids), nprobe, begin, end, convert(x), keys, near=(own, listed))
    S = rounded(q).astype(np.float64) @ rounded(x).T
    coarse = rounded(q).astype(np.float64) @ rounded(centroids).T
    found = nb.numbers(keys)
    for i in range(nq):
        near = listed[own[i]]
        cells = near[np.argsort(-coarse[i, near])][:nprobe]
        there = np.concatenate([np.arange(begin[c], end[c]) for c in cells])
        mine = found[i][found[i] >= 0]
        np.testing.assert_allclose(-np.sort(-S[i, mine]), -np.sort(-S[i, there])[:K], atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_group_sums(threads):
    rs = np.random.RandomState(0)
    x = rs.randn(500, 33).astype(np.float32)
    order = rs.permutation(500)[:450].astype(np.int32)
    end = np.array([0, 3, 3, 200, 449, 450])
    with with_threads(threads):
        sums = nb.group_sums(x, order, end)
    for got, rows in zip(sums, np.split(order, end[:-1])):
        np.testing.assert_allclose(got, x[rows].astype("f8").sum(axis=0), atol=1e-4)
    assert nb.group_sums(x[:0], order[:0], np.zeros(3, np.int64)).tolist() == np.zeros((3, 33)).tolist()


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nq,n,d,nlist,K,nprobe", [(1, 50, 32, 7, 3, 2), (300, 700, 48, 20, 10, 3), (2500, 900, 32, 20, 12, 20)])
def test_queries_enter_the_lists_of_the_rows_they_are_compared_with(nq, n, d, nlist, K, nprobe, threads, stored):
    """The first half of each cell's rows has lists of its own, some of them not full."""
    convert, rounded = FORMATS[stored]
    x, q, centroids = unit_vectors(n, d, 2), unit_vectors(nq, d, 1), unit_vectors(nlist, d, 3)
    end = np.cumsum(np.random.RandomState(4).multinomial(n, np.ones(nlist) / nlist))
    begin = np.concatenate([[0], end[:-1]])
    middle = begin + (end - begin) // 2
    numbers = (n + np.arange(nq)).astype(np.int32)
    S = rounded(x).astype(np.float64) @ rounded(x).T
    known = np.argsort(-S, axis=1)[:, :K]
    known[::3, 1:] = -1
    x_keys = nb.make_keys(np.take_along_axis(S, np.maximum(known, 0), 1), known)
    worst = nb.worst_products(x_keys)
    assert np.isneginf(worst[::3]).all() or K == 1
    before, keys = x_keys.copy(), np.zeros((nq, K), np.int64)
    with with_threads(threads):
        nb.search_cells(convert(q), convert(centroids), nprobe, begin, end, convert(x), keys,
                        insert=(middle, numbers, x_keys, worst))
    alone = np.zeros((nq, K), np.int64)
    nb.search_cells(convert(q), convert(centroids), nprobe, begin, end, convert(x), alone)
    np.testing.assert_array_equal(np.sort(keys), np.sort(alone))
    cells = np.argsort(-(rounded(q).astype(np.float64) @ rounded(centroids).T), axis=1)
    searched = np.array([np.isin(np.arange(nlist), row[:max(nprobe, np.searchsorted(np.cumsum((end - begin)[row]), K) + 1)])
                         for row in cells])
    Sq = rounded(x).astype(np.float64) @ rounded(q).T
    found = nb.numbers(x_keys)
    for c in range(nlist):
        near = np.flatnonzero(searched[:, c])
        for r in range(begin[c], end[c]):
            if r >= middle[c]:
                np.testing.assert_array_equal(x_keys[r], before[r])
                continue
            mine = known[r][known[r] >= 0]
            want = -np.sort(-np.concatenate([S[r, mine], Sq[r, near]]))[:K]
            have = found[r][found[r] >= 0]
            got = [S[r, i] if i < n else Sq[r, i - n] for i in have]
            np.testing.assert_allclose(-np.sort(-np.array(got)), want, atol=2e-6)
            assert len(set(have)) == len(have)
            assert (((x_keys[r] & nb.NEW) != 0) == (found[r] >= n)).all()
    np.testing.assert_array_equal(worst, nb.worst_products(x_keys))


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("n,d,K,R", [(40, 32, 5, 8), (600, 48, 8, 8), (257, 64, 40, 32)])
def test_a_round_compares_all_neighbours_of_a_node(n, d, K, R, stored):
    """Against sets: with room for all reverse neighbours, the lists become the best of all pairs that share a node."""
    convert, rounded = FORMATS[stored]
    x = clustered(n, d, 10, 1)
    X = convert(x)
    rs = np.random.RandomState(0)
    start = np.stack([rs.choice(n, K, replace=False) for _ in range(n)])
    S = (rounded(x).astype(np.float64) @ rounded(x).T).astype(np.float32)
    keys = nb.make_keys(S[np.arange(n)[:, None], start], start) | nb.NEW
    nb.descent_round(X, keys, R=n)
    offered = [set(row) for row in start]
    reverse = [np.flatnonzero((start == v).any(axis=1)) for v in range(n)]
    for v in range(n):
        both = np.union1d(start[v], reverse[v])
        for a in both:
            offered[a] |= set(both) - {a}
    found = nb.numbers(keys)
    for v in range(n):
        there = np.array(sorted(offered[v]))
        mine = found[v]
        assert len(set(mine)) == K
        np.testing.assert_allclose(-np.sort(-S[v, mine]), -np.sort(-S[v, there])[:K], atol=2e-6)


@pytest.mark.parametrize("stored", FORMATS)
def test_rounds_lead_to_the_true_graph_and_stop(stored):
    convert = nb.FORMATS[stored]
    x = clustered(1500, 32, 20)
    X = convert(x)
    rs = np.random.RandomState(1)
    start = np.stack([rs.choice(1500, 15, replace=False) for _ in range(1500)])
    keys = nb.make_keys((x @ x.T)[np.arange(1500)[:, None], start], start) | nb.NEW
    inserted = [nb.descent_round(X, keys, seed=r) for r in range(15)]
    assert inserted[-1] == 0
    D, I = nb.exact_products(keys, x, x, 10, same=True)
    want = np.argsort(-(x @ x.T), axis=1)[:, :10]
    assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(I, want)]) > 9.9
    assert (I[:, 0] == np.arange(1500)).all()


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("part", [1, 37, 450, 899, 900, 5000])
def test_rounds_on_parts_of_the_lists_give_the_same(part, stored, tmp_path):
    """Whatever is new and old, missing, equal or a bar; the lists may be in a file."""
    x, rs = clustered(900 if part > 1 else 90, 32, 12), np.random.RandomState(0)
    n = len(x)
    x[n // 3:n // 2] = x[7]
    X = nb.FORMATS[stored](x)
    near = np.stack([rs.choice(n, 10, replace=False) for _ in range(n)]).astype(np.int32)
    keys = nb.search_near(X, np.arange(n, dtype=np.int32), near, X, 10) | rs.randint(0, 2, (n, 10))
    keys[rs.rand(n) < .1, 6:] = 0
    bars = rs.rand(n) < .1
    keys[bars, 8:] = nb.make_keys(nb.worst_products(keys)[bars, None], np.full((bars.sum(), 2), nb.NONE))
    lists = np.memmap(tmp_path / "lists", np.int64, "w+", shape=keys.shape)
    lists[:] = keys
    for r in range(3):
        done = []
        nb.descent_round(X, keys, R=7, seed=r, block=64)
        nb.descent_round(X, lists, 7, r, done.append, part, functools.partial(scratch, str(tmp_path)), 64)
        assert np.array_equal(np.sort(keys, axis=1), np.sort(lists, axis=1)) and done == sorted(done) and done[-1] == n


def test_memory_of_a_round_on_parts(tmp_path):
    X, K, n = nb.to_bytes(unit_vectors(6000, 32)), 20, 6000
    keys = nb.search_all(X, X, K) | nb.NEW
    folder = str(tmp_path)
    for part, empty, most in ((None, np.empty, 8 * n * K), (n // 4, np.empty, 10 * n * K),
                              (n // 4, functools.partial(scratch, folder), 2 * n * K)):
        tracemalloc.start()
        nb.descent_round(X, keys.copy() if part is None else keys, part=part, empty=empty)
        peak = tracemalloc.get_traced_memory()[1] - (8 * n * K if part is None else 0)
        tracemalloc.stop()
        assert .8 * most < peak < most + 16 * n


@pytest.mark.parametrize("stored", FORMATS)
def test_rounds_skip_what_is_old(stored):
    convert = nb.FORMATS[stored]
    x = clustered(500, 32, 5)
    start = np.random.RandomState(1).randint(0, 500, (500, 1))
    keys = nb.make_keys((x @ x.T)[np.arange(500)[:, None], start], start)
    before = keys.copy()
    assert nb.descent_round(convert(x), keys) == 0 and np.array_equal(keys, before)


@pytest.mark.parametrize("stored", FORMATS)
def test_bars_are_none_and_keep_the_worse_out(stored):
    """Entries that name nobody: their products are what others have to pass, in searches and in rounds."""
    convert, rounded = FORMATS[stored]
    x = clustered(400, 64, 5)
    X, S = convert(x), rounded(x).astype(np.float64) @ rounded(x).T
    bars = np.sort(S)[:, -5:-3].mean(axis=1).astype(np.float32)
    keys = np.repeat(nb.make_keys(bars[:, None], np.full((400, 1), nb.NONE)), 20, axis=1)
    assert (nb.numbers(keys) == -1).all()
    np.testing.assert_array_equal(nb.worst_products(keys), bars)
    whole, begin = np.array([400]), np.array([0])
    nb.search_cells(X, X[:1].copy(), 1, begin, whole, X, keys)
    for row, bar, found in zip(S, bars, nb.numbers(keys)):
        assert set(found[found >= 0]) == set(np.flatnonzero(row > bar)) and len(set(found[found >= 0])) == 4
    keys[keys != 0] |= nb.NEW
    before = nb.numbers(keys)
    nb.descent_round(X, keys)
    assert np.array_equal(np.sort(nb.numbers(keys)), np.sort(before))
    D, I = nb.exact_products(keys, x, x, 20)
    assert np.array_equal((I >= 0).sum(axis=1), (before >= 0).sum(axis=1)) and (D[I < 0] == -np.inf).all()


@pytest.mark.parametrize("stored", FORMATS)
def test_results_do_not_depend_on_threads(stored):
    """Two nodes may be compared by any thread at any time; what is kept is the same. Duplicates make ties."""
    convert = nb.FORMATS[stored]
    x = clustered(900, 32, 12)
    x[300:400] = x[7]
    x[800:] = 0
    X = convert(x)
    results = []
    for threads in (1, 4, 3, 8, 2, 4):
        with with_threads(threads):
            keys = np.zeros((900, 10), np.int64)
            begin = np.arange(0, 900, 100)
            nb.search_cells(X, X[::100].copy(), 2, begin, begin + 100, X, keys)
            keys[keys != 0] |= nb.NEW
            for r in range(3):
                nb.descent_round(X, keys, seed=r, R=5)
            results.append(np.sort(keys, axis=1))
    assert all(np.array_equal(results[0], r) for r in results)


def test_offers_of_equals_do_not_depend_on_threads():
    """One as good as the worst enters a list if its number is lower, whenever it comes: in rounds, and in searches of all."""
    rs = np.random.RandomState(0)
    X = nb.to_bfloat16(unit_vectors(40, 32)[rs.randint(0, 40, 3000)])
    listed = np.stack([rs.choice(3000, 8, replace=False) for _ in range(3000)]).astype(np.int32)
    start = nb.search_near(X, np.arange(3000, dtype=np.int32), listed, X, 8) | nb.NEW
    results = []
    for threads in (1, 2, 3, 7):
        with with_threads(threads):
            keys, x_keys = start.copy(), np.zeros((3000, 8), np.int64)
            for r in range(3):
                nb.descent_round(X, keys, seed=r, R=6)
            nb.search_all(X, X, 1, insert=(x_keys, nb.worst_products(x_keys)))
            results.append((np.sort(keys), np.sort(x_keys)))
    for keys, x_keys in results:
        assert np.array_equal(keys, results[0][0]) and np.array_equal(x_keys, results[0][1])


def test_a_search_of_cells_among_equals_does_not_depend_on_threads():
    """So many queries that they are cut in groups of thousands, whose cells come in an order of their own."""
    rs = np.random.RandomState(0)
    vectors = unit_vectors(50, 32)
    X, centroids = nb.to_bfloat16(vectors[rs.randint(0, 50, 5000)]), nb.to_bfloat16(unit_vectors(50, 32, 1))
    Q = nb.to_bfloat16(unit_vectors(140_000, 32, 2))
    begin = np.arange(0, 5000, 100)
    results = []
    for threads in (1, 8):
        keys = np.zeros((len(Q), 4), np.int64)
        with with_threads(threads):
            nb.search_cells(Q, centroids, 12, begin, begin + 100, X, keys)
        results.append(np.sort(keys))
    assert np.array_equal(*results)


def test_exact_products_in_two_parts_with_scales_and_numbers():
    rs = np.random.RandomState(0)
    q, x = rs.randn(9, 45).astype("f4"), rs.randn(30, 45).astype("f4")
    q_scale, x_scale = rs.uniform(.5, 2, 9).astype("f4"), rs.uniform(.5, 2, 30).astype("f4")
    order, rows = rs.permutation(30).astype("i4"), rs.permutation(9).astype("i4")
    lists = np.stack([rs.choice(30, 6, replace=False) for _ in range(9)])
    lists[2, 3:] = -1
    keys = nb.make_keys(rs.randn(9, 6), lists)
    D, I = nb.exact_products(keys, (q[:4].copy(), q[4:].copy()), (x[:11].copy(), x[11:].copy()), 8, rows, order,
                             q_scale, x_scale)
    S = (q * q_scale[:, None]).astype("f8") @ (x * x_scale[:, None]).T
    for j, i in enumerate(rows):
        there = order[lists[j][lists[j] >= 0]]
        want = there[np.argsort(-S[i, there])]
        assert np.array_equal(I[i], np.append(want, [-1] * (8 - len(want))))
        np.testing.assert_allclose(D[i, :len(want)], S[i, want], rtol=1e-5)
        assert (D[i, len(want):] == -np.inf).all()


@pytest.mark.parametrize("self_", [False, True])
def test_known_products_are_not_computed_again(self_):
    x = unit_vectors(300, 40)
    keys = nb.search_all(nb.to_bfloat16(x), nb.to_bfloat16(x), 25)
    want = nb.exact_products(keys, x, x, 12, same=self_)
    D, I = (a.copy() for a in want)
    assert all(np.array_equal(a, b) for a, b in zip(nb.exact_products(keys, x, x, 12, same=self_, D=D, I=I, known=200), want))
    D[:200, :5] += 7            # seen in what comes out: these were looked up
    I[:150, 3:] = -1            # and those were not
    D, I = nb.exact_products(keys, x, x, 12, same=self_, D=D, I=I, known=200)
    assert np.array_equal(I, want[1])
    np.testing.assert_array_equal(D[200:], want[0][200:])
    np.testing.assert_allclose(D[150:200] - want[0][150:200], np.repeat([[7] * 5 + [0] * 7], 50, 0), atol=1e-5)
    np.testing.assert_allclose(D[:150] - want[0][:150], np.repeat([[7] * 3 + [0] * 9], 150, 0), atol=1e-5)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("n,n0,d,k,K", [(1, 1, 5, 1, 1), (900, 600, 48, 9, 14), (400, 0, 32, 3, 5), (700, 700, 64, 40, 70)])
def test_known_lists(n, n0, d, k, K, stored):
    convert, rounded = FORMATS[stored]
    x, rs = unit_vectors(n, d), np.random.RandomState(1)
    I = np.array([rs.choice(n, k, replace=False) for _ in range(n0)], np.int32).reshape(n0, k)
    if n0 > 1:
        I[::3, k // 2:] = -1
    order = rs.permutation(n).astype(np.int32)
    position = np.argsort(order).astype(np.int32)
    keys = np.full((n, K), 99, np.int64)
    nb.known_lists(convert(x[order]), order, position, I, .125, keys)
    S = rounded(x).astype(np.float64) @ rounded(x).T.astype(np.float64)
    numbers, sims = nb.numbers(keys), nb.similarities(keys)
    for node in range(n):
        row, sim, had = numbers[position[node]], sims[position[node]], I[node] if node < n0 else []
        had = [u for u in had if u >= 0]
        np.testing.assert_array_equal(row, np.r_[position[had], np.full(K - len(had), -1)])
        np.testing.assert_allclose(sim[:len(had)], S[node, had], atol=2e-6)
        bar = S[node, had].min() - .125 if len(had) == k else -np.inf
        np.testing.assert_allclose(sim[len(had):], bar, atol=2e-6)
    assert not (keys & nb.NEW).any()


def test_rows_of_a_file(tmp_path):
    x = np.arange(600 * 7, dtype=np.float32).reshape(600, 7)
    path = tmp_path / "x.raw"
    x.tofile(path)
    rows = np.random.RandomState(0).randint(-5, 610, 1000)
    out = np.full((1000, 7), -1, np.float32)
    nb.read_rows(path, rows, 600, out)
    have = (rows >= 0) & (rows < 600)
    assert np.array_equal(out[have], x[rows[have]]) and (out[~have] == -1).all()
    nb.read_rows(path, np.empty(0, int), 600, out[:0])
    os.truncate(path, 599 * 28 + 5)
    nb.read_rows(path, [598, 0], 600, out[:2])
    assert np.array_equal(out[:2], x[[598, 0]])
    with pytest.raises(ValueError, match="x.raw is truncated: the file ends before the end of row 599"):
        nb.read_rows(path, [3, 599], 600, out[:2])
    with pytest.raises(ValueError, match="contiguous float32"):
        nb.read_rows(path, [3], 600, np.empty((1, 7)))


def test_a_neighbour_that_is_listed_twice_counts_once():
    x = unit_vectors(40, 32)
    lists = np.random.RandomState(0).randint(0, 20, (40, 30))
    D, I = nb.exact_products(nb.make_keys(np.zeros(lists.shape, "f4"), lists), x, x, 25)
    for i in range(40):
        want = np.unique(lists[i])
        want = want[np.argsort(-(x[want] @ x[i]), kind="stable")]
        assert np.array_equal(I[i, :len(want)], want) and (I[i, len(want):] == -1).all()


def test_a_node_heads_its_own_list_even_among_duplicates():
    x = np.tile(unit_vectors(1, 32), (60, 1))
    x[50:] = 0
    keys = nb.search_all(nb.to_bfloat16(x), nb.to_bfloat16(x), 4)
    D, I = nb.exact_products(keys, x, x, 4, same=True)
    assert (I[:, 0] == np.arange(60)).all() and all(len(set(row)) == 4 for row in I)
    np.testing.assert_allclose(D[:50], 1, rtol=1e-6)
    assert (D[50:] == 0).all()


def test_a_shorter_node_that_no_candidate_names_is_in_its_own_list():
    """First where rounding may have put it behind others, last where it is behind them."""
    x = np.tile(unit_vectors(1, 32), (60, 1))
    x[20] *= np.float32(1 - 3e-7)
    x[40] *= np.float32(.5)
    others = (np.arange(60)[:, None] + np.arange(1, 7)) % 60
    D, I = nb.exact_products(nb.make_keys(np.zeros(others.shape, "f4"), others), x, x, 4, same=True)
    assert np.array_equal(I[:, 0] == np.arange(60), np.arange(60) != 40)
    assert I[40].tolist() == [41, 42, 43, 40]
    np.testing.assert_allclose(D[40], [.5, .5, .5, .25], rtol=1e-6)


@pytest.mark.parametrize("k1,k2,k", [(3, 3, 3), (5, 2, 4), (1, 4, 9), (4, 4, 1)])
def test_merge_lists(k1, k2, k):
    rs = np.random.RandomState(k1)
    lists = []
    for kk, first in ((k1, 0), (k2, 100)):
        D = -np.sort(-rs.randn(50, kk).astype("f4"), axis=1)
        I = first + rs.randint(0, 99, (50, kk)).astype("i4")
        for row in range(50):
            there = rs.randint(0, kk + 1)
            D[row, there:], I[row, there:] = -np.inf, -1
        lists += [D, I]
    D, I = nb.merge_lists(*lists, k)
    for row in range(50):
        pairs = [(-d, i) for Dx, Ix in (lists[:2], lists[2:]) for d, i in zip(Dx[row], Ix[row]) if i >= 0]
        want = sorted(pairs)[:k]
        assert list(I[row]) == [i for _, i in want] + [-1] * (k - len(want))
        assert list(D[row]) == [-d for d, _ in want] + [-np.inf] * (k - len(want))


def test_of_equal_ones_those_of_the_first_lists_come_first():
    D, I = nb.merge_lists(np.float32([[.5, .5, .2]]), np.int32([[7, 8, 9]]), np.float32([[.5, .2]]), np.int32([[1, 2]]), 5)
    assert I.tolist() == [[7, 8, 1, 9, 2]] and D.tolist() == [[.5, .5, .5, np.float32(.2), np.float32(.2)]]


def test_no_queries_and_no_vectors():
    empty, x = nb.to_bfloat16(np.empty((0, 32), "f4")), nb.to_bfloat16(unit_vectors(3, 32))
    assert nb.search_all(empty, x, 4).shape == (0, 4)
    assert not nb.search_all(x, empty, 4).any()
    assert nb.descent_round(empty, np.empty((0, 4), np.int64)) == 0


@pytest.mark.parametrize("call,message", [
    (lambda x: nb.search_all(x, x[:, :16].copy(), 3), "X: contiguous int32"),
    (lambda x: nb.search_all(x, x, 0), "K is less than 1"),
    (lambda x: nb.search_all(x, x[::2], 3), "X: contiguous int32"),
    (lambda x: nb.search_all(nb.to_bfloat16(np.ones((2, 64))), x, 3), "X: contiguous int32"),
    (lambda x: nb.search_cells(nb.to_bfloat16(np.ones((2, 64))), x, 1, np.zeros(8, "i8"), np.zeros(8, "i8"), x,
                               np.zeros((2, 2), "i8")), "centroids: contiguous int32"),
    (lambda x: nb.search_cells(x, x, 0, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 2), "i8")), "nprobe"),
    (lambda x: nb.search_cells(x, x[:0], 1, np.zeros(0, "i8"), np.zeros(0, "i8"), x, np.zeros((8, 2), "i8")), "number of cells"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), np.full((1, 3), 8, "i4"), x, 1), "listed vector is out of range"),
    (lambda x: nb.search_near(x, np.ones(8, "i4"), np.zeros((1, 3), "i4"), x, 1), "group is out of range"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), np.zeros((1, 3), "i4"), x, 1, np.arange(1, 9, dtype="i4")),
     "order is not a permutation"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), np.zeros((1, 3), "i4"), x, 1, np.zeros(8, "i4")), "order is not a permutation"),
    (lambda x: nb.search_all(x, x, 3, first=-5), "first number is less than 0"),
    (lambda x: nb.search_all(np.zeros((2, 19), "i4"), np.zeros((2, 19), "i4"), 1), "vectors of 19 words"),
    (lambda x: nb.search_all(np.zeros((2, 17), "f4"), np.zeros((2, 17), "f4"), 1), "vectors of 17 words"),
    (lambda x: nb.descent_round(x, np.zeros((8, 0), "i8")), "K is less than 1"),
    (lambda x: nb.descent_round(x, np.zeros((8, 2), "i8"), R=-3), "R is less than 0"),
    (lambda x: nb.search_cells(x, x, 1, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 2), "i8"), insert=(
        np.zeros(8, "i8"), np.full(8, -7, "i4"), np.zeros((8, 2), "i8"), np.zeros(8, "f4"))), "found -7 to -7"),
    (lambda x: nb.search_cells(x, x, 1, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 2), "i8"),
                               near=(np.zeros(8, "i4"), np.zeros((7, 2), "i4"))), "listed: contiguous int32 8xany"),
    (lambda x: nb.search_cells(x, x, 3, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 2), "i8"),
                               near=(np.zeros(8, "i4"), np.zeros((8, 2), "i4"))), "fewer than nprobe 3"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), (np.array([0, 4]), np.zeros(3, "i4")), x, 1), "3 are listed"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), (np.array([0, 3, 2]), np.zeros(3, "i4")), x, 1), "do not rise"),
    (lambda x: nb.group_sums(np.ones((3, 2), "f4"), np.array([3], "i4"), np.array([1])), "row is out of range"),
    (lambda x: nb.group_sums(np.ones((3, 2), "f4"), np.array([2], "i4"), np.array([2])), "ends of groups do not rise"),
    (lambda x: nb.search_all(x, x, 3, insert=(np.zeros((7, 2), "i8"), np.zeros(8, "f4"))), "x_keys: contiguous int64 8xany"),
    (lambda x: nb.known_lists(x, np.arange(8, dtype="i4"), np.arange(8, dtype="i4"), np.full((4, 2), 8, "i4"), 0,
                              np.zeros((8, 3), "i8")), "out of range"),
    (lambda x: nb.known_lists(x, np.arange(8, dtype="i4"), np.arange(8, dtype="i4"), np.zeros((4, 2), "i4"), 0,
                              np.zeros((8, 1), "i8")), "longer than K"),
    (lambda x: nb.descent_round(x, np.zeros((8, 3))), "keys: contiguous int64"),
    (lambda x: nb.descent_round(x, nb.make_keys(np.ones((8, 1)), np.full((8, 1), 8))), "out of range"),
    (lambda x: nb.products_in_part(np.zeros((8, 2), "i4"), np.ones((8, 4), "f4"), np.ones((3, 5), "f4"), 0,
                                   np.zeros((8, 2), "f4")), "Q: contiguous float32 8x5 expected"),
    (lambda x: nb.products_in_part(np.zeros((8, 2), "i4"), np.ones((8, 5), "f4"), np.ones((3, 5), "f4"), 0,
                                   np.zeros((8, 2), "f4"), x_scale=np.ones(8, "f4")), "x_scale: contiguous float32 3 expected"),
    (lambda x: nb.best_by_products(np.zeros((2, 2), "i4"), np.zeros((2, 2), "f4"), 0, np.zeros((2, 1), "f4"),
                                   np.zeros((2, 1), "i4")), "without the node itself"),
    (lambda x: nb.best_by_products(np.zeros((2, 2), "i4"), np.zeros((2, 2), "f4"), 0, np.zeros((2, 0), "f4"),
                                   np.zeros((2, 0), "i4")), "k is less than 1"),
    (lambda x: nb.merge_lists(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((3, 3)), np.zeros((3, 3)), 2), "lists of 2 and 3"),
    (lambda x: nb.group_sums(np.ones((3, 2), "f4"), np.array([-1], "i4"), np.array([1])), "row is out of range"),
    (lambda x: nb.group_sums(np.ones((3, 2), "f4"), np.array([2, 1], "i4"), np.array([2, 1])), "ends of groups do not rise"),
    (lambda x: nb.search_near(x, np.full(8, -1, "i4"), np.zeros((1, 3), "i4"), x, 1), "group is out of range"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), (np.array([-1, 3]), np.zeros(3, "i4")), x, 1), "do not rise"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), np.full((1, 3), -1, "i4"), x, 1), "listed vector is out of range"),
    (lambda x: nb.search_near(x, np.zeros(8, "i4"), np.zeros((1, 3), "i4"), x, 0), "K is less than 1"),
    (lambda x: nb.search_self(x, 0), "K is less than 1"),
    (lambda x: nb.search_all(x, x, 3, insert=(np.zeros((8, 0), "i8"), np.zeros(8, "f4"))), "K is less than 1"),
    (lambda x: nb.search_cells(x, x, 1, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 0), "i8")), "K, nprobe"),
    (lambda x: nb.search_cells(x, x, 1, np.zeros(8, "i8"), np.zeros(8, "i8"), x, np.zeros((8, 2), "i8"), before=(-1, None)),
     "`before`"),
    (lambda x: nb.search_all(np.zeros((2, 0), "i4"), np.zeros((2, 0), "i4"), 1), "multiple of 16 words"),
    (lambda x: nb.known_lists(x, np.arange(8, dtype="i4"), np.arange(8, dtype="i4"), np.zeros((9, 2), "i4"), 0,
                              np.zeros((8, 3), "i8")), "more known lists"),
    (lambda x: nb.known_lists(x, np.arange(8, dtype="i4"), np.arange(8, dtype="i4"), np.zeros((4, 0), "i4"), 0,
                              np.zeros((8, 3), "i8")), "more known lists"),
])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(nb.to_bytes(unit_vectors(8, 64)))


def test_library_loads_alone():
    """The tile registers are asked for in a process of its own, with torch's threads or without."""
    code = "from graph_utils import neighbours as nb; import numpy as np; " \
           "print(*nb.numbers(nb.search_all(nb.to_bfloat16(np.eye(40, 32, dtype='f4')), nb.to_bfloat16(np.eye(40, 32, dtype='f4')), 1)[3]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == 3


def test_numbers_out_of_range_are_refused():
    """Whatever names a row that is not there is an error, not a look into other memory."""
    x = np.random.RandomState(0).standard_normal((20, 8)).astype(np.float32)
    X = nb.to_bytes(x)
    keys = nb.make_keys(np.zeros((20, 3), np.float32), np.tile(np.arange(3), (20, 1)))
    all_rows = np.arange(20, dtype=np.int32)
    damaged = keys.copy()
    damaged[7, 1] = nb.make_keys(np.zeros(1, np.float32), np.array([20]))[0]
    one_off = np.where(all_rows == 5, 20, all_rows).astype(np.int32)
    for arguments in ({"keys": damaged}, {"q_number": one_off}, {"x_number": one_off[:2]}, {"x_number": -all_rows},
                      {"x_scale": np.ones(1, np.float32)}, {"q_scale": np.ones(19, np.float32)}):
        with pytest.raises(ValueError, match="no query 20|no vector is|expected"):
            nb.exact_products(**{"keys": keys, "queries": x, "base": x, "k": 2, **arguments})
    for arguments, message in (({"base": x[:, :5].copy()}, "anyx8 expected, found float32 20x5"),
                               ({"base": [x, x, x]}, "base: one or two arrays expected, found 3"), ({"k": 0}, "k is less than 1"),
                               ({"base": x[:7].copy(), "same": True}, "20 queries and 7 base vectors are not the same")):
        with pytest.raises(ValueError, match=message):
            nb.exact_products(**{"keys": keys, "queries": x, "base": x, "k": 2, **arguments})
    rows = [np.array([0]), np.array([20])]
    for begin, end in ((rows[0] - 1, rows[1]), (rows[0], rows[1] + 1)):
        with pytest.raises(ValueError, match="numbers from 0 to 20 expected"):
            nb.search_cells(X, X[:1].copy(), 1, begin, end, X, np.zeros((20, 3), np.int64))
    for order, position in ((one_off, all_rows), (all_rows, one_off)):
        with pytest.raises(ValueError, match="numbers from 0 to 19 expected, found 0 to 20"):
            nb.known_lists(X, order, position, all_rows[:, None], 0.0, keys.copy())


@pytest.mark.parametrize("product", [1, 0, -1])
def test_an_offer_as_good_as_the_worst_enters_by_its_lower_number(product):
    Q, X = (nb.to_bfloat16(np.full((1, 1), v, "f4")) for v in (product, 1))
    x_keys = nb.make_keys(np.full((1, 1), product), np.full((1, 1), 5))
    nb.search_all(Q, X, 1, insert=(x_keys, np.full(1, product, "f4")))
    assert nb.numbers(x_keys) == 0


def test_the_greatest_number():
    x = nb.to_bytes(unit_vectors(8, 64))
    assert nb.numbers(nb.search_all(x, x, 8, first=2 ** 31 - 9)).max() == 2 ** 31 - 2
    with pytest.raises(ValueError, match="at most 2.31 - 1 vectors"):
        nb.search_all(x, x, 8, first=2 ** 31 - 8)


def test_many_vectors_after_few():
    X, keys = nb.to_bfloat16(unit_vectors(3000, 32)), np.zeros((3000, 5), np.int64)
    for i, j in ((0, 600), (600, 3000)):
        core.search_self(i, j, X, 16, 16, 5, keys)
    assert np.array_equal(np.sort(keys), np.sort(nb.search_self(X, 5)))


def test_a_seed_samples_reverse_neighbours():
    rs, X = np.random.RandomState(0), nb.to_bytes(unit_vectors(500, 32))
    near = np.stack([rs.choice(500, 6, replace=False) for _ in range(500)]).astype("i4")
    start = nb.search_near(X, np.arange(500, dtype="i4"), near, X, 6) | nb.NEW
    a, b, c = start.copy(), start.copy(), start.copy()
    for keys, seed in ((a, 0), (b, 0), (c, 1)):
        nb.descent_round(X, keys, 2, seed)
    assert np.array_equal(np.sort(a), np.sort(b)) and not np.array_equal(np.sort(a), np.sort(c))


@pytest.mark.parametrize("part", [None, 7])
@pytest.mark.parametrize("R", [0, 1, 20, 47, 48, 60])
def test_as_many_reverse_neighbours_as_asked_for(R, part):
    """All know node 0, which knows node 1."""
    X, keys = nb.to_bytes(unit_vectors(50, 32)), np.zeros((50, 50), np.int64)
    keys[:, 0] = nb.make_keys(np.zeros(50), np.eye(1, 50, dtype=int)[0]) | nb.NEW
    found = min(R, 48) + 1
    assert nb.descent_round(X, keys, R, part=part) == found * (found - 1)


@pytest.mark.parametrize("part", [None, 7])
@pytest.mark.parametrize("m,new", [(1, 1), (31, 31), (32, 0), (32, 32), (33, 31), (70, 33), (70, 1), (70, 32)])
def test_pairs_are_compared_where_one_is_new(m, new, part):
    X, keys = nb.to_bytes(unit_vectors(m + 1, 32)), np.zeros((m + 1, m), np.int64)
    keys[0] = nb.make_keys(np.zeros(m), np.arange(1, m + 1)) | (np.arange(m) < new)
    assert nb.descent_round(X, keys, 0, part=part) == m * (m - 1) - (m - new) * (m - new - 1)
    found = nb.numbers(keys)
    for a in range(1, m + 1):
        want = set(range(1, m + 1)) - {a} if a <= new else set(range(1, new + 1))
        assert set(found[a][found[a] >= 0]) == want


def test_what_stays_is_old():
    rs, X = np.random.RandomState(0), nb.to_bytes(unit_vectors(300, 32))
    start = np.stack([rs.choice(300, 6, replace=False) for _ in range(300)])
    keys = nb.search_near(X, np.arange(300, dtype="i4"), start.astype("i4"), X, 6) | nb.NEW
    nb.descent_round(X, keys)
    stayed = (nb.numbers(keys)[:, :, None] == start[:, None]).any(2)
    assert 0 < stayed.mean() < 1 and np.array_equal((keys & nb.NEW) == 0, stayed)


def test_products_after_the_known_ones_are_computed():
    x = unit_vectors(30, 40)
    keys = nb.search_all(nb.to_bfloat16(x), nb.to_bfloat16(x), 9)
    want, I = nb.exact_products(keys, x, x, 9, same=True)
    D, _ = nb.exact_products(keys, x, x, 9, same=True, D=want + 7, I=I.copy(), known=20)
    assert np.array_equal(D[20:], want[20:]) and (D[:20] > 5).all()


def test_products_after_the_known_ones_are_those_given():
    x = unit_vectors(30, 40)
    keys = nb.search_all(nb.to_bfloat16(x), nb.to_bfloat16(x), 9)
    want, I = nb.exact_products(keys, x, x, 9, same=True)
    D = want + 7
    nb.best_by_products(I, want, 0, D, I.copy(), 20)
    assert np.array_equal(D[20:], want[20:]) and (D[:20] > 5).all()


@pytest.mark.parametrize("k", [1, 3, 4, 6, 7])
def test_a_shorter_node_is_the_last_of_its_list(k):
    x = np.ones((7, 32), "f4")
    x[0] = .5
    D, I = nb.exact_products(nb.make_keys(np.zeros((7, 7)), np.tile(np.arange(7), (7, 1))), x, x, k, same=True)
    assert I[0].tolist() == [*range(1, k), 0]


def test_itself_first_among_equals_behind_others():
    x = np.array([[.5], [1], [.5]], "f4")
    D, I = nb.exact_products(nb.make_keys(np.zeros((3, 3)), np.tile(np.arange(3), (3, 1))), x, x, 3, same=True)
    assert I.tolist() == [[1, 0, 2], [1, 0, 2], [1, 2, 0]]


def test_rounding_is_little():
    x = np.array([[1], [1 - 3e-6]], "f4")
    D, I = nb.exact_products(nb.make_keys(np.zeros((2, 2)), np.tile(np.arange(2), (2, 1))), x, x, 2, same=True)
    assert I.tolist() == [[0, 1], [0, 1]]


def test_products_of_other_parts_are_left():
    x, products = unit_vectors(9, 32), np.full((1, 9), 7, "f4")
    nb.products_in_part(np.arange(9, dtype="i4")[None], x[:1], x[3:6], 3, products)
    assert np.array_equal(products[0] != 7, (np.arange(9) >= 3) & (np.arange(9) < 6))


@pytest.mark.parametrize("name", ["float64", "Float32", "avx"])
def test_products_that_are_not_known(name):
    with pytest.raises(ValueError, match=f"products by '{name}' are not known"):
        nb.use_products(name)
    assert nb.products() != name


def test_a_file_that_cannot_be_read():
    with pytest.raises(OSError, match="row 0: Input/output error"):
        nb.read_rows("/proc/self/mem", [0], 1, np.empty((1, 4), "f4"))


def test_outputs_that_are_read_only():
    x, keys = nb.to_bytes(unit_vectors(8, 64)), np.zeros((8, 3), "i8")
    keys.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match="read-only|not writable"):
        nb.search_all(x, x, 3, keys)
    assert not keys.any()


@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("near", [None, (np.zeros(1, "i4"), np.arange(3, dtype="i4")[:, None])])
def test_cells_that_hold_one_too_few(near, K):
    q, centroids, x = np.array([[3, 2, 1]]), np.eye(3), np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1]])
    keys, end = np.zeros((1, K), np.int64), np.array([2, 4, 5])
    nb.search_cells(nb.to_bfloat16(q), nb.to_bfloat16(centroids), 1, end - [2, 2, 1], end, nb.to_bfloat16(x), keys, near=near)
    assert set(nb.numbers(keys)[0]) <= {0, 1, 2, 3} and len(set(nb.numbers(keys)[0])) == K


def test_as_many_cells_as_asked_for_where_those_looked_at_hold_too_few():
    """Of all cells the nearest alone would hold enough."""
    q, centroids = (nb.to_bytes(np.array(a, "f4")) for a in ([[4, 3, 2, 1]], np.eye(4)))
    x = nb.to_bytes(np.array([[1, 0, 0, 0]] * 3 + [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "f4"))
    keys, end = np.zeros((1, 3), np.int64), np.array([3, 4, 5, 6])
    near = np.zeros(1, "i4"), np.tile(np.array([2, 3], "i4"), (4, 1))
    nb.search_cells(q, centroids, 2, end - [3, 1, 1, 1], end, x, keys, near=near)
    assert 3 in nb.numbers(keys)


def test_more_queries_of_a_cell_than_are_packed_at_a_time():
    X, Q = nb.to_bytes(unit_vectors(40, 16)), nb.to_bytes(unit_vectors(1 << 17, 16, 1))
    keys, begin = np.zeros((len(Q), 3), np.int64), np.array([0])
    nb.search_cells(Q, X[:1].copy(), 1, begin, begin + 40, X, keys)
    assert np.array_equal(np.sort(keys), np.sort(nb.search_all(Q, X, 3)))


def test_as_many_equals_as_asked_for():
    x = nb.to_bytes(np.ones((400, 64), "f4"))
    for K in range(1, 120):
        assert (nb.numbers(nb.search_all(x[:1], x, K)) >= 0).all(), K


def test_numbers_too_small_for_a_step_are_zero():
    residual = np.empty(1, np.float32)
    words = nb.to_bytes(np.array([[1e-38, 0, -1e-38]], "f4"), residual=residual)
    assert (words[:, :-1].view(np.uint8) == 128).all() and words[0, -1] == 0 and np.isfinite(residual).all()


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("K, first, then", [(1, 1, 3), (7, 2, 5), (7, 6, 20), (40, 3, 4)])
def test_search_of_further_cells(K, first, then, stored):
    """Finds what all at once do, though lists may have some of it already; what enters is new."""
    convert, _ = FORMATS[stored]
    nq, n, nlist = 700, 900, 20
    q, x, centroids = (convert(unit_vectors(m, 48, seed)) for seed, m in enumerate((nq, n, nlist)))
    end = np.sort(np.random.RandomState(3).permutation(n)[:nlist])
    end[-1] = n
    begin = np.concatenate([[0], end[:-1]])

    def search(keys, nprobe, before=None):
        keys = keys.copy()
        nb.search_cells(q, centroids, nprobe, begin, end, x, keys, before=before)
        return -np.sort(-nb.numbers(keys)), keys

    nothing = np.zeros((nq, K), np.int64)
    _, keys = search(nothing, first)
    want, all_at_once = search(nothing, then)
    known = keys.copy()         # some have found all there is
    known[::3] = all_at_once[::3]
    found, joined = search(known, then, (first, None))
    assert (np.sort(nb.numbers(joined)) == found[:, ::-1]).all()
    new = (joined & nb.NEW) != 0
    for i in range(nq):
        assert len(set(found[i][found[i] >= 0])) == (found[i] >= 0).sum()
        was = np.isin(nb.numbers(joined[i]), nb.numbers(known[i]))
        assert (new[i] == ~was).all()
    # products of floats may be rounded otherwise where others are computed with them
    np.testing.assert_allclose(np.sort(nb.similarities(joined)), np.sort(nb.similarities(all_at_once)), atol=2e-6)
    assert (found == want).mean() > .999
    assert new.any()


@pytest.mark.parametrize("first, then", [((3, 4), (8, None)), ((2, 5), (6, 12)), ((4, 6), (30, None)), ((5, None), (9, 18))])
def test_further_cells_where_few_were_looked_at(first, then):
    """All cells are searched in the end, also those that are nearer than some that were searched before, but were not looked
    at: (nprobe, cells listed for each; None: all)."""
    q, x, centroids = (nb.to_bytes(unit_vectors(m, 48, seed)) for seed, m in enumerate((700, 900, 30)))
    own = np.sort(np.random.RandomState(4).randint(0, 30, 700)).astype(np.int32)
    end = np.linspace(0, 900, 31).astype(np.int64)[1:]
    begin = end - 30
    best_first = np.sort(nb.search_all(centroids, centroids, 30).view(np.uint64))[:, ::-1].view(np.int64)
    nearest = nb.numbers(best_first).astype(np.int32)

    def near(m):
        return None if m is None else (own, np.ascontiguousarray(nearest[:, :m]))

    def search(keys, nprobe, m, before=None):
        nb.search_cells(q, centroids, nprobe, begin, end, x, keys, near=near(m), before=before)

    keys, want = np.zeros((2, 700, 20), np.int64)
    search(keys, *first)
    search(want, *first)
    search(keys, *then, before=(first[0], near(first[1])))
    all_at_once = np.zeros((700, 20), np.int64)
    search(all_at_once, *then)
    # the best of what either search finds
    for i in range(700):
        both = {**dict(zip(nb.numbers(want[i]), nb.similarities(want[i]))),
                **dict(zip(nb.numbers(all_at_once[i]), nb.similarities(all_at_once[i])))}
        best = sorted((s for number, s in both.items() if number >= 0), reverse=True)[:20]
        assert sorted(nb.similarities(keys[i]), reverse=True) == best
