"""Time diffusion.py beside the paper's way, and its diffusion beside scikit-learn's and graphlearning's, in one run.

Reads $DDIR as diffusion.py does. Prints two Markdown tables, and writes them to --out.

Start to finish: diffusion.py without and with the completed graph that a first run leaves, and the paper's way: Faiss
searches the background's index (nprobe 256) for the neighbours of the labelled and test images, all else (background and
test images against the labelled ones, the labelled ones among themselves) is compared exactly; scipy symmetrises; MKL
multiplies all rows of L with nodes in the order of the files, numpy divides the columns by their sums, and the test
images' scores are gathered after every iteration. Its searches and scores are timed on some queries (of the background, a
stretch), and the time is multiplied by the number of queries over theirs; one of the iterations is timed; reading, PCA and
merging are left out.

The diffusion alone, on the same completed graph (the test images are further nodes for the peers): scikit-learn's
LabelSpreading for as many iterations, and graphlearning's randomwalk, which solves for the limit by conjugate gradients.
They work on all classes at once in float64: where that needs more memory than there is, they are left out.

    DDIR=/path/to/data python benchmarks/diffusion.py --nbg 1000000 --out diffusion.md
"""
import signal
import time
import warnings

from runs import diffusion, show

import numpy as np
from lowshot.machine import available_memory, thread_count
from lowshot.script import Parser, log, number, print_header, run, size


def arguments():
    p = Parser(__doc__)
    p.add_argument("--nbg", type=number(int, 0), default=1000000, help="background images")
    p.add_argument("--nlabeled", type=number(int, 1), default=2, help="labelled images per novel class")
    p.add_argument("--seed", type=number(int, 0), default=1, help="seed of their choice")
    p.add_argument("--k", type=number(int, 1), default=30, help="neighbours")
    p.add_argument("--dim", type=number(int, 1), default=256, help="dimensions of the vectors")
    p.add_argument("--niter", type=number(int, 1), default=3, help="iterations")
    p.add_argument("--nprobe", type=number(int, 1), default=256, help="cells that the paper's way searches")
    p.add_argument("--queries", type=number(int, 1), default=2000, help="queries that the paper's searches are timed on")
    p.add_argument("--patience", type=number(float, 1), default=600, help="seconds after which another package is given up")
    p.add_argument("--parts", nargs="+", default=["paper", "peers"], choices=("paper", "peers"), help="tables")
    p.add_argument("--out", help="file for the tables")
    return p.parse_args()


def ours(args, *more):
    """The record of one run of diffusion.py, with `wall`: seconds from start to finish."""
    options = [word for name in ("nbg", "nlabeled", "seed", "k", "dim", "niter") for word in (f"--{name}", getattr(args, name))]
    return diffusion(*options, *more)


