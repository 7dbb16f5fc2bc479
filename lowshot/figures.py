"""Figures of an experiment: its validation, the report of one system, and both systems beside each other.

All show top-5 accuracy in per cent, for all test images in one row, in the next for those of the novel classes. Lines and
points are means over seeds, bands and bars one standard deviation. Functions return a matplotlib Figure.
"""
import contextlib

import numpy as np

from lowshot.files import whole

INK, MUTED, GRID, LOGREG = "#24292f", "#6b7280", "#e5e7eb", "#c2410c"
ROWS = (("top5", "all", "all classes"), ("top5_novel", "novel", "novel classes"))       # key of ours, of the paper's, words
WIDEST = 6              # panels side by side


def save(figure, path):
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def validation_figure(curves, chosen):
    """Accuracy against iterations on the validation classes, for each number of labels.

    curves: {(nbg or None, n): {setting: [results of each seed's run]}}, as experiments.validation_curves() gives them
    chosen: {(nbg or None, n): (setting, iteration)}; the others are thin lines
    """
    nlabeled = list(dict.fromkeys(n for _, n in curves))
    shades = shades_of(nbg for nbg, _ in curves)
    with drawing([title_of(n) for n in nlabeled], 1) as (figure, groups):
        for (nbg, n), settings in curves.items():
            best, iteration = chosen[nbg, n]
            for (key, _, _), [ax] in zip(ROWS, groups[nlabeled.index(n)]):
                for setting, runs in settings.items():
                    if setting != best:
                        ax.plot(iterations(runs), percent(runs, key).mean(axis=0), color=MUTED, lw=0.6, alpha=0.4, zorder=1,
                                label="other settings of the grid")
                runs = settings[best]
                draw_curve(ax, runs, key, shades[nbg], nbg, ", the best setting" if len(settings) > 1 else "")
                at = iterations(runs).index(iteration)
                ax.plot(iteration, percent(runs, key)[:, at].mean(), "o", ms=9, mfc="none", mec=shades[nbg], mew=1.5,
                        label="chosen number of iterations")
        for group in groups:
            group[1, 0].set_xlabel("iterations")
    return figure


def report_figure(rows):
    """Accuracy against the number of labels, the paper's as dashed lines; rows: as report.final_accuracies() gives them."""
    sizes, nlabeled = (list(dict.fromkeys(some)) for some in zip(*rows))
    nlabeled.sort()
    shades = shades_of(sizes)
    with drawing([""], 1, inches=5.5) as (figure, [group]):
        for (key, published, _), [ax] in zip(ROWS, group):
            for nbg in sizes:
                aside = 0.04 * (sizes.index(nbg) - (len(sizes) - 1) / 2)         # for bars not to hide each other
                of_size = [(x + aside, rows[nbg, n]) for x, n in enumerate(nlabeled)]
                ours = [(x, np.mean(row[key]), np.std(row[key])) for x, row in of_size]
                ax.errorbar(*zip(*ours), color=shades[nbg], marker="o", ms=4, capsize=3, lw=1.6, label=name_of(nbg))
                paper = [(x, *row["paper"][published]) for x, row in of_size if row["paper"]]
                if paper:
                    ax.errorbar(*zip(*paper), color=shades[nbg], marker="D", mfc="white", ms=4, capsize=3, lw=1,
                                ls=(0, (4, 3)), label="the same, paper")
            ax.set_xticks(range(len(nlabeled)), nlabeled)
        ax.set_xlabel("labelled images per novel class")
    return figure


def comparison_figure(systems):
    """Accuracy of diffusion against iterations and against the background's size, and of logistic regression as a line, for
    each number of labels; the paper's beside those against the size. systems: as report.comparison() gives them."""
    logreg = systems["logreg", None]
    diffusion = dict(sorted((nbg, rows) for (system, nbg), rows in systems.items() if system == "diffusion"))
    shades = shades_of(diffusion)
    with drawing([title_of(n) for n in logreg], 2) as (figure, groups):
        for n, group in zip(logreg, groups):
            for (key, published, _), (left, right) in zip(ROWS, group):
                for nbg, rows in diffusion.items():
                    draw_curve(left, rows[n]["results"], key, shades[nbg], nbg)
                draw_backgrounds(right, {nbg: rows[n] for nbg, rows in diffusion.items()}, key, published, shades)
                mean, std = np.mean(logreg[n][key]), np.std(logreg[n][key])
                for ax in (left, right):
                    ax.axhline(mean, color=LOGREG, lw=1.5, ls=(0, (5, 3)), zorder=1, label=name_of(None))
                    ax.axhspan(mean - std, mean + std, color=LOGREG, alpha=0.10, lw=0, zorder=0)
                if logreg[n]["paper"]:
                    right.axhline(logreg[n]["paper"][published][0], color=LOGREG, lw=1, ls=(0, (1, 2)), zorder=1,
                                  label=f"{name_of(None)}, paper")
            group[1, 0].set_xlabel("iterations of diffusion")
            group[1, 1].set_xlabel("background (iterations by validation)")
    return figure


