"""The networks that make features: ResNets with the tensor names of the published checkpoints, and torchvision's models.

    network = make_network("ResNet50")
    load_checkpoint(network, "89.tar")
    features = network.eval()(images)           # (n, 2048)

The ResNets are those of He et al. (Deep residual learning, 2016, table 1; ResNet10 has one simple block per stage) but
for the details that the published checkpoints fix: the trunk is one flat sequence, the 3x3 convolution of a bottleneck
block has a bias, its 1x1 shortcut no batch norm, and the classifier no bias.
"""
import copy
import os
import pickle
import re
import warnings
import zipfile

import torch
from torch import nn

from lowshot.files import whole
from lowshot.packages import load_torchvision


class SimpleBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the stride sits on the first one and on the shortcut."""
    expansion = 1

    def __init__(self, indim, outdim, stride):
        super().__init__()
        self.C1 = nn.Conv2d(indim, outdim, 3, stride, 1, bias=False)
        self.BN1 = nn.BatchNorm2d(outdim)
        self.C2 = nn.Conv2d(outdim, outdim, 3, 1, 1, bias=False)
        self.BN2 = nn.BatchNorm2d(outdim)
        self.identity = indim == outdim
        if not self.identity:
            self.shortcut = nn.Conv2d(indim, outdim, 1, stride, bias=False)
            self.BNshortcut = nn.BatchNorm2d(outdim)

    def forward(self, x):
        y = torch.relu(self.BN1(self.C1(x)))
        y = self.BN2(self.C2(y))
        return torch.relu(y + (x if self.identity else self.BNshortcut(self.shortcut(x))))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride sits on the 3x3 one and on the shortcut."""
    expansion = 4

    def __init__(self, indim, outdim, stride):
        super().__init__()
        width = outdim // self.expansion
        self.C1 = nn.Conv2d(indim, width, 1, bias=False)
        self.BN1 = nn.BatchNorm2d(width)
        self.C2 = nn.Conv2d(width, width, 3, stride, 1)
        self.BN2 = nn.BatchNorm2d(width)
        self.C3 = nn.Conv2d(width, outdim, 1, bias=False)
        self.BN3 = nn.BatchNorm2d(outdim)
        self.identity = indim == outdim
        if not self.identity:
            self.shortcut = nn.Conv2d(indim, outdim, 1, stride, bias=False)

    def forward(self, x):
        y = torch.relu(self.BN1(self.C1(x)))
        y = torch.relu(self.BN2(self.C2(y)))
        y = self.BN3(self.C3(y))
        return torch.relu(y + (x if self.identity else self.shortcut(x)))


class ResNet(nn.Module):
    """Images float32 (n, 3, h, w) of any size -> features (n, feature_dim), or scores (n, num_classes) if it classifies.

    The trunk ends in the average over whatever positions are left, so 224x224 images and small ones both do.
    """

    def __init__(self, block, depths, num_classes=None):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        dim = 64
        for stage, depth in enumerate(depths):
            outdim = 64 * 2 ** stage * block.expansion
            for i in range(depth):
                layers.append(block(dim, outdim, 2 if stage > 0 and i == 0 else 1))
                dim = outdim
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.trunk = nn.Sequential(*layers)
        self.feature_dim = dim
        self.classifier = None if num_classes is None else nn.Linear(dim, num_classes, bias=False)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):        # He et al. 2015 (Delving deep into rectifiers), by outgoing connections
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x):
        features = self.trunk(x)
        return features if self.classifier is None else self.classifier(features)


NETWORKS = {"ResNet10": (SimpleBlock, (1, 1, 1, 1)), "ResNet18": (SimpleBlock, (2, 2, 2, 2)),
            "ResNet34": (SimpleBlock, (3, 4, 6, 3)), "ResNet50": (BottleneckBlock, (3, 4, 6, 3)),
            "ResNet101": (BottleneckBlock, (3, 4, 23, 3))}
