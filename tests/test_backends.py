"""Which backend is chosen; what they compute is tested by test_product.py and test_diffusion.py."""
import pytest
import torch

from lowshot import backends, machine
from lowshot.backends import MklGraph, OwnGraph, TorchGraph, TritonGraph, choose_backend


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that has 8 GB free."""
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    for name, value in (("is_available", True), ("device_count", 1), ("mem_get_info", (8 * 10 ** 9, 80 * 10 ** 9))):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: [])
    assert choose_backend("auto", "auto", 10, 5) is OwnGraph and choose_backend("auto", "cpu", 10, 5) is OwnGraph
    assert not backends.has_mkl() or choose_backend("mkl", "auto", 10, 5) is MklGraph
    assert choose_backend("torch", "auto", 10, 5).device == "cpu"


@pytest.mark.parametrize("triton,kind,too_many", [(None, TorchGraph, 10 ** 7), (True, TritonGraph, 10 ** 8)])
def test_a_gpu_is_taken_where_the_graph_fits(gpu, capsys, monkeypatch, triton, kind, too_many):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: triton)
    chosen = choose_backend("auto", "auto", 10 ** 6, 30)
    assert chosen.__base__ is kind and chosen.device == "cuda" and not capsys.readouterr().out
    assert choose_backend("auto", "auto", too_many, 30) is OwnGraph
    assert "of the GPU's memory do not hold the graph" in capsys.readouterr().out
    for name, device in (("torch", "auto"), ("auto", "cuda"), ("torch", "cuda:0")):         # who asks for it gets it
        assert issubclass(choose_backend(name, device, 10 ** 8, 30), TorchGraph)
    assert choose_backend("own", "auto", 10, 5) is OwnGraph and choose_backend("auto", "cpu", 10, 5) is OwnGraph


@pytest.mark.parametrize("name,device,message", [
    ("own", "cuda", "--backend own computes on the CPU, --device is cuda"), ("auto", "cuda:1", "sees 1 GPUs"),
    ("auto", "tpu", "--device is 'tpu'"), ("triton", "cpu", "triton computes on a GPU")])
def test_what_cannot_be(gpu, name, device, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(name, device, 10, 5)


def test_mkl_where_there_is_none(monkeypatch):
    monkeypatch.setattr(backends, "has_mkl", lambda: False)
    with pytest.raises(ValueError, match="--backend mkl: graph_utils was built without MKL"):
        choose_backend("mkl", "auto", 10, 5)
