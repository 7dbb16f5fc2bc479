"""Demo, last step: draw the contact sheet: test images, their five best classes, and the background images that gave the most to
the best one. (Figures of accuracies are drawn by run_logreg.bash, run_diffusion.bash and lowshot/phases.py.)

reads   FILE.npz of diffusion.py --storeexamples, and the images
writes  --sheet, PNG

    python demo/show.py --sheet examples.png --examples "$DDIR/demo_examples.npz"
"""
import io
import os
import sys
import textwrap
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lowshot  # noqa: E402 F401     before numpy: it names the number of threads
import numpy as np  # noqa: E402

from lowshot.files import check_outputs, read_json  # noqa: E402
from lowshot.figures import INK, MUTED, save  # noqa: E402
from lowshot.layout import DataDir  # noqa: E402
from lowshot.script import Parser, log, number, run  # noqa: E402

RIGHT, WRONG = "#15803d", "#b91c1c"


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--sheet", required=True, metavar="PNG", help="draw the contact sheet into this file")
    parser.add_argument("--examples", required=True, metavar="NPZ", help="what diffusion.py --storeexamples wrote")
    parser.add_argument("--nexamples", type=number(int, 1), default=18, help="images on the contact sheet")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the choice of examples")
    return parser.parse_args()


def main():
    args = arguments()
    check_outputs(args.sheet)
    ddir = DataDir()
    if not os.path.exists(args.examples):
        raise ValueError(f"{args.examples} does not exist: diffusion.py --storeexamples makes it")
    with np.load(args.examples, allow_pickle=False) as file:
        examples = {name: file[name] for name in file.files}
    lacks = {"rows", "labels", "scores", "neighbours", "contribution", "nlabelled", "labelled_rows", "classes"} - set(examples)
    if lacks:
        raise ValueError(f"{args.examples} has no array {min(lacks)}: diffusion.py --storeexamples makes it")
    save(contact_sheet(ddir.root, examples, args.nexamples, args.seed), args.sheet)
    log(f"wrote {args.sheet}")


def choose_examples(examples, count, seed=0):
    """Test images to show, indices into the rows of the examples: of random classes, none twice while others wait."""
    rs = np.random.RandomState(seed)
    labels = np.asarray(examples["labels"])
    order, seen, late = [], set(), []
    for i in rs.permutation(len(labels)):
        (late if labels[i] in seen else order).append(int(i))
        seen.add(labels[i])
    return (order + late)[:count]


def carriers(examples, i, count):
    """Background images among test image i's neighbours that gave the most to its best class.

    Returns [(background image number, share of the best class's score)], best first; only those that gave something.
    """
    neighbours, gave = np.asarray(examples["neighbours"][i], np.int64), np.asarray(examples["contribution"][i], float)
    nlabelled, total = int(examples["nlabelled"]), gave.sum()
    order = np.argsort(-gave, kind="stable")
    return [(int(neighbours[j] - nlabelled), float(gave[j] / total))
            for j in order if neighbours[j] >= nlabelled and gave[j] > 0][:count]


def background_image(root, n):
    """Background image n as uint8 (h, w, 3), black if it is missing or cannot be read."""
    from PIL import Image
    path = os.path.join(root, "yfcc100m", f"{n // 10 ** 6:02d}", f"{n // 1000 % 1000:03d}.zip")
    try:
        with zipfile.ZipFile(path) as file:
            with Image.open(io.BytesIO(file.read(f"{n % 1000:03d}.jpg"))) as image:
                return np.asarray(image.convert("RGB"))
    except (OSError, KeyError, zipfile.BadZipFile):
        return np.zeros((32, 32, 3), np.uint8)


