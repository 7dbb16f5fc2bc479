"""build_graph.py, as a user runs it."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import build_graph
from graph_utils import neighbours as nb
from lowshot import exact_search, faiss_search, file_arrays, gpu_search, index_files, knn, machine, sampling
from lowshot.cells import Cells, Codes, Vectors
from lowshot.files import exclusive
from lowshot.index_files import Checkpoint, GraphFiles, read_index, write_ivf_flat
from lowshot.packages import faiss
from lowshot.script import silent
from vectors import clustered

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIM = 32


def make_raw(root, n, dim=DIM, seed=0, above=False):
    rs = np.random.RandomState(seed)
    x = (3 * rs.randn(15, dim)[rs.randint(0, 15, n)] + 2 * rs.randn(n, dim)).astype("<f4")
    folder = root / "features" / ("" if above else "f100m")
    os.makedirs(folder, exist_ok=True)
    x.tofile(folder / f"concatenated_PCAR{dim}.raw")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def run(root, *args, dim=DIM, env=None):
    return subprocess.run([sys.executable, os.path.join(ROOT, "build_graph.py"), *map(str, args), "--dim", str(dim)],
                          env={**os.environ, "DDIR": str(root), **(env or {})}, capture_output=True, text=True)


def read_graph(root, n, k):
    stem = os.path.join(root, "knngraph", f"ndis{n}_k{k}_")
    I = np.fromfile(stem + "I_11.int32", "<i4").reshape(n, k)
    return np.fromfile(stem + "D_11.float32", "<f4").reshape(n, k), I


def recall(I, x, k):
    want = np.argsort(-(x @ x.T), axis=1)[:, :k]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(I[:, :k], want)]) / k


def check_list(D, I, x):
    S = np.take_along_axis(x.astype("f8") @ x.T, np.maximum(I, 0).astype("i8"), 1)
    np.testing.assert_allclose(D[I >= 0], S[I >= 0], atol=1e-6)
    assert (np.diff(np.where(I < 0, -9, D), axis=1) <= 0).all()


def no_leftovers(root):
    return [f for f in os.listdir(root / "knngraph") if "partial" in f or "tmp" in f or f.startswith(".")] == []


@pytest.mark.parametrize("n,k,columns", [(400, 20, 32), (1, 1, 1), (5, 8, 8), (300, 32, 32)])
def test_small_sets_are_exact(tmp_path, n, k, columns):
    x = make_raw(tmp_path, 400)[:n]
    done = run(tmp_path, n, "--k", k)
    assert done.returncode == 0, done.stderr
    D, I = read_graph(tmp_path, n, columns)
    check_list(D, I, x)
    S = -np.sort(-(x.astype("f8") @ x.T), axis=1)[:, :columns]
    np.testing.assert_allclose(D[:, :S.shape[1]], S, atol=1e-6)
    assert (I[:, 0] == np.arange(n)).all() and (I[:, n:] == -1).all()
    index = faiss.read_index(str(tmp_path / "knngraph" / f"ndis{n}.index"))
    assert index.ntotal == n and index.metric_type == faiss.METRIC_INNER_PRODUCT
    np.testing.assert_allclose(index.reconstruct_n(0, n), x, atol=1e-6)
    assert "exact search" in done.stdout and no_leftovers(tmp_path)
    record = json.load(open(tmp_path / "logs" / "build_graph" / f"ndis{n}_k{columns}.json"))
    assert record["exact"] and record["peak_memory"] > 0


def test_vectors_may_stand_one_folder_up(tmp_path):
    make_raw(tmp_path, 50, above=True)
    assert run(tmp_path, 50).returncode == 0


def test_by_cells(tmp_path):
    x = make_raw(tmp_path, 4000)
    done = run(tmp_path, 4000, "--index", "IVF80,Flat", "--k", 10, "--recall", .97, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    D, I = read_graph(tmp_path, 4000, 16)
    check_list(D, I, x)
    assert recall(I, x, 16) > .96 and (I[:, 0] == np.arange(4000)).all()
    assert "recall@16 0.9" in done.stdout and no_leftovers(tmp_path)
    # the index is one that Faiss itself reads and searches
    index = faiss.read_index(str(tmp_path / "knngraph" / "ndis4000.index"))
    assert index.nlist == 80 and index.nprobe == 80
    found_D, _ = index.search(x[:300], 16)
    np.testing.assert_allclose(found_D, -np.sort(-(x[:300] @ x.T), axis=1)[:, :16], atol=1e-6)
    # a second run does nothing; without the graph it takes the index and gives the same
    assert "nothing to do" in run(tmp_path, 4000, "--index", "IVF80,Flat", "--k", 10).stdout
    os.unlink(tmp_path / "knngraph" / "ndis4000_k16_I_11.int32")
    before = os.path.getmtime(tmp_path / "knngraph" / "ndis4000.index")
    assert run(tmp_path, 4000, "--k", 10, "--recall", .97).returncode == 0
    assert before == os.path.getmtime(tmp_path / "knngraph" / "ndis4000.index")
    again = read_graph(tmp_path, 4000, 16)
    assert np.array_equal(again[1], I) and np.array_equal(again[0], D)


def test_a_stored_graph_is_never_replaced_unasked(tmp_path):
    """One that came without an index gets one; one of another size is an error."""
    make_raw(tmp_path, 500)
    assert run(tmp_path, 500, "--k", 8).returncode == 0
    folder = tmp_path / "knngraph"
    paths = [folder / "ndis500_k8_I_11.int32", folder / "ndis500_k8_D_11.float32"]
    before = [p.read_bytes() for p in paths]
    os.unlink(folder / "ndis500.index")
    done = run(tmp_path, 500, "--k", 8)
    assert done.returncode == 0 and "kept" in done.stdout and [p.read_bytes() for p in paths] == before
    assert faiss.read_index(str(folder / "ndis500.index")).ntotal == 500
    for path, content in zip(paths, before):
        path.write_bytes(content[:-4])
        done = run(tmp_path, 500, "--k", 8)
        assert done.returncode == 1 and "16000 (500 rows of 32) expected" in done.stderr and path.name in done.stderr
        assert path.read_bytes() == content[:-4]
        path.write_bytes(content)
    os.rename(paths[1], folder / "D")
    done = run(tmp_path, 500, "--k", 8)
    assert done.returncode == 1 and "has 0 bytes" in done.stderr and paths[0].read_bytes() == before[0]
    paths[0].write_bytes(before[0][:-4])
    files = {p: p.read_bytes() for p in folder.iterdir()}
    assert "4000 lists for 500 vectors" in run(tmp_path, 500, "--k", 8, "--overwrite", "--index", "IVF4000,Flat").stderr
    assert files == {p: p.read_bytes() for p in folder.iterdir()}       # nothing is lost before there is an index
    assert run(tmp_path, 500, "--k", 8, "--overwrite").returncode == 0
    assert [p.read_bytes() for p in paths] == before


def test_a_graph_that_another_run_completed_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
    make_raw(tmp_path, 300)
    assert run(tmp_path, 300, "--k", 8).returncode == 0
    path, aside = tmp_path / "knngraph" / "ndis300_k8_I_11.int32", tmp_path / "I"
    os.rename(path, aside)
    before = os.stat(aside).st_mtime_ns

    @contextlib.contextmanager
    def waited_for(lock):
        if aside.exists():
            os.rename(aside, path)
        yield

    monkeypatch.setattr(build_graph, "exclusive", waited_for)
    monkeypatch.setenv("DDIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_graph.py", "300", "--k", "8", "--dim", str(DIM)])
    build_graph.main()
    assert "was completed by another run meanwhile" in capsys.readouterr().out and os.stat(path).st_mtime_ns == before


def test_threads_do_not_change_the_graph(tmp_path):
    graphs = []
    for threads in ("1", "3"):
        root = tmp_path / threads
        make_raw(root, 3000)
        assert run(root, 3000, "--index", "IVF50,Flat", env={"OMP_NUM_THREADS": threads}).returncode == 0
        graphs.append(read_graph(root, 3000, 32))
    # similarities to rounding, as k-means sums in another order may; neighbours but for ties
    np.testing.assert_allclose(graphs[0][0], graphs[1][0], atol=1e-6)
    assert (graphs[0][1] == graphs[1][1]).mean() > .999


@pytest.mark.parametrize("factory,wanted", [("HNSW16", .9), ("IVF30,SQ8", .9), ("IVF30,PQ8", .4), ("PCA16,IVF20,Flat", 0)])
def test_other_indexes_are_searched_by_faiss(tmp_path, factory, wanted):
    """Whatever the index holds, the similarities are exact, each image is its own neighbour, and the graph is taken."""
    x = make_raw(tmp_path, 2000)
    done = run(tmp_path, 2000, "--index", factory, "--k", 8)
    assert done.returncode == 0, done.stderr
    D, I = read_graph(tmp_path, 2000, 8)
    assert ((I >= 0) & (I < 2000)).all() and recall(I, x, 8) >= wanted
    assert "recall@8" in done.stdout and no_leftovers(tmp_path)
    if factory != "HNSW16":         # which may miss an image itself
        check_list(D, I, x)
        assert (I[:, 0] == np.arange(2000)).mean() > .99
    assert "nothing to do" in run(tmp_path, 2000, "--index", factory, "--k", 8).stdout
    make_raw(tmp_path, 2000, seed=1)
    index = tmp_path / "knngraph" / "ndis2000.index"
    assert f"{index} was made from other vectors: remove it" in run(tmp_path, 2000, "--k", 4).stderr
    assert run(tmp_path, 2000, "--k", 4, "--overwrite").returncode == 0
    assert not os.path.exists(f"{index}.json")          # of an index that holds its vectors as they are


def test_an_index_is_searched_the_same_way_when_it_is_read_again(tmp_path):
    make_raw(tmp_path, 2000)
    graphs = []
    for _ in range(2):
        assert "nprobe 1: recall" in run(tmp_path, 2000, "--index", "IVF20_HNSW8,Flat", "--k", 8).stdout
        graphs.append(read_graph(tmp_path, 2000, 8))
        os.unlink(tmp_path / "knngraph" / "ndis2000_k8_I_11.int32")
    for a, b in zip(*graphs):
        np.testing.assert_array_equal(a, b)


def test_nprobe_without_cells_is_noted(tmp_path):
    make_raw(tmp_path, 100)
    assert "note: --nprobe 3 is of no use" in run(tmp_path, 100, "--nprobe", 3).stdout


def test_nprobe(tmp_path):
    x = make_raw(tmp_path, 3000)
    done = run(tmp_path, 3000, "--index", "IVF50,Flat", "--nprobe", 9999)         # as many as there are
    assert done.returncode == 0 and "round" not in done.stdout.replace("rounds", "") and "50 cells of 50 per node" in done.stdout
    assert recall(read_graph(tmp_path, 3000, 32)[1], x, 30) > .99


def killed_at_second_save(monkeypatch):
    """Run build_graph.py, killed when it has saved a part of the graph twice; the numbers of rows that this one and later runs
    save."""
    save, saved = GraphFiles.save, []

    def killed(self, done):
        save(self, done)
        saved.append(done)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(GraphFiles, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        build_graph.main()
    return saved


def test_a_killed_search_by_faiss_goes_on(tmp_path, monkeypatch):
    x = make_raw(tmp_path, 1000)
    monkeypatch.setattr(faiss_search, "BLOCK", 300)
    monkeypatch.setenv("DDIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_graph.py", "1000", "--index", "HNSW16", "--k", "8", "--dim", str(DIM)])
    saved = killed_at_second_save(monkeypatch)
    assert not os.path.exists(tmp_path / "knngraph" / "ndis1000_k8_I_11.int32")
    build_graph.main()
    assert saved == [300, 600, 900, 1000] and no_leftovers(tmp_path)
    assert recall(read_graph(tmp_path, 1000, 8)[1], x, 8) > .9


def test_similarities_of_coarse_indexes_where_vectors_do_not_fit_in_memory(tmp_path, monkeypatch, capsys):
    """The same graph, also where the run is killed while they are computed."""
    make_raw(tmp_path, 2000)
    monkeypatch.setenv("DDIR", str(tmp_path))
    arguments = ["build_graph.py", "2000", "--index", "IVF20,PQ8", "--k", "8", "--dim", str(DIM)]
    monkeypatch.setattr(sys, "argv", arguments)
    build_graph.main()
    want = read_graph(tmp_path, 2000, 8)
    monkeypatch.setattr(sys, "argv", [*arguments, "--overwrite"])
    monkeypatch.setattr(exact_search, "BLOCK", 300)
    monkeypatch.setattr(machine, "available_memory", lambda: 10 ** 5)
    best, calls = exact_search.nb.best_by_products, []

    def killed(*a):
        best(*a)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(exact_search.nb, "best_by_products", killed)
    with pytest.raises(KeyboardInterrupt):
        build_graph.main()
    monkeypatch.setattr(sys, "argv", arguments)
    capsys.readouterr()
    build_graph.main()
    assert "read in parts" in capsys.readouterr().out and len(calls) > 4 and no_leftovers(tmp_path)
    for a, b in zip(read_graph(tmp_path, 2000, 8), want):
        np.testing.assert_array_equal(a, b)


def test_files_made_anew_are_not_taken_for_those_of_an_earlier_state(tmp_path):
    paths = str(tmp_path / "I"), str(tmp_path / "D")
    files = GraphFiles(*paths, 6, 2, "a search by Faiss")
    files.arrays[0][:4] = 7
    files.save(4)
    assert GraphFiles(*paths, 6, 2, "a search by Faiss").done == 4
    assert GraphFiles(*paths, 6, 2, "a search of another index").done == 0
    files.save(4)
    assert GraphFiles(*paths, 6, 2, None).done == 0               # another way, whose run is then killed
    files = GraphFiles(*paths, 6, 2, "a search by Faiss")
    assert files.done == 0 and not files.arrays[0].any()


@pytest.mark.parametrize("stop", ["search", "block", "round"])
def test_a_killed_graph_by_cells_goes_on(tmp_path, monkeypatch, stop):
    """Killed after a checkpoint, or when a further block of lists is in the file and no checkpoint says so."""
    x = make_raw(tmp_path, 3000)
    monkeypatch.setattr(build_graph, "CHECKPOINT_FROM", 1000)
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    monkeypatch.setattr(sampling, "SEARCH_BLOCK", 1024)
    monkeypatch.setattr(knn, "ROUND", 0)
    monkeypatch.setenv("DDIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_graph.py", "3000", "--index", "IVF200,Flat", "--k", "16", "--recall", ".95",
                                      "--dim", str(DIM), "--device", "cpu"])
    save = Checkpoint.save
    states = []

    def killed(self, lists, searched, rounds, nprobe):
        if stop == "block" and searched == 2048 and not states.count((1024, "killed")):
            states.append((1024, "killed"))
            raise KeyboardInterrupt
        save(self, lists, searched, rounds, nprobe)
        self.wait()
        states.append((searched, lists.dtype))
        if states.count(states[-1]) == 1 and states[-1] == {"search": (2048, "i8"), "round": (3000, "i4")}.get(stop):
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        build_graph.main()
    assert not os.path.exists(tmp_path / "knngraph" / "ndis3000_k16_I_11.int32")
    done = list(states)
    build_graph.main()
    resumed = states[len(done):]
    assert done[:2] == [(1024, "i8"), (1024, "killed") if stop == "block" else (2048, "i8")]
    assert resumed[0] == {"search": (3000, "i8"), "block": (2048, "i8"), "round": (3000, "i4")}[stop]
    assert all(s[0] == 3000 for s in resumed[2:])
    assert no_leftovers(tmp_path)
    D, I = read_graph(tmp_path, 3000, 16)
    check_list(D, I, x)
    assert recall(I, x, 16) > .94 and all(len(set(row)) == 16 for row in I)


def test_a_killed_run_goes_on_to_the_same_graph(tmp_path, monkeypatch):
    """Killed among near cells, in a round, and among further cells; once, or again and again."""
    x, k = clustered(3000, d=64, spread=3.), 12
    monkeypatch.setattr(knn, "ROUND", 0)
    monkeypatch.setattr(sampling, "SEARCH_BLOCK", 600)
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    monkeypatch.setattr(knn, "REVERSE", 4)      # drawn anew in each round
    reaching = sampling.cells_reaching          # few further cells, and again more
    monkeypatch.setattr(knn, "cells_reaching", lambda curve, wanted: min(reaching(curve, wanted), 20))
    cells, search_cells, descent_round = Cells.train(Vectors(x), 100), nb.search_cells, nb.descent_round

    class Run:
        """A run that is killed at its step number `last`, if that is given."""

        def __init__(self, last=None):
            self.steps, self.last = [], last
            self.checkpoint = Checkpoint(str(tmp_path / "lists"), [1])
            monkeypatch.setattr(nb, "search_cells", self.search)
            monkeypatch.setattr(nb, "descent_round", self.round)
            with self.checkpoint:
                self.D, self.I, self.info = knn.build_knn_graph(cells, k, recall=.9, checkpoint=self.checkpoint)
            os.unlink(self.checkpoint.path)

        def step(self, what):
            self.checkpoint.wait()
            self.steps.append(what)
            if len(self.steps) - 1 == self.last:
                raise KeyboardInterrupt

        def search(self, *args, before, **how):
            self.step("further" if before else "search")
            search_cells(*args, before=before, **how)

        def round(self, X, keys, *args, started):
            def begun(lists):
                started(lists)
                before.append(keys.copy())
            before = []
            self.step("round")
            found = descent_round(X, keys, *args, started=begun)
            self.step("round done")
            keys[1500:] = before[0][1500:]      # it finds little, so that further cells are needed
            return found

        def same(self, other):
            return self.info == other.info and np.array_equal(self.I, other.I) and np.array_equal(self.D, other.D)

    def killed(last):
        with pytest.raises(KeyboardInterrupt):
            Run(last)

    whole = Run()
    names = [name for i, name in enumerate(whole.steps) if not i or name != whole.steps[i - 1]]
    assert names[:2] == ["search", "round"] and names.count("further") > 1 and len(names) > 8
    assert whole.info["recall"] >= .9 and recall(whole.I, x, k) >= .89
    further = [i for i, name in enumerate(whole.steps) if name == "further"]
    for last in (3, 6, further[3], further[-1]):
        killed(last)
        resumed = Run()
        done = len(whole.steps) - len(resumed.steps)
        assert resumed.steps == whole.steps[done:] and resumed.same(whole)
        again = whole.steps[done:last]      # a block, or a round and what followed it
        assert again.count("search") + again.count("round") <= 1
    for _ in range(4):
        killed(3)
    assert Run().same(whole)


def test_copies_are_of_lists_that_do_not_change_meanwhile():
    calls = []

    class Copies:
        def open(self, keys, X, empty):
            return 0, 0, 0

        def save(self, lists, *state):
            calls.append((lists.copy(), lists, *state))

        def give_up(self):
            calls.append("give up")

        def wait(self):
            calls.append("wait")

    cells = Cells.train(Vectors(clustered(600)), 30)
    cells.use(Codes())
    lists = knn.Lists(cells, cells.position(), 20, checkpoint=Copies())
    lists.search(2, silent)
    begin = nb.listed(lists.keys)
    assert (begin < 0).all()            # all is new
    assert lists.descend(32, 0, silent) > 0
    search, stop, started, wait = calls
    assert stop == "give up" and wait == "wait" and search[2:] == (600, 0, 2) and started[2:] == (600, 0, 2)
    assert np.array_equal(nb.listed(search[0]), begin)
    for array in started[:2]:
        assert np.array_equal(np.sort(array), np.sort(begin))


def test_index_and_checkpoint_of_something_else_are_not_taken(tmp_path, monkeypatch, capsys):
    X = nb.to_bytes(make_raw(tmp_path, 5))

    def opened(checkpoint, X=X):
        keys = np.zeros((5, 2), np.int64)
        return (keys, *checkpoint.open(keys, X))

    def another(identity=1):
        return Checkpoint(str(tmp_path / "lists"), [identity])

    checkpoint = another()
    keys, *state = opened(checkpoint)
    assert state == [0, 0, 0] and not keys.any()
    keys[:4] = np.sort(nb.search_all(X[:4], X, 2), axis=1)
    keys[1, 1] = 0              # none comes last
    keys[2] |= nb.NEW
    checkpoint.save(keys, 4, 1, 2)
    assert checkpoint.writer is None                    # it is not time yet
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    monkeypatch.setattr(Checkpoint, "PIECE", 24)
    checkpoint.save(keys, 4, 1, 2)
    checkpoint.wait()
    found, *state = opened(another())
    assert state == [4, 1, 2] and np.array_equal(np.sort(found, axis=1), np.sort(keys, axis=1))
    right = (tmp_path / "lists").read_bytes()
    for wrong, what in ((5, "out of range"), (5 - 2 ** 31, "out of range")):
        (tmp_path / "lists").write_bytes(right[:24] + np.int32(wrong).tobytes() + right[28:])
        with pytest.raises(ValueError, match=f"lists is damaged .*{what}.*: delete it"):
            opened(another())
    (tmp_path / "lists").write_bytes(right)
    # one that is given up, or has no room, leaves the one before
    wrong = np.zeros_like(keys)
    checkpoint.stopped.set()
    checkpoint.save(wrong, 4, 1, 2)
    checkpoint.wait()
    other = another()
    opened(other)
    for module, name, full in ((os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))),
                               (shutil, "disk_usage", lambda folder: SimpleNamespace(free=31))):
        with monkeypatch.context() as m:
            m.setattr(module, name, full)
            other.save(wrong, 4, 1, 2)
            other.wait()
        assert "note: no copy of the lists was written" in capsys.readouterr().out
        found, *state = opened(another())
        assert state == [4, 1, 2] and np.array_equal(np.sort(found, axis=1), np.sort(keys, axis=1))
        assert [f for f in os.listdir(tmp_path) if "lists" in f] == ["lists"]
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=32))        # four rows of two numbers
        # as a round lists them
        other.save(nb.listed(keys[::-1]), 5, 2, 3)
        other.wait()
        assert opened(another())[1:] == (4, 1, 2)       # five are too many
        other.save(nb.listed(keys), 4, 2, 3)
        other.wait()
    found, *state = opened(another())
    assert state == [4, 2, 3] and np.array_equal(np.sort(found, axis=1), np.sort(keys, axis=1))
    for found, *state in (opened(another(2)), opened(another(), nb.to_bfloat16(np.zeros((5, 32), np.float32)))):
        assert state == [0, 0, 0] and not found.any()
    x = make_raw(tmp_path, 40)
    index = faiss.IndexFlatL2(DIM)
    index.add(x)
    faiss.write_index(index, str(tmp_path / "l2.index"))
    with pytest.raises(ValueError, match="metric 1"):
        read_index(str(tmp_path / "l2.index"), 40, DIM)


def test_a_copy_that_is_not_whole_is_not_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "EVERY", 0)
    X, path = nb.to_bytes(np.eye(5, 32, dtype=np.float32)), tmp_path / "lists"

    def opened():
        return Checkpoint(str(path), [1]).open(np.zeros((5, 2), np.int64), X)

    checkpoint = Checkpoint(str(path), [1])
    checkpoint.open(np.zeros((5, 2), np.int64), X)
    checkpoint.save(np.zeros((5, 2), np.int64), 4, 1, 2)
    checkpoint.wait()
    assert opened() == (4, 1, 2)
    whole = path.read_bytes()
    for damaged in (whole[:40], whole[:60], whole[:24], b"", whole[:40] + b"[1]", whole[:40] + b"\xff", whole[8:]):
        path.write_bytes(damaged)
        assert opened() == (0, 0, 0)
    path.write_bytes(whole)
    (tmp_path / ".lists.123.tmp").write_bytes(b"x")         # of a run that was killed while it wrote
    assert opened() == (4, 1, 2) and os.listdir(tmp_path) == ["lists"]


def test_no_room_for_lists_in_a_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "knngraph").mkdir()
    keys = file_arrays.scratch(str(tmp_path / "knngraph"), (5, 2), np.int64)
    assert keys.shape == (5, 2) and not keys.any() and os.listdir(tmp_path / "knngraph") == []
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device: .*knngraph"):
        file_arrays.scratch(str(tmp_path / "knngraph"), 5, np.int32)


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 14])       # vectors in hand, of cells of about 20
def test_streamed_index_equals_that_of_faiss(tmp_path, monkeypatch, block):
    monkeypatch.setattr(index_files, "BLOCK", block)
    x = make_raw(tmp_path, 500)
    cells = Cells.train(Vectors(x), 25)
    write_ivf_flat(str(tmp_path / "a.index"), cells)
    quantizer = faiss.IndexFlatIP(DIM)
    quantizer.add(cells.centroids)
    index = faiss.IndexIVFFlat(quantizer, DIM, 25, faiss.METRIC_INNER_PRODUCT)
    index.is_trained, index.nprobe = True, 25
    for c in range(25):
        rows = cells.order[cells.begin[c]:cells.end[c]].astype("i8")
        codes = x[rows].view(np.uint8)
        index.invlists.add_entries(c, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes))
    index.ntotal = 500
    faiss.write_index(index, str(tmp_path / "b.index"))
    assert open(tmp_path / "a.index", "rb").read() == open(tmp_path / "b.index", "rb").read()


def break_nan(root):
    path = root / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw"
    x = np.fromfile(path, "<f4").reshape(-1, DIM)
    x[37, 3] = np.nan
    x.tofile(path)


def cut(path, nbytes):
    with open(path, "rb+") as f:
        f.truncate(nbytes)


def write_index_of(root, n, d):
    os.makedirs(root / "knngraph", exist_ok=True)
    index = faiss.IndexFlatIP(d)
    index.add(np.ones((n, d), np.float32))
    faiss.write_index(index, str(root / "knngraph" / "ndis100.index"))


@pytest.mark.parametrize("spoil,args,words", [
    (lambda r: break_nan(r), [100], "PCAR32.raw: row 37 holds NaN"),
    (lambda r: None, [101], "12800 bytes, at least 12928"),
    (lambda r: cut(r / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw", 12799), [90], "12799 bytes"),
    (lambda r: os.unlink(r / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw"), [90], "does not exist: python train_apply_pca.py"),
    (lambda r: write_index_of(r, 99, DIM), [100], "holds 99 vectors of 32"),
    (lambda r: write_index_of(r, 100, 7), [100], "holds 100 vectors of 7"),
    (lambda r: (write_index_of(r, 100, DIM), cut(r / "knngraph" / "ndis100.index", 900)), [100], "truncated or not a Faiss index"),
    (lambda r: write_index_of(r, 100, DIM), [100], "it was made from others: remove it and run build_graph.py again"),
    (lambda r: None, [100, "--index", "Nonsense"], "--index Nonsense"),
    (lambda r: None, [100, "--index", "IDMap,Flat"], "--index IDMap,Flat"),
    (lambda r: None, [100, "--index", "IVF101,Flat"], "101 lists for 100 vectors"),
    (lambda r: None, [100, "--index", "IVF0,Flat"], "0 lists for 100 vectors"),
    (lambda r: None, [0], "at least 1"),
    (lambda r: None, [100, "--k", 0], "at least 1"),
    pytest.param(lambda r: None, [100, "--device", "gpu"], "no GPU",
                 marks=pytest.mark.skipif(gpu_search.search_device() is not None, reason="there is a GPU")),
])
def test_bad_input_is_one_line(tmp_path, spoil, args, words):
    make_raw(tmp_path, 100)
    spoil(tmp_path)
    done = run(tmp_path, *args)
    assert done.returncode in (1, 2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_complete_graph_is_checked_and_its_index_too(tmp_path):
    make_raw(tmp_path, 300)
    raw = tmp_path / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw"
    x = np.fromfile(raw, np.float32).reshape(300, DIM)
    x[:, -2:] *= .2                 # two dimensions that change similarities by little more than .0005 on average
    x.tofile(raw)
    x[:, :-2].tofile(raw.with_name(f"concatenated_PCAR{DIM - 2}.raw"))
    assert run(tmp_path, 300, "--k", 8).returncode == 0
    stored = tmp_path / "knngraph" / "ndis300_k8_I_11.int32"
    right = stored.read_bytes()
    for wrong, said in ((b"\xff" * len(right), "row 0 lists no neighbour"),
                        (right[:4] + b"\0\0\1\0" + right[8:], "row 0 names a neighbour that is none of 300 nodes"),
                        (right[:7 * 32 + 8] + b"\xff" * 4 + right[7 * 32 + 12:], "row 7 has a gap between its neighbours")):
        stored.write_bytes(wrong)
        assert f"I_11.int32: {said}: --overwrite makes it again" in run(tmp_path, 300, "--k", 8).stderr
    stored.write_bytes(right)
    index = tmp_path / "knngraph" / "ndis300.index"
    os.truncate(index, 0)
    assert "truncated or not a Faiss index" in run(tmp_path, 300, "--k", 8).stderr
    os.unlink(index)
    made = run(tmp_path, 300, "--k", 8, "--index", "IVF5,Flat")
    assert made.returncode == 0, made.stderr
    whole = index.read_bytes()
    index.write_bytes(whole[:-1000] + np.random.RandomState(0).bytes(1000))
    assert "is damaged, or made from others" in run(tmp_path, 300, "--k", 8).stderr
    os.unlink(index)
    assert "in other dimensions; --overwrite" in run(tmp_path, 300, "--k", 8, dim=DIM - 2).stderr
    done = run(tmp_path, 300, "--k", 8)
    assert done.returncode == 0 and "and kept" in done.stdout and index.exists()


def test_damaged_indexes_are_named(tmp_path):
    """A quantizer of fewer cells than there are lists, and numbers that are none."""
    x, path = make_raw(tmp_path, 300), str(tmp_path / "knngraph" / "ndis300.index")
    os.mkdir(tmp_path / "knngraph")
    quantizer = faiss.IndexFlatIP(DIM)
    ivf = faiss.IndexIVFFlat(quantizer, DIM, 8, faiss.METRIC_INNER_PRODUCT)
    ivf.train(x)
    ivf.add(x)
    quantizer.reset()
    quantizer.add(x[:3])
    faiss.write_index(ivf, path)
    done = run(tmp_path, 300, "--k", 8)
    assert done.returncode == 1 and f"ndis300.index is damaged: it has 3 centroids of {DIM} dimensions for 8 lists" in done.stderr
    numbered = faiss.IndexIDMap(faiss.IndexFlatIP(DIM))
    numbered.add_with_ids(x, np.r_[:299, 10 ** 6])
    faiss.write_index(numbered, path)
    done = run(tmp_path, 300, "--k", 8)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "it numbers its 300 vectors 0 .. 1000000" in done.stderr


@pytest.mark.parametrize("given, recall", [(["524287"], .98), (["524288"], .95), (["10", "--recall", "0"], 0)])
def test_the_recall_that_is_wanted(monkeypatch, given, recall):
    monkeypatch.setattr(sys, "argv", ["build_graph.py", *given])
    assert build_graph.arguments().recall == recall


def test_a_stored_graph_of_lower_recall_is_named(tmp_path):
    make_raw(tmp_path, 1000)
    assert run(tmp_path, 1000, "--k", 8, "--index", "IVF40,Flat", "--nprobe", 1).returncode == 0
    assert "note: with recall 0." in run(tmp_path, 1000, "--k", 8).stdout
    assert "note" not in run(tmp_path, 1000, "--k", 8, "--recall", 0.01).stdout
    (tmp_path / "logs" / "build_graph" / "ndis1000_k8.json").write_text("[]")
    done = run(tmp_path, 1000, "--k", 8)
    assert done.returncode == 0 and "nothing to do" in done.stdout and "note" not in done.stdout


@pytest.mark.parametrize("index", ["Flat", "IVF20,Flat"])
def test_a_graph_of_other_vectors_is_not_taken_for_complete(tmp_path, index):
    make_raw(tmp_path, 300)
    assert run(tmp_path, 300, "--k", 8, "--index", index).returncode == 0
    done = run(tmp_path, 300, "--k", 8)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    x = make_raw(tmp_path, 300, seed=5)
    done = run(tmp_path, 300, "--k", 8)
    assert done.returncode == 1 and "made from other vectors; --overwrite makes it again" in done.stderr
    os.unlink(tmp_path / "knngraph" / "ndis300_k8_I_11.int32")
    assert "it was made from others: remove it" in run(tmp_path, 300, "--k", 8).stderr
    assert run(tmp_path, 300, "--k", 8, "--overwrite").returncode == 0
    assert recall(read_graph(tmp_path, 300, 8)[1], x, 8) > .99 and no_leftovers(tmp_path)


@pytest.mark.parametrize("fits", [True, False])
def test_an_index_that_gpus_take_or_not(tmp_path, monkeypatch, capsys, fits):
    """Faiss's calls for GPUs, answered on the CPU: an index that is refused there is not searched by Faiss here."""
    def to_gpus(index, co):
        assert co.shard
        if not fits:
            raise RuntimeError("Error: cudaMalloc error out of memory")
        return index

    x = make_raw(tmp_path, 1000)
    for name, value in (("get_num_gpus", lambda: 2), ("GpuMultipleClonerOptions", type("Options", (), {})),
                        ("GpuParameterSpace", faiss.ParameterSpace), ("index_cpu_to_all_gpus", to_gpus)):
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(gpu_search, "search_device", lambda name: None)
    monkeypatch.setenv("DDIR", str(tmp_path))
    words = ["build_graph.py", "1000", "--index", "IVF20,Flat", "--k", "8", "--dim", str(DIM)]
    monkeypatch.setattr(sys, "argv", words)
    build_graph.main()
    out = capsys.readouterr().out
    assert ("out of memory" in out) != fits and ("nprobe 1:" in out) == fits
    D, I = read_graph(tmp_path, 1000, 8)
    check_list(D, I, x)
    assert recall(I, x, 8) > .94 and no_leftovers(tmp_path)
    monkeypatch.setattr(sys, "argv", [*words, "--device", "gpu", "--overwrite"])
    if fits:
        build_graph.main()
    else:
        with pytest.raises(ValueError, match="--device gpu: .*out of memory"):
            build_graph.main()


