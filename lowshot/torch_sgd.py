"""Training of many linear classifiers by SGD on the same mini-batches, by torch: logreg.py on GPUs."""
import numpy as np
import torch


class TorchClassifiers:
    """G linear classifiers of C classes with bias, trained side by side by SGD, one per (lr, wd) of `points`.

    Each starts at zero and follows torch.optim.SGD(lr, momentum=mom, weight_decay=wd) on the mean softmax loss, weight
    decay on the bias as well. Runs on any device; on a CPU graph_utils.FusedSGD does the same faster.
    """

    SCORED = 1024               # images whose scores are in memory at once

    def __init__(self, points, C, d, mom, device="cpu"):
        self.points, self.C, self.d, self.mom, self.device = points, C, d, mom, device
        G = len(points)
        self.W, self.M = (torch.zeros(G, C, d, device=device) for _ in range(2))
        self.b, self.mb = (torch.zeros(G, C, 1, device=device) for _ in range(2))
        self.lr, self.wd = (torch.tensor(v, dtype=torch.float32, device=device).view(G, 1, 1) for v in zip(*points))
        self.captured = None, None, None

    @staticmethod
    def together(batchsize):
        return 100

    def _scores(self, x):
        G, C = len(self.points), self.C
        return torch.mm(self.W.view(G * C, self.d), x.t()).view(G, C, len(x)) + self.b             # (G, C, B)

    def steps(self, X, images, classes, loss=False):
        """T iterations on the mini-batches X[images].

        X: float32 (n, d) tensor of this device; images, classes: int64 (T, B). loss: return the mean softmax loss of
        each point before each iteration, float64 (T, G).
        """
        images, classes = (torch.from_numpy(a).to(self.device) for a in (images, classes))
        if self.device != "cpu" and not loss:
            return self._replay(X, images, classes)
        losses = [self._step(X.index_select(0, i), y, loss) for i, y in zip(images, classes)]
        return torch.stack(losses).cpu().numpy() if loss else None

    def _replay(self, X, images, classes):
        """steps() on a GPU: as a CUDA graph, since to launch the kernels of an iteration takes longer than they do."""
        made_for, graph, now = self.captured
        if made_for != (X.data_ptr(), X.shape, images.shape[1]):
            # once by itself, for what is made when it is first needed
            self._step(X.index_select(0, images[0]), classes[0], False)
            now, graph = (images[0].clone(), classes[0].clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(X.index_select(0, now[0]), now[1], False)
            self.captured = (X.data_ptr(), X.shape, images.shape[1]), graph, now
            images, classes = images[1:], classes[1:]
        for i, y in zip(images, classes):
            now[0].copy_(i)
            now[1].copy_(y)
            graph.replay()

    def _step(self, x, y, loss):
        each = torch.arange(len(x), device=self.device)
        log_P = self._scores(x).log_softmax(1)
        P = log_P.exp()
        P[:, y, each] -= 1
        P /= len(x)
        self.M.view(-1, self.d).addmm_(P.view(-1, len(x)), x, beta=self.mom)
        self.mb.mul_(self.mom).add_(P.sum(2, keepdim=True))
        for w, m in ((self.W, self.M), (self.b, self.mb)):
            m.addcmul_(w, self.wd)
            w.addcmul_(m, self.lr, value=-1)
        return -log_P[:, y, each].double().mean(1) if loss else None

    def ranks(self, X, labels, store=None):
        """How many classes score above each image's own one, or equally with a lower number: int64 (G, m).

        X: float32 (m, d) tensor, labels: int (m,). A NaN score of its own ranks an image last. store: a list of G
        arrays (m, C) that receive the scores, or None.
        """
        labels = torch.as_tensor(labels, device=self.device).long()
        out = np.empty((len(self.points), len(X)), np.int64)
        number = torch.arange(self.C, device=self.device)[:, None]
        for i in range(0, len(X), self.SCORED):
            block = slice(i, i + self.SCORED)
            y = labels[block]
            scores = self._scores(X[block].to(self.device))
            own = scores.gather(1, y.expand(len(scores), 1, -1))
            ranks = ((scores > own) | ((scores == own) & (number < y))).sum(1)
            ranks[own[:, 0].isnan()] = 2 ** 31 - 1
            out[:, block] = ranks.cpu().numpy()
            for g, s in enumerate(scores if store is not None else ()):
                store[g][block] = s.t().cpu().numpy()
        return out

    def top(self, X, labels, most=5):
        """Whether fewer than `most` classes rank before each image's own one, bool (G, m); X, labels as for ranks()."""
        return self.ranks(X, labels) < most

    def weights(self, g):
        """(W float32 (C, d), b float32 (C,)) of point g, numpy."""
        return self.W[g].cpu().numpy(), self.b[g, :, 0].cpu().numpy()

    def state(self):
        """Everything that training goes on from, shaped as that of FusedSGD."""
        n = len(self.points) * self.C
        return {k: getattr(self, k).view(shape).cpu().numpy()
                for k, shape in (("W", (n, self.d)), ("M", (n, self.d)), ("b", n), ("mb", n))}

    def restore(self, state):
        for k in ("W", "M", "b", "mb"):
            tensor = getattr(self, k)
            tensor.copy_(torch.from_numpy(state[k]).view(tensor.shape))
