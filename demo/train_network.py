"""Demo, second step: train the network on the base classes.

Trains ResNet10 on the training images of the base classes of both sets and nothing else, and writes a checkpoint of the
published form. Cross entropy, SGD with one cycle of the learning rate, on the images as they are.

reads   $DDIR/imagenet_meta_{train,val}.json and the images they name, $DDIR/label_idx.json
writes  $DDIR/models/checkpoints/ResNet10/<last epoch>.tar    epochs are numbered from 0
        $DDIR/logs/train_network_ResNet10_13.json             arguments, loss, accuracy and time of each epoch

A run that was cut off goes on after the last whole epoch ($DDIR/models/checkpoints/ResNet10/training.pt). Same seed,
same number of threads, same machine: same weights.

    python demo/train_network.py
"""
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lowshot  # noqa: E402 F401     before numpy: it names the number of threads
import numpy as np  # noqa: E402

from lowshot.files import exclusive, read_json, whole, write_json  # noqa: E402
from lowshot.layout import DataDir  # noqa: E402
from lowshot.machine import peak_memory  # noqa: E402
from lowshot.script import Parser, Progress, clock, log, number, print_header, provenance, run  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # as save_features.py has them


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--model", default="ResNet10", help="ResNet10, ResNet18, ResNet34, ResNet50 or ResNet101")
    parser.add_argument("--epochs", type=number(int, 1), default=14, help="passes over the training images")
    parser.add_argument("--batchsize", type=number(int, 2), default=128, help="images per step")
    parser.add_argument("--lr", type=number(float, 0), default=0.1, help="highest learning rate of the cycle")
    parser.add_argument("--wd", type=number(float, 0), default=0.0005, help="weight decay")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 31), default=0, help="seed of weights and order")
    return parser.parse_args()


def main():
    args = arguments()
    ddir = DataDir()
    print_header(args)
    state_path = ddir.path("models", "checkpoints", args.model, "training.pt")
    with exclusive(state_path):
        train(args, ddir, state_path)


