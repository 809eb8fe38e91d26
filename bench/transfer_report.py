"""Tables and pictures of bench/transfer.py, made of its results file alone.

`report` gives the README's text, `publish` puts it between the README's markers and draws docs/transfer-*.png. A row's
fine-tunings are compared, seed by seed, with those of the same detector from scratch, on the same share of the labels.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image

import data
import finetune
import plots
from bench import transfer_numbers as numbers
from bench.figures import shrink
from bench.transfer_numbers import at_epoch, cells, interval, minus, over_the_run, spread
from bench.transfer_study import RATES, STUDY
from detectors import cross_attention
from model import objectness
from proposals import Cache

BEGIN, END = "<!-- transfer:begin -->", "<!-- transfer:end -->"
TITLES = {
    "1": "**Methods** (Tables 1 and 2 in miniature).",
    "1h": "**Methods, with the paper's Hungarian matching** instead of group matching (DETReg: its runs from above).",
    "1r": "**Is it the learning rate?** From scratch at the rate of the pretrained rows, too.",
    "1l": "**Does it last?** Rows of the tables above, fine-tuned four times as long at the same rates.",
    "1m": "**Methods, Deformable multi-scale.**",
    "1b": "**Other detectors, more queries, fewer labels.** `--fraction` with as many more epochs: as many steps.",
    "2": "**Pretext tasks and proposals** (Tables 3 and 4 in miniature).",
    "6": "**Switches**, beyond the paper but for its Hungarian matching; *as it is* has group matching.",
}
MAIN = {"1h": "Hungarian, Siamese DETR", "2": "(e) R-C + G", "6": "as it is"}  # what other rows are held against
IOUS = [50, 55, 60, 65, 70, 75, 80, 85, 90, 95]


class Row:
    """A row's finished runs: `runs` the fine-tunings, `pre` the pretrainings, `scratch` what it is held against."""

    def __init__(self, lines, question, name):
        own = [line for line in lines if [question, name] in line["rows"]]
        best = {line["key"]: line["lr"] for line in numbers.best_rates(lines)}
        self.name, self.pre = name, [line for line in own if line["kind"] == "pretrain"]
        self.runs = [r for r in own if r["kind"] == "finetune" and r["lr"] == best.get(r["key"], r["lr"])]
        self.method = own[0]["method"]
        first = (self.runs or own)[0]  # rows of other fractions may share the pretraining
        key = f"scratch {first['model']} {first['fraction']}"
        self.gains = self.method != "scratch" or first["key"] != key  # it is held against from scratch
        self.scratch = [r for r in lines if self.runs and r["kind"] == "finetune" and r["key"] == key
                        and r["lr"] == best.get(key, r["lr"]) and r["length"] == self.runs[0]["length"]]  # fmt: skip
        for part in ("images and labels of --train", "images and labels of --val"):
            sums = {run["settings"][part] for run in self.runs + self.scratch if part in run["settings"]}
            if len(sums) > 1:
                raise ValueError(f"{name}: runs with different {part} ({', '.join(sorted(sums))}) are not comparable; "
                                 "keep what changed in a file of its own, with other --results")  # fmt: skip

    @property
    def label(self):
        """The name, with a mark where held-out regions are not found: such a run is Siamese DETR by name only."""
        unused = sum("iou_gain" in p and p["iou_gain"] <= p.get("iou_gain_95", 0) for p in self.pre)
        some = f" in {unused} of {len(self.pre)} pretrainings" if unused < len(self.pre) else ""
        return self.name + (f" (regions **not used**{some})" if unused else "")

    def values(self, value):
        """(mean, low, high) of a number of the runs, in percent."""
        return percent(interval(cells(self.runs, value)))

    def gain(self, value, against=None):
        """The same of its paired difference to from scratch, or to another row."""
        others = self.scratch if against is None else against.runs
        pairs = minus(cells(self.runs, value), cells(others, value), scratch=not (against and against.pre))
        return percent(interval(pairs)) if pairs else None


def main_rows(lines, questions=("1", "1h", "1l", "1m")):
    return [row for question in questions for row in rows_of(lines, question) if row.runs]


def new_rows(rows):
    """Without those whose runs an earlier row has, all of them."""
    seen, kept = set(), []
    for row in rows:
        runs = {run["run"] for run in row.runs}
        kept += [row] if runs - seen else []
        seen |= runs
    return kept


def percent(found):
    return tuple(None if x is None else 100 * x for x in found)