class Problem:
    """The completed graph and labels that diffusion.py works on, and the vectors it is made from."""

    def __init__(self, args):
        from lowshot.completion import FixedKey, add_novel, fixed_vectors, read_features
        from lowshot.features import FeatureFile
        from lowshot.layout import DataDir
        from lowshot.split import images_of_run, load_split
        self.args, self.ddir = args, DataDir()
        split = load_split(self.ddir.label_idx(), "test")
        with FeatureFile(self.ddir.train) as train_file, FeatureFile(self.ddir.val) as val_file:
            rows, self.labels, nbase, test_rows, self.test_labels, _ = images_of_run(train_file, val_file, split, args.nlabeled,
                                                                                     args.seed)
        self.is_novel, self.C = split.is_novel, len(split.classes)
        fixed = FixedKey(self.ddir, "test", args.nbg, args.k, args.dim, rows[:nbase], test_rows).stored_or_made()
        novel = read_features(self.ddir.train, rows[nbase:], self.ddir.pca(args.dim), "novel images read")
        base, self.test = fixed.load("base"), fixed.load("test")
        self.vectors = fixed_vectors(self.ddir, args.nbg, args.dim, base, scale=fixed.load("scale"))
        changes = add_novel(fixed, self.vectors, novel)
        I = changes.of_neighbours(fixed.load("I"))
        self.labelled = np.concatenate([base, novel])
        self.n, self.nl, self.nt = len(I), len(rows), len(test_rows)
        # as the files and the paper have it: the labelled images first
        self.I, self.test_I = (np.where(I < 0, -1, (I + self.nl) % self.n).astype(np.int32)
                               for I in (np.roll(I, self.nl, axis=0), changes.test_I))

    def matrix(self, with_tests=False):
        """W0 + W0^T, scipy CSR; the test images as further nodes if asked for."""
        import scipy.sparse
        I = np.concatenate([self.I, self.test_I]) if with_tests else self.I
        n, have = len(I), I >= 0
        indptr = np.concatenate([[0], np.cumsum(have.sum(axis=1))])
        W0 = scipy.sparse.csr_matrix((np.ones(indptr[-1], np.float32), I[have], indptr), shape=(n, n))
        return W0 + W0.T

    def accuracy(self, scores):
        """(all, novel) top-5 accuracies, given the scores of all test images (nt, C)."""
        from graph_utils import BestClasses
        from lowshot.evaluate import accuracies
        best = BestClasses(self.test_labels)
        best.update(np.ascontiguousarray(scores, np.float32), np.arange(self.C))
        return accuracies(best.right(), self.test_labels, self.is_novel)


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paper_way(problem):
    """{step: seconds} of the paper's way."""
    from graph_utils import mkl_product
    from lowshot.packages import faiss
    p, args = problem, problem.args
    rs = np.random.RandomState(0)

    def some(x):
        return np.ascontiguousarray(x[np.sort(rs.choice(len(x), min(args.queries, len(x)), replace=False))])

    def exact(queries, count):
        return seconds_of(lambda: faiss.knn(queries, p.labelled, min(args.k, p.nl), metric=faiss.METRIC_INNER_PRODUCT)) \
            * count / len(queries)

    labelled, test = some(p.labelled), some(p.test)
    steps = {"labelled images among themselves": exact(labelled, p.nl), "test against labelled images": exact(test, p.nt)}
    if args.nbg:
        index = faiss.read_index(p.ddir.index(args.nbg))
        if isinstance(index, faiss.IndexIVF):
            index.nprobe = args.nprobe
        first = rs.randint(max(1, args.nbg - args.queries))
        background = p.vectors.scaled_rows(np.arange(first, min(first + args.queries, args.nbg)))
        for name, queries, count in (("labelled", labelled, p.nl), ("test", test, p.nt)):
            steps[f"{name} images in the background"] = seconds_of(lambda: index.search(queries, args.k)) * count / len(queries)
        steps["background against labelled images"] = exact(background, args.nbg)
        del index
    start = time.perf_counter()
    W = p.matrix()
    W.data /= np.repeat(np.asarray(W.sum(axis=1)).ravel(), np.diff(W.indptr))
    steps["W = W0 + W0^T"] = time.perf_counter() - start
    # all pages are there: those of np.zeros are one page of zeros until they are written
    L, out = np.full((p.n, p.C), 0, np.float32), np.full((p.n, p.C), 1, np.float32)
    L[np.arange(p.nl), p.labels] = 1
    indptr = W.indptr.astype(np.int64)

    def iteration():
        mkl_product(indptr, W.indices, W.data, L, out, check=False)
        sums = out.sum(axis=0)
        np.divide(out, np.where(sums > 0, sums, 1), out=out)

    steps[f"{args.niter} iterations"] = seconds_of(iteration) * args.niter
    rows = np.sort(rs.choice(p.nt, min(p.nt, args.queries), replace=False))
    steps["scores"] = seconds_of(lambda: [out[I[I >= 0]].sum(axis=0) for I in p.test_I[rows]]) * p.nt / len(rows) * (args.niter + 1)
    return steps


def memory_for(copies, problem, what):
    needed = copies * 8 * (problem.n + problem.nt) * problem.C
    if needed > available_memory():
        raise MemoryError(f"{what}: {copies} matrices of nodes and classes in float64 take {size(needed)}, "
                          f"{size(available_memory())} are free")


