"""Who multiplies by W: the library's kernels for CPUs and GPUs, or MKL's and torch's general sparse products.

Each backend is a SymmetricGraph with these operations on panels of L, float32 (n, ncol), kept where it computes:

    device                                        where it computes, for torch
    panel                                         columns of a panel that it is quickest with
    follows                                       whether rows that no label has reached are left out
    entry_bytes                                   memory of this process per entry of W, at most
    libraries                                     bytes of this process's memory that its libraries take, on a CPU
    zeros(ncol)                                   a panel
    seed(L, nodes, columns)                       L = 0 but for ones at (nodes, columns)
    product(L, out, scale, rows, weights)         see SymmetricGraph.product
    neighbour_sums(test_I, L, scale, scores)      see graph_utils.neighbour_sums; into a numpy array
    read(L, rows, scale)                          rows of L * scale as a numpy array
    free_memory()                                 bytes that it may take where it computes
    fits(n, k)                                    of those on GPUs: whether W and the narrowest panels fit there
"""
import importlib.util
import warnings

import numpy as np

from graph_utils import PANEL, WIDEST, SymmetricGraph, aligned_zeros, has_mkl, mkl_product, neighbour_sums
from lowshot import gpu_search
from lowshot.machine import spendable_memory, torch_device
from lowshot.script import log, size

ENTRIES = 1.6       # of W, for each node and neighbour: most edges are not mutual, 2 would be the most


class OwnGraph(SymmetricGraph):
    """The library's kernel: no array of values, sums and scaling in the same pass, only the rows that are asked for."""

    device, panel, entry_bytes, follows = "cpu", PANEL, 4, True
    libraries = 80e6                                        # bytes of memory of the process on a CPU, besides its arrays

    def zeros(self, ncol):
        return aligned_zeros((self.n, ncol))

    def seed(self, L, nodes, columns):
        L[:] = 0
        L[nodes, columns] = 1

    def neighbour_sums(self, test_I, L, scale, scores):
        neighbour_sums(test_I, L, scale, scores)

    def read(self, L, rows, scale):
        return L[rows] * scale

    def free_memory(self):
        return spendable_memory()


class MklGraph(OwnGraph):
    """MKL's product with an array of values: the paper's way, kept for comparison."""

    panel, entry_bytes, follows = WIDEST, 8, False

    def _take(self, *arrays):
        super()._take(*arrays)
        self.csr_values = self.values()

    def product(self, L, out, scale, rows=None, weights=None):
        mkl_product(self.indptr, self.indices, self.csr_values, L, out, check=False)
        out *= scale
        if weights is None:
            return out.sum(axis=0, dtype=np.float64)
        return sum(weights[i:i + 65536].astype(np.float64) @ out[i:i + 65536] for i in range(0, self.n, 65536))