# ------------------------------------------------------------------------------------------------------------- parts

@contextlib.contextmanager
def drawing(titles, width, inches=3.1):
    """A figure with `width` panels for each title, in two rows: (figure, [axes (2, width) for each title]). What is drawn gets
    its style and legend at the end."""
    import matplotlib
    from matplotlib.figure import Figure
    bands = -(-len(titles) * width // WIDEST)
    columns = -(-len(titles) // bands)
    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "text.color": INK,
                                "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED}):
        figure = Figure(figsize=(inches * columns * width + 0.4, 6.2 * bands + 0.4), layout="constrained")
        axes = figure.subplots(2 * bands, columns * width, sharey="row", squeeze=False)
        groups = [axes[2 * band:2 * band + 2, width * i:width * (i + 1)] for band in range(bands) for i in range(columns)]
        for group in groups[len(titles):]:
            for ax in group.flat:
                ax.remove()
        groups = groups[:len(titles)]
        yield figure, groups
        for title, group in zip(titles, groups):
            group[0, 0].set_title(title, loc="left", fontweight="bold", fontsize=10)
            for ax in group.flat:
                set_style(ax)
        for row, ax in enumerate(axes[:, 0]):
            ax.set_ylabel(f"top-5 accuracy (%), {ROWS[row % 2][2]}")
        named = {name: handle for group in groups for ax in group.flat
                 for handle, name in zip(*ax.get_legend_handles_labels())}
        names = sorted(named, key=lambda name: name.endswith("paper"))          # ours first
        figure.legend([named[name] for name in names], names, loc="outside lower center", frameon=False,
                      ncols=min(len(named), int(figure.get_figwidth() / 3.1)))


def shades_of(sizes):
    """{nbg: colour}, the darker the larger; None stands for logistic regression."""
    import matplotlib
    known = sorted(set(sizes) - {None})
    return {None: LOGREG, **dict(zip(known, matplotlib.colormaps["viridis_r"](np.linspace(0.95, 0.22, len(known))[::-1])))}


def iterations(runs):
    return [r["iteration"] for r in runs[0]]


def percent(runs, key):
    """Accuracies (runs, iterations) in per cent."""
    return 100 * np.array([[r[key] for r in results] for results in runs])


def draw_curve(ax, runs, key, colour, nbg, what=""):
    """Accuracy against iterations."""
    x, y = iterations(runs), percent(runs, key)
    mean, std = y.mean(axis=0), y.std(axis=0)
    ax.plot(x, mean, color=colour, lw=1.8, marker="o" if len(x) < 50 else None, ms=3, label=name_of(nbg) + what)
    ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.xaxis.set_major_formatter(lambda value, _: short(value))


def draw_backgrounds(ax, rows, key, published, shades):
    """Accuracy against the size of the background; sizes evenly spaced, as 0 has no logarithm."""
    x = np.arange(len(rows))
    ax.plot(x, [np.mean(row[key]) for row in rows.values()], color=MUTED, lw=1.2, zorder=1.5)
    for at, (nbg, row) in zip(x, rows.items()):
        mean, std = np.mean(row[key]), np.std(row[key])
        ax.errorbar(at, mean, std, color=shades[nbg], marker="o", ms=6, capsize=3, lw=1.4, zorder=2)
        ax.annotate(f"{mean:.1f}", (at, mean + std), xytext=(0, 7), textcoords="offset points", ha="center",
                    va="bottom", fontsize=8, color=INK, bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.6})
        if row["paper"]:
            ax.errorbar(at, *row["paper"][published], color=MUTED, marker="D", mfc="white", ms=5, capsize=3, lw=1,
                        label="diffusion, paper")
    ax.set_xticks(x, [short(nbg) for nbg in rows])
    ax.set_xlim(-0.5, len(rows) - 0.5)


def set_style(ax):
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
    return f"{n:g}"


def title_of(n):
    return f"{n} label{'' if n == 1 else 's'} per novel class"


def name_of(nbg):
    """Words for diffusion with so many background images, or for logistic regression, None."""
    return ("logistic regression" if nbg is None else
            "diffusion, no background" if nbg == 0 else f"diffusion, {nbg:,} background images")