def contact_sheet(root, examples, count=18, seed=0):
    """Test images with their five best classes and the background images that carried the label: a Figure.

    root: data directory; examples: arrays of diffusion.py --storeexamples.
    """
    from matplotlib.figure import Figure
    from PIL import Image
    meta = read_json(os.path.join(root, "imagenet_meta_val.json"))
    names, classes = meta.get("label_names"), np.asarray(examples["classes"])
    chosen = choose_examples(examples, count, seed)
    columns = 2
    rows = -(-len(chosen) // columns)
    # lengths in inches
    cell_w, cell_h, side, top = 6.4, 1.3, 1.0, 1.0
    fig = Figure(figsize=(columns * cell_w + 0.3, rows * cell_h + top + 0.1))
    total_w, total_h = fig.get_size_inches()
    fig.text(0.3 / total_w, 1 - 0.32 / total_h, "Test images, their five best classes, and the background images that "
             "carried the label", fontsize=13, fontweight="bold", color=INK, va="center")
    fig.text(0.3 / total_w, 1 - 0.62 / total_h, "Bars and percentages: share of the score. Green: the true class. "
             "Right: unlabelled neighbours that gave most to the best class.", fontsize=9, color=MUTED, va="center")

    def place(x, y, w, h):
        """Axes at inches from the left and from the top."""
        ax = fig.add_axes((x / total_w, 1 - (y + h) / total_h, w / total_w, h / total_h))
        ax.set_axis_off()
        return ax

    for number_, i in enumerate(chosen):
        x, y = 0.3 + number_ // rows * cell_w, top + number_ % rows * cell_h
        with Image.open(os.path.join(root, meta["image_names"][examples["rows"][i]])) as image:
            place(x, y, side, side).imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
        scores, label = np.asarray(examples["scores"][i], float), int(examples["labels"][i])
        best = np.argsort(-scores, kind="stable")[:5]
        best = best[scores[best] > 0]
        ax = place(x + side + 0.12, y, 2.25, side)
        ax.set_xlim(0, 1), ax.set_ylim(4.5, -0.5)
        for line, c in enumerate(best):
            share = scores[c] / scores.sum()
            colour = RIGHT if c == label else INK
            ax.barh(line, share, height=0.8, color=RIGHT if c == label else "#94a3b8", alpha=0.30, lw=0)
            ax.text(0.015, line, _name(names, classes[c]), color=colour, va="center", fontsize=7.5,
                    fontweight="bold" if c == label else "normal")
            ax.text(0.995, line, f"{100 * share:.0f}", color=MUTED, va="center", ha="right", fontsize=7)
        missed = label not in best
        fig.text(x / total_w, 1 - (y + side + 0.09) / total_h, ("missed: " if missed else "") +
                 _name(names, classes[label], 40), fontsize=7, color=WRONG if missed else RIGHT, va="center")
        found = carriers(examples, i, 4)
        for j, (n, share) in enumerate(found):
            small = 0.62
            ax = place(x + side + 2.47 + j * (small + 0.06), y + 0.1, small, small)
            ax.imshow(background_image(root, n), interpolation="nearest")
            ax.set_title(f"{100 * share:.0f} %", fontsize=7, color=MUTED, y=-0.32, pad=0)
        if not found:
            place(x + side + 2.47, y + 0.1, 2.6, 0.62).text(
                0, 0.5, "labelled images only" if len(best) else "no label reached it", color=MUTED, fontsize=8,
                va="center")
    return fig


def _name(names, c, width=26):
    """Name of class number c (0-based), shortened."""
    if not names or c >= len(names):
        return f"class {c + 1}"
    name = str(names[c]).replace("$", r"\$")     # which would start a formula
    if name[1:2] == " ":        # a character and its Unicode name: the common words say little
        for word, brief in (("LATIN ", ""), ("SMALL LETTER ", "small "), ("CAPITAL LETTER ", "capital "),
                            ("SMALL LIGATURE ", "ligature "), ("CAPITAL LIGATURE ", "ligature "), ("DIGIT ", "")):
            name = name.replace(word, brief)
        name = name[:2] + name[2:].lower()
    return textwrap.shorten(name, width, placeholder="…") or name[:width]


if __name__ == "__main__":
    run(main)