def rows_of(lines, question):
    """A question's rows that have runs, in the order of STUDY."""
    names = dict.fromkeys(name for line in lines if line["kind"] != "rate" for q, name in line["rows"] if q == question)
    order = {name: place for place, name in enumerate(STUDY[question][1])}
    return [Row(lines, question, name) for name in sorted(names, key=lambda name: order.get(name, len(order)))]


def metric(key):
    return lambda line: line[key] if line[key] > -1 else float("nan")


# ---------------------------------------------------------------- the text


def report(lines):
    """Markdown of all questions that the lines answer."""
    parts = [facts(lines)]
    for question, title in TITLES.items():
        rows = [row for row in rows_of(lines, question) if row.runs]
        if rows:
            parts += [title, results(rows, next((row for row in rows if row.name == MAIN.get(question)), None))]
        if question == "1r" and rows:
            parts[-1] += versus([row for row in rows_of(lines, "1") if row.method == "siamese"], rows)
    rates = {best["key"]: best["tried"] for best in numbers.best_rates(lines)}
    tuned = {row.runs[0]["key"]: row.name for row in reversed(main_rows(lines, ("1", "1m")))}  # later rows take theirs
    tried = {name: rates[key] for key, name in reversed(tuned.items()) if key in rates}
    if tried:
        table = [[name, *(f"{100 * aps[rate]:.1f}" for rate in RATES)] for name, aps in tried.items()]
        parts += ["**Learning rates tried**: AP on the split.", markdown(["", *RATES], table)]
    methods = new_rows(main_rows(lines))
    lengths = sorted({row.runs[0]["length"][0] for row in methods})
    if methods:
        parts += [
            "**How fast** (Figure 6): epochs until half and all of what from scratch has at the end, with the same "
            "seeds, and AP after 10 % of the schedule "
            f"({' or '.join(f'{epochs / 10:g}' for epochs in lengths)} epochs).", convergence(methods),
            "**How tight** (Figure 4): AP from scratch and what pretraining adds, by IoU threshold and size of the "
            "object. The last column: does the gain grow from IoU 0.50 to 0.75?", by_threshold(methods)]  # fmt: skip
    pre = [row for question in ("5", "1", "1h", "1m", "2", "6") for row in rows_of(lines, question) if row.pre]
    if pre:
        parts += ["**Before any fine-tuning** (Figure 5): does a query find its region (held-out views; pretraining "
                  "seed 0), and what share of the labelled objects is in the detector's boxes, whatever their class?",
                  before(pre)]  # fmt: skip
    return "\n\n".join(parts)


def hours_of_the_fastest(lines):
    """CPU-hours of all runs and repetitions, each at the pace of the fastest of kind, detector, method and length."""
    took = {}
    for line in lines:
        alike = took.setdefault((line["kind"], line["key"], *line["length"]), [])
        alike += [made["cpu_seconds"] for made in (line, *line.get("again", []))]
    return sum(min(alike) * len(alike) for alike in took.values()) / 3600


def facts(lines):
    """What was run, where, at what cost."""
    rates = numbers.best_rates(lines)
    repeated = [again for line in lines for again in line.get("again", [])]
    made = [*lines, *repeated]
    hours, commits = sum(one["cpu_seconds"] for one in made) / 3600, sorted({str(one["commit"]) for one in made})
    fastest = hours_of_the_fastest(lines)
    kinds = {kind: sum(line["kind"] == kind for line in lines) for kind in ("pretrain", "finetune", "rate")}
    more = f" and {len(repeated)} made again after their weights were lost" if repeated else ""
    done, machines = max(one["date"] for one in made), sorted({one["machine"] for one in made})
    text = f"""{kinds["pretrain"]} pretrainings, {kinds["finetune"]} fine-tunings, {kinds["rate"]} runs to choose
learning rates{more}: {hours:.1f} CPU-hours, one thread a run, on {"; ".join(machines)}, until {done}
({fastest:.1f} had every run been as fast as the fastest like it: machines differ). Commits {", ".join(commits)}.
All numbers: MobileNetV2 with *supervised ImageNet weights*, frozen, where the paper uses SwAV's ResNet-50. Intervals
are 95 %, by a crossed bootstrap over pretraining and fine-tuning seeds, and none is given for fewer than three runs.
With one pretraining they cover fine-tuning seeds only, and with three runs they hold the truth in about four of five
cases; with two pretrainings in three of five if all of the spread is pretraining's, in 86 to 99 % if none is. The
choice of photographs to evaluate on is in no interval. `n x m`: pretraining by fine-tuning seeds, the same fine-tuning
seeds in all rows. Differences are paired: over the seeds that both rows have. """
    if rates:
        text += f"""
Learning rates of {len(rates)} rows were chosen by AP on a fifth of the training images, after training on the other
four fifths at half length with one seed (below); the other rows take their method's, of their detector or else of
Conditional."""
    else:
        text += "The learning rate of fine-tuning was not tuned."
    pairs = [[minus(cells(row.runs, of), cells(row.scratch, of), scratch=True) for of in (metric("AP"), over_the_run)]
             for row in rows_of(lines, "1") if row.runs and row.gains]  # fmt: skip
    last, mean = (100 * np.mean([spread(pair[i]) for pair in pairs]) if pairs else np.nan for i in range(2))
    if last >= 0.05:
        text += f"""
*Over the run* is the mean of AP over all epochs, the area under a curve of Figure 6. A single pair's difference to from
scratch varies by {last:.1f} AP at the end and by {mean:.1f} over the run (standard deviation over fine-tuning seeds,
question 1): read single pairs, for which no interval is given, by that. """
    return re.sub(r" +\n", "\n", text).strip()


