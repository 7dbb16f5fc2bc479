"""Exact nearest neighbours by comparing all vectors on a GPU: what lowshot/exact_search.py's exact_knn() does where there is one.

Products are of vectors in float16. They give some more candidates than neighbours, which are compared in float32 by the
library's code for CPUs, as those of other searches are, while the GPU goes on with the next queries.
"""
import importlib.util

import numpy as np

from graph_utils import neighbours as nb
from lowshot.machine import gpu_available

SPARE = 8                   # candidates beyond k
BLOCK = 1 << 14             # queries at a time, at most
LISTED = 1 << 21            # candidates at a time, at most
MAXIMA = 1 << 31            # bytes of GPU memory for what the GPU finds on the way
GPU_LIBRARIES = 900e6       # bytes of the host's memory that torch and CUDA take
LONGEST = 100.0             # norms beyond this are left to the CPU: float16 ends at 65504


def search_device(name="auto"):
    """The torch device on which "auto", "cuda" or "cuda:0" searches, or None if that is the CPU."""
    if name == "cpu" or not importlib.util.find_spec("triton") or not gpu_available():
        return None
    import torch
    return torch.device("cuda" if name == "auto" else name)


def free_memory(device):
    """Bytes of the GPU's memory that are free, or that torch keeps for what comes next."""
    import torch
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release():
    """Give memory that torch keeps back to the GPU: Faiss, for one, does not get it from torch."""
    import torch
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def on_device(vectors, i, j, device):
    """Vectors i .. j - 1, float32 on a GPU."""
    import torch
    x = torch.tensor(vectors.stretch(i, j), device=device)
    return x if vectors.scale is None else x.mul_(torch.from_numpy(vectors.scale[i:j, None]).to(device))


class Rounded:
    """Vectors in float16 on a GPU: x (padded n, padded d). lost: norms of what rounding took, float32 (n,) numpy."""

    def __init__(self, vectors, device):
        import torch
        from graph_utils.gpu import padded_for_search
        n, d = vectors.n, vectors.d
        self.vectors = vectors
        self.x = torch.zeros((padded_for_search(n), -(-d // 64) * 64), dtype=torch.float16, device=device)
        self.lost = np.empty(n, np.float32)
        for i, j in vectors.blocks():
            x = on_device(vectors, i, j, device)
            self.x[i:j, :d] = x
            self.lost[i:j] = (x - self.x[i:j, :d]).norm(dim=1).cpu().numpy()

    def errors_with(self, others, bound):
        """Function of the numbers of these vectors: bounds of the errors of their products with the others. bound:
        exact_search._error()."""
        most, pair = float(others.lost.max(initial=0)), (self.vectors, others.vectors)
        return lambda rows: bound(self.lost[rows], most, *pair)

    @staticmethod
    def bytes(n, d):
        """Memory of the GPU for n vectors of d columns."""
        return 2 * (n + 512) * -(-d // 64) * 64


def fits(n, d, device):
    """Whether n vectors of d columns can be searched on the GPU."""
    return Rounded.bytes(n, d) + 3 * MAXIMA < free_memory(device)


def near(Q, X, K, error, rows=None):
    """Yield (rows, keys, error) for stretches of the queries Q: their numbers int32 (m,), the K nearest among X by products in
    float16, int64 (m, K), and bounds float32 (m,): other vectors' products exceed the least of these by no more.

    Q, X: Rounded, on one GPU. rows: numbers of the queries, all if None. error(rows): bounds of the errors of products.
    """
    import torch
    from graph_utils.gpu import GROUP, TILE, candidates
    M, n, device = TILE[0], Q.vectors.n if rows is None else len(rows), Q.x.device
    step = max(M, min(BLOCK, MAXIMA // (4 * len(X.x) // GROUP), LISTED // K) // M * M)
    buffers, waiting = [], None
    for i in range(0, n, step):
        j = min(i + step, n)
        q = torch.zeros((-(-(j - i) // M) * M, Q.x.shape[1]), dtype=Q.x.dtype, device=device)
        q[:j - i] = Q.x[i:j] if rows is None else Q.x[torch.from_numpy(rows[i:j]).to(device).long()]
        found = candidates(q, X.x, X.vectors.n, K)
        if len(buffers) < 2:        # one is read while the other is written
            buffers.append([torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in found])
        buffers.reverse()
        ready = _to_host(found, buffers[0])
        # the GPU works on while the caller has those before
        if waiting is not None:
            yield _keys(*waiting, error)
        waiting = np.arange(i, j, dtype=np.int32) if rows is None else rows[i:j].astype(np.int32), ready
    if waiting is not None:
        yield _keys(*waiting, error)


def near_in_float32(xq, X, K):
    """Keys int64 (nq, .) of the K nearest among the Vectors X for each of xq, float32 (nq, d), by products in float32."""
    import torch
    device = X.device
    queries = torch.from_numpy(xq).to(device)
    products = torch.empty((len(xq), 0), device=device)
    numbers = torch.empty((len(xq), 0), dtype=torch.int64, device=device)
    for i, j in X.blocks():
        x = on_device(X, i, j, device).t()
        rows = [torch.cat([p, q @ x], 1).topk(min(K, p.shape[1] + j - i)) for q, p in zip(queries.split(4096),
                                                                                        products.split(4096))]
        at, had = torch.cat([r.indices for r in rows]), products.shape[1]
        products = torch.cat([r.values for r in rows])
        numbers = torch.where(at < had, numbers.gather(1, at.clamp(max=had - 1)), at - had + i) if had else at + i
    return nb.make_keys(products.cpu().numpy(), numbers.cpu().numpy())


def _to_host(tensors, buffers):
    """Begin to copy tensors to buffers; the function returned waits for it and gives arrays. Work started later is not waited
    for."""
    import torch
    host = [buffer[:len(t)].copy_(t, non_blocking=True) for buffer, t in zip(buffers, tensors)]
    event = torch.cuda.Event() if tensors[0].is_cuda else None
    if event is not None:
        event.record(torch.cuda.current_stream(tensors[0].device))

    def wait():
        if event is not None:
            event.synchronize()
        return [t.numpy() for t in host]
    return wait


def _keys(rows, ready, error):
    products, numbers, missed = (a[:len(rows)] for a in ready())
    return rows, nb.make_keys(products, numbers), error(rows) + np.maximum(missed - products.min(axis=1), 0)
