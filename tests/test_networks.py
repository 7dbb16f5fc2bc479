import argparse
import copy
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from lowshot.networks import NETWORKS, load_checkpoint, make_network, save_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPES = os.path.join(os.path.dirname(__file__), "data", "checkpoint_shapes.json")


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2's pickle wrote at protocol 2: strings as bytes, OrderedDict from a list of pairs."""
    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        data = text.encode("latin1")
        self.write(b"U" + struct.pack("<B", len(data)) + data if len(data) < 256
                   else b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = save_str


def python2_checkpoint(path, state, epoch=89, location="cuda:0", truncate=0):
    """Write {'epoch', 'state'} as PyTorch 0.2 did: five pickles, then each storage's length and numbers.

    Tensors were on a GPU, were rebuilt by a function of few arguments, and had no batch counters.
    """
    tensors = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    keys = {name: str(10 ** 8 + i) for i, name in enumerate(tensors)}

    class Storage:
        def __init__(self, name):
            self.name = name

    class Tensor:
        def __init__(self, name):
            self.name = name

        def __reduce__(self):
            t = tensors[self.name]
            return torch._utils._rebuild_tensor, (Storage(self.name), 0, tuple(t.shape), tuple(t.stride()))

    class Pickler(Python2Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return ("storage", torch.cuda.FloatStorage, keys[thing.name], location,
                        tensors[thing.name].numel(), None)

    def dumps(thing):
        out = io.BytesIO()
        Pickler(out, 2).dump(thing)
        return out.getvalue()

    with open(path, "wb") as f:
        f.write(dumps(0x1950a86a20f9469cfc6c) + dumps(1001))
        f.write(dumps({"protocol_version": 1001, "little_endian": True,
                       "type_sizes": {"short": 2, "int": 4, "long": 4}}))
        f.write(dumps({"epoch": epoch, "state": {"module." + name: Tensor(name) for name in tensors}}))
        f.write(dumps(sorted(keys.values())))
        for name in sorted(tensors, key=keys.get):
            data = tensors[name].contiguous().numpy().tobytes()
            f.write(struct.pack("<q", tensors[name].numel()) + data)
    if truncate:
        os.truncate(path, os.path.getsize(path) - truncate)


def filled(name, seed=0, **more):
    """A network whose every tensor, running means included, has values of its own."""
    torch.manual_seed(seed)
    network = make_network(name, **more)
    for tensor_name, t in network.state_dict().items():
        if tensor_name.endswith(("running_mean", "bias")):
            t.normal_(0, 0.1)
        elif tensor_name.endswith("running_var"):
            t.uniform_(0.5, 2)
    return network.eval()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a if not n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", ["ResNet10", "ResNet50"])
def test_tensors_have_the_published_names_and_shapes(name):
    with open(SHAPES) as f:
        published = json.load(f)[name]
    with torch.device("meta"):
        state = make_network(name, 1000).state_dict()
    assert {"module." + n: list(t.shape) for n, t in state.items()} == published


@pytest.mark.parametrize("name,dim,parameters", [
    # without classifier; of the literature's counts, ours has the biases and lacks the shortcuts' batch norms
    ("ResNet10", 512, 9536 + 73984 + 230144 + 919040 + 3673088), ("ResNet18", 512, 11_176_512), ("ResNet34", 512, 21_284_672),
    ("ResNet50", 2048, 23_508_032 + 3776 - 7680), ("ResNet101", 2048, 42_500_160 + 8128 - 7680)])
def test_sizes(name, dim, parameters):
    with torch.device("meta"):
        network = make_network(name)
    assert network.feature_dim == dim
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", ["ResNet10", "ResNet50"])
@pytest.mark.parametrize("height,width", [(32, 32), (17, 40), (1, 1)])
def test_features_are_averages_of_rectified_maps(name, height, width):
    network = filled(name)
    x = torch.randn(2, 3, height, width)
    with torch.inference_mode():
        y = network(x)
        maps = network.trunk[:-2](x)
    assert y.shape == (2, network.feature_dim) and (y >= 0).all()
    assert torch.allclose(y, maps.mean((2, 3)))
    assert maps.shape[2:] == (-(-height // 32), -(-width // 32))        # five strides of two


@pytest.mark.parametrize("name,conv,first", [("ResNet18", "C1", [2, 4, 6]), ("ResNet50", "C2", [3, 7, 13])])
def test_where_the_strides_are(name, conv, first):
    with torch.device("meta"):
        blocks = [b for b in make_network(name).trunk if hasattr(b, "C1")]
    for i, block in enumerate(blocks):
        strides = {c: m.stride for c, m in block.named_children() if isinstance(m, torch.nn.Conv2d)}
        assert [c for c, s in strides.items() if s != (1, 1)] == ([conv, "shortcut"] if i in first else [])


def test_one_block_by_hand():
    # one pixel, all weights one or so: relu(shortcut + C2(relu(C1)))
    block = make_network("ResNet10").trunk[5].eval()
    for p in (block.C1, block.C2, block.shortcut):
        torch.nn.init.constant_(p.weight, 0.01)
    x = torch.ones(1, 64, 1, 1)
    a = 0.64 / (1 + 1e-5) ** .5
    b = 128 * 0.01 * a / (1 + 1e-5) ** .5
    assert torch.allclose(block(x), torch.full((1, 128, 1, 1), a + b), rtol=1e-5)


def test_classifier_has_no_bias_and_gives_scores():
    network = filled("ResNet10", num_classes=7)
    assert network.classifier.bias is None
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(network(x), network.trunk(x) @ network.classifier.weight.T, atol=1e-5)


@pytest.mark.parametrize("classifier", [None, 12])
def test_checkpoint_round_trip(tmp_path, classifier):
    a = filled("ResNet10", num_classes=12)
    save_checkpoint(a, tmp_path / "89.tar", 89)
    content = torch.load(tmp_path / "89.tar", weights_only=True)
    assert set(content) == {"epoch", "state"} and all(n.startswith("module.") for n in content["state"])
    b = make_network("ResNet10", classifier)
    assert content["epoch"] == 89
    load_checkpoint(b, tmp_path / "89.tar")
    assert same_state(a.trunk, b.trunk)
    if classifier:
        assert same_state(a, b)


def test_checkpoint_of_2017(tmp_path):
    a = filled("ResNet10", num_classes=5)
    state = dict(a.state_dict(), **{"classifier.bias": torch.zeros(5)})
    python2_checkpoint(tmp_path / "89.tar", state)
    with open(tmp_path / "89.tar", "rb") as f:
        head = f.read(20000)
    assert b"U\x05state" in head and b"X\x05\x00\x00\x00state" not in head and b"num_batches" not in head
    for classes in (None, 5):
        b = make_network("ResNet10", classes)
        load_checkpoint(b, str(tmp_path / "89.tar"))
        assert same_state(a.trunk, b.trunk)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(a(x), b.eval()(x))


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoint_written_by_torch_in_either_format(tmp_path, legacy):
    a = filled("ResNet10")
    torch.save({"state": {"module." + n: torch.nn.Parameter(t, False) for n, t in a.state_dict().items()}},
               tmp_path / "c.tar", _use_new_zipfile_serialization=not legacy, pickle_protocol=2)
    b = make_network("ResNet10")
    load_checkpoint(b, tmp_path / "c.tar")
    assert same_state(a, b)


@pytest.mark.parametrize("key,prefix", [("model", ""), ("model_state_dict", "module."), ("state_dict", "model."),
                                        (None, "module.model.")])
def test_other_forms_of_checkpoints(tmp_path, key, prefix):
    a, b = filled("ResNet10"), make_network("ResNet10")
    state = {prefix + n: t for n, t in a.state_dict().items()}
    torch.save({key: state, "epoch": 3, "optimizer": {}} if key else state, tmp_path / "c.tar")
    load_checkpoint(b, tmp_path / "c.tar")
    assert same_state(a, b)


def test_prefix_of_some_tensors_only(tmp_path):
    network = make_network("ResNet10")
    torch.save({"model." + n if n == "trunk.0.weight" else n: t for n, t in network.state_dict().items()}, tmp_path / "c.tar")
    assert "no tensor trunk.0.weight" in refusal(network, tmp_path / "c.tar")


def test_other_objects_beside_tensors(tmp_path):
    network = make_network("ResNet10")
    torch.save({"state": network.state_dict(), "args": argparse.Namespace(lr=.1)}, tmp_path / "c.tar")
    message = refusal(network, tmp_path / "c.tar")
    assert "objects of type argparse.Namespace" in message and "state_dict alone" in message and "truncated" not in message


def refusal(network, path):
    with pytest.raises(ValueError) as e:
        load_checkpoint(network, path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_truncated_checkpoints(tmp_path):
    network = make_network("ResNet10")
    state = network.state_dict()
    size = sum(t.numel() for t in state.values()) * 4
    for cut in (1, 4, size // 2, size - 100):
        python2_checkpoint(tmp_path / "a.tar", state, truncate=cut)
        assert "truncated" in refusal(network, tmp_path / "a.tar")
    save_checkpoint(network, tmp_path / "b.tar", 1)
    whole_size = os.path.getsize(tmp_path / "b.tar")
    for left in (whole_size - 1, whole_size // 2, 1000, 10, 0):
        os.truncate(tmp_path / "b.tar", left)
        assert "truncated" in refusal(network, tmp_path / "b.tar")


def test_files_that_are_no_checkpoint(tmp_path):
    network = make_network("ResNet10")
    assert "does not exist" in refusal(network, tmp_path / "none.tar")
    assert "not a file" in refusal(network, tmp_path)
    (tmp_path / "text").write_text("hello\n" * 100)
    refusal(network, tmp_path / "text")
    (tmp_path / "random").write_bytes(np.random.RandomState(0).bytes(5000))
    message = refusal(network, tmp_path / "random")
    assert "or holds other objects than tensors" in message and "weights_only" not in message
    torch.save([1, 2], tmp_path / "list")
    assert "list" in refusal(network, tmp_path / "list")
    torch.save({"epoch": 3}, tmp_path / "empty")
    assert "no tensors" in refusal(network, tmp_path / "empty")


class Command:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path, legacy):
    command = Command()
    command.path = tmp_path / "executed"
    torch.save({"state": command}, tmp_path / "evil.tar", _use_new_zipfile_serialization=not legacy)
    message = refusal(make_network("ResNet10"), tmp_path / "evil.tar")
    assert ".system, which are not loaded since they could run code" in message and "truncated" not in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("wrong,name,words", [
    ("ResNet10", "ResNet50", ("tensor module.trunk.4.C1.weight", "(64, 64, 3, 3)", "(64, 64, 1, 1)")),
    ("ResNet18", "ResNet10", ("trunk.5.C1.weight", "(64, 64, 3, 3)", "(128, 64, 3, 3)")),
    ("ResNet10", "ResNet18", ("trunk.5.C1.weight", "(128, 64, 3, 3)", "(64, 64, 3, 3)")),
    ("resnet18", "ResNet18", ("trunk.0.weight", "no tensor", "(64, 3, 7, 7)", "--model resnet18"))])
def test_other_architecture(tmp_path, wrong, name, words):
    save_checkpoint(make_network(wrong), tmp_path / "x.tar", 0)
    message = refusal(make_network(name), tmp_path / "x.tar")
    assert all(w in message for w in ("another architecture", *words))
    assert ("--model" in message) == (wrong == "resnet18")


def test_more_or_fewer_tensors(tmp_path):
    network = make_network("ResNet10")
    state = network.state_dict()
    torch.save({"state": {**state, "trunk.9.C1.weight": torch.zeros(2, 3)}}, tmp_path / "x")
    assert "trunk.9.C1.weight of shape (2, 3)" in refusal(network, tmp_path / "x")
    torch.save({"state": {"module." + n: t * np.nan for n, t in state.items()}}, tmp_path / "x")
    assert "tensor module.trunk.0.weight holds NaN" in refusal(network, tmp_path / "x")
    del state["trunk.7.BN2.running_var"]
    torch.save({"state": state}, tmp_path / "x")
    assert "trunk.7.BN2.running_var" in refusal(network, tmp_path / "x")


def test_a_flipped_bit_is_noticed(tmp_path):
    network = make_network("ResNet10")
    save_checkpoint(network, tmp_path / "x", 1)
    content = bytearray((tmp_path / "x").read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "x").write_bytes(content)
    assert "bad checksum of" in refusal(network, tmp_path / "x")


@pytest.mark.parametrize("change, message", [
    (lambda state: state.update({"trunk.0.weight": state["module.trunk.0.weight"]}), "for the same place in the network"),
    (lambda state: state.update({"module.trunk.0.weight": state["module.trunk.0.weight"].to(torch.complex64)}), "complex64"),
    (lambda state: state.update({"module.trunk.0.weight": state["module.trunk.0.weight"].to(torch.int32)}), "int32"),
    (lambda state: state.update({"module.trunk.0.weight": state["module.trunk.0.weight"].to_sparse()}), "sparse_coo")])
def test_tensors_of_other_kinds(tmp_path, change, message):
    network = make_network("ResNet10")
    state = {"module." + n: t for n, t in network.state_dict().items()}
    change(state)
    torch.save({"state": state}, tmp_path / "x")
    assert message in refusal(network, tmp_path / "x")


def test_a_refused_checkpoint_leaves_the_network_alone(tmp_path):
    network = make_network("ResNet10")
    before = {n: t.clone() for n, t in network.state_dict().items()}
    state = dict(filled("ResNet10", 1).state_dict(), **{"trunk.7.C2.weight": torch.zeros(3)})
    torch.save({"state": state}, tmp_path / "x")
    refusal(network, tmp_path / "x")
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_nothing_is_printed_beside_a_network_of_torchvision():
    code = "from lowshot.networks import make_network; print(make_network('resnet18').feature_dim)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("512\n", "")


@pytest.mark.parametrize("name,dim", [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_torchvision_models(tmp_path, name, dim):
    from lowshot.packages import load_torchvision
    torch.manual_seed(3)
    full = load_torchvision().models.get_model(name, weights=None).eval()
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    network = make_network(name)
    assert network.feature_dim == dim
    load_checkpoint(network.eval(), tmp_path / "weights.pth")
    last = [m for m in full.modules() if isinstance(m, torch.nn.Linear)][-1]
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        full(x)
        assert torch.equal(network(x), seen[0])


def old_names(state):
    """The tensors and names that torchvision's files of densenets have, from 2017."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", n): t for n, t in state.items()
            if not n.endswith("num_batches_tracked")}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["googlenet", "densenet121", "mnasnet0_5", "squeezenet1_1"])
def test_official_weights_by_either_route(tmp_path, monkeypatch, name):
    """--modelfile gives the features that torchvision's network has where torchvision itself loads its weights."""
    from lowshot.packages import load_torchvision
    models = load_torchvision().models
    torch.manual_seed(3)
    official = models.get_model(name, weights=None).state_dict()
    if name == "densenet121":
        official = old_names(official)
        assert "features.denseblock1.denselayer1.norm.1.weight" in official
    torch.save(official, tmp_path / "weights.pth")
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *a, **k: copy.copy(official))
    full = models.get_model(name, weights="DEFAULT").eval()
    fetched, loaded = make_network(name, pretrained=True).eval(), make_network(name).eval()
    load_checkpoint(loaded, tmp_path / "weights.pth")
    x = torch.randn(2, 3, 80, 80)
    seen = []
    last = [m for m in full.modules() if isinstance(m, torch.nn.Linear)]
    if last:
        last[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.inference_mode():
        full(x)
        expected = seen[0] if last else full.features(x).mean((2, 3))
        assert expected.shape == (2, loaded.feature_dim)
        for network in (fetched, loaded):       # the random googlenet's features are tiny
            assert (network(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    # and so does what was kept of a network that torchvision gave its weights: without classifiers for training
    torch.save(full.state_dict(), tmp_path / "kept.pth")
    load_checkpoint(loaded, tmp_path / "kept.pth")


def test_all_networks_whose_input_torchvision_transforms():
    with torch.device("meta"):
        assert make_network("inception_v3").transform_input and make_network("googlenet").transform_input


def test_old_names_of_vision_transformers(tmp_path):
    from lowshot.packages import load_torchvision
    make = load_torchvision().models.VisionTransformer
    a, b = (make(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16) for _ in range(2))
    state = {n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t for n, t in a.state_dict().items()}
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in state
    torch.save(state, tmp_path / "vit.pth")
    load_checkpoint(b, tmp_path / "vit.pth")
    assert same_state(a, b)


def test_unknown_names():
    for name in ("ResNet11", "resnet11"):
        with pytest.raises(ValueError, match=name):
            make_network(name)
    with pytest.raises(ValueError, match="classifier"):
        make_network("resnet18", 10)
    assert len(NETWORKS) == 5