OLD_NAMES = (        # of tensors in torchvision's older files, which its own loaders change so
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\bmlp\.linear_1\."), "mlp.0."), (re.compile(r"\bmlp\.linear_2\."), "mlp.3."))
AUXILIARY = "aux1", "aux2", "AuxLogits"          # classifiers inside googlenet and inception_v3
KEYS = "state", "state_dict", "model", "model_state_dict"       # under which a checkpoint may hold the tensors


def make_network(name, num_classes=None, pretrained=False):
    """A network with random weights, by name; attribute `feature_dim` is the number of features.

    name: one of NETWORKS, or the lower-case name of one of torchvision's classification models, which then gives what
    enters its last linear layer (of squeezenet1_0 and 1_1, which have none, the averages of the last maps). num_classes: add
    a classifier without bias, for training (own networks only). pretrained: torchvision's own weights (downloaded by
    torchvision if they are not in its cache).
    Raises ValueError for an unknown name.
    """
    if name in NETWORKS:
        if pretrained:
            raise ValueError(f"{name} needs a checkpoint (--modelfile): only torchvision's models come with weights")
        network = ResNet(*NETWORKS[name], num_classes)
        network.name = name
        return network
    models = load_torchvision().models
    if name not in models.list_models(module=models):
        raise ValueError(f"unknown network {name!r}: one of {', '.join(NETWORKS)}, or the lower-case name of a "
                         "torchvision classification model, such as resnet50")
    if num_classes is not None:
        raise ValueError(f"only {', '.join(NETWORKS)} take a classifier, not {name}")
    with warnings.catch_warnings():             # two of the old models announce a change of their initialisation
        warnings.simplefilter("ignore", FutureWarning)
        try:
            network = models.get_model(name, weights="DEFAULT" if pretrained else None)
        except OSError as e:                    # URLError is one
            raise OSError(f"torchvision could not get its weights of {name} ({e}): --modelfile takes a file of weights")
    if hasattr(network, "transform_input"):     # as torchvision does where it loads its weights, which --modelfile may bring
        network.transform_input = True
    for auxiliary in AUXILIARY:                 # classifiers for training, which a file may have or not
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
            network.aux_logits = False
    if name.startswith("squeezenet"):           # a convolution classifies
        network.feature_dim, network.classifier_name = network.classifier[1].in_channels, "classifier"
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return network
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise ValueError(f"{name} does not end in a linear layer: its features cannot be taken from before one")
    where, layer = linear[-1]
    network.set_submodule(where, nn.Identity())
    network.feature_dim = layer.in_features
    network.classifier_name = where
    return network


def usual_transforms(name, pretrained):
    """List of dicts as `transforms` of a configuration: of torchvision's weights of one of its models that `pretrained` gives,
    or else of any of them, its choice first."""
    weights = load_torchvision().models.get_model_weights(name)
    made_for = [w.transforms() for w in (weights.DEFAULT, *(() if pretrained else weights))]
    return [{"resize": t.resize_size[0], "crop": t.crop_size[0], "mean": list(t.mean), "std": list(t.std)} for t in made_for]


def load_checkpoint(network, path):
    """Load the weights of `network` from a checkpoint.

    The published form is a dict whose `state` holds tensors named `module.trunk.0.weight` and so on, written by any
    PyTorch since 2017, also under Python 2. The tensors may lie under another of KEYS, or be the dict itself (torchvision),
    and their names may all begin with `model.`. Batch counters may lack; the classifier is skipped where the network has
    none. Nothing in the file is executed.

    Raises ValueError for a truncated file, one that is no checkpoint or holds other objects than tensors, or one of another
    architecture.
    """
    content = _read(path)
    content = next((content[key] for key in KEYS if isinstance(content.get(key), dict)), content)
    content = {n: t.detach() for n, t in content.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}
    if not content:
        raise ValueError(f"{path} holds no tensors: a checkpoint is a dict with the network's tensors under 'state'")
    own = {name.removeprefix("module."): name for name in content}      # the checkpoint's own name of each tensor
    if all(name.startswith("model.") for name in own):
        own = {name.removeprefix("model."): n for name, n in own.items()}
    for old, new in OLD_NAMES:
        own = {old.sub(new, name): n for name, n in own.items()}
    state = {name: content[n] for name, n in own.items()}
    if len(state) < len(content):
        raise ValueError(f"{path}: two of its {len(content)} tensors are for the same place in the network")

    def other(what):
        hint = ""
        if isinstance(network, ResNet) and _names_of_torchvision(network.name, state):
            hint = f" (its tensors have the names of torchvision's network: --model {network.name.lower()})"
        return ValueError(f"{path} is of another architecture: {what}{hint}")

    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):
                continue
            raise other(f"it has no tensor {name}, the network expects one of shape {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise other(f"tensor {own[name]} has shape {tuple(state[name].shape)}, the network expects {tuple(tensor.shape)}")
    classifiers = getattr(network, "classifier_name", "classifier"), *(name for name in AUXILIARY if hasattr(network, name))
    for name, tensor in state.items():
        if name not in expected and not name.startswith(tuple(f"{c}." for c in classifiers)):
            raise other(f"its tensor {own[name]} of shape {tuple(tensor.shape)} has no place in the network")
    for name, tensor in state.items():
        if name not in expected or not expected[name].is_floating_point():
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise ValueError(f"{path}: tensor {own[name]} is {tensor.dtype}, {tensor.layout}: plain floating point was expected")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path}: tensor {own[name]} holds NaN or infinity")
    # what state_dict() returned tells of its version, which some of torchvision's networks insist on
    expected.update((n, t) for n, t in state.items() if n in expected)
    network.load_state_dict(expected)


def _names_of_torchvision(name, state):
    """Whether tensors have the names of those of torchvision's network of this name in lower case, if there is one."""
    try:
        with torch.device("meta"):
            network = make_network(name.lower())
    except ValueError:
        return False
    return {n for n in network.state_dict() if not n.endswith("num_batches_tracked")} == {
        n for n in state if not n.endswith("num_batches_tracked") and not n.startswith(network.classifier_name + ".")}


