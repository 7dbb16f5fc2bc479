"""One iteration L <- normalise(W L) on a GPU, beside cuSPARSE through torch, on the graph of a data directory.

Reads   $DDIR/knngraph/ndis{nbg}_k32_I_11.int32      the background's graph (build_graph.py), or --graph FILE.npy
Prints a Markdown table, and writes it to --out.

Ours: the kernel of diffusion.py --backend triton, panel by panel, with column sums and scaling; the graph renumbered by
graph_utils.locality_rank, and in the order of the files. cuSPARSE: torch's CSR tensor times L, all columns at once and in
panels of as many columns as ours, the product alone; then with scaling and column sums as torch's operations. The best of
several rounds counts, timed by events on the GPU. Every result is compared with float64 on a sample of rows.

    DDIR=/path/to/data python benchmarks/gpu_product.py --nbg 1000000 --out gpu_product.md

Memory of the GPU: 12 bytes x nodes x columns, 6.2 GB for 1,000,000 nodes and 512 columns, and 20 bytes per entry of W.
"""
from runs import show

import numpy as np
from lowshot.script import Parser, log, number, print_header, run
from product import SAMPLE, graph_arguments, read_graph


def arguments():
    p = Parser(__doc__)
    graph_arguments(p)
    p.add_argument("--columns", type=number(int, 1), default=512, help="columns of L")
    p.add_argument("--panels", type=number(int, 16, 512), nargs="+", default=[64, 128], help="columns of our panels, rows of "
                   "the table for each; diffusion.py takes 128")
    p.add_argument("--rounds", type=number(int, 1), default=5, help="rounds, the first of which does not count")
    p.add_argument("--device", default="cuda", help="cuda, cuda:0, ...")
    p.add_argument("--out", help="file for the table")
    return p.parse_args()


class Case:
    """W in the order of the files and renumbered, and L as panels: float32 (n, columns) each, in the order of the files."""

    def __init__(self, I, rank, args):
        import torch
        from lowshot.backends import TorchGraph, TritonGraph
        self.torch, self.args, self.rank = torch, args, rank
        torch.cuda.set_device(torch.device(args.device).index or 0)
        kinds = {name: type(name, (base,), {"device": args.device}) for name, base in (("triton", TritonGraph),
                                                                                      ("torch", TorchGraph))}
        self.graphs = {(name, renumbered): kind(I, rank if renumbered else None) for name, kind in kinds.items()
                       for renumbered in (False, True)}
        W = self.graphs["torch", False]
        self.n, self.nnz, self.bytes = W.n, W.nnz, sum(a.nbytes for a in W.arrays)
        generator = torch.Generator(args.device).manual_seed(1)
        self.L = torch.rand((self.n, args.columns), generator=generator, device=args.device)
        self.nodes = np.sort(np.random.RandomState(1).choice(self.n, min(SAMPLE, self.n), replace=False))
        values, L = W.values(), self.L.cpu().numpy()
        self.exact = np.array([values[slice(*W.indptr[i:i + 2])] @ L[W.indices[slice(*W.indptr[i:i + 2])]].astype(np.float64)
                               for i in self.nodes])

    def copy(self):
        out = self.torch.empty_like(self.L)
        return self.seconds(lambda: out.copy_(self.L))

    def panels(self, width, renumbered):
        at = self.torch.as_tensor(self.rank, device=self.args.device).long() if renumbered else slice(None)
        for c in range(0, self.args.columns, width):
            columns = self.L[:, c:c + width]
            panel = self.torch.empty_like(columns, memory_format=self.torch.contiguous_format)
            panel[at] = columns
            yield panel

    def product(self, kind, width, renumbered, normalised=True):
        """(seconds, largest relative error) of one iteration over all columns."""
        torch, W = self.torch, self.graphs[kind, renumbered]
        rows = self.rank[self.nodes] if renumbered else self.nodes
        seconds, found = 0.0, []
        for panel in self.panels(width, renumbered):
            out, scale = torch.empty_like(panel), np.ones(panel.shape[1], np.float32)
            if normalised:
                seconds += self.seconds(lambda: W.product(panel, out, scale))
            else:
                seconds += self.seconds(lambda: torch.addmm(out, W.matrix, panel, beta=0, out=out))
            found.append(W.read(out, rows, scale))
        return seconds, float(np.abs(np.concatenate(found, 1) - self.exact).max() / np.abs(self.exact).max())

    def seconds(self, call):
        torch, times = self.torch, []
        for _ in range(self.args.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        return min(times[1:] or times)


def main():
    args = arguments()
    print_header(args)
    import torch
    from graph_utils import locality_rank
    if not torch.cuda.is_available():
        raise ValueError("this torch sees no GPU")
    I, recall = read_graph(args)
    case = Case(I, locality_rank(I), args)
    copy = case.copy()
    bound = copy * (1 + case.bytes / (2 * 4 * case.L.numel()))
    rows = []
    ways = [(f"ours, {'renumbered' if r else 'order of the files'}, panels of {w}", "triton", w, r, True)
            for w in args.panels for r in (True, False)]
    ways += [(f"cuSPARSE, {'renumbered' if r else 'order of the files'}, "
              f"{f'panels of {w}' if w < args.columns else 'all columns'}{', scaling and sums' if full else ''}",
              "torch", w, r, full)
             for r in (False, True) for w in (args.columns, 64) for full in (False, True)]
    for name, *way in ways:
        try:
            seconds, error = case.product(*way)
        except torch.OutOfMemoryError as e:
            log(f"{name}: left out, {str(e).splitlines()[0]}")
            continue
        log(f"{name}: {1000 * seconds:.2f} ms, error {error:.1e}")
        if error > 1e-5:
            raise ValueError(f"{name} is wrong: relative error {error:.1e}")
        rows.append((name, seconds, error))
    peer = min(s for name, s, _ in rows if name.startswith("cuSPARSE, order of the files") and "sums" not in name)
    lines = [f"{case.n:,} nodes, k = {args.k}, {case.nnz:,} entries of W"
             + (f", recall@{args.k} of the graph {recall:.3f}" if recall is not None else "") + f", {args.columns} columns; "
             f"{torch.cuda.get_device_name(args.device)}, torch {torch.__version__}, CUDA {torch.version.cuda}.", "",
             "| product | ms | times cuSPARSE in file order | times the copy | largest relative error |",
             "| --- | --- | --- | --- | --- |"]
    for name, seconds, error in rows:
        lines.append(f"| {name} | {1000 * seconds:.1f} | {peer / seconds:.2f} | {seconds / bound:.1f} | {error:.0e} |")
    lines += [f"| copy: L in and out once, indices in once | {1000 * bound:.1f} | {peer / bound:.2f} | 1.0 | |", "",
              f"Copy speed: {2 * 4 * case.L.numel() / copy / 1e9:.0f} GB/s read and written."]
    show("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    run(main)
