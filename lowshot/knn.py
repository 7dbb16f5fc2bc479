"""K-nearest-neighbour graphs and search by inner product, to a recall; for build_graph.py and diffusion.py.

Vectors, lists D, I and `progress` are as in exact_search.py.

    cells = Cells.train(Vectors(x))                                         cells.order puts near nodes together
    build_knn_graph(cells, k, recall=.95, out=(D, I), known=n0) -> D, I, info
    search_begun(cells, xq, k, recall=.95)() -> D, I, info

Recall is measured on a sample by exact search, and raised until it is reached.
"""
import math
import mmap

import numpy as np

from graph_utils import aligned_zeros, neighbours as nb
from lowshot import exact_search, machine, sampling
from lowshot.cells import BLOCK, as_vectors, nearest_cell
from lowshot.exact_search import best_of, compares_all
from lowshot.file_arrays import allocator
from lowshot.sampling import MISSED, REVERSE, Sample, cells_reaching, compared_by, longest_list, usual_list, with_margin
from lowshot.script import silent

BAR = 3                     # standard errors of codes by which a candidate may seem worse than a node's known neighbours
AFFORDABLE = 1 << 31        # comparisons of new nodes with known ones that are not worth leaving out
ROUND = 1.25                # comparisons that take as long as a round of neighbours-of-neighbours does for a pair, at least
NEARLY_ALL = .995           # recall that is worth a quarter of that in further comparisons
MOST_WITH_ROUNDS = 64       # neighbours up to which such rounds are the quicker way on much of the data
MOST_PARTS = 16             # of the lists, that a round works on one after the other; each looks at all neighbourhoods, so that
                            # more would take long
WIDE_FROM = 1 << 15         # comparisons per node from which longer lists and more rounds are the quicker way
WIDE_START = .75            # recall that these rounds start from; from lower, they end lower
SAMPLED = 160_000_000       # bytes of a sample, its candidates, and what finds them
WORKING = 60_000_000        # and of blocks of vectors in hand, and threads
WIDE_UPTO = .97             # recall that they reach where neighbours are hard to find


