"""The product W L of label diffusion, and nearest neighbours, on a GPU: written in Triton, which comes with the CUDA builds
of torch.

As on the CPU (product.py), W has no array of values: rows are CSR, the first nsingle of each are entries 1, the others 2.
A program makes ROWS rows of the product one after the other, in one warp, and adds up their sums on the way. Rows that are
near each other are made at the same time, so that neighbours they share are read from the caches.
"""
import functools

import torch
import triton
import triton.language as tl

ROWS = 4            # of a program
AT_ONCE = 512       # numbers that a program reads at a time: four float4 for each thread of its warp
SUMMED = 512        # sums of programs that another adds up, a multiple of 32
PIECE = 4096        # neighbours summed before they are added to the rest: a float loses what is small beside it


@triton.jit
def _product(indptr, indices, nsingle, L, scale, rows, nrow, weights, out, sums, ncol, ALL: tl.constexpr,
             WEIGHTED: tl.constexpr, ROWS: tl.constexpr, J: tl.constexpr, C: tl.constexpr, PIECE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    have = column < ncol
    j = tl.arange(0, J)
    s = tl.load(scale + column, have, 0.0)
    total = tl.zeros([C], tl.float32)
    for r in range(block * ROWS, tl.minimum(block * ROWS + ROWS, nrow)):
        if ALL:
            row = r
        else:
            row = tl.load(rows + r).to(tl.int64)
        begin = tl.load(indptr + row)
        end = tl.load(indptr + row + 1)
        double = begin + tl.load(nsingle + row)
        x = tl.zeros([C], tl.float32)
        for first in range(begin, end, PIECE):
            part = tl.zeros([J, C], tl.float32)
            for at in range(first, tl.minimum(first + PIECE, end), J):
                e = at + j
                node = tl.load(indices + e, e < end, 0).to(tl.int64)
                values = tl.load(L + node[:, None] * ncol + column[None, :], (e < end)[:, None] & have[None, :], 0.0)
                part += tl.where(e < double, 1.0, 2.0)[:, None] * values
            x += tl.sum(part, 0)
        x = x / tl.maximum(2 * (end - begin) - (double - begin), 1).to(tl.float32) * s
        tl.store(out + row * ncol + column, x, have)
        if WEIGHTED:
            x *= tl.load(weights + row)
        total += x
    tl.store(sums + block * C + column, total)


@triton.jit
def _add_up(sums, n, out, R: tl.constexpr, J: tl.constexpr, C: tl.constexpr):
    # torch, asked for sums in float64, first writes the numbers in float64
    begin = tl.program_id(0).to(tl.int64) * R
    column = tl.arange(0, C)
    j = tl.arange(0, J)
    total = tl.zeros([J, C], tl.float64)
    for i in range(begin, tl.minimum(begin + R, n), J):
        total += tl.load(sums + (i + j)[:, None] * C + column[None, :], (i + j < n)[:, None], 0.0)
    tl.store(out + tl.program_id(0) * C + column, tl.sum(total, 0))


@triton.jit
def _neighbour_sums(I, k, L, scale, out, ncol, J: tl.constexpr, C: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    have = column < ncol
    j = tl.arange(0, J)
    x = tl.zeros([J, C], tl.float32)
    for first in range(0, k, J):
        node = tl.load(I + query * k + first + j, first + j < k, -1).to(tl.int64)
        x += tl.load(L + node[:, None] * ncol + column[None, :], (node >= 0)[:, None] & have[None, :], 0.0)
    tl.store(out + query * ncol + column, tl.sum(x, 0) * tl.load(scale + column, have, 0.0), have)


def _tile(ncol):
    """(neighbours, columns) that a program reads at a time."""
    C = triton.next_power_of_2(ncol)
    return max(1, min(32, AT_ONCE // C)), C


def on_device_of_first(function):
    """Triton launches on the current device: let that be the one of the first argument."""
    @functools.wraps(function)
    def launched(first, *others):
        with torch.cuda.device_of(first):
            return function(first, *others)
    return launched


@on_device_of_first
def product(indptr, indices, nsingle, L, scale, rows, weights, out):
    """out = diag(1 / row sums) W L diag(scale); returns the column sums of out, weighted or plain, float64 (ncol,).

    indptr int64 (n + 1,), indices int32, nsingle int32 (n,): as of SymmetricGraph. L, out: float32 (n, ncol), distinct.
    scale float32 (ncol,). rows: int32, the rows to compute, or None for all. weights: float32 (n,) or None. All are tensors
    of one GPU, and contiguous.
    """
    ncol, nrow = L.shape[1], len(out) if rows is None else len(rows)
    J, C = _tile(ncol)
    blocks = triton.cdiv(nrow, ROWS)
    sums = torch.empty((blocks, C), device=L.device)
    if nrow:
        _product[(blocks,)](indptr, indices, nsingle, L, scale, indptr if rows is None else rows, nrow,
                            scale if weights is None else weights, out, sums, ncol, rows is None, weights is not None, ROWS, J,
                            C, PIECE, num_warps=1)
    parts = triton.cdiv(blocks, SUMMED)
    total = torch.empty((parts, C), dtype=torch.float64, device=L.device)
    if parts:
        _add_up[(parts,)](sums, blocks, total, SUMMED, J, C)
    return total[:, :ncol].sum(0)


@on_device_of_first
def neighbour_sums(I, L, scale):
    """(sum over j of L[I[i, j]]) * scale, float32 (nq, ncol). I: int32 (nq, k), negative = none; all on one GPU."""
    out = torch.empty((len(I), L.shape[1]), device=L.device)
    if len(I):
        _neighbour_sums[(len(I),)](I, I.shape[1], L, scale, out, L.shape[1], *_tile(L.shape[1]), num_warps=1)
    return out


# ---- nearest neighbours

GROUP = 32          # vectors whose products with a query are represented by the largest of them
TILE = 128, 256, 64         # queries, vectors and dimensions that a program multiplies at a time


@triton.jit
def _group_maxima(Q, X, nq, nx, maxima, ngroup, d, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    # programs of the same vectors follow each other: these are read once
    tiles = nq // M
    tile = tl.program_id(0) // tiles
    m = tl.program_id(0) % tiles * M + tl.arange(0, M)
    n = tile.to(tl.int64) * N + tl.arange(0, N)
    columns = tl.arange(0, D)
    q_at = Q + m[:, None] * d + columns[None, :]
    x_at = X + n[None, :] * d + columns[:, None]
    products = tl.zeros([M, N], tl.float32)
    for _ in range(0, d, D):
        products = tl.dot(tl.load(q_at), tl.load(x_at), products)
        q_at += D
        x_at += D
    products = tl.where((n < nx)[None, :], products, float("-inf"))
    best = tl.max(tl.reshape(products, [M, N // GROUP, GROUP]), 2)
    group = tile * (N // GROUP) + tl.arange(0, N // GROUP)
    tl.store(maxima + m.to(tl.int64)[:, None] * ngroup + group[None, :], best)


@triton.jit
def _products_of_groups(Q, X, nx, groups, K, out, d, D: tl.constexpr, GROUP: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    for g in range(0, K):
        n = tl.load(groups + query * K + g).to(tl.int64) * GROUP + tl.arange(0, GROUP)
        products = tl.zeros([GROUP], tl.float32)
        for c in range(0, d, D):
            q = tl.load(Q + query * d + c + columns).to(tl.float32)
            x = tl.load(X + n[:, None] * d + (c + columns)[None, :]).to(tl.float32)
            products += tl.sum(x * q[None, :], 1)
        tl.store(out + (query * K + g) * GROUP + tl.arange(0, GROUP), tl.where(n < nx, products, float("-inf")))


def padded_for_search(n):
    """Rows of a matrix that holds n vectors, or queries, for candidates(); the others are zero."""
    return -(-n // (16 * GROUP)) * 16 * GROUP


@on_device_of_first
def candidates(Q, X, nx, K):
    """The K best of the vectors X for each query, by products of what they are rounded to.

    Q (nq, d), X (n, d): float16 on one GPU, contiguous; nq is a multiple of 128, n is padded_for_search(nx) with zeros at the
    end, d is a multiple of 64. Returns products float32 (nq, K), numbers int64 (nq, K) and missed float32 (nq,): no other
    vector has a larger product than this. K is nx where there are no more vectors. Memory: nx / 8 bytes per query.
    """
    M, N, D = TILE
    nq, d = Q.shape
    ngroup = len(X) // GROUP
    maxima = torch.empty((nq, ngroup), device=Q.device)
    _group_maxima[(nq // M * (len(X) // N),)](Q, X, nq, nx, maxima, ngroup, d, M, N, D, GROUP, num_warps=8, num_stages=3)
    K = min(K, nx)
    missed = torch.full((nq,), -torch.inf, device=Q.device)
    groups = _largest_groups(maxima, min(K + 1, ngroup))
    if groups.shape[1] < ngroup:
        # of the best K + 1 groups the last is the best that is left out
        missed = maxima.gather(1, groups).min(1).values
    groups = groups.contiguous()
    del maxima
    products = torch.empty((nq, groups.shape[1] * GROUP), device=Q.device)
    _products_of_groups[(nq,)](Q, X, nx, groups, groups.shape[1], products, d, D, GROUP, num_warps=4)
    best, at = products.topk(min(K + 1, products.shape[1]))
    numbers = groups.gather(1, at[:, :K] // GROUP) * GROUP + at[:, :K] % GROUP
    if best.shape[1] > K:
        missed = torch.maximum(missed, best[:, K])
    return best[:, :K], numbers, missed


def _largest_groups(maxima, K):
    """Numbers of the K largest of each row of maxima (nq, ngroup), int64 (nq, K), in no order."""
    nq, ngroup = maxima.shape
    if ngroup <= 64 * K:
        return maxima.topk(K, sorted=False).indices
    # of 16 groups each, those with the largest maxima hold them all
    of_16 = maxima.view(nq, -1, 16)
    top = of_16.amax(2).topk(K, sorted=False).indices
    best = of_16.gather(1, top[:, :, None].expand(-1, -1, 16)).view(nq, -1).topk(K, sorted=False).indices
    return top.gather(1, best // 16) * 16 + best % 16
