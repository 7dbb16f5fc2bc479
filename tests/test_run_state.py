"""lowshot/run_state.py: what a run is gone on from, and what not."""
import numpy as np
import pytest

from lowshot import run_state
from lowshot.run_state import RunState


def own():
    return {"W": np.ones((3, 4), np.float32), "step": np.arange(5)}


def test_state_comes_back(tmp_path):
    state = RunState(tmp_path / "r.json", {"seed": 1})
    assert state.load(own(), None) is None
    state.save({name: 2 * a for name, a in own().items()}, iteration=5)
    seen = []
    arrays, rest = RunState(tmp_path / "r.json", {"seed": 1}).load(own(), seen.append)
    assert rest == {"iteration": 5} and seen == [rest]
    assert all(a.dtype == own()[name].dtype and np.array_equal(a, 2 * own()[name]) for name, a in arrays.items())
    state.remove()
    assert not list(tmp_path.iterdir())


def test_state_of_another_run_is_told_and_not_taken(tmp_path, capsys):
    RunState(tmp_path / "r.json", {"seed": 1}).save(own())
    for name in ("s.json", "r.1", "r"):
        assert RunState(tmp_path / name, {"seed": 1}).load(own(), None) is None
    assert not capsys.readouterr().out
    assert RunState(tmp_path / "r.json", {"seed": 2}).load(own(), None) is None
    assert "is of a run of other arguments or files" in capsys.readouterr().out


def test_state_of_another_user(tmp_path, capsys, monkeypatch):
    state = RunState(tmp_path / "r.json", {})
    state.save(own())

    def denied(path, *rest):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(run_state, "open", denied, raising=False)
    monkeypatch.setattr(run_state, "remove", denied)
    assert state.load(own(), None) is None
    assert ".r.json.state.npz': this run begins anew" in capsys.readouterr().out
    state.remove()


def refuse(rest):
    raise KeyError("iteration")


@pytest.mark.parametrize("spoil", [
    lambda data: data[:300], lambda data: data.replace(b"W.npy", b"w.npy"), lambda data: b"",
    lambda data: data.replace(b"\x93NUMPY", bytes(6)), lambda data: data.replace(b"'<f4'", b"'<i4'"),
    lambda data: data.replace(np.ones(12, np.float32).tobytes(), np.zeros(12, np.float32).tobytes()), None])
def test_damaged_state_is_told_and_not_taken(tmp_path, capsys, spoil):
    state = RunState(tmp_path / "r.json", {"seed": 1})
    state.save(own())
    path = tmp_path / ".r.json.state.npz"
    if spoil:
        assert spoil(path.read_bytes()) != path.read_bytes()
        path.write_bytes(spoil(path.read_bytes()))
    assert state.load(own(), print if spoil else refuse) is None
    assert "r.json.state.npz is damaged" in capsys.readouterr().out


def test_other_shapes_are_not_taken(tmp_path, capsys):
    RunState(tmp_path / "r.json", {}).save({**own(), "W": np.ones((4, 3), np.float32)})
    assert RunState(tmp_path / "r.json", {}).load(own(), print) is None
    assert "W is float32 (4, 3)" in capsys.readouterr().out


def test_disk_that_takes_no_state_is_told_once(tmp_path, capsys):
    state = RunState(tmp_path / "none/r.json", {})
    (tmp_path / "none").write_text("a file")
    state.save(own())
    state.save(own())
    assert capsys.readouterr().out.count("no state was kept") == 1