def build_knn_graph(cells, k, recall=0.95, out=None, known=0, nprobe=0, seed=0, progress=silent, say=silent,
                    checkpoint=None, sample=None, folder=None):
    """The graph of the k nearest, itself included, of each vector of `cells`, which give their codes up on the way.

    The vectors of each node's nprobe nearest cells are compared with it, and then neighbours of neighbours, or more cells where
    that is quicker, until recall@k as measured on a sample is reached. Similarities are exact float32 products; those in known
    lists stay as they are. Deterministic for a seed, killed meanwhile or not, and whatever the number of threads but for rounding
    in projections by BLAS.

    out: arrays (D, I) (n, k) to fill; made here if None. known: the first nodes, so many, not all, have their lists there, and
    are compared with the other nodes only; recall is that of the other nodes.
    nprobe: search that many cells, without further rounds.
    sample: Sample of the nodes, of those that are new if lists are given; made here if None.
    folder: where candidates are kept, in files, if they do not fit in the memory that is free; None: in memory all the same.
    say: function that gets a line on each step. checkpoint: Checkpoint or None; None with known lists.
    Returns D, I, info (recall, exact, which it is not, nprobe and rounds).
    """
    vectors, n = cells.vectors, cells.n
    D, I = out if out is not None else (np.empty((n, k), np.float32), np.empty((n, k), np.int32))
    position = cells.position()
    # known lists are as they are: it is the new nodes, and their entries in these lists, that have to be found
    sample = sample or Sample(vectors, vectors, min(k, n), seed, cells, progress, first=known)
    wanted, reverse = with_margin(recall), REVERSE
    comparison = compared_by(sample, cells, recall, progress, say)
    K = needed = comparison.needed(recall)
    curve = sample.recall_by_nprobe(cells, position)
    nprobe = min(nprobe, len(curve))
    if known:
        p = nprobe or cells_for_new(curve, wanted + comparison.lost(K) + MISSED, n - known, n)
    else:
        p, without_rounds = (nprobe, True) if nprobe else cells_for_all(curve, wanted, comparison.lost(K), K, n)
        if not without_rounds and p * n > WIDE_FROM * len(curve) and wanted <= WIDE_UPTO:
            # in all dimensions: with half of them lists would be long for their sake alone
            needed = compared_by(sample, cells, recall, progress, say, half=False).needed(recall)
            curve = sample.recall_by_nprobe(cells, position)
            p, K, reverse = cells_reaching(curve, WIDE_START), max(needed, longest_list(k)), 2 * REVERSE
            say(f"neighbours are far and wide: {K} candidates are kept for each, compared in all dimensions")
    lists = Lists(cells, position, K, I[:known], comparison.error, checkpoint, folder, say)

    def near(p):
        # a cell's own nodes have to be enough for the work on its list
        return None if nprobe or n - known < 16 * len(curve) else sample.near_cells(cells, position, p, curve[p - 1])

    further = False
    p = lists.nprobe or p           # of a run that was killed
    while True:
        lists.search(p, progress, near(p), further)
        have = lists.recall(sample, needed)
        say(f"{p} cells of {len(curve)} per node: recall@{k} {have:.4f} on {len(sample.number)} {'new ' if known else ''}nodes")
        gained = 1.0
        while not nprobe and have < wanted and gained > .002:
            inserted = lists.descend(reverse, seed, progress)
            before, have = have, lists.recall(sample, needed)
            gained = have - before
            say(f"neighbours of neighbours, round {lists.rounds}: {inserted / n:.2f} insertions per node, recall@{k} {have:.4f}")
        if nprobe or have >= wanted or curve[p - 1] >= wanted or p == len(curve):
            break               # more cells do not find what rounding hides
        # so many that it suffices if rounds find the same share of what these miss, and a few for that they find less
        missed = .9 * (1 - wanted) * (1 - curve[p - 1]) / (1 - have)
        further = not known
        p = min(max(cells_reaching(curve, 1 - missed), p + p // 8 + 1), 4 * p, len(curve))
        if known:       # what has entered the lists of known nodes is not told apart
            lists.restart()
    if have < recall and not nprobe:
        say(f"note: recall@{k} {have:.4f} is all that comparing candidates in {cells.codes.format} gives here")
    cells.X, cells.chosen = None, False     # not needed any more, and the largest part of the memory
    numbers = lists.become_numbers(needed)
    exact_search.products_of_all(vectors, lambda nodes: numbers[position[nodes]], D, I, progress, say, known, cells.order)
    vectors.release()
    return D, I, {"recall": sample.recall(D[sample.number]), "nprobe": p, "rounds": lists.rounds, "exact": False}


def cells_for_new(curve, wanted, new, n):
    """Cells to search for each of the `new` ones of n nodes, given the recall by number of cells.

    Few are searched for: cheaper than a round over all nodes, up to some number of cells. To the wanted recall, and as far as it
    takes a second or two.
    """
    affordable = AFFORDABLE // max(1, new * n // len(curve))
    return max(min(cells_reaching(curve, wanted), max(1, len(curve) // 8)), min(affordable, len(curve)))


def cells_for_all(curve, wanted, lost, K, n):
    """Cells to search for each of n nodes, and whether these find the wanted recall without neighbours of neighbours, which are
    the quicker way from some recall on, unless a round takes longer than the cells that are left.

    lost: recall that codes lose with K candidates.
    """
    p = cells_reaching(curve, max(1 - 2.5 * (1 - wanted), .5))
    alone = cells_reaching(curve, wanted + min(lost, (1 - wanted) / 4) + MISSED)
    round_cells = int(ROUND * (K + REVERSE) ** 2 * len(curve) / n)
    if alone - p >= round_cells:
        return p, False
    return max(alone, min(cells_reaching(curve, max(NEARLY_ALL, wanted)), alone + round_cells // 4)), True


class Lists:
    """The candidate lists of all nodes, in the order of cells. How many nodes were `searched` in how many cells (`nprobe`), and
    how many `rounds` of neighbours-of-neighbours were made.

    known: neighbours int32 (n0, k) of the first nodes. Where the lists and what a round takes besides (memory_of_lists()) do not
    fit in the memory that is free, both are in files in `folder`, unless that is None.
    """

    def __init__(self, cells, position, K, known=(), error=0.0, checkpoint=None, folder=None, say=silent):
        self.cells, self.position, self.checkpoint = cells, position, checkpoint
        self.known, self.error, self.n0, self.K = known, error, len(known), K
        n = cells.n
        # in each cell the first nodes come first: from `middle` on they are new
        before = np.concatenate([[0], np.cumsum(cells.order < self.n0)])
        self.middle = cells.begin + before[cells.stop] - before[cells.begin]
        self.empty = allocator(memory_of_lists(n, K), folder)
        self.in_file = self.empty is not aligned_zeros
        if self.in_file:
            say("candidates are kept in files, as they do not fit in the memory that is free")
        self.keys, self.searched, self.rounds, self.nprobe = self.empty((n, K), np.int64), 0, 0, 0
        if checkpoint is not None:
            self.searched, self.rounds, self.nprobe = checkpoint.open(self.keys, cells.X, self.empty)
        if self.n0:
            self.restart()

    def restart(self):
        """The lists that were given, and nothing else."""
        # further places are for what may be among the k best, not for whatever comes first
        nb.known_lists(self.cells.X, self.cells.order, self.position, self.known, BAR * self.error, self.keys)

    def search(self, nprobe, progress, near=None, further=False):
        """Join the best of each node's nprobe nearest cells; near: those to look at, of Sample.near_cells(). further: but for
        those of the search before this one; no copies are written then."""
        c, n = self.cells, self.cells.n
        if self.n0:
            self._search_new(nprobe, progress, near)
        if not further:
            self.before = None
        for i in range(0 if further else self.searched, n, sampling.SEARCH_BLOCK):
            rows = np.arange(i, min(i + sampling.SEARCH_BLOCK, n))
            block = slice(i, i + len(rows))
            nb.search_cells(c.X[block], c.C, nprobe, c.begin, c.stop, c.X, self.keys[block], near=self._near(near, rows),
                            before=self.before and (self.before[0], self._near(self.before[1], rows)))
            if not further:
                self._mark_new(slice(j, min(j + BLOCK, block.stop)) for j in range(i, block.stop, BLOCK))
                self.searched = block.stop
                if self.checkpoint is not None:
                    self.checkpoint.save(self.keys, self.searched, self.rounds, nprobe)
            progress("nodes compared with near cells", block.stop, n)
        self.nprobe, self.before = nprobe, (nprobe, near)

    def _near(self, near, rows):
        return None if near is None else (self.cells.cell_of(rows).astype(np.int32), near)

    def _search_new(self, nprobe, progress, near):
        """Compare the new nodes with near cells; they enter the lists of the known nodes there as well."""
        c = self.cells
        new = np.flatnonzero(c.order >= self.n0).astype(np.int32)
        worst = nb.worst_products(self.keys)
        if self.in_file:        # a few lists all over the file change: what is read around each would be many times as much
            self.keys._mmap.madvise(mmap.MADV_RANDOM)
        for i in range(0, len(new), sampling.SEARCH_BLOCK):
            rows = new[i:i + sampling.SEARCH_BLOCK]
            keys = self.keys[rows]
            nb.search_cells(c.X[rows], c.C, nprobe, c.begin, c.stop, c.X, keys,
                            insert=(self.middle, rows, self.keys, worst), near=self._near(near, rows))
            self.keys[rows] = keys
            # what entered the lists of others is marked already
            self._mark_new(rows[j:j + BLOCK] for j in range(0, len(rows), BLOCK))
            progress("new nodes compared with near cells", i + len(rows), len(new))
        if self.in_file:
            self.keys._mmap.madvise(mmap.MADV_NORMAL)
        self.searched = c.n

    def _mark_new(self, blocks):
        """What the lists of these nodes hold is new to the rounds of neighbours-of-neighbours."""
        for rows in blocks:
            keys = self.keys[rows]
            self.keys[rows] = np.where(nb.numbers(keys) >= 0, keys | nb.NEW, keys)

    def descend(self, reverse, seed, progress):
        """One round of neighbours-of-neighbours. Returns the number of insertions. Copies are of what it begins with."""
        n, copies = self.cells.n, self.checkpoint
        if copies is not None:
            copies.give_up()        # of lists that change now
        inserted = nb.descent_round(self.cells.X, self.keys, reverse, seed + self.rounds,
                                    lambda done: progress("nodes' neighbours compared with each other", done, n),
                                    self.part(), self.empty,
                                    started=copies and (lambda lists: copies.save(lists, n, self.rounds, self.nprobe)))
        if copies is not None:
            copies.wait()           # they keep what the round began with in memory
        self.rounds += 1
        return inserted

    def part(self):
        """Nodes whose lists a round is to work on at a time, or None for all."""
        if not self.in_file:
            return None
        n, K = self.keys.shape
        more = .8 * machine.available_memory() - memory_of_lists(n, K, in_file=True)      # the rest for what is read in order
        part = n / MOST_PARTS + max(0, more / (8 * K))
        return -(-n // math.ceil(n / part))         # as many parts, alike in size

    def best(self, rows, most):
        """The keys of some nodes, int64 (., K): the best `most` of longer lists."""
        keys = self.keys[rows]
        if self.K <= most:
            return np.ascontiguousarray(keys)
        keys = np.partition(keys.view(np.uint64), self.K - most, axis=1)[:, self.K - most:]
        return np.ascontiguousarray(keys).view(np.int64)

    def become_numbers(self, most):
        """The numbers of the best alone, int32 (n, K), -1 for none, in half the memory; the lists are given up."""
        if self.checkpoint is not None:
            self.checkpoint.give_up()
        numbers = np.empty((len(self.keys), min(self.K, most)), np.int32)
        for i in range(0, len(numbers), BLOCK):
            numbers[i:i + BLOCK] = nb.numbers(self.best(slice(i, i + BLOCK), most))
        self.keys = None
        return numbers

    def recall(self, sample, most):
        """Recall on the sample, as it would be if similarities of the best `most` were computed now."""
        return sample.recall_of_keys(self.best(self.position[sample.number], most), self.cells)


def memory_of_lists(n, K, in_file=False, rounds=True):
    """Bytes of K candidates for each of n nodes, and of a round: their copy, who has whom as a neighbour, how many these are,
    and the worst of each. Of lists in a file those of the nodes that are worked on at a time, at least one of MOST_PARTS."""
    return 12 * n + (8 * K * n // MOST_PARTS if in_file else (16 if rounds else 8) * K * n)


def memory_of_graph(n, k, d, in_file=False, rounds=True):
    """Bytes that build_knn_graph() takes for n vectors of d dimensions until it has candidates, on most data: codes, order and
    position, and then what a sample takes, or lists. With many neighbours cells are searched to the end, without rounds."""
    lists = memory_of_lists(n, usual_list(k, d), in_file, rounds and k <= MOST_WITH_ROUNDS)
    return 4 * n * nb.words_of_bytes(d) + 24 * n + max(SAMPLED, lists + WORKING)


def search_begun(cells, xq, k, recall=0.95, progress=silent, say=silent):
    """The k nearest of each of xq among the vectors of cells, with at least the given recall on a sample of xq.

    In two parts: this one needs the codes in cells; the function that it returns, which needs them no more, returns
    D, I, info (recall, exact, and nprobe where it is not).
    say: function that gets a line on how vectors are compared, where it is not by bytes of all dimensions.
    """
    Q, X = as_vectors(xq), cells.vectors
    if Q.n <= 2 * sampling.SAMPLE or compares_all(Q.n, X.n, X.d, X.device):
        found = *exact_search.exact_knn(Q, X, k, progress), {"recall": 1.0, "exact": True}
        return lambda: found
    sample = Sample(Q, X, k, 0, cells, progress, size=sampling.COMPLETION_SAMPLE)
    K = compared_by(sample, cells, recall, progress, say).needed(recall)
    curve = sample.recall_by_nprobe(cells, cells.position())
    p = cells_reaching(curve, with_margin(recall))
    queries = np.concatenate([Q.converted(cells.codes, i, j) for i, j in Q.blocks()])
    # queries of one cell after the other share what is read
    order = np.argsort(nearest_cell(queries, cells.C), kind="stable").astype(np.int32)
    keys = np.zeros((Q.n, K), np.int64)
    for i in range(0, Q.n, sampling.SEARCH_BLOCK):
        rows = slice(i, i + sampling.SEARCH_BLOCK)
        nb.search_cells(queries[order[rows]], cells.C, p, cells.begin, cells.stop, cells.X, keys[rows])
        progress("queries searched", min(i + sampling.SEARCH_BLOCK, Q.n), Q.n)

    def similarities():
        D, I = best_of(keys, Q, X, k, q_number=order, x_number=cells.order)
        return D, I, {"recall": sample.recall(D[sample.number]), "nprobe": p, "exact": False}

    return similarities