def results(rows, main):
    """AP, and its difference to from scratch and to the main row."""
    gains = [metric("AP"), metric("AP50"), metric("AP75"), over_the_run]
    head = ["", "n x m", "lr", "AP", "AP50", "AP75", "AP - scratch", "AP50 - scratch", "AP75 - scratch"]
    head += ["over the run - scratch"]
    head += [f"AP - {main.name}", f"over the run - {main.name}"] if main else []
    table, seeds = [], {r["seed"] for row in rows for r in row.runs}
    if all(row.gains for row in rows):  # what they are held against, over all seeds that one of them has
        held = [r for r in rows[0].scratch if r["seed"] in seeds]
        means = [number(percent(interval(cells(held, metric(key))))[0]) for key in ("AP", "AP50", "AP75")]
        table += [["from scratch", f"- x {len(held)}", held[0]["lr"], *means, *["-"] * (len(head) - 6)]] if held else []
    for row in rows:
        seeds = [len({r[key] for r in row.runs}) for key in ("pre_seed", "seed")]
        cell = [row.label, f"{seeds[0] if row.pre else '-'} x {seeds[1]}", row.runs[0]["lr"]]
        cell += [number(row.values(metric(key))[0]) for key in ("AP", "AP50", "AP75")]
        cell += [with_interval(row.gain(of) if row.gains else None) for of in gains]
        against = row.gains and row is not main  # from scratch has its difference to the main row in that one's line
        cell += [with_interval(row.gain(of, main) if against else None) for of in gains[::3]] if main else []
        table.append(cell)
    text = markdown(head, table)
    for row in [row for row in rows if row.method == "siamese"] if main is None else ():
        others = [r for r in rows if r.method in ("updetr", "detreg") and r.runs[0]["model"] == row.runs[0]["model"]]
        text += versus([row], others)
    return text


def versus(rows, others):
    """Sentences on each row minus each of the others, where they have seeds in common."""
    pairs = [(row, other) for row in rows for other in others if row.gain(metric("AP"), other)]
    return "".join(f"\n\n{row.name} minus {other.name}: AP {with_interval(row.gain(metric('AP'), other))}, "
                   f"over the run {with_interval(row.gain(over_the_run, other))}." for row, other in pairs)  # fmt: skip


def convergence(rows):
    table = []
    for row in rows:
        seeds = {line["seed"] for line in row.runs}
        held = [line for line in row.scratch if line["seed"] in seeds]
        if not held:
            continue
        goal = np.mean([line["curve"]["AP"] for line in held], 0)[-1]  # from scratch reaches it, to the last bit
        epochs = row.runs[0]["curve"]["epoch"]
        mean = np.mean([r["curve"]["AP"] for r in row.runs], 0)
        until = [numbers.epochs_until(epochs, mean, share * goal) for share in (0.5, 1)]
        early = 0.1 * row.runs[0]["length"][0]
        gain = row.gain(lambda line, early=early: at_epoch(line, early)) if row.gains else None
        cell = ["not reached" if epoch is None else f"{epoch:.1f}" for epoch in until]
        early = row.values(lambda line, early=early: at_epoch(line, early))[0]
        table.append([row.label, *cell, number(early), with_interval(gain)])
    return markdown(["", "half", "all", "AP after 10 %", "- scratch"], table)