def label_spreading(problem):
    """(seconds, accuracies) of scikit-learn's LabelSpreading, the graph given."""
    from sklearn.semi_supervised import LabelSpreading
    memory_for(5, problem, "scikit-learn")
    W = problem.matrix(with_tests=True)
    y = np.full(W.shape[0], -1)
    y[:problem.nl] = problem.labels
    model = LabelSpreading(kernel=lambda X, Y: W, max_iter=problem.args.niter, tol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that it has not converged
        seconds = seconds_of(lambda: model.fit(np.zeros((W.shape[0], 1)), y))
    return seconds, problem.accuracy(model.label_distributions_[problem.n:])


def random_walk(problem):
    """(seconds, accuracies) of graphlearning's randomwalk, the graph given."""
    import graphlearning
    memory_for(8, problem, "graphlearning")
    W = problem.matrix(with_tests=True).astype(np.float64)
    model = graphlearning.ssl.randomwalk(W)
    found = []
    seconds = seconds_of(lambda: found.append(model.fit(np.arange(problem.nl), problem.labels)))
    return seconds, problem.accuracy(found[0][problem.n:])


def paper_table(args, problem, cold, warm):
    paper = paper_way(problem)
    total = sum(paper.values())
    lines = ["| start to finish | s | times faster than the paper's way |", "| --- | --- | --- |",
             f"| diffusion.py, first run | {cold['wall']:.1f} | {total / cold['wall']:.1f} |",
             f"| diffusion.py, further runs | {warm['wall']:.1f} | {total / warm['wall']:.1f} |",
             f"| the paper's way, nprobe {args.nprobe} | {total:.0f} | 1 |"]
    return [*lines, *(f"| &nbsp;&nbsp;{name} | {seconds:.1f} | |" for name, seconds in paper.items()), ""]


def stop(*_):
    raise TimeoutError


def peers_table(args, problem, warm):
    signal.signal(signal.SIGALRM, stop)
    mine = warm["steps"][-1]["seconds"]
    last = warm["results"][-1]
    lines = ["| the diffusion alone | s | times slower than ours | top-5 accuracy, all / novel |", "| --- | --- | --- | --- |",
             f"| diffusion.py, {args.niter} iterations | {mine:.2f} | 1 | {last['top5']:.3f} / {last['top5_novel']:.3f} |"]
    for name, peer in ((f"scikit-learn LabelSpreading, {args.niter} iterations", label_spreading),
                       ("graphlearning randomwalk, converged", random_walk)):
        try:
            signal.setitimer(signal.ITIMER_REAL, args.patience)
            seconds, (top5, novel) = peer(problem)
            lines.append(f"| {name} | {seconds:.1f} | {seconds / mine:.0f} | {top5:.3f} / {novel:.3f} |")
        except ImportError as e:
            lines.append(f"| {name} | not installed: {e} | | |")
        except MemoryError as e:
            lines.append(f"| {name} | does not run: {e} | | |")
        except TimeoutError:
            lines.append(f"| {name} | more than {args.patience:g} | more than {args.patience / mine:.0f} | |")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        log(lines[-1])
    return [*lines, ""]


def main():
    args = arguments()
    print_header(args)
    cold = ours(args, "--nocache") if "paper" in args.parts else None
    if cold:
        log(f"diffusion.py, first run, which keeps nothing: {cold['wall']:.1f} s")
    ours(args)
    warm = min((ours(args) for _ in range(2)), key=lambda record: record["wall"])
    log(f"diffusion.py, further runs: {warm['wall']:.1f} s")
    problem = Problem(args)
    lines = [f"{args.nbg:,} background, {problem.nl:,} labelled, {problem.nt:,} test images, {problem.C} classes, k = {args.k}, "
             f"{args.niter} iterations, {thread_count()} threads.", ""]
    if cold:
        lines += paper_table(args, problem, cold, warm)
    if "peers" in args.parts:
        lines += peers_table(args, problem, warm)
    show("\n".join(lines), args.out)


if __name__ == "__main__":
    run(main)
