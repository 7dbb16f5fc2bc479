"""Training of many linear classifiers by SGD on the same mini-batches, in few passes over their parameters."""
import numpy as np

from graph_utils import core
from graph_utils.neighbours import to_bfloat16
from graph_utils.product import aligned_zeros

TILE = 32               # rows and columns are padded to multiples of it
TOGETHER = 256          # images of the mini-batches that share a pass over the parameters
MOST = 16               # mini-batches that share a pass
ARITHMETICS = {"float32": core.kFloat32, "split": core.kSplit, "bfloat16": core.kBfloat16}


def padded(n, multiple=TILE):
    return -(-n // multiple) * multiple


def padded_images(n, arithmetic="split"):
    """Images of a mini-batch of n with padding."""
    return padded(n, core.sgd_multiple(ARITHMETICS[arithmetic]))


def rounding_norms(x):
    """For each row of x float32 (n, d) its norm and that of what rounding to bfloat16 takes from it, float32 (n, 2): a little
    more, as x rounded may be longer than x by 2^-9."""
    lost = np.empty(len(x), np.float32)
    to_bfloat16(x, residual=lost)
    return np.stack([np.sqrt(np.einsum("ij,ij->i", x, x)), lost], axis=1) * np.float32(1 + 2 ** -8)


class FusedSGD:
    """G linear classifiers of C classes with bias, trained side by side by SGD, one per (lr, wd) of `points`.

    Each starts at zero and follows torch.optim.SGD(lr, momentum=mom, weight_decay=wd) on the mean softmax loss,
    weight decay on the bias as well:

        M <- mom M + gradient + wd W,    W <- W - lr M.

    W and M (8 G C d bytes) are too large for the caches, so T mini-batches share one pass over them. While their
    gradients are unknown, W and M only decay, linearly: after t steps W is alpha_t W + beta_t M, and a gradient g of
    step s adds c_{t-s} g to it. As g = P^T X_s, with P = (softmax - one-hot) / B, the logits of mini-batch t are

        Z_t = X_t (alpha_t W + beta_t M)^T + sum over s < t of c_{t-s} (X_t X_s^T) P_s.

    The pass computes the first part for all t, and the sum needs the T mini-batches only: their inner products, the
    same for all classifiers. The gradients are applied, one after the other as above, in the next pass. The bias is
    the weight of a feature that is one. Results equal those of single steps up to rounding.

    arithmetic: of the products. "split": float32, by AMX tiles where the CPU has them (each number as the sum of two in
    bfloat16); "float32": without these; "bfloat16": factors are rounded to 8 binary digits in training, parameters and
    sums remain float32, and ranks() and top() are as without.
    """

    SCORED = 256        # images whose scores are computed at a time

    def __init__(self, points, C, d, mom, arithmetic="split"):
        self.points, self.C, self.d, self.mom, self.arithmetic = points, int(C), int(d), mom, arithmetic
        self.exact = "split" if arithmetic == "bfloat16" else arithmetic
        G = len(points)
        if min(G, self.C, self.d) < 1:
            raise ValueError(f"{G} points, {C} classes and {d} columns: at least one of each expected")
        self.rows, self.dpad = padded(G * self.C), padded(self.d)
        self.W, self.M = (aligned_zeros((self.rows, self.dpad)) for _ in range(2))
        self.b, self.mb = (np.zeros(self.rows, np.float32) for _ in range(2))
        self.lr, self.wd = np.array(points, np.float32).reshape(G, 2).T.copy()
        self.screens = core.sgd_has_bfloat16()
        self.pending = None             # (T, Bpad, X, P) whose gradients W and M lack
        self.memory_of, self.factors, self.turn = {}, {}, 0

    @staticmethod
    def together(batchsize):
        """T, the number of mini-batches that share a pass."""
        return min(max(TOGETHER // padded_images(batchsize), 1), MOST)

    def ahead(self, T):
        """(alpha_t, beta_t) of t = 0 .. T - 1, float32 (G, T, 2), and c_1 .. c_T, float32 (G, T)."""
        if T not in self.factors:
            alpha, beta = np.ones(len(self.points)), np.zeros(len(self.points))
            lr, wd = np.array(self.points, np.float64).reshape(-1, 2).T
            factors, response = [], []
            m_of_w, m_of_m = np.zeros(len(lr)), np.ones(len(lr))      # M is m_of_w W + m_of_m M
            with np.errstate(over="ignore", invalid="ignore"):        # of rates at which training diverges
                for _ in range(T):
                    factors.append((alpha, beta))
                    response.append(beta - lr * alpha)                # the gradient is -lr W and M at once
                    m_of_w, m_of_m = self.mom * m_of_w + wd * alpha, self.mom * m_of_m + wd * beta
                    alpha, beta = alpha - lr * m_of_w, beta - lr * m_of_m
                self.factors[T] = (np.ascontiguousarray(np.transpose(factors, (2, 0, 1)), np.float32),
                                   np.ascontiguousarray(np.transpose(response), np.float32))
        return self.factors[T]

    @staticmethod
    def memory(G, C, d, batchsize):
        """Bytes that G classifiers take at most, in training and evaluation."""
        rows, dpad, T = padded(G * C), padded(d), FusedSGD.together(batchsize)
        Bpad = padded_images(batchsize)
        images = max(T * Bpad, FusedSGD.SCORED)
        scratch = max(core.sgd_scratch(G, C, dpad, 1, FusedSGD.SCORED), core.sgd_scratch(G, C, dpad, T, Bpad))
        rounded = 2 * rows * dpad if core.sgd_has_bfloat16() else 0        # of W, for rounding_norms()
        return 8 * rows * (dpad + 1) + 2 * 4 * images * (rows + dpad) + scratch + rounded

    def _space(self, name, size, dtype=np.float32):
        """`size` items of memory that is kept between calls, zeros at first."""
        if len(self.memory_of.get(name, ())) < size:
            self.memory_of[name] = aligned_zeros(size, dtype)
        return self.memory_of[name][:size]

    def _scratch(self, T, Bpad):
        return self._space("scratch", core.sgd_scratch(len(self.points), self.C, self.dpad, T, Bpad), np.uint8)

    def _gather(self, X, images, Bpad):
        """X[images] padded to float32 (T Bpad, dpad); images: int64 (T, B)."""
        if X.ndim != 2 or X.shape[1] != self.d or X.dtype != np.float32:
            raise ValueError(f"X is {X.dtype} {X.shape}, float32 (n, {self.d}) expected")
        T, B = images.shape
        self.turn = 1 - self.turn       # the mini-batches of the last call may be pending
        out = self._space(("X", self.turn), T * Bpad * self.dpad).reshape(T, Bpad, self.dpad)
        out[:, B:] = 0
        core.gather_batches(len(X), self.d, X, images.size, images, B, Bpad, self.dpad, out)
        return out

    def _pass(self, arithmetic, T=0, Bpad=0, X=None):
        """Apply what is pending; returns the logits of T mini-batches X, as if their gradients were zero."""
        T0, Bpad0, X0, P = self.pending or (0, 0, None, None)
        Z = self._space(("Z", self.turn), self.rows * T * Bpad) if T else None
        core.sgd_pass(len(self.points), self.C, self.dpad, self.mom, self.lr, self.wd, self.W, self.M, self.b, self.mb,
                      T0, Bpad0, X0, P, T, Bpad, X, self.ahead(T)[0] if T else None, Z,
                      ARITHMETICS[arithmetic], self._scratch(max(T, T0), max(Bpad, Bpad0)))
        self.pending = None
        return Z

    def flush(self):
        """Bring W, M, b and mb up to date."""
        if self.pending:
            self._pass(self.arithmetic)

    def steps(self, X, images, classes, loss=False):
        """T iterations on the mini-batches X[images]; best in groups of together(B).

        X: float32 (n, d); images, classes: int64 (T, B). loss: return the mean softmax loss of each point before each
        iteration, float64 (T, G).
        """
        images, classes = (np.ascontiguousarray(a, np.int64) for a in (images, classes))
        if images.ndim != 2 or images.shape != classes.shape or not images.size:
            raise ValueError(f"images {images.shape} and classes {classes.shape} must both be (T, B)")
        (T, B), Bpad = images.shape, padded_images(images.shape[1], self.arithmetic)
        if classes.min() < 0 or classes.max() >= self.C:
            raise ValueError(f"a class is not in 0 .. {self.C - 1}")
        x = self._gather(X, images, Bpad)
        Z = self._pass(self.arithmetic, T, Bpad, x)
        losses = np.empty((T, len(self.points), B)) if loss else None
        core.sgd_gradients(len(self.points), self.C, self.dpad, T, B, Bpad, x, classes, self.ahead(T)[1], Z, losses,
                           ARITHMETICS[self.arithmetic], self._scratch(T, Bpad))
        self.pending = T, Bpad, x, Z
        return losses.mean(2) if loss else None

    @staticmethod
    def _labels(X, labels):
        labels = np.ascontiguousarray(labels, np.int64)
        if labels.shape != (len(X),):
            raise ValueError(f"labels {labels.shape} for {len(X)} images")
        return labels

    def _scores(self, X, arithmetic):
        """Yield (a slice of X, its rows padded to (Bpad, dpad), their logits Z (rows Bpad)) until all of X had its turn."""
        for i in range(0, len(X), self.SCORED):
            images = np.arange(i, min(i + self.SCORED, len(X)))
            Bpad = padded_images(len(images), arithmetic)
            x = self._gather(X, images[None], Bpad)[0]
            yield slice(i, i + len(images)), x, self._pass(arithmetic, 1, Bpad, x)

    def ranks(self, X, labels, store=None):
        """How many classes score above each image's own one, or equally with a lower number: int32 (G, m).

        X: float32 (m, d), labels: int (m,). A NaN score of its own ranks an image last. store: a list of G arrays
        (m, C) that receive the scores, or None.
        """
        self.flush()
        G, labels = len(self.points), self._labels(X, labels)
        out = np.empty((G, len(X)), np.int32)
        for part, x, Z in self._scores(X, self.exact):
            n, Bpad = len(labels[part]), len(x)
            some = np.empty((G, n), np.int32)
            core.ranks_of(G, self.C, n, Bpad, Z, labels[part], some)
            out[:, part] = some
            for g in range(G if store is not None else 0):
                store[g][part] = Z.reshape(self.rows, Bpad)[g * self.C:(g + 1) * self.C, :n].T
        return out

    def top(self, X, labels, most=5):
        """Whether fewer than `most` classes rank before each image's own one, bool (G, m); X, labels as for ranks().

        Where the CPU multiplies bfloat16 faster, scores are computed in it, with bounds of their errors; only where
        these leave an answer open, the scores in doubt are computed again.
        """
        if not self.screens:
            return self.ranks(X, labels) < most
        self.flush()
        G, labels = len(self.points), self._labels(X, labels)
        w_norms, out = rounding_norms(self.W), np.empty((G, len(X)), np.uint8)
        for part, x, Z in self._scores(X, "bfloat16"):
            n, Bpad = len(labels[part]), len(x)
            some = np.empty((G, n), np.uint8)
            core.top_of(G, self.C, self.dpad, n, Bpad, most, Z, x, rounding_norms(x), self.W, self.b, w_norms, labels[part],
                        self.C * n // 8, some)
            if (some == core.kUnknown).any():           # scores too close, or not finite
                some = np.where(some == core.kUnknown, self.ranks(X[part], labels[part]) < most, some)
            out[:, part] = some
        return out.astype(bool)

    def weights(self, g):
        """(W float32 (C, d), b float32 (C,)) of point g."""
        self.flush()
        rows = slice(g * self.C, (g + 1) * self.C)
        return self.W[rows, :self.d].copy(), self.b[rows].copy()

    def _parameters(self):
        n = len(self.points) * self.C
        return {"W": self.W[:n, :self.d], "M": self.M[:n, :self.d], "b": self.b[:n], "mb": self.mb[:n]}

    def state(self):
        """Everything that training goes on from, as views of the parameters."""
        self.flush()
        return self._parameters()

    def restore(self, state):
        self.pending = None
        for name, view in self._parameters().items():
            view[...] = state[name]
