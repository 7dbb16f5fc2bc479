"""Tables and figures of an experiment, made from the records of its runs (see experiments.py)."""
import os
import sys

import numpy as np

from lowshot.experiments import SYSTEMS, entry_of, parameters_and_jobs
from lowshot.figures import comparison_figure, name_of, report_figure, save, title_of
from lowshot.files import write_json, write_text
from lowshot.jobs import check_none_lacks
from lowshot.script import as_text, log


def final_accuracies(e, system, jobs, parameters):
    """{(nbg or None, n): row} of the jobs that have run, and the jobs without a record.

    A row has the "parameters", the paper's figures ("paper": {"all": [mean, std], "novel": ..} in per cent, or {}), "notes",
    which are lines on what the test images lack, and lists with an entry for each seed: "seeds", "top5" and "top5_novel" in per
    cent, at the parameters' number of iterations, "results", as the records have them, for all iterations, "unreadable", how many
    labelled and test images could not be read, "seconds" and "peak_memory" in bytes.
    """
    rows, without = {}, []
    for job in jobs:
        record, a = job.result(), job.arguments
        if record is None:
            without.append(job)
            continue
        nbg, n = a.get("nbg"), a["nlabeled"]
        p = entry_of(parameters, nbg, n)
        results = record["results"] if system == "diffusion" else record["runs"][0]["results"]
        iteration = p["niter" if system == "diffusion" else "maxiter"]
        [at] = [r for r in results if r["iteration"] == iteration]
        row = rows.setdefault((nbg, n), {"parameters": p, "paper": entry_of(e.published.get(system, {}), nbg, n), "notes": []})
        row["notes"] += [note for note in record.get("notes", []) if note not in row["notes"]]
        for key, value in (("seeds", a["seed"]), ("top5", 100 * at["top5"]), ("top5_novel", 100 * at["top5_novel"]),
                           ("results", results), ("unreadable", record.get("unreadable", [0, 0])),
                           ("seconds", record["seconds"]), ("peak_memory", record["peak_memory"])):
            row.setdefault(key, []).append(value)
    return rows, without


def mean_std(values):
    """Mean and standard deviation over seeds (of the runs themselves: divided by their number), as text."""
    return f"{np.mean(values):.2f} +/- {np.std(values):.3f}"


def markdown(header, rows):
    """A Markdown table; cells are text, columns are padded to one width."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in lines)


def report_table(e, system, rows):
    """The Markdown table of one system, with the paper's figures where the experiment has any."""
    with_paper = any(row["paper"] for row in rows.values())
    names = ["niter"] if system == "diffusion" else ["batchsize", "lr", "wd", "maxiter"]
    header = [*(["background"] if system == "diffusion" else []), "labels per novel class", *names, "seeds", "all", "novel",
              *(["all, paper", "novel, paper"] if with_paper else []), "s, median", "GB, most"]
    table = []
    for (nbg, n), row in rows.items():
        cells = [] if nbg is None else [f"{nbg:,}"]
        cells += [str(n), *(as_text(row["parameters"][name]) for name in names), str(len(row["seeds"])),
                  mean_std(row["top5"]), mean_std(row["top5_novel"])]
        if with_paper:
            paper = row["paper"]
            cells += [f"{paper[key][0]:.2f} +/- {paper[key][1]:.3f}" if paper else "" for key in ("all", "novel")]
        cells += [f"{np.median(row['seconds']):.1f}", f"{max(row['peak_memory']) / 1e9:.2f}"]
        table.append(cells)
    return markdown(header, table)


def print_report(e, system, ddir, jobs, parameters, source):
    """Phase 4: one line per number of labels, a Markdown table, and report.md, report.json and report.png beside the records."""
    rows, without = final_accuracies(e, system, jobs, parameters)
    if not rows:
        check_none_lacks(without, jobs, 3)
    title = f"top-5 accuracy in per cent, mean +/- standard deviation over seeds (population), {source} parameters"
    log(title)
    previous = None
    for (nbg, n), row in rows.items():
        if nbg != previous:
            log(f"nbg={nbg}")
            previous = nbg
        log(f"nl={n}: {mean_std(row['top5'])}, novel {mean_std(row['top5_novel'])}")
    for i, what in enumerate(("labelled", "test")):
        bad = [counts[i] for row in rows.values() for counts in row["unreadable"] if counts[i]]
        if bad:
            log(f"note: {len(bad)} of {sum(len(row['seeds']) for row in rows.values())} runs have {what} images that could not "
                f"be read, up to {max(bad)}, which have the features of a black one")
    text = report_table(e, system, rows) + "\n" + notes_of(e, rows.values())
    log("\n" + text)
    check_none_lacks(without, jobs, 3)      # before files of them all are replaced
    text = f"{title[0].upper()}{title[1:]}.\n\n{text}"
    stem = os.path.join(e.folder(system, ddir), "report" if source == "chosen" else f"report-{source}")
    write_json(stem + ".json", [{"nbg": nbg, "nlabeled": n, **row} for (nbg, n), row in rows.items()])
    write_text(stem + ".md", text)
    save(report_figure(rows), stem + ".png")
    log(f"wrote {stem}.md, {stem}.json and {stem}.png")


