"""The arithmetic of bench/transfer.py: results files, AP by threshold and size, recall, intervals, epochs until.

A line of the results is one run; see Study.record there for what it holds. AP and recall are in 0..1 here and in the
file, in percent in tables.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import metrics
from bench.transfer_study import RATES
from proposals import Cache

SIZES = ("all", "small", "medium", "large")  # pycocotools' areas, limits 32^2 and 96^2 pixels
DRAWS = 4_000


def read(path, missing_ok=False):
    """The lines of a results file; ValueError where it is missing or damaged."""
    path = Path(path)
    if missing_ok and not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} holds no results ({error}): run python -m bench.transfer first") from error
    if not lines and not missing_ok:
        raise ValueError(f"{path} holds no results yet: run python -m bench.transfer first")
    return lines


def best_rates(lines):
    """[{key, lr, tried: {rate: AP}}] of the runs of --tune: the rate of the highest last AP on the split.

    A search that was cut off has chosen nothing. ValueError when a rate was tried twice, with different settings.
    """
    tried = {}
    for line in lines:
        if line["kind"] == "rate":
            aps = tried.setdefault(line["key"], {})
            if line["lr"] in aps:
                raise ValueError(
                    f"{line['key']}: rate {line['lr']} was tried twice; give other settings another --results"
                )
            aps[line["lr"]] = line["AP"]
    whole = {key: aps for key, aps in tried.items() if set(aps) >= set(RATES)}
    return [{"key": key, "lr": max(aps, key=aps.get), "tried": aps} for key, aps in whole.items()]


# ---------------------------------------------------------------- numbers of one run


def open_labels(path):
    """The labels as finetune.py reads them, opened by pycocotools."""
    with contextlib.redirect_stdout(None):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = metrics.truth_table(data.read_annotations([path], quiet=True))
        coco.createIndex()
    return coco


def evaluate(truth, found, agnostic=False):
    """pycocotools' arrays: precision (10 IoU, 101 recalls, K, 4 sizes, 3 counts), recall without the second axis."""
    with contextlib.redirect_stdout(None):
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "bbox")
        evaluation.params.useCats = int(not agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
    arrays = {name: evaluation.eval[name] for name in ("precision", "recall")}
    return {name: np.where(array > -1, array, np.nan) for name, array in arrays.items()}


def grid(labels, detections):
    """{size: AP at each of the ten IoU thresholds, None where there is no such object} of a file of detections."""
    precision = evaluate(open_labels(labels), json.loads(Path(detections).read_text()))["precision"][..., -1]
    return {size: [rounded(precision[t, ..., i]) for t in range(10)] for i, size in enumerate(SIZES)}


def recall_of_boxes(labels, cache):
    """Class-agnostic recall of a cache of boxes of the labelled photographs: AR of up to 100, and that at IoU 0.5."""
    truth, cache = open_labels(labels), Cache(cache)
    ids = {image["path"]: image["id"] for image in truth.dataset["images"]}
    category = min(truth.getCatIds())
    found = [{"image_id": ids[path], "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
             for i, path in enumerate(cache.paths) for (x0, y0, x1, y1), score
             in zip(cache.boxes(i).tolist(), cache.scores(i).tolist(), strict=True)]  # fmt: skip
    recall = evaluate(truth, found, agnostic=True)["recall"][:, 0, :, -1]  # (10 IoU, 4 sizes)
    return {"recall50": rounded(recall[0, 0])} | {f"AR {size}": rounded(recall[:, i]) for i, size in enumerate(SIZES)}


def rounded(values):
    values = np.asarray(values)[~np.isnan(values)]
    return round(float(values.mean()), 4) if values.size else None


# ---------------------------------------------------------------- numbers of many runs


def cells(lines, value):
    """{(pretraining seed, fine-tuning seed): value(line)}; ValueError when a pair of seeds has two runs."""
    found = {}
    for line in lines:
        key = line["pre_seed"], line["seed"]
        if key in found:
            raise ValueError(f"{line['rows']}: two runs with the seeds {key}; give other settings another --results")
        found[key] = value(line)
    return found


def minus(a, b, scratch=False):
    """Paired differences of two `cells`; scratch: b has no pretraining, and its seed 0 serves for all of a's."""
    pairs = {key: (0, key[1]) if scratch else key for key in a}
    return {key: a[key] - b[other] for key, other in pairs.items() if other in b}


def interval(found, draws=DRAWS, seed=0):
    """(mean, low, high) of `cells`: 95 % interval by a crossed bootstrap of both seeds; None of fewer than three runs.

    Pretraining and fine-tuning seeds are drawn with replacement, each kind by itself: all runs of a pretraining go
    together, and so do all of a fine-tuning seed, which the rows share. A count w becomes 1 + (w - 1) sqrt(n / (n - 1))
    (Rao and Wu 1988), or n = 2 pretrainings would show half of their variance. Of a study that was cut off, the
    fine-tuning seeds count that all pretrainings have.
    """
    pre = sorted({p for p, _ in found})
    seeds = [s for s in sorted({s for _, s in found}) if all((p, s) in found for p in pre)]
    if not seeds:
        pre, seeds = pre[:1], sorted(s for p, s in found if p == pre[0])
    x = np.array([[found[p, s] for s in seeds] for p in pre])  # (P, S)
    if x.size < 3:
        return (float(x.mean()) if x.size else float("nan")), None, None
    g = np.random.default_rng(seed)
    rows, columns = (resampled(g, n, draws) for n in x.shape)
    means = (rows @ x * columns).sum(1) / x.size
    return float(x.mean()), *np.quantile(means, (0.025, 0.975)).tolist()


def resampled(g, n, draws):
    """Weights (draws, n) of a bootstrap of n things, mean 1, with the variance of the mean unbiased; 1 for n = 1."""
    counts = g.multinomial(n, np.full(n, 1 / n), draws)
    return 1 + (counts - 1) * (n / max(n - 1, 1)) ** 0.5


def at_epoch(line, epoch, key="AP"):
    """A curve's value there, on straight lines between evaluations, from 0 at epoch 0."""
    curve = line["curve"]
    return float(np.interp(epoch, [0, *curve["epoch"]], [0, *curve[key]]))


def over_the_run(line, key="AP"):
    """A curve's mean over the epochs, on straight lines between evaluations, from 0 at epoch 0."""
    epochs, values = [0, *line["curve"]["epoch"]], [0, *line["curve"][key]]
    areas = np.diff(epochs) * (np.array(values[1:]) + values[:-1]) / 2
    return float(areas.sum() / epochs[-1])


def spread(found):
    """Standard deviation of `cells` over the fine-tuning seeds of a pretraining, pooled; nan where each has one."""
    groups = [[value for (p, _), value in found.items() if p == pre] for pre in {p for p, _ in found}]
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)
    free = sum(len(group) - 1 for group in groups)
    return float((squares / free) ** 0.5) if free else float("nan")


def epochs_until(epochs, values, goal):
    """The first epoch, on straight lines between evaluations, at which a curve from 0 reaches the goal, or None."""
    epochs, values = [0, *epochs], [0, *values]
    for i in range(1, len(values)):
        if values[i] >= goal:
            share = (goal - values[i - 1]) / (values[i] - values[i - 1]) if values[i] > values[i - 1] else 1
            return epochs[i - 1] + share * (epochs[i] - epochs[i - 1])
    return None
