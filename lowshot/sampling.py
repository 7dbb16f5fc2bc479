"""Recall of neighbours as measured on a sample by exact search, and what it takes to reach one: candidates, cells, codes."""
from dataclasses import dataclass

import numpy as np

from graph_utils import neighbours as nb
from lowshot import exact_search
from lowshot.cells import Codes, as_vectors, main_directions, nearest_cells
from lowshot.exact_search import best_and_unsure, best_of
from lowshot.script import silent, size

SAMPLE = 1000               # queries that recall is measured on: its standard error is about .003
COMPLETION_SAMPLE = SAMPLE // 2     # the same of base images, and of test images
CODES_SAMPLE = 4            # of these, every fourth tells what codes lose
CODES_AT_ONCE = 25          # so many of them at a time
BYTES_ERR = 10              # standard errors by which products of bytes are taken to err at the most
SPARE_LISTED = 8            # candidates beyond k at least, where nothing is proven
SEARCH_BLOCK = 1 << 19      # queries between reports; groups of queries that share few cells are largest from this number on
REVERSE = 32                # reverse neighbours that take part in a round of neighbours-of-neighbours; twice as many
                            # where lists are longer
MISSED = .001               # recall that may be lost where the nearest cells are looked for among few
WIDE_LEAST = 64             # how long longer lists (knn.WIDE_FROM) are at least


def sampled(n, size, seed):
    """Numbers of `size` of n vectors, or of all, increasing. They are drawn as nobody else draws: of data that were made with
    the same seed the sample might be all the copies, say, and tell nothing of the others."""
    return np.sort(np.random.RandomState([seed, *b"sample"]).choice(n, min(size, n), replace=False))


