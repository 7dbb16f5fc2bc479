"""Demo, last step: draw the figure and the contact sheet.

The figure: accuracy against the number of iterations, one curve a background size, and accuracy against the size of the
background, with logistic regression as a line; a row for all test images and one for those of the novel classes.
The contact sheet: test images, their five best classes, and the background images that gave the most to the best one.

reads   $DDIR/logs/{diffusion,logreg}/EXPERIMENT/*.json
                                               parameters and records of the experiment's phases 2 and 3, those that
                                               its table is made of
        FILE.npz of diffusion.py --storeexamples, and the images, for the contact sheet
writes  --figure and --sheet, PNG

    python demo/show.py --figure figure.png --sheet examples.png --examples "$DDIR/demo_examples.npz"
"""
import io
import os
import sys
import textwrap
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lowshot  # noqa: E402 F401     before numpy: it names the number of threads
import numpy as np  # noqa: E402

from lowshot.experiments import CHECKOUT, Experiment, parameters_and_jobs, records_of  # noqa: E402
from lowshot.files import check_outputs, read_json, whole  # noqa: E402
from lowshot.layout import DataDir  # noqa: E402
from lowshot.script import Parser, as_text, log, number, run  # noqa: E402

INK, MUTED, GRID = "#24292f", "#6b7280", "#e5e7eb"
RIGHT, WRONG = "#15803d", "#b91c1c"
BASELINE = "#c2410c"


def arguments():
    parser = Parser(__doc__)
    parser.add_argument("--figure", default="", metavar="PNG", help="draw the figure into this file")
    parser.add_argument("--sheet", default="", metavar="PNG", help="draw the contact sheet into this file")
    parser.add_argument("--examples", default="", metavar="NPZ", help="what diffusion.py --storeexamples wrote")
    parser.add_argument("--experiment", default=os.path.join(CHECKOUT, "configs", "demo.yaml"), metavar="YAML",
                        help="experiment file, as of run_diffusion.bash; NBG, NLABELED and SEEDS replace its lists")
    parser.add_argument("--nlabeled", type=number(int, 1), nargs="+",
                        help="numbers of labels of the figure's columns (default: the experiment's first two)")
    parser.add_argument("--nexamples", type=number(int, 1), default=18, help="images on the contact sheet")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the choice of examples")
    args = parser.parse_args()
    if not args.figure and not args.sheet:
        parser.error("name at least one of --figure and --sheet")
    if bool(args.sheet) != bool(args.examples):
        parser.error("--sheet and --examples go together")
    return args


def main():
    args = arguments()
    check_outputs(args.figure, args.sheet)
    ddir = DataDir()
    if args.figure:
        e = Experiment(args.experiment)
        nlabeled = args.nlabeled or e.nlabeled[:2]
        if set(nlabeled) - set(e.nlabeled):
            raise ValueError(f"--nlabeled {min(set(nlabeled) - set(e.nlabeled))}: {e.path} has {as_text(e.nlabeled)}")
        save(figure(*records(e, ddir), nlabeled), args.figure)
    if args.sheet:
        if not os.path.exists(args.examples):
            raise ValueError(f"{args.examples} does not exist: diffusion.py --storeexamples makes it")
        with np.load(args.examples, allow_pickle=False) as file:
            examples = {name: file[name] for name in file.files}
        lacks = {"rows", "labels", "scores", "neighbours", "contribution", "nlabelled", "labelled_rows",
                 "classes"} - set(examples)
        if lacks:
            raise ValueError(f"{args.examples} has no array {min(lacks)}: diffusion.py --storeexamples makes it")
        save(contact_sheet(ddir.root, examples, args.nexamples, args.seed), args.sheet)


def save(fig, path):
    with whole(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150, facecolor="white")
    log(f"wrote {path}")


# ------------------------------------------------------------------------------------------------------------- figure

def records(e, ddir):
    """What the table of an experiment is made of: (records of diffusion.py, records of logreg.py, {(nlabeled, nbg): chosen number
    of iterations}), all of the test split."""
    parameters, diffusion = parameters_and_jobs(e, "diffusion", ddir)
    _, logreg = parameters_and_jobs(e, "logreg", ddir)
    chosen = {(n, nbg): parameters[str(nbg)][str(n)]["niter"] for n in e.nlabeled for nbg in e.diffusion["nbg"]}
    return records_of(diffusion, 3), records_of(logreg, 3), chosen


def diffusion_curves(records, nlabeled):
    """{nbg: {"top5" or "top5_novel": (runs, iterations) accuracy}} of the records with so many labels."""
    runs = {}
    for record in records:
        if record["arguments"]["nlabeled"] == nlabeled:
            runs.setdefault(record["arguments"]["nbg"], []).append(record["results"])
    return {nbg: {key: np.array([[r[key] for r in results] for results in of_size]) for key in ("top5", "top5_novel")}
            for nbg, of_size in sorted(runs.items())}