def train(args, ddir, state_path):
    """Train, and write checkpoint and record, where they are not there; state_path: what is kept after each epoch."""
    record = provenance(args)
    checkpoint = os.path.join(os.path.dirname(state_path), f"{args.epochs - 1}.tar")
    record_path = ddir.log(f"train_network_{args.model}_{args.epochs - 1}.json")
    if os.path.exists(checkpoint) and os.path.exists(record_path):
        made_with = read_json(record_path).get("arguments")
        if made_with == vars(args):
            log(f"{checkpoint} is complete")
            return
        raise ValueError(f"{checkpoint} was trained with other arguments ({made_with}): remove it to train again")

    import torch
    from lowshot.networks import make_network, save_checkpoint
    images, labels, val_images, val_labels, nclass = base_images(ddir)
    log(f"{len(images)} training images of {nclass} base classes, {len(val_images)} validation images")
    torch.manual_seed(args.seed)
    network = make_network(args.model, nclass).to(memory_format=torch.channels_last)
    steps = len(images) // args.batchsize or 1
    optimizer = torch.optim.SGD(weight_groups(network, args.wd), lr=args.lr, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.2,
                                                    cycle_momentum=False)
    history = resume(state_path, args, network, optimizer, scheduler)
    with Progress(args.epochs * len(images), "training images", len(history) * len(images)) as progress:
        for epoch in range(len(history), args.epochs):
            t0 = time.monotonic()
            loss = train_epoch(network, optimizer, scheduler, images, labels, args, steps, epoch, progress)
            correct = accuracy(network, val_images, val_labels)
            history.append({"epoch": epoch, "loss": loss, "accuracy": correct, "seconds": round(time.monotonic() - t0, 3)})
            log(f"[{clock(sum(h['seconds'] for h in history))}] epoch {epoch + 1}/{args.epochs} loss {loss:.3f} "
                f"accuracy on the base classes' validation images {correct:.3f}")
            with whole(state_path) as temporary:
                torch.save({"arguments": vars(args), "history": history, "network": network.state_dict(),
                            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, temporary)
    save_checkpoint(network.to(memory_format=torch.contiguous_format), checkpoint, args.epochs - 1)
    write_json(record_path, {**record, "checkpoint": os.path.relpath(checkpoint, ddir.root),
                             "classes": nclass, "training_images": len(images), "validation_images": len(val_images),
                             "threads": torch.get_num_threads(), "accuracy": history[-1]["accuracy"],
                             "seconds": sum(h["seconds"] for h in history), "epochs": history,
                             "peak_memory": peak_memory()})
    os.unlink(state_path)
    log(f"wrote {checkpoint}: accuracy {history[-1]['accuracy']:.3f} on the base classes")


# --------------------------------------------------------------------------------------------------------------- data

def base_images(ddir):
    """Images of the base classes: (training images, labels, validation images, labels, number of classes).

    Images are uint8 tensors (n, 3, h, w), labels int64 (n,) in 0 .. number of classes - 1.
    """
    import torch
    split = read_json(ddir.label_idx())
    base = split.get("base_classes") or [*split.get("base_classes_1", []), *split.get("base_classes_2", [])]
    classes = np.unique(np.array(base, np.int64)) - 1
    if len(classes) < 2:
        raise ValueError(f"{ddir.label_idx()} lists {len(classes)} base_classes, two at the least were expected")
    out = []
    for part in ("train", "val"):
        path = ddir.path(f"imagenet_meta_{part}.json")
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist: demo/make_data.py makes it")
        meta = read_json(path)
        labels = np.array(meta["image_labels"], np.int64)
        chosen = np.flatnonzero(np.isin(labels, classes))
        absent = np.setdiff1d(classes, labels)
        if len(absent):
            raise ValueError(f"{path} has no image of base class {absent[0] + 1}")
        with Progress(len(chosen), f"{part} images read") as progress:
            pixels = [read_image(os.path.join(ddir.root, meta["image_names"][i]), progress) for i in chosen]
        if len({p.shape for p in pixels}) > 1:
            raise ValueError(f"the images of {path} are not all of one size")
        out += [torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
                torch.from_numpy(np.searchsorted(classes, labels[chosen]))]
    return *out, len(classes)


def read_image(path, progress):
    """uint8 (h, w, 3)."""
    from PIL import Image
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    progress.advance()
    return pixels


def normalise(x):
    """Images float32 (n, 3, h, w) in 0..1 as the network takes them."""
    import torch
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------- training

def weight_groups(network, wd):
    """Weights decay; biases and batch norms do not."""
    decay = [p for p in network.parameters() if p.ndim > 1]
    return [{"params": decay, "weight_decay": wd},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0}]


def train_epoch(network, optimizer, scheduler, images, labels, args, batches, epoch, progress):
    """One pass in random order; the order depends on seed and epoch only. Returns the mean loss."""
    import torch
    generator = torch.Generator().manual_seed(args.seed * 100003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    network.train()
    total = 0.0
    for i in range(batches):
        batch = order[i * args.batchsize:(i + 1) * args.batchsize]
        x = normalise(images[batch].float() / 255)
        loss = torch.nn.functional.cross_entropy(network(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
        progress.advance(len(batch))
    progress.update((epoch + 1) * len(images))
    if not math.isfinite(total):
        raise ValueError(f"the loss is not finite in epoch {epoch + 1}: lower --lr {args.lr}")
    return total / batches


def accuracy(network, images, labels):
    """Share of the images whose highest score is their label's."""
    import torch
    network.eval()
    with torch.no_grad():
        right = [(network(normalise(x.float() / 255)).argmax(1) == y).sum().item()
                 for x, y in zip(images.split(500), labels.split(500))]
    return sum(right) / len(images)


def resume(path, args, network, optimizer, scheduler):
    """Load the state after the last whole epoch if it is of these arguments; returns the history of epochs."""
    import torch
    if not os.path.exists(path):
        return []
    try:
        state = torch.load(path, weights_only=True)
        if state["arguments"] == vars(args):
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            log(f"going on after epoch {len(state['history'])}/{args.epochs}")
            return state["history"]
    except Exception as e:      # torch's reader fails in many ways
        raise ValueError(f"{path} cannot be read ({type(e).__name__}): remove it to train from the start")
    log("the state of another training is replaced")
    return []


if __name__ == "__main__":
    run(main)
