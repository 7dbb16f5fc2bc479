"""Figures of experiments: what they draw is what the records say."""
import pytest

from lowshot.figures import comparison_figure, report_figure, save, validation_figure


def run_of(*accuracies, first=0, step=1):
    return [{"iteration": first + step * i, "top5": a, "top5_novel": a / 2} for i, a in enumerate(accuracies)]


def row(results, at, paper={}):
    """A row as report.final_accuracies() makes it, of some runs at a number of iterations."""
    return {"results": results, "paper": paper, "top5": [100 * run[at]["top5"] for run in results],
            "top5_novel": [100 * run[at]["top5_novel"] for run in results]}


def drawn(ax):
    """{label: heights} of the lines of a panel that have one."""
    return {name: list(handle.get_ydata() if hasattr(handle, "get_ydata") else handle[0].get_ydata())
            for handle, name in zip(*ax.get_legend_handles_labels())}


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_comparison():
    paper = {"all": [40.5, 1.0], "novel": [20.5, 2.0]}
    systems = {("logreg", None): {n: row([run_of(0.6), run_of(0.7)], 0) for n in (1, 2)},
               ("diffusion", 1000): {n: row([run_of(0.1, 0.4, 0.2), run_of(0.1, 0.6, 0.3)], 1, paper) for n in (1, 2)},
               ("diffusion", 0): {n: row([run_of(0.3), run_of(0.4)], 0) for n in (1, 2)}}
    figure = comparison_figure(systems)
    left, right = figure.axes[:2]
    assert drawn(left) == {"diffusion, no background": [pytest.approx(35)], "logistic regression": [pytest.approx(65)] * 2,
                           "diffusion, 1,000 background images": pytest.approx([10, 50, 25])}
    assert right.lines[0].get_ydata() == pytest.approx([35, 50])            # at the chosen number of iterations
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "1k"]
    assert drawn(right)["diffusion, paper"] == [40.5] and [t.get_text() for t in right.texts] == ["35.0", "50.0"]
    novel = figure.axes[4:6]
    assert drawn(novel[0])["logistic regression"] == [pytest.approx(32.5)] * 2 and drawn(novel[1])["diffusion, paper"] == [20.5]
    assert [ax.get_title("left") for ax in figure.axes[:4]] == ["1 label per novel class", "", "2 labels per novel class", ""]
    assert texts(figure) == ["diffusion, no background", "diffusion, 1,000 background images", "logistic regression",
                             "diffusion, paper"]


def test_comparison_beside_a_part_of_the_papers_figures():
    paper = {"all": [40.5, 1.0], "novel": [20.5, 2.0]}
    systems = {("logreg", None): {n: row([run_of(0.6)], 0, paper if n == 2 else {}) for n in (1, 2)},
               ("diffusion", 0): {n: row([run_of(0.3)], 0, paper if n == 2 else {}) for n in (1, 2)}}
    figure = comparison_figure(systems)
    assert {"diffusion, paper", "logistic regression, paper"} < set(texts(figure))
    assert drawn(figure.axes[3])["logistic regression, paper"] == [40.5] * 2
    figure.draw_without_rendering()
    left, right = figure.axes[0].get_xlim()     # of a single number of iterations
    assert [at for at in figure.axes[0].get_xticks() if left <= at <= right] == [0]


@pytest.mark.parametrize("count, panels", [(1, 4), (3, 12), (4, 16), (5, 20)])
def test_comparison_of_many_numbers_of_labels(tmp_path, count, panels):
    systems = {("logreg", None): {n: row([run_of(0.6)], 0) for n in range(1, count + 1)},
               ("diffusion", 0): {n: row([run_of(0.3)], 0) for n in range(1, count + 1)}}
    figure = comparison_figure(systems)
    assert len(figure.axes) == panels and all(ax.lines for ax in figure.axes)
    save(figure, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_report():
    paper = {"all": [40.5, 1.0], "novel": [20.5, 2.0]}
    figure = report_figure({(nbg, n): row([run_of(0.1 * n + nbg / 1e4), run_of(0.1 * n)], 0, paper if n == 5 else {})
                            for nbg in (0, 1000) for n in (5, 1, 2)})
    above, below = figure.axes
    found = drawn(above)
    assert found["diffusion, 1,000 background images"] == pytest.approx([15, 25, 55])
    assert found["diffusion, no background"] == pytest.approx([10, 20, 50]) and found["the same, paper"] == [40.5]
    assert drawn(below)["diffusion, 1,000 background images"] == pytest.approx([7.5, 12.5, 27.5])
    assert [label.get_text() for label in below.get_xticklabels()] == ["1", "2", "5"]
    bars = {container.get_label(): container.lines[2][0].get_segments() for container in above.containers}
    assert [list(bar[:, 1]) for bar in bars["diffusion, 1,000 background images"]] == [
        pytest.approx(ends) for ends in ([10, 20], [20, 30], [50, 60])]         # one standard deviation over seeds, to both sides
    assert [list(bar[:, 1]) for bar in bars["the same, paper"]] == [[39.5, 41.5]]


def test_validation_of_logreg():
    settings = {(0.1, 0.0, 16): [run_of(0.2, 0.3, first=500, step=500)] * 2,
                (0.01, 0.0, 16): [run_of(0.6, 0.5, first=500, step=500), run_of(0.8, 0.5, first=500, step=500)]}
    figure = validation_figure({(None, 1): settings}, {(None, 1): ((0.01, 0.0, 16), 500)})
    ax = figure.axes[0]
    assert drawn(ax) == {"logistic regression, the best setting": pytest.approx([70, 50]),
                         "other settings of the grid": pytest.approx([20, 30]),
                         "chosen number of iterations": pytest.approx([70])}
    [mark] = [line for line in ax.lines if line.get_markersize() == 9]
    assert list(mark.get_xdata()) == [500] and mark.get_ydata() == pytest.approx([70])


def test_validation_of_diffusion():
    curves = {(nbg, n): {(): [run_of(0.1, 0.2 + nbg / 1e4, 0.1)]} for nbg in (0, 1000) for n in (1, 2)}
    figure = validation_figure(curves, {key: ((), 1) for key in curves})
    assert len(figure.axes) == 4
    for ax in figure.axes[:2]:
        assert drawn(ax) == {"diffusion, no background": pytest.approx([10, 20, 10]),
                             "diffusion, 1,000 background images": pytest.approx([10, 30, 10]),
                             "chosen number of iterations": pytest.approx([30])}