class Sample:
    """Some of `vectors`, of those from number `first` on, and their true neighbours among the Vectors X.

    number int32 (m,); D, I: their k nearest by exact search. candidates: int64 (m, k + MANY_SPARE), the nearest by products in
    bytes, in no order; in very tight clusters these miss some of the k nearest.
    cells: Cells of X, which get the vectors in bytes of all dimensions, if they do not hold them; these serve to find candidates,
    and products are taken to err by BYTES_ERR standard errors at the most.
    """

    def __init__(self, vectors, X, k, seed, cells, progress=silent, size=SAMPLE, first=0):
        self.number = (first + sampled(vectors.n - first, size, seed)).astype(np.int32)
        self.k, self.X = k, X
        self.x = vectors.scaled_rows(self.number)
        Q = as_vectors(self.x)
        # in tight clusters the errors of candidates leave many in doubt, and float32 is slow
        K = k + exact_search.MANY_SPARE
        keys, error = self._by_bytes(Q, X, K, cells, progress)
        self.candidates = nb.numbers(keys)
        self.D, self.I, unsure = best_and_unsure(keys, error, Q, X, k)
        self.D[unsure], self.I[unsure] = exact_search.exact_knn(self.x[unsure], X, k, progress, spare=exact_search.MANY_SPARE)

    @staticmethod
    def _by_bytes(Q, X, K, cells, progress):
        """(keys, error) as exact_search.candidates_for(). A step of bytes errs like a uniform variable, of variance 1 / 12."""
        if cells.X is None or not cells.codes.plain:
            cells.use(Codes(), progress)
        keys, queries = np.zeros((Q.n, min(K, X.n)), np.int64), Q.converted(cells.codes, 0, Q.n)
        step = 0.0
        for i in range(0, X.n, SEARCH_BLOCK):
            part = cells.X[i:i + SEARCH_BLOCK]
            nb.search_all(queries, part, keys.shape[1], keys, i)
            step = max(step, float(part[:, -1].copy().view(np.float32).max()))
            progress("vectors compared with a sample", i + len(part), X.n)
        variance = (queries[:, -1].copy().view(np.float32) * X.longest) ** 2 + (step * Q.longest) ** 2
        numbers = nb.numbers(keys)
        keys = nb.make_keys(nb.similarities(keys), np.where(numbers < 0, -1, cells.order[numbers]))
        return keys, BYTES_ERR * np.sqrt(variance / 12).astype(np.float32)

    def recall_by_nprobe(self, cells, position, listed=None):
        """Share of the true neighbours in the nprobe nearest cells, float64 (nlist,): for nprobe = 1, 2, ...

        listed: bool (m, nlist), cells of which the nearest are taken; all if None.
        """
        nlist = len(cells.centroids)
        far = -cells.codes.projected(self.x) @ cells.codes.projected(cells.centroids).T
        if listed is not None:
            far[~listed] = np.inf
        cell = cells.cell_of(position[np.maximum(self.I, 0)])
        mine = np.take_along_axis(far, cell, 1)
        far.sort(axis=1)
        rank = np.stack([np.searchsorted(row, x) for row, x in zip(far, mine)])
        found = rank[(self.I >= 0) & np.isfinite(mine)]
        return np.cumsum(np.bincount(found, minlength=nlist)) / max(1, (self.I >= 0).sum())

    def near_cells(self, cells, position, nprobe, recall):
        """For each cell those near it among which a node of its own finds the nprobe nearest, int32 (nlist, m): so many that no
        more of the sample's true neighbours are lost by it than MISSED. None where that saves little.

        recall: that of the nprobe nearest of all cells.
        """
        nlist = len(cells.centroids)
        C = cells.codes.projected(cells.centroids)
        similar = C[cells.cell_of(position[self.number])] @ C.T
        m = 2 * nprobe
        while m <= nlist // 4:
            least = -np.partition(-similar, m - 1, axis=1)[:, m - 1:m]
            if self.recall_by_nprobe(cells, position, similar >= least)[nprobe - 1] >= recall - MISSED:
                return nearest_cells(cells.C, cells.C, m)
            m *= 2
        return None

    def compared(self, choices, longest):
        """A Comparison for each of some codes, with at most `longest` candidates."""
        found, errors, true = np.zeros((len(choices), longest)), [[] for _ in choices], 0
        chosen = np.arange(0, len(self.number), CODES_SAMPLE)
        for rows in np.split(chosen, range(CODES_AT_ONCE, len(chosen), CODES_AT_ONCE)):
            numbers = self.candidates[rows]         # as many for each
            x = self.X.scaled_rows(numbers.ravel())
            coded = [(codes(self.x[rows]), codes(x)) for codes in choices]
            for r, i in enumerate(rows):
                mine = slice(r * numbers.shape[1], (r + 1) * numbers.shape[1])
                products = np.einsum("ij,j->i", x[mine], self.x[i])
                k = np.count_nonzero(self.I[i] >= 0)
                true += k
                for choice, (q_codes, x_codes) in enumerate(coded):
                    keys = nb.search_all(q_codes[r:r + 1], x_codes[mine], numbers.shape[1])[0]
                    keys = np.sort(keys.view(np.uint64))[::-1].view(np.int64)
                    exact = products[nb.numbers(keys)]
                    errors[choice].append((nb.similarities(keys) - exact).std())
                    near = np.cumsum(exact[:longest] >= self.D[i, k - 1] - 1e-6)
                    found[choice, :len(near)] += np.minimum(near, k)
                    found[choice, len(near):] += min(near[-1], k)
        return [Comparison(codes, self.k, curve, float(np.sqrt(np.mean(np.square(e)))))
                for codes, curve, e in zip(choices, found[:, self.k - 1:] / true, errors)]

    def recall_of_keys(self, keys, cells):
        """recall() of the best of candidates, int64 (m, K)."""
        return self.recall(best_of(keys, as_vectors(self.x), cells.vectors, self.k, x_number=cells.order)[0])

    def recall(self, D):
        """Share of the true neighbours found, given the similarities of what was found; equals count as found, and what differs
        by no more than 1e-6, as sums in float32 do: of many copies of an image any are."""
        have = self.I >= 0
        last = np.where(have, self.D, np.inf).min(axis=1)
        found = (D[:, :self.k] >= last[:, None] - 1e-6) & have
        return float(found.sum() / max(1, have.sum()))