def notes_of(e, rows):
    """The notes of rows as paragraphs, each once, and of what part of the experiment they are."""
    part = [f"note: with {e.replaced} in place of what {os.path.basename(e.path)} has"] * bool(e.replaced)
    return "".join(f"\n{note}\n" for note in [*part, *dict.fromkeys(note for row in rows for note in row["notes"])])


# ------------------------------------------------------------------------------------------------ all systems together

def comparison(e, ddir, source):
    """{("logreg", None) or ("diffusion", nbg): {n: row}}, rows as final_accuracies gives them; all jobs must have run."""
    systems = {}
    for system in SYSTEMS:
        parameters, jobs = parameters_and_jobs(e, system, ddir, source)
        rows, without = final_accuracies(e, system, jobs, parameters)
        check_none_lacks(without, jobs, 3)
        for (nbg, n), row in rows.items():
            systems.setdefault((system, nbg), {})[n] = row
    return systems


def comparison_table(e, systems):
    """Mean accuracies (all / novel, per cent) by system and number of labels."""
    header = ["top-5 accuracy, all / novel (%)"]
    header += [title_of(n) for n in e.nlabeled]
    rows = []
    for (_, nbg), of_n in systems.items():
        rows.append([name_of(nbg), *(f"{np.mean(of_n[n]['top5']):.1f} / {np.mean(of_n[n]['top5_novel']):.1f}"
                                     for n in e.nlabeled)])
    return markdown(header, rows)


def findings(e, systems):
    """[(statement with figures, whether it holds)]: what the paper found, looked for in these results."""
    backgrounds = sorted(nbg for system, nbg in systems if system == "diffusion")
    logreg, most = systems["logreg", None], systems["diffusion", backgrounds[-1]]
    out = []
    for n in (n for n in e.nlabeled if n <= 2):
        ahead = np.mean(most[n]["top5_novel"]) - np.mean(logreg[n]["top5_novel"])
        out.append((f"n = {n}: diffusion is ahead of logistic regression by 5 points or more on the novel classes "
                    f"({ahead:+.1f})", bool(ahead >= 5)))
    if len(backgrounds) > 1:
        for n in e.nlabeled:
            means = [np.mean(systems["diffusion", nbg][n]["top5"]) for nbg in backgrounds]
            out.append((f"n = {n}: accuracy of diffusion grows with the background "
                        f"({', '.join(f'{m:.1f}' for m in means)})", bool((np.diff(means) > 0).all())))
    if max(e.nlabeled) >= 20:
        n = max(e.nlabeled)
        ahead = np.mean(logreg[n]["top5"]) - np.mean(most[n]["top5"])
        out.append((f"n = {n}: logistic regression is ahead of diffusion ({ahead:+.1f})", bool(ahead > 0)))
    return out


def print_comparison(e, ddir, source):
    """The table of both systems and the paper's findings; also to $DDIR/logs/{experiment}.md, with a figure beside it."""
    systems = comparison(e, ddir, source)
    text = comparison_table(e, systems)
    text += f"\n\nMeans over {len(e.seeds)} choice{'s' if len(e.seeds) > 1 else ''} of the labelled images.\n"
    found = [f"- {'holds' if holds else 'DOES NOT HOLD'}: {statement}\n" for statement, holds in findings(e, systems)]
    if found:
        text += "\nWhat a large background is expected to show, on these data:\n\n" + "".join(found)
    text += notes_of(e, (row for of_n in systems.values() for row in of_n.values()))
    log(text)
    stem = ddir.log(e.name if source == "chosen" else f"{e.name}-{source}")
    table, picture = stem + ".md", stem + ".png"
    write_text(table, text)
    save(comparison_figure(systems), picture)
    print(f"wrote {table} and {picture}", file=sys.stderr)