def by_threshold(rows):
    """AP of from scratch, then gains, by threshold; a line a size of object that the set has."""
    table = []
    for row in rows:
        gains = row.gains
        for size in numbers.SIZES:
            if any(value is None for r in row.runs for value in r["grid"][size]) or (
                gains and not row.gain(metric("AP"))
            ):
                continue
            numbers_of = [lambda line, t=t, size=size: line["grid"][size][t] for t in range(10)]
            cell = [(row.gain(of) if gains else row.values(of))[0] for of in numbers_of]
            cell = [f"{value:+.1f}" if gains else number(value) for value in cell]
            slope = row.gain(lambda r, size=size: r["grid"][size][5] - r["grid"][size][0]) if gains else None
            table.append([row.label, size, *cell, with_interval(slope)])
    return markdown(["", "objects", *(f".{t}" for t in IOUS), ".75 - .50"], table)


def before(rows):
    table, seen = [], set()
    for row in rows:
        line = min(row.pre, key=lambda line: line["seed"])
        if line["run"] not in seen:
            seen.add(line["run"])
            parts = [
                f"{line[k]:.3f} +- {line.get(f'{k}_95', 0):.3f}" if k in line else "-" for k in ("iou_gain", "cos_gain")
            ]
            group = f"{line['own_group']:.2f}" if "own_group" in line else "-"
            values = line["before"]
            recall = [number(None if values[k] is None else 100 * values[k])
                      for k in ("AR all", "recall50", *(f"AR {size}" for size in numbers.SIZES[1:]))]  # fmt: skip
            table.append([row.label, *parts, group, *recall])
    head = ["", "IoU gain", "cosine gain", "own group", "AR@100", "recall at 0.5", "ARs", "ARm", "ARl"]
    shown = [i for i in range(len(head)) if any(cells[i] != "-" for cells in table)]  # no column of nothing
    return markdown([head[i] for i in shown], [[cells[i] for i in shown] for cells in table])


def number(x):
    return "-" if x is None or np.isnan(x) else f"{x:.1f}"


def with_interval(found):
    if found is None or np.isnan(found[0]):
        return "-"
    mean, low, high = found
    return f"{mean:+.1f}" if low is None else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(head, rows):
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures, and the README


def publish(lines, runs, root, readme, fill_readme=True):
    """Draw the pictures in root/docs and write the text: into the README, or beside them -> the text to print."""
    text = report(lines)
    drawn = pictures(lines, Path(runs), Path(root) / "docs")
    for path in drawn:
        if Image.open(path).mode != "P":  # drawn just now
            shrink(path, 800)
    shown = "\n".join(f"![{path.stem.replace('-', ' ')}]({path.relative_to(root)})" for path in drawn)
    text = f"{text}\n\n{shown}".strip()
    if not fill_readme:
        (Path(root) / "transfer.md").write_text(text + "\n")
    elif BEGIN in readme.read_text():
        readme.write_text(filled(readme.read_text(), text))
    else:
        text += f"\n\n({readme} has no {BEGIN}, {END}: left as it is)"
    return text


def filled(readme, text):
    """The README with `text` between the markers."""
    head, rest = readme.split(BEGIN, 1)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}"