def test_two_runs_do_not_write_one_graph(tmp_path):
    make_raw(tmp_path, 50)
    with exclusive(str(tmp_path / "knngraph" / "ndis50.index")):
        done = run(tmp_path, 50)
        assert done.returncode == 1 and "another process is writing" in done.stderr
    assert run(tmp_path, 50).returncode == 0 and no_leftovers(tmp_path)


@pytest.mark.parametrize("factory", ["IVF40,Flat", "IVF20_HNSW8,Flat", "IVF20,SQfp16"])
def test_zero_vectors_and_duplicates(tmp_path, factory):
    make_raw(tmp_path, 2000)
    path = tmp_path / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw"
    x = np.fromfile(path, "<f4").reshape(-1, DIM)
    x[100:300] = 0
    x[300:500] = x[7]
    x.tofile(path)
    done = run(tmp_path, 2000, "--index", factory, "--k", 8)
    assert done.returncode == 0, done.stderr
    D, I = read_graph(tmp_path, 2000, 8)
    assert (I == np.arange(2000)[:, None]).any(axis=1).all() and not D[100:300].any()
    np.testing.assert_allclose(D[300:500], 1, atol=1e-6)


def test_ddir_unset():
    env = {k: v for k, v in os.environ.items() if k != "DDIR"}
    done = subprocess.run([sys.executable, os.path.join(ROOT, "build_graph.py"), "10"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "DDIR" in done.stderr


@pytest.mark.parametrize("change", ["vectors", "nprobe", None])
def test_a_search_by_faiss_of_something_else_begins_anew(tmp_path, monkeypatch, change):
    make_raw(tmp_path, 1000)
    monkeypatch.setattr(faiss_search, "BLOCK", 300)
    monkeypatch.setenv("DDIR", str(tmp_path))
    words = ["build_graph.py", "1000", "--index", "IVF20,SQ8", "--k", "8", "--dim", str(DIM), "--nprobe", "2"]
    monkeypatch.setattr(sys, "argv", words)
    saved = killed_at_second_save(monkeypatch)
    if change == "vectors":
        os.utime(tmp_path / "features" / "f100m" / f"concatenated_PCAR{DIM}.raw", (1, 1))
    elif change == "nprobe":
        monkeypatch.setattr(sys, "argv", [*words[:-1], "3"])
    build_graph.main()
    assert saved == [300, 600, *([300, 600] if change else []), 900, 1000]


def test_the_graphs_files_are_on_disk_before_they_get_their_names_D_first(tmp_path, monkeypatch):
    files = GraphFiles(str(tmp_path / "I"), str(tmp_path / "D"), 6, 2, None)
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *a, call=getattr(os, name): calls.append(a[1:]) or call(*a))
    files.flush()
    files.finish()
    assert calls == [(), (), (str(tmp_path / "D"),), (str(tmp_path / "I"),)]


def test_what_links_lead_to_is_written(tmp_path):
    make_raw(tmp_path, 200)
    assert run(tmp_path, 200).returncode == 0
    far, names = tmp_path / "far", ["ndis200_k32_I_11.int32", "ndis200_k32_D_11.float32"]
    far.mkdir()
    for name in names:
        os.rename(tmp_path / "knngraph" / name, far / name)
        os.symlink(far / name, tmp_path / "knngraph" / name)
    x = make_raw(tmp_path, 200, seed=1)
    done = run(tmp_path, 200, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(far)) == sorted(names) and all((tmp_path / "knngraph" / name).is_symlink() for name in names)
    check_list(*read_graph(tmp_path, 200, 32), x)


def test_a_graph_that_is_there_has_its_own_record(tmp_path, monkeypatch):
    make_raw(tmp_path, 200)
    record = tmp_path / "logs" / "build_graph" / "ndis200_k32.json"
    (tmp_path / "logs").write_text("")
    done = run(tmp_path, 200)
    assert done.returncode == 1 and f"{record} cannot be written" in done.stderr and not (tmp_path / "knngraph").exists()
    (tmp_path / "logs").unlink()
    monkeypatch.setenv("DDIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_graph.py", "200", "--dim", str(DIM), "--overwrite"])
    build_graph.main()
    assert json.load(open(record))["exact"]
    record.write_text('{"recall": 0.5}')

    def killed(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(GraphFiles, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            build_graph.main()
    assert not record.exists()
    with monkeypatch.context() as m:
        m.setattr(GraphFiles, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            build_graph.main()
    assert json.load(open(record))["exact"] and not (tmp_path / "knngraph" / "ndis200_k32_I_11.int32").exists()

    def full(path, content):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(build_graph, "write_json", full)
    with pytest.raises(OSError, match="No space"):          # for the record: the graph is there all the same
        build_graph.main()
    check_list(*read_graph(tmp_path, 200, 32), make_raw(tmp_path, 200))


def test_an_index_of_many_cells_searches_256(tmp_path):
    write_ivf_flat(str(tmp_path / "a.index"), Cells.train(Vectors(make_raw(tmp_path, 400)), 300))
    assert faiss.read_index(str(tmp_path / "a.index")).nprobe == 256


def test_places_of_neighbours_that_were_not_found(tmp_path):
    make_raw(tmp_path, 1000)
    done = run(tmp_path, 1000, "--index", "IVF100_HNSW8,Flat", "--k", 32, "--nprobe", 1)
    assert done.returncode == 0, done.stderr
    D, I = read_graph(tmp_path, 1000, 32)
    assert (I < 0).any() and (D[I < 0] == -np.inf).all() and np.isfinite(D[I >= 0]).all()