def _read(path):
    """The dict in a checkpoint file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}: "
                         "a network's checkpoint was expected")
    damaged = f"{path} ({os.path.getsize(path)} bytes) is truncated or not a PyTorch checkpoint"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # remarks on the file's age
            if zipfile.is_zipfile(path):        # torch does not look at checksums
                with zipfile.ZipFile(path) as z:
                    if damaged_part := z.testzip():
                        raise zipfile.BadZipFile(f"bad checksum of {damaged_part}")
            # latin1: the strings of a Python 2 pickle are bytes
            content = torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
    except MemoryError:
        raise
    except pickle.UnpicklingError as e:
        # torch explains at length how to load without weights_only, which we never do
        other = re.search(r"GLOBAL (\S+)", str(e))
        if other:
            raise ValueError(f"{path} holds objects of type {other.group(1)}, which are not loaded since they could run code: "
                             "where you trust it, load it with torch.load(..., weights_only=False) and save its state_dict "
                             "alone")
        raise ValueError(f"{damaged}, or holds other objects than tensors")
    except Exception as e:
        # the reader fails in its own ways (EOFError, RuntimeError, IndexError, KeyError, UnicodeDecodeError, ...)
        raise ValueError(f"{damaged}: {type(e).__name__} {' '.join(str(e).split())[:120]}")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: a checkpoint is a dict with the tensors under "
                         "'state'")
    return content


def save_checkpoint(network, path, epoch):
    """Write a checkpoint of the published form: {'epoch': epoch, 'state': {'module.' + name: tensor}}."""
    state = {f"module.{name}": tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    with whole(path) as temporary:
        torch.save({"epoch": epoch, "state": state}, temporary)


class FromPixels(nn.Module):
    """uint8 (n, h, w, 3) -> what `network` makes of ((x / 255 - mean) / std) as float32 (n, 3, h, w).

    channels_last: whether channels stay last in memory.
    """

    def __init__(self, network, mean, std, channels_last=True):
        super().__init__()
        self.network, self.channels_last = network, channels_last
        std = torch.tensor(std, dtype=torch.float32)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", torch.tensor(mean, dtype=torch.float32) / std)

    def forward(self, x):
        x = (x * self.scale - self.shift).permute(0, 3, 1, 2)
        return self.network(x if self.channels_last else x.contiguous())


def for_inference(network, mean, std, shape, device="cpu"):
    """A quick way to features: extract(uint8 tensor (n, h, w, 3)) begins, and what it returns, called, gives the features
    as numpy float32 (n, feature_dim). On a GPU the next batch can be started before the result is asked for.

    shape: that of the batches, (n, h, w, 3); others serve, if slower. On the CPU batch norms are folded into the
    convolutions, which oneDNN runs in its own layouts (twice as fast as the network as it is), if that gives the same
    features to 1e-4 of the largest one, as a few random images tell; it may be called from several threads at once. With
    device "cuda" all GPUs share each batch, and features are to be used before extract() is called for the third time since.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # full float32, as everywhere else; for which channels first are the quicker layout
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        quick = FromPixels(network, mean, std, channels_last=False).eval().requires_grad_(False).to(device)
        if device.index is None and torch.cuda.device_count() > 1:
            quick = nn.DataParallel(quick)
        extract = _ThroughGpu(quick, shape, device)
    else:
        quick = _folded(FromPixels(network, mean, std).eval().requires_grad_(False), shape)

        def extract(x):
            return quick(x).numpy
    extract.shape = tuple(shape)
    return extract


def _folded(plain, shape):
    """`plain` prepared for the CPU and batches of this shape; `plain` itself if that cannot be done well."""
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=generator)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = plain(example[:4])
    except RuntimeError as e:
        raise ValueError(f"the network cannot take images of {shape[2]}x{shape[1]}: {str(e).splitlines()[0]}")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quick = torch.jit.optimize_for_inference(torch.jit.trace(copy.deepcopy(plain), example, check_trace=False))
            found = quick(example)[:4]
    except (RuntimeError, AttributeError, NotImplementedError):
        return plain                            # a network, or a PyTorch, that cannot be traced
    return quick if (expected - found).abs().max() <= 1e-4 * expected.abs().max() else plain


class _ThroughGpu:
    """extract() of for_inference() on a GPU. Images and features go through memory that is pinned once: that takes longer than
    a small network does."""

    DEPTH = 3       # batches that are under way or looked at

    def __init__(self, network, shape, device):
        self.network, self.device = network, device
        self.images = [torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=True) for _ in range(self.DEPTH)]
        self.features, self.done, self.calls = [None] * self.DEPTH, [torch.cuda.Event() for _ in range(self.DEPTH)], 0

    def __call__(self, x):
        slot = self.calls % self.DEPTH
        self.calls += 1
        self.done[slot].synchronize()
        if x.shape == self.images[slot].shape:
            x = self.images[slot].copy_(x)
        with torch.cuda.device(self.device):
            y = self.network(x.to(self.device, non_blocking=True))
            host = self.features[slot]
            if host is None or host.shape != y.shape:
                host = self.features[slot] = torch.empty(y.shape, pin_memory=True)
            host.copy_(y, non_blocking=True)
            self.done[slot].record()

        def wait():
            self.done[slot].synchronize()
            return host.numpy()
        return wait