def with_margin(recall):
    """What is to be measured on a sample for that recall: a little more, as samples err, less so near 1."""
    return recall + min(.005, (1 - recall) / 4)


def cells_reaching(curve, wanted):
    """The smallest p with curve[p - 1] >= wanted, or the number of cells."""
    reached = np.flatnonzero(curve >= wanted)
    return int(reached[0]) + 1 if len(reached) else len(curve)


@dataclass
class Comparison:
    """What comparing vectors by codes loses, as measured on a sample.

    k: neighbours that are wanted; curve: share of them among the best K by codes, for K = k, k + 1, ...; error: standard
    error of products of codes.
    """
    codes: Codes
    k: int
    curve: np.ndarray
    error: float

    def lost(self, K):
        """Recall that is lost where K candidates are kept."""
        return 1 - float(self.curve[min(K - self.k, len(self.curve) - 1)])

    def needed(self, recall):
        """Candidates per node, a few more than neighbours, so that codes cost a quarter of what recall leaves at most; the
        most there may be, where that is not enough."""
        most = self.k + len(self.curve) - 1
        return next((K for K in range(self.k + SPARE_LISTED, most, 8) if self.suffices(recall, K)), most)

    def suffices(self, recall, K):
        return self.lost(K) <= (1 - recall) / 4

    def cost(self, recall, d):
        """Of the rounds of neighbours-of-neighbours, to compare with that of others; infinite where recall is out of reach."""
        K = self.needed(recall)
        return self.codes.words(d) * (K + REVERSE) ** 2 if self.suffices(recall, K) else np.inf


def compared_by(sample, cells, recall, progress, say, half=True):
    """The Comparison that is the cheapest for this recall; cells then hold the vectors by its codes.

    Bytes of half the dimensions or of all; where vectors differ by hardly more than bytes do, as in clusters of nearly the
    same image, bfloat16, and where that is too coarse as well, float32. Codes that were chosen before are kept if they serve
    this sample too. half: whether half the dimensions may do.
    """
    d, longest = sample.x.shape[1], longest_list(sample.k)
    if cells.chosen and (half or cells.codes.transform is None):
        [now] = sample.compared([cells.codes], longest)
        if now.codes.format == "float32" or now.suffices(recall, now.needed(recall)):
            return now
    m, choices = half_dimensions(d), [cells.codes if cells.codes is not None and cells.codes.plain else Codes()]
    if half and m < d:
        choices.append(Codes("bytes", main_directions(cells.vectors, m)))
    best = min(sample.compared(choices, longest), key=lambda c: c.cost(recall, d))
    if best.cost(recall, d) == np.inf:
        finer = sample.compared([Codes("bfloat16"), Codes("float32")], longest)
        best = next((c for c in finer if c.cost(recall, d) < np.inf), finer[-1])
        more = 4 * cells.n * (best.codes.words(d) - Codes().words(d))
        say(f"vectors are nearly the same: compared in {best.codes.format}, slower and in {size(more)} more memory than bytes")
    elif best.codes.transform is not None:
        say(f"vectors are compared in {m} of {d} dimensions, {best.needed(recall)} candidates are kept for each")
    if best.codes is not cells.codes:
        cells.use(best.codes, progress)
    cells.chosen = True
    return best


def longest_list(k):
    """Candidates per node, at most, while a graph of k neighbours is built."""
    return max(2 * k, WIDE_LEAST)


def usual_list(k, d):
    """The same as it is on most data, to tell how much memory a graph is going to take: more where half of the d dimensions
    may be compared."""
    return max(k + k // 2, WIDE_LEAST) if half_dimensions(d) < d else k + SPARE_LISTED


def half_dimensions(d):
    """Dimensions that are compared where half of d do: a multiple of 64."""
    return -(-d // 128) * 64