def pictures(lines, runs, out):
    """All that the lines allow; what needs the weights of seed 0, as long as `runs` lacks some, only once -> paths."""
    drawn, methods = [], main_rows(lines)
    detectors = dict.fromkeys(row.name.rsplit(", ", 1)[0] for row in methods)
    of = {name: {row.name.rsplit(", ", 1)[1]: row for row in methods if row.name.rsplit(", ", 1)[0] == name}
          for name in detectors}  # fmt: skip
    if methods:
        curves = {name: {label: curve(row) for label, row in rows.items()} for name, rows in of.items()}
        drawn.append(plots.save_bands(out / "transfer-convergence.png", curves, "epoch", "AP on unseen photographs"))
        by_iou = {name: {label: [(t / 100, *row.values(lambda r, i=i: r["grid"]["all"][i])) for i, t in enumerate(IOUS)]
                         for label, row in rows.items()} for name, rows in of.items()}  # fmt: skip
        drawn.append(plots.save_bands(out / "transfer-iou.png", by_iou, "IoU threshold", "AP at the end"))
    for question in TITLES:
        bars = {row.name: row.gain(metric("AP")) for row in rows_of(lines, question) if row.runs and row.gains}
        bars = {name: bar for name, bar in bars.items() if bar}
        if len(bars) > 1:
            path = out / f"transfer-question{question}.png"
            drawn.append(plots.save_bars(path, bars, "AP minus from scratch, 95 % interval"))
    columns = {row.name.rsplit(", ", 1)[-1]: runs / line["run"] for q in ("5", "1") for row in rows_of(lines, q)
               for line in row.pre if line["seed"] == 0 and "--variant conditional" in line["model"]}  # fmt: skip
    there = {name: folder for name, folder in columns.items() if (folder / "boxes" / "meta.json").exists()}
    path = out / "transfer-before.png"
    if there and (len(there) == len(columns) or not path.exists()):  # the weights of some may be on another machine
        save_before(path, there)
    drawn += [path] if path.exists() else []
    weights = {label: max((runs / row.runs[0]["run"]).glob("step-*.pt"), default=None)
               for label, row in next(iter(of.values()), {}).items()}  # fmt: skip
    there = {label: file for label, file in weights.items() if file}
    path = out / "transfer-detections.png"
    if there and (len(there) == len(weights) or not path.exists()):
        save_detections(path, there, next(iter(of.values())))
    return drawn + ([path] if path.exists() else [])


def curve(row):
    epochs = row.runs[0]["curve"]["epoch"]
    return [(epoch, *row.values(lambda line, i=i: line["curve"]["AP"][i])) for i, epoch in enumerate(epochs)]


def save_before(path, folders, photographs=2):
    """A column a method: its five best boxes before fine-tuning, and where the best one's query looked (all heads)."""
    images, titles, boxes, maps = [], [], [], []
    for i in range(photographs):
        for name, folder in folders.items():
            cache = Cache(folder / "boxes")
            image = data.load_image(Path(cache.meta["root"]) / cache.paths[i])
            maps.append(attention(max(folder.glob("step-*.pt"), default=None), image))
            images.append(np.asarray(image))
            boxes.append(cache.boxes(i)[:5])
            titles.append(name if i == 0 else "")
    fig, axes = plots.panels(images, columns=len(folders))
    for ax, title, box, seen in zip(axes, titles, boxes, maps, strict=True):
        if seen is not None:
            left, right, bottom, top = ax.images[0].get_extent()
            ax.imshow(seen, cmap="inferno", alpha=0.55, extent=(left, right, bottom, top), interpolation="bilinear")
        plots.draw(ax, box, None)
        ax.set_title(title)
    plots.write(fig, path)


def attention(checkpoint, image):
    """Cross-attention (H, W) of the last layer, heads averaged, of the query that is surest of an object."""
    if checkpoint is None:
        return None
    (detector, made_by), found = finetune.load_pretrained(checkpoint), []
    detector.resolution = 256
    weights = cross_attention(detector, lambda: found.append(finetune.look_at(detector, image)))
    score = objectness(found[0].logits[-1, 0], made_by.softmax or detector.row.softmax, made_by.first)
    w, h = data.resize_size(*image.size, 256)
    stride = detector.strides[0]
    return weights[0, :, score.argmax()].mean(0).reshape(-(-h // stride), -(-w // stride)).numpy()


def save_detections(path, weights, rows, photographs=2):
    """The same photographs after fine-tuning, a column each of `weights`, files of seed 0."""
    models = {label: finetune.load_detector(file) for label, file in weights.items()}
    settings = rows[next(iter(weights))].runs[0]["settings"]
    photos = data.list_images(settings["val"][0])
    images = [data.load_image(photos.root / name) for name in photos.paths[:photographs]]
    fig, axes = plots.panels([np.asarray(im) for im in images for _ in models], columns=len(models))
    for ax, (image, (label, model)) in zip(axes, [(im, m) for im in images for m in models.items()], strict=True):
        found = finetune.detect(*model, image, 0.3)
        names = sorted({row[0] for row in found})
        colours = [plots.colour_of(names.index(row[0])) for row in found]
        boxes = np.array([row[2] for row in found]).reshape(-1, 4)
        plots.draw(ax, boxes, [f"{row[0]} {row[1]:.2f}" for row in found], colours=colours)
        ax.set_title(label if image is images[0] else "")
    plots.write(fig, path)