class TorchGraph(SymmetricGraph):
    """torch's sparse product (cuSPARSE on a GPU), graph and panels on the device: kept for comparison."""

    follows, libraries = False, 355e6
    device, panel, entry_bytes = "cuda", WIDEST, 16         # indices become int64 on their way to the device
    on_device = 12                                          # bytes per entry there
    share = .75         # of the device's free memory: cuSPARSE works in a buffer of its own, our kernel adds sums up

    def _take(self, *arrays):
        import torch
        super()._take(*arrays)
        self.torch = torch
        self.to_device()

    def to_device(self):
        tensors = map(self._tensor, (self.indptr, self.indices.astype(np.int64), self.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # that such tensors are new
            self.matrix = self.torch.sparse_csr_tensor(*tensors, size=(self.n, self.n), check_invariants=False)

    def _tensor(self, a):
        return self.torch.as_tensor(a).to(self.device)

    def zeros(self, ncol):
        return self.torch.zeros((self.n, ncol), device=self.device)

    def seed(self, L, nodes, columns):
        L.zero_()
        L[self._tensor(nodes), self._tensor(columns)] = 1

    def product(self, L, out, scale, rows=None, weights=None):
        self.torch.addmm(out, self.matrix, L, beta=0, out=out)      # into the panel, without another one for the result
        out *= self._tensor(scale)
        if weights is None:
            sums = out.sum(0, dtype=self.torch.float64)
        else:
            sums = sum((self._tensor(weights[i:i + 65536]).double() @ out[i:i + 65536].double())
                       for i in range(0, self.n, 65536))
        return sums.cpu().numpy()

    def neighbour_sums(self, test_I, L, scale, scores):
        for i in range(0, len(test_I), 4096):
            nodes = self._tensor(test_I[i:i + 4096]).long()
            sums = (L[nodes.clamp(min=0)] * (nodes >= 0)[:, :, None]).sum(1) * self._tensor(scale)
            scores[i:i + 4096] = sums.cpu().numpy()

    def read(self, L, rows, scale):
        return (L[self._tensor(rows).long()] * self._tensor(scale)).cpu().numpy()

    @classmethod
    def free_memory(cls):
        if cls.device.startswith("cuda"):
            return int(gpu_search.free_memory(cls.device) * cls.share)
        return spendable_memory()

    @classmethod
    def fits(cls, n, k):
        """Whether W of n nodes with k neighbours and the narrowest panels fit in the device's memory."""
        return cls.on_device * ENTRIES * k * n + 16 * n + 2 * 4 * 16 * n < cls.free_memory()


class TritonGraph(TorchGraph):
    """The library's kernel for GPUs, as OwnGraph is for CPUs: no array of values, sums and scaling in the same pass."""

    panel, entry_bytes, on_device = 128, 4, 4

    def to_device(self):
        from graph_utils import gpu
        self.gpu = gpu
        self.csr = [self._tensor(a) for a in self.arrays]
        self.kept = {}

    def _kept(self, name, a):
        """The array on the device, where it stays until another of this name is asked for."""
        if self.kept.get(name, (None,))[0] is not a:
            self.kept[name] = a, self._tensor(a)
        return self.kept[name][1]

    def product(self, L, out, scale, rows=None, weights=None):
        rows = None if rows is None else self._tensor(rows)
        weights = None if weights is None else self._kept("weights", weights)
        return self.gpu.product(*self.csr, L, self._tensor(scale), rows, weights, out).cpu().numpy()

    def neighbour_sums(self, test_I, L, scale, scores):
        scores[:] = self.gpu.neighbour_sums(self._kept("test_I", test_I), L, self._tensor(scale)).cpu().numpy()


def choose_backend(name, device, n, k):
    """The backend class for --backend and --device; "auto" takes a GPU where there is one, and the graph of n nodes with k
    neighbours fits in its memory, else the own kernel."""
    choose = name == device == "auto"
    if device == "auto" and name in ("own", "mkl"):
        device = "cpu"
    device = torch_device(device)
    if name == "auto":
        name = "own" if device == "cpu" else "triton" if importlib.util.find_spec("triton") else "torch"
    if name == "triton" and device == "cpu":
        raise ValueError("--backend triton computes on a GPU, and there is none, or --device is cpu")
    if name == "triton" and not importlib.util.find_spec("triton"):
        raise ValueError("--backend triton: Triton is not installed (it comes with the CUDA builds of torch)")
    if name in ("torch", "triton"):
        base = TorchGraph if name == "torch" else TritonGraph
        backend = type(base.__name__, (base,), {"device": device})
        if not choose or backend.fits(n, k):
            return backend
        log(f"note: diffusion on the CPU, as {size(backend.free_memory())} of the GPU's memory do not hold the graph")
        return OwnGraph
    if name == "mkl" and not has_mkl():
        raise ValueError("--backend mkl: graph_utils was built without MKL (compile.bash says how to name it)")
    if device != "cpu":
        raise ValueError(f"--backend {name} computes on the CPU, --device is {device}")
    return {"own": OwnGraph, "mkl": MklGraph}[name]