def baseline(records, nlabeled):
    """{"top5": (runs,), "top5_novel": (runs,)} of logistic regression, at the end of each run."""
    last = [record["runs"][0]["results"][-1] for record in records if record["arguments"]["nlabeled"] == nlabeled]
    return {key: np.array([r[key] for r in last]) for key in ("top5", "top5_novel")}


def figure(diffusion, logreg, chosen, nlabeled=(1, 2)):
    """Accuracy against iterations and against the background's size, as a matplotlib Figure.

    diffusion, logreg: lists of records as the scripts write them, of the test split. Bands are one standard deviation
    over seeds. chosen: {(nlabeled, nbg): iterations} of the validation split, for the plots against the background's
    size. There must be a diffusion record for each of the numbers of labels.
    """
    import matplotlib
    from matplotlib.figure import Figure
    columns = [(n, diffusion_curves(diffusion, n), baseline(logreg, n)) for n in nlabeled]
    sizes = sorted({nbg for _, curves, _ in columns for nbg in curves})
    shades = dict(zip(sizes, matplotlib.colormaps["viridis_r"](np.linspace(0.22, 0.95, len(sizes)))))
    width = 2 * len(columns)
    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "text.color": INK,
                                "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED}):
        fig = Figure(figsize=(3.1 * width + 0.4, 6.6), layout="constrained")
        axes = fig.subplots(2, width, sharey="row", squeeze=False)
        for row, (key, words) in enumerate((("top5", "all classes"), ("top5_novel", "novel classes"))):
            for i, (n, curves, base) in enumerate(columns):
                left, right = axes[row, 2 * i], axes[row, 2 * i + 1]
                labels = f"{n} label{'s' if n > 1 else ''} per novel class"
                _iterations(left, curves, key, shades)
                _backgrounds(right, {nbg: curve[key] for nbg, curve in curves.items()},
                             {nbg: chosen[n, nbg] for nbg in curves}, shades)
                for ax in (left, right):
                    _line(ax, base[key])
                    _style(ax)
                if row == 0:
                    left.set_title(labels, loc="left", fontweight="bold", fontsize=10)
                else:
                    left.set_xlabel("iterations of diffusion")
                    right.set_xlabel("background (iterations by validation)")
            axes[row, 0].set_ylabel(f"top-5 accuracy (%), {words}")
        handles, names = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False)
    return fig


def _iterations(ax, curves, key, shades):
    for nbg, curve in curves.items():
        mean, std = 100 * curve[key].mean(axis=0), 100 * curve[key].std(axis=0)
        x = np.arange(len(mean))
        ax.plot(x, mean, color=shades[nbg], lw=1.8, marker="o", ms=3,
                label=f"diffusion, {nbg:,} background images" if nbg else "diffusion, no background")
        if len(curve[key]) > 1:
            ax.fill_between(x, mean - std, mean + std, color=shades[nbg], alpha=0.15, lw=0)
    ax.xaxis.get_major_locator().set_params(integer=True)


def _backgrounds(ax, curves, chosen, shades):
    """Each size at its chosen number of iterations; sizes evenly spaced, as 0 has no logarithm."""
    values = {nbg: 100 * curve[:, chosen[nbg]] for nbg, curve in curves.items()}
    x = np.arange(len(curves))
    ax.plot(x, [v.mean() for v in values.values()], color=MUTED, lw=1.2, zorder=1)
    for at, (nbg, v) in zip(x, values.items()):
        ax.errorbar(at, v.mean(), v.std() if len(v) > 1 else None, color=shades[nbg], marker="o", ms=6, capsize=3,
                    lw=1.4, zorder=2)
        ax.annotate(f"{v.mean():.1f}", (at, v.mean()), xytext=(0, 7), textcoords="offset points", ha="center",
                    va="bottom", fontsize=8, color=INK, bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.6})
    ax.set_xticks(x, [short(nbg) for nbg in curves])
    ax.set_xlim(-0.5, len(curves) - 0.5)


def _line(ax, values):
    if len(values):
        mean, std = 100 * values.mean(), 100 * values.std()
        ax.axhline(mean, color=BASELINE, lw=1.5, ls=(0, (5, 3)), zorder=0, label="logistic regression")
        if len(values) > 1:
            ax.axhspan(mean - std, mean + std, color=BASELINE, alpha=0.10, lw=0, zorder=0)


def _style(ax):
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    ax.tick_params(length=0)
    ax.margins(y=0.12)


def short(n):
    """60000 as 60k, 1000000 as 1M."""
    for unit, letter in ((10 ** 6, "M"), (10 ** 3, "k")):
        if n >= unit:
            return f"{n / unit:g}{letter}"
    return str(n)


# ------------------------------------------------------------------------------------------------------ contact sheet

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
