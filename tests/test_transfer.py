"""The study of bench/transfer.py: its intervals, its order, its numbers, and that README and stored results agree."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import data
import finetune
import metrics
import plots
import pretrain
import proposals
from bench import transfer, transfer_report
from bench import transfer_numbers as numbers
from bench import transfer_study as study
from toyset import write_toy

ROOT = Path(__file__).parents[1]


def settings(*flags):
    return transfer.parse_args(list(flags))


# ---------------------------------------------------------------- intervals


def simulated(g, pre, seeds, between, shared, gain=0.0):
    """Differences of `pre` pretrainings with `seeds` fine-tunings each, of which `shared` comes from scratch's run."""
    x = gain + between * g.normal(size=(pre, 1)) + shared * g.normal(size=(1, seeds)) + g.normal(size=(pre, seeds))
    return {(p, s): x[p, s] for p in range(pre) for s in range(seeds)}


@pytest.mark.parametrize("pre, between, shared", [(2, 0.0, 0.0), (2, 0.5, 0.0), (2, 0.5, 1.0), (4, 1.0, 1.0)])
def test_interval_covers_the_truth_as_often_as_it_says(pre, between, shared):
    g, inside, studies = np.random.default_rng(0), 0, 300
    for i in range(studies):
        _, low, high = numbers.interval(simulated(g, pre, 5, between, shared, gain=3.0), draws=400, seed=i)
        inside += low <= 3 <= high
    assert 0.88 <= inside / studies <= 0.995  # 95 % is meant; 300 studies show it to +- 2.5 %


def test_interval_clustered_on_pretraining_is_wider_than_one_that_takes_runs_as_independent():
    g = np.random.default_rng(1)
    for _ in range(20):
        x = simulated(g, 3, 5, between=2.0, shared=0.0)
        _, low, high = numbers.interval(x)
        _, naive_low, naive_high = numbers.interval({(0, i): value for i, value in enumerate(x.values())})
        if np.std([np.mean([x[p, s] for s in range(5)]) for p in range(3)]) > 1:
            assert high - low > 1.3 * (naive_high - naive_low)


def test_interval_is_around_the_mean_shifts_and_scales_with_the_data():
    x = simulated(np.random.default_rng(2), 2, 5, 0.5, 0.5)
    mean, low, high = numbers.interval(x)
    assert low < mean < high and mean == pytest.approx(np.mean(list(x.values())))
    np.testing.assert_allclose(numbers.interval({k: 3 * v - 7 for k, v in x.items()}),
                               [3 * mean - 7, 3 * low - 7, 3 * high - 7])  # fmt: skip
    assert numbers.interval({k: 4.0 for k in x}) == pytest.approx((4, 4, 4))


def test_interval_of_a_study_that_was_cut_off_takes_what_all_pretrainings_have():
    x = simulated(np.random.default_rng(3), 2, 3, 0.5, 0.5)
    assert numbers.interval({**x, (0, 3): 99.0}) == numbers.interval(x)
    assert numbers.interval({(0, 0): 2.0}) == (2.0, None, None)
    assert numbers.interval({(0, 0): 1.0, (0, 1): 3.0}) == (2.0, None, None)  # it would hold the truth in three of five
    assert numbers.interval({(0, 0): 2.0, (1, 1): 5.0})[0] == 2.0  # no seed in common: the first pretraining


def test_differences_are_paired_by_seed_and_scratch_serves_every_pretraining():
    pretrained, scratch = {(0, 0): 5.0, (1, 0): 6.0, (0, 1): 9.0, (0, 2): 1.0}, {(0, 0): 1.0, (0, 1): 2.0}
    assert numbers.minus(pretrained, scratch, scratch=True) == {(0, 0): 4.0, (1, 0): 5.0, (0, 1): 7.0}
    other = {(0, 0): 1.0, (1, 0): 3.0}
    assert numbers.minus(pretrained, other) == {(0, 0): 4.0, (1, 0): 3.0}
    # a method of which only the first pretraining is done is no scratch: its spread would be missing
    assert numbers.minus({(0, 0): 10.0, (1, 0): 14.0}, {(0, 0): 9.0}) == {(0, 0): 1.0}


def test_epochs_until_and_ap_between_evaluations_lie_on_the_curve():
    epochs, values = [2, 4, 6], [0.0, 0.2, 0.1]
    assert numbers.epochs_until(epochs, values, 0.1) == pytest.approx(3)
    assert numbers.epochs_until(epochs, values, 0.2) == pytest.approx(4)
    assert numbers.epochs_until(epochs, values, 0.21) is None and numbers.epochs_until([3], [0.3], 0.1) == 1
    line = {"curve": {"epoch": epochs, "AP": values}}
    assert [numbers.at_epoch(line, e) for e in (1, 3, 5)] == pytest.approx([0, 0.1, 0.15])


def test_mean_over_the_run_is_the_area_under_the_curve_and_the_spread_that_of_seeds_alone():
    assert numbers.over_the_run({"curve": {"epoch": [2, 4, 6], "AP": [0.0, 0.2, 0.2]}}) == pytest.approx(0.6 / 6)
    assert numbers.over_the_run({"curve": {"epoch": [10], "AP": [0.4]}}) == pytest.approx(0.2)
    g = np.random.default_rng(0)
    found = {(p, s): 100 * p + 3 * g.normal() for p in range(4) for s in range(500)}  # whole pretrainings apart
    assert numbers.spread(found) == pytest.approx(3, rel=0.05)
    assert numbers.spread({(0, 0): 1.0, (0, 1): 3.0, (1, 0): 9.0}) == pytest.approx(2**0.5)
    assert np.isnan(numbers.spread({(0, 0): 1.0, (1, 0): 9.0}))


# ---------------------------------------------------------------- what is run, and in which order


@pytest.mark.parametrize("questions", [["1"], ["1", "1m", "2", "6"]])
def test_a_study_that_is_cut_off_is_balanced_and_pretraining_comes_first(questions):
    runs, rows = study.plan(settings("--questions", *questions), {})
    assert len({run.name for run in runs}) == len(runs) and set(rows) == {run.name for run in runs}
    done, counts = set(), {}
    for run in runs:
        assert run.init is None or run.init in done
        done.add(run.name)
        if run.kind == "finetune":
            for row in map(tuple, rows[run.name]):
                counts.setdefault(row, []).append((run.seed, run.pre_seed))
    for row, seeds in counts.items():
        (pre, tune), arms = study.STUDY[row[0]]
        want = [(s, p) for s in range(tune) for p in range(pre if arms[row[1]].pre else 1)]
        assert set(want) <= set(seeds) and seeds == sorted(seeds)
    first = [run for run in runs if run.kind == "finetune" and (run.pre_seed, run.seed) == (0, 0)]
    place = [runs.index(run) for run in first]
    assert max(place) < min(i for i, run in enumerate(runs) if (run.pre_seed, run.seed) != (0, 0))


def test_question_1_has_the_runs_that_the_budget_counts_on():
    for question, pre, tune in (("1", 3 * 2, 5 + 3 * 5 * 2), ("1m", 4 * 2, 3 + 4 * 3 * 2)):
        kinds = [run.kind for run in study.plan(settings("--questions", question), {})[0]]
        assert kinds.count("pretrain") == pre and kinds.count("finetune") == tune
    runs, _ = study.plan(settings("--quick"), {})
    assert [run.kind for run in runs] == ["finetune", "pretrain", "finetune"]
    assert sum(study.stated_minutes(run, images=64) for run in runs) < 8  # proposals and evaluation come on top


def test_methods_with_hungarian_matching_differ_from_question_1_in_that_alone_and_share_what_has_it_already():
    first, paper = (study.plan(settings("--questions", question), {})[0] for question in ("1", "1h"))
    ours, theirs = ({run.flags for run in runs if run.kind == "pretrain"} for runs in (first, paper))
    moved = {flags.replace("--match group", "--match hungarian") for flags in ours}
    assert moved <= theirs and not any("group" in flags for flags in theirs)
    shared = {run.name for run in first} & {run.name for run in paper}
    assert {name.split("-")[2] for name in shared} == {"detreg", "scratch"}


def test_rows_of_a_seed_differ_in_nothing_but_the_start_and_the_tuned_rate():
    rate = study.rate_key(study.Arm(study.CONDITIONAL, study.SIAMESE))
    runs, _ = study.plan(settings(), {rate: "5e-4"})
    assert {run.rate for run in runs if run.kind == "finetune"} == {"3e-4", "5e-4"}
    for seed in range(5):
        same = [run for run in runs if run.kind == "finetune" and run.seed == seed and not run.init == ""]
        own = [re.sub(r"--lr \S+|--backbone-weights auto", "", run.flags.replace(run.arm.model, "")) for run in same]
        assert len(same) == 7 and len({" ".join(flags.split()) for flags in own}) == 1


def test_longer_fine_tunings_share_pretraining_and_rate_with_the_first_question_and_need_no_rates_of_their_own():
    chosen = {study.rate_key(arm): "5e-4" for arm in study.STUDY["1"][1].values()}
    (first, _), (longer, _) = (study.plan(settings("--questions", *asked), chosen) for asked in (["1", "1h"], ["1l"]))
    assert {run.name for run in longer if run.kind == "pretrain"} < {run.name for run in first}
    assert len([run for run in longer if run.kind == "pretrain"]) == 2  # either matching
    tuned = [run for run in longer if run.kind == "finetune"]
    assert {study.length(run.flags)[0] for run in tuned} == {4 * 25} and {run.rate for run in tuned} == {"5e-4"}
    assert {run.seed for run in tuned if run.init} == {run.seed for run in tuned if not run.init}
    assert all("--drop-epoch 80 " in run.flags for run in tuned)
    rates = [study.plan(settings("--questions", *asked, "--tune"), {}, tune=True)[0] for asked in (["1"], ["1", "1l"])]
    assert {run.name for run in rates[0]} == {run.name for run in rates[1]}


def test_detectors_that_were_not_tuned_take_their_methods_rate_on_conditional():
    scratch, siamese = (study.rate_key(study.Arm(study.CONDITIONAL, pre)) for pre in (None, study.SIAMESE))
    dab = study.rate_key(study.STUDY["1b"][1]["DAB, from scratch"])
    runs, rows = study.plan(settings("--questions", "1b"), {scratch: "1e-4", siamese: "5e-4", dab: "3e-4"})
    rates = {row: run.rate for run in runs for _, row in rows[run.name] if run.kind == "finetune"}
    assert rates.pop("DAB, from scratch") == "3e-4"
    assert {row: rate for row, rate in rates.items() if rate != ("1e-4" if "scratch" in row else "5e-4")} == {}
    assert {run.rate for run in study.plan(settings("--questions", "1b"), {})[0]} == {"3e-4", None}


def test_another_setting_is_another_folder_and_the_same_run_serves_two_rows():
    args = settings("--questions", "1", "2")
    runs, rows = study.plan(args, {})
    assert any(len(r) > 2 for r in rows.values())
    for change in (
        ["--steps", "801"],
        ["--epochs", "31"],
        ["--labels", "b.json"],
        ["--data", "b"],
        ["--scenes", "b"],
        ["--extra=--amp"],
    ):
        others = {run.name for run in study.plan(settings("--questions", "1", "2", *change), {})[0]}
        changed = {run.name for run in runs} - others
        assert changed and (change[0] in ("--epochs", "--labels") or any("pretrain" in name for name in changed))


def test_every_flag_of_the_study_is_one_of_the_scripts():
    runs, _ = study.plan(settings("--questions", *study.STUDY), {})
    runs += study.plan(settings("--questions", *study.STUDY), {}, tune=True)[0]
    places = dict.fromkeys([*study.NEEDS, "data", "scenes", "labels", "val", "split", "out", "siamese"], "x")
    for _, command in study.NEEDS.values():
        script, *flags = command.format_map(places | {"jobs": 2}).split()
        args = (proposals if script == "proposals.py" else finetune).parse_args(flags)
        assert "--workers" not in flags or args.workers == 2  # boxes are made by as many processes as runs
    for run in runs:
        flags = [*run.flags.format_map(places).split(), "--out", "x", *(["--init", "x"] if run.init else [])]
        args = (pretrain if run.kind == "pretrain" else finetune).parse_args(flags)
        assert args.seed == run.seed and (run.kind != "pretrain" or args.num_regions == 10)
        assert run.kind == "pretrain" or args.drop_epoch < args.epochs


def test_rates_are_tried_once_a_detector_and_method_on_a_split_of_the_training_images():
    args = settings("--questions", "1", "1m", "2", "--tune")
    runs, _ = study.plan(args, {}, tune=True)
    tried = [run for run in runs if run.kind == "rate"]
    assert len(tried) == 3 * 8 and not any("{val}" in run.flags or "{labels}" in run.flags for run in tried)
    lines = [{"kind": "rate", "key": study.rate_key(run.arm), "lr": run.rate, "AP": float(run.rate)} for run in tried]
    chosen = {line["key"]: line["lr"] for line in numbers.best_rates(lines)}
    assert set(chosen.values()) == {"5e-4"}
    assert not numbers.best_rates(lines[:2])  # a search that was cut off
    with pytest.raises(ValueError, match="rate 1e-4 was tried twice"):
        numbers.best_rates([*lines, lines[0]])
    runs, _ = study.plan(args, chosen)
    assert all("--lr 5e-4 " in run.flags for run in runs if run.kind == "finetune")


def test_split_of_the_labels_has_each_image_once_and_opens_elsewhere(tmp_path):
    toy = write_toy(tmp_path / "toy", unlabelled=1, train=10, val=1, size=64)
    transfer.write_split(toy / "train.json", tmp_path / "runs" / "split")
    transfer.write_split(toy / "train.json", tmp_path / "runs" / "split")  # again, as a repeated call does
    parts = [data.read_annotations(tmp_path / "runs" / "split" / f"{name}.json") for name in ("train", "val")]
    ids = [[image["id"] for image in part.images] for part in parts]
    assert list(map(len, ids)) == [8, 2] and sorted(ids[0] + ids[1]) == list(range(1, 11))
    assert parts[0].categories == parts[1].categories and len(parts[0].categories) == 6


# ---------------------------------------------------------------- numbers of one run


def test_grid_by_threshold_averages_to_the_scripts_ap_and_recall_of_the_truth_is_one(tmp_path):
    toy = write_toy(tmp_path / "toy", unlabelled=1, train=1, val=8)
    labels, g = toy / "val.json", torch.Generator().manual_seed(0)
    found = [
        {**box, "score": torch.rand((), generator=g).item()} for box in json.loads(labels.read_text())["annotations"]
    ]
    for box in found[::2]:  # half of them moved
        box["bbox"] = [x + 3 * torch.rand((), generator=g).item() for x in box["bbox"]]
    (tmp_path / "d.json").write_text(json.dumps(found))
    grid = numbers.grid(labels, tmp_path / "d.json")
    twelve, _ = metrics.evaluate(data.read_annotations(labels), found)
    assert np.mean(grid["all"]) == pytest.approx(twelve["AP"], abs=1e-4)
    assert grid["all"][0] == pytest.approx(twelve["AP50"], abs=1e-4) and grid["all"] == sorted(grid["all"])[::-1]
    assert np.mean(grid["large"]) == pytest.approx(twelve["APl"], abs=1e-4)
    (tmp_path / "d.json").write_text("[]")
    assert set(numbers.grid(labels, tmp_path / "d.json")["all"]) == {0.0}
    proposals.write_cache(labels, tmp_path / "gt", kind="gt")
    assert numbers.recall_of_boxes(labels, tmp_path / "gt")["AR all"] == 1
    proposals.write_cache(labels, tmp_path / "random", kind="random")
    assert 0 < numbers.recall_of_boxes(labels, tmp_path / "random")["AR all"] < 0.9


# ---------------------------------------------------------------- the report


def stored(pre=2, seeds=3, gain=0.05, questions=("1", "1m", "2", "5")):
    """Results as a study would leave them: from scratch has 0.2 + 0.01 seed, Siamese `gain` more, UP-DETR half."""
    runs, rows = study.plan(settings("--questions", *questions, "--seeds", str(pre), str(seeds)), {})
    lines = []
    for run in runs:
        line = {"run": run.name, "kind": run.kind, "rows": rows[run.name], "key": study.rate_key(run.arm),
                "method": study.method(run.arm), "model": run.arm.model, "fraction": 1.0, "pre_seed": run.pre_seed,
                "seed": run.seed, "init": run.init, "lr": run.rate, "length": study.length(run.flags), "settings": {},
                "commit": "abc", "machine": "a machine", "date": "2026-11-22", "cpu_seconds": 60}  # fmt: skip
        if run.kind == "pretrain":
            line |= {"iou_gain": 0.2, "iou_gain_95": 0.02, "cos_gain": 0.1, "cos_gain_95": 0.01, "own_group": 0.5}
            line["before"] = {"recall50": 0.5} | {
                f"AR {size}": None if size == "small" else 0.3 for size in numbers.SIZES
            }
        else:
            ap = (
                0.2 + 0.01 * run.seed + {"scratch": 0, "updetr": gain / 2, "detreg": 0, "siamese": gain}[line["method"]]
            )
            ap += 0.001 * (run.pre_seed * 2 - 1) if run.init else 0
            line |= {"AP": ap, "AP50": ap * 2, "AP75": ap}
            line["curve"] = {"epoch": [15, 30], "AP": [ap / 2, ap], "AP50": [ap, 2 * ap], "AP75": [ap, ap]}
            line["grid"] = {size: [None if size == "small" else ap] * 10 for size in numbers.SIZES}
        lines.append(line)
    return lines


def test_report_gives_paired_gains_with_intervals_and_marks_what_does_not_use_its_regions():
    lines = stored()
    text = transfer_report.report(lines)
    row = next(line for line in text.splitlines() if line.startswith("| Conditional, Siamese DETR | 2 x 3"))
    mean, low, high = map(float, re.search(r"\| ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", row).groups())
    assert mean == 5.0 and low < 5.0 < high and high - low < 0.5  # seeds cancel, pretrainings remain
    assert "| 26.0 |" in row and "Conditional, Siamese DETR minus Conditional, UP-DETR: AP +2.5" in text
    assert "supervised ImageNet weights" in text and "was not tuned" in text and "not used" not in text
    until = next(
        line for line in text.splitlines() if line.startswith("| Conditional, Siamese DETR | ") and "x" not in line
    )
    assert float(until.split("|")[3]) == pytest.approx(15 + 15 * (0.21 - 0.13) / 0.13, abs=0.06)
    assert float(row.split("|")[-2].split("[")[0]) == pytest.approx(5 / 2, abs=0.06)  # over the run, a straight line
    assert "A single pair" not in text  # here all seeds agree
    for line in lines:
        if line["method"] == "siamese" and line["kind"] == "finetune" and line["seed"] == 0:
            line["AP"] += 0.03
    assert re.search(r"varies by 0.[5-9] AP at the end and by 0.0 over the run", transfer_report.report(lines))
    for line in lines:
        if line["method"] == "siamese" and line["kind"] == "pretrain":
            line["iou_gain"] = 0.01
    assert "Conditional, Siamese DETR (regions **not used**)" in transfer_report.report(lines)
    for line in lines:
        if line["method"] == "siamese" and line["kind"] == "pretrain" and line["seed"] == 1:
            line["iou_gain"] = 0.2
    assert "Conditional, Siamese DETR (regions **not used** in 1 of 2 pretrainings)" in transfer_report.report(lines)
    assert all(len(set(line.count("|") for line in table.splitlines())) == 1
               for table in transfer_report.report(lines).split("\n\n") if table.startswith("|"))  # fmt: skip


def test_how_fast_a_row_is_is_held_against_from_scratch_with_its_own_seeds():
    lines = [line for line in stored(questions=("1",)) if line["method"] != "siamese" or line["seed"] == 0]
    text = transfer_report.report([line for line in lines if "rate" != line["kind"]]).split("**How fast**")[1]
    row = next(line for line in text.splitlines() if line.startswith("| Conditional, Siamese DETR |"))
    goal, end = 0.20, 0.25  # of seed 0; all seeds of from scratch have 0.21
    until = [15 * share * goal / (end / 2) if share * goal < end / 2 else 15 + 15 * (share * goal - end / 2) / (end / 2)
             for share in (0.5, 1)]  # fmt: skip
    assert [float(cell) for cell in row.split("|")[2:4]] == pytest.approx(until, abs=0.06)


def test_rows_with_the_papers_matching_are_held_against_siamese_detr_and_told_once_where_question_1_has_their_runs():
    text = transfer_report.report(stored(questions=("1", "1h")))
    table = text.split("**Methods, with the paper's Hungarian matching**")[1].split("\n\n")[1]
    last = {row.split(" |")[0][2:]: row.split("|")[-3].strip() for row in table.splitlines()[2:]}
    assert last["Hungarian, from scratch"] == last["Hungarian, Siamese DETR"] == "-"
    assert last["Hungarian, UP-DETR"].startswith("-2.5 [") and last["Hungarian, DETReg"].startswith("-5.0 [")
    for title, lines_each in (("**How fast**", 1), ("**How tight**", 3)):
        rows = text.split(title)[1].split("\n\n")[1].splitlines()
        for name, times in (("UP-DETR", 1), ("DETReg", 0), ("from scratch", 0)):
            assert sum(row.startswith(f"| Hungarian, {name} |") for row in rows) == times * lines_each, (title, name)


def test_longer_fine_tunings_are_held_against_from_scratch_of_their_own_length_and_tell_how_fast_they_are(
    tmp_path, monkeypatch
):
    lines = stored(questions=("1", "1l"))
    for line in lines:
        if line["length"][0] == 100 and line["method"] == "scratch":
            line |= {"AP": line["AP"] + 0.3, "curve": {**line["curve"], "epoch": [50, 100]}}
        elif line["length"][0] == 100 and line["kind"] == "finetune":
            line |= {"AP": line["AP"] + 0.2, "curve": {**line["curve"], "epoch": [50, 100]}}
    text = transfer_report.report(lines)
    gains = {
        row.split(" |")[0][2:]: row.split("|")[7].split("[")[0].strip() for row in text.splitlines() if " 2 x 3 " in row
    }
    assert gains["Conditional, Siamese DETR"] == "+5.0"
    assert gains["Conditional, four times as long, Siamese DETR"] == "-5.0"
    assert gains["Conditional, four times as long, Siamese DETR with Hungarian matching"] == "-5.0"
    fast = text.split("**How fast**")[1].split("\n\n")
    assert "(2.5 or 10 epochs)" in fast[0]
    whole = {row.split(" |")[0][2:]: row.split("|")[3].strip() for row in fast[1].splitlines()[2:]}
    assert (
        whole["Conditional, from scratch"] == "30.0"
        and whole["Conditional, four times as long, from scratch"] == "100.0"
    )
    drawn = {}
    monkeypatch.setattr(plots, "save_bands", lambda path, panels, *_: drawn.setdefault(path, panels) and path)
    transfer_report.pictures(lines, tmp_path, tmp_path)
    ends = {
        name: {curve[-1][0] for curve in rows.values()}
        for name, rows in drawn[tmp_path / "transfer-convergence.png"].items()
    }
    assert ends == {"Conditional": {30}, "Conditional, four times as long": {100}}


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 8, 13, 40])
def test_report_of_a_study_that_was_cut_off_is_written_all_the_same(cut, tmp_path):
    lines = stored()[:cut]
    assert "CPU-hours" in transfer_report.report(lines)
    for path in transfer_report.pictures(lines, tmp_path, tmp_path / "docs"):
        assert matplotlib.image.imread(path).std() > 0


def test_report_says_what_its_runs_cost_and_would_have_cost_at_the_pace_of_the_fastest_like_them():
    lines = stored()
    alike = [line for line in lines if line["key"] == lines[0]["key"] and line["kind"] == "finetune"]
    others = (len(lines) - len(alike)) / 60
    for hours, line in enumerate(alike, start=1):
        line["cpu_seconds"] = 3600 * hours
    assert transfer_report.hours_of_the_fastest(lines) == pytest.approx(len(alike) + others)
    assert f"{sum(range(1, len(alike) + 1)) + others:.1f} CPU-hours" in transfer_report.report(lines)
    alike[0]["length"] = [99, 0]  # a run of another length is not like them
    assert transfer_report.hours_of_the_fastest(lines) == pytest.approx(1 + 2 * (len(alike) - 1) + others)
    alike[1]["again"] = [{"cpu_seconds": 9 * 3600}, {"cpu_seconds": 1800}]  # repetitions count on both sides
    assert transfer_report.hours_of_the_fastest(lines) == pytest.approx(1 + (len(alike) - 1 + 2) / 2 + others)


def test_report_takes_the_runs_of_the_tuned_rate_and_refuses_two_runs_of_a_seed():
    lines = stored()
    scratch = next(line for line in lines if line["method"] == "scratch")
    old = {**scratch, "run": "old", "lr": "1e-4", "AP": 0.9}
    with pytest.raises(ValueError, match="two runs with the seeds"):
        transfer_report.report([*lines, old])
    rates = [{**scratch, "run": rate, "kind": "rate", "lr": rate, "AP": ap, "rows": [["1", "x"]]}
             for rate, ap in (("1e-4", 0.1), ("3e-4", 0.2), ("5e-4", 0.1))]  # fmt: skip
    assert transfer_report.report([*lines, old, *rates]).count("| 21.0 |") > 0


def test_rates_are_told_by_the_row_they_were_tried_for_alone():
    lines = stored(questions=("1m",))
    like = next(line for line in lines if line["method"] == "siamese" and line["kind"] == "finetune")
    rates = [{**like, "run": rate, "kind": "rate", "lr": rate, "rows": []} for rate in study.RATES]
    for line in lines:
        line["lr"] = study.RATES[0]
    table = transfer_report.report([*lines, *rates]).split("**Learning rates tried**")[1].split("\n\n")[1]
    assert [row.split(" |")[0] for row in table.splitlines()[2:]] == ["| Deformable-MS, Siamese DETR"]


def test_a_row_at_a_rate_of_its_own_is_held_against_scratch_and_pretrained_rows_and_is_no_ones_scratch():
    lines, args = stored(), settings("--questions", "1r", "--seeds", "1", "3")
    before = transfer_report.report(lines)
    assert "from scratch at" not in before
    scratch = {line["seed"]: line for line in lines if line["method"] == "scratch" and "conditional" in line["model"]}
    runs, rows = study.plan(args, {study.rate_key(study.Arm(study.CONDITIONAL)): "3e-4"})
    assert [run.rate for run in runs] == ["5e-4"] * 3 and not {run.name for run in runs} & {x["run"] for x in lines}
    more = [{**scratch[run.seed], "run": run.name, "rows": rows[run.name], "key": study.rate_key(run.arm),
             "lr": run.rate, "AP": scratch[run.seed]["AP"] + 0.02} for run in runs]  # fmt: skip
    text = transfer_report.report([*lines, *more])
    assert "| Conditional, from scratch at 5e-4 | - x 3 | 5e-4 | 23.0 |" in text and "| +2.0 [+2.0, +2.0] |" in text
    assert "Siamese DETR minus Conditional, from scratch at 5e-4: AP +3.0 [" in text
    assert all(line in text for line in before.splitlines() if line.startswith("| Conditional, Siamese"))
    assert study.plan(args, {}, tune=True)[0] == []  # its rate is given


def test_rows_of_fewer_labels_are_held_against_scratch_on_as_many_whoever_made_their_pretraining():
    lines, (runs, rows) = stored(), study.plan(settings("--questions", "1", "1b", "--seeds", "1", "1"), {})
    known = {line["run"]: line for line in lines}
    like = {line["method"]: line for line in lines if line["kind"] == "finetune" and line["seed"] == 0}
    for run in [run for run in runs if any("labels" in row for _, row in rows[run.name])]:
        if run.name in known:
            known[run.name]["rows"] += rows[run.name]
        else:
            line = {**like[study.method(run.arm)], "run": run.name, "rows": rows[run.name], "lr": run.rate}
            line |= {"key": study.rate_key(run.arm), "fraction": run.arm.fraction, "length": study.length(run.flags)}
            lines.append({**line, "seed": run.seed, "pre_seed": run.pre_seed, "AP": line["AP"] - run.arm.fraction / 10})
    text = transfer_report.report(lines)
    for share in ("30", "10"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {share} % of the labels, Siamese DETR"))
        assert row.split("|")[7].strip() == "+5.1"  # 5, and what its pretraining gives


def test_readme_is_filled_between_its_markers_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{transfer_report.BEGIN}\nold\n{transfer_report.END}\nafter\n")
    text = transfer_report.publish(stored(), tmp_path / "runs", tmp_path, readme)
    once = readme.read_text()
    assert once == f"before\n{transfer_report.BEGIN}\n\n{text}\n\n{transfer_report.END}\nafter\n"
    assert transfer_report.filled(once, text) == once
    assert all((tmp_path / name).is_file() for name in re.findall(r"\]\((docs/[^)]+)\)", text))
    assert "\nold\n" not in once


def test_pictures_of_all_methods_stay_where_the_weights_of_some_are_elsewhere(tmp_path, monkeypatch):
    """A study that goes on on another machine has the results of all runs there, but the weights of its own alone."""
    lines, docs, runs = stored(pre=1, seeds=1), tmp_path / "docs", tmp_path / "runs"
    for name in ("save_before", "save_detections"):
        draw = lambda path, columns, *rest: path.write_text(",".join(columns))  # noqa: E731
        monkeypatch.setattr(transfer_report, name, draw)

    def pictures(*methods):
        for line in lines:
            if line["method"] in methods and "--variant conditional" in line["model"]:
                (runs / line["run"] / "boxes").mkdir(parents=True, exist_ok=True)
                for name in ("boxes/meta.json", "step-1.pt"):
                    (runs / line["run"] / name).touch()
        drawn = [path.stem.split("-")[1] for path in transfer_report.pictures(lines, runs, docs)]
        return [(docs / f"transfer-{name}.png").read_text() if name in drawn else None
                for name in ("before", "detections")]  # fmt: skip

    assert pictures() == [None, None]
    assert pictures("siamese") == ["untrained,Siamese DETR", "Siamese DETR"]  # better than none
    for name in ("before", "detections"):
        (docs / f"transfer-{name}.png").write_text("all, drawn elsewhere")
    assert pictures("detreg", "updetr") == ["untrained,UP-DETR,DETReg,Siamese DETR", "all, drawn elsewhere"]
    assert pictures("scratch")[1] == "from scratch,UP-DETR,DETReg,Siamese DETR"
    shutil.rmtree(runs)
    assert pictures() == ["untrained,UP-DETR,DETReg,Siamese DETR", "from scratch,UP-DETR,DETReg,Siamese DETR"]


def test_readme_and_stored_results_agree():
    readme = (ROOT / "README.md").read_text()
    if not transfer.RESULTS.exists():
        pytest.skip("no results are stored yet: python -m bench.transfer")
    inside = readme.split(transfer_report.BEGIN)[1].split(transfer_report.END)[0]
    assert transfer_report.report(numbers.read(transfer.RESULTS)) in inside, "python -m bench.transfer --report"


def test_damaged_or_missing_results_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl holds no results"):
        numbers.read(tmp_path / "absent.jsonl")
    (tmp_path / "r.jsonl").write_text('{"run": 1}\n{"ru')
    with pytest.raises(ValueError, match="r.jsonl holds no results"):
        numbers.read(tmp_path / "r.jsonl")
    assert numbers.read(tmp_path / "absent.jsonl", missing_ok=True) == []
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match="r.jsonl holds no results yet"):
        numbers.read(tmp_path / "r.jsonl")


def test_a_second_round_brings_the_pretraining_whose_boxes_it_needs(tmp_path):
    flags = [
        "--questions",
        "6",
        "--arms",
        "second round",
        "--out",
        str(tmp_path),
        "--results",
        str(tmp_path / "r.jsonl"),
    ]
    write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1)
    runs = transfer.Study(settings(*flags, "--labels", str(tmp_path / "toy" / "train.json"))).todo
    assert [run.kind for run in runs] == ["pretrain", "pretrain", *["finetune"] * 3]
    assert runs[0].name == study.siamese(settings(*flags)).name and "{own-boxes}" in runs[1].flags


def test_a_pretraining_that_is_made_again_and_stopped_is_not_taken_for_finished(tmp_path):
    """Its line is in the results, of another machine; half of its weights are here."""
    write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1)
    results = tmp_path / "r.jsonl"
    flags = ["--questions", "1", "--arms", "Siamese", "--seeds", "1", "1", "--out", str(tmp_path / "runs"), "--labels",
             str(tmp_path / "toy" / "train.json"), "--results", str(results)]  # fmt: skip
    (pretraining, _), rows = study.plan(settings(*flags), {})
    results.write_text(json.dumps({"run": pretraining.name, "kind": "pretrain", "rows": rows[pretraining.name]}) + "\n")
    folder = tmp_path / "runs" / pretraining.name
    folder.mkdir(parents=True)
    for step, kinds in ((200, ["pretrain", "finetune"]), (800, ["finetune"])):
        (folder / f"step-{step:08d}.pt").touch()
        assert [run.kind for run in transfer.Study(settings(*flags)).todo] == kinds


def test_a_repetition_stands_beside_what_was_published_and_its_time_counts(tmp_path):
    flags = ["--questions", "1", "--arms", "Siamese", "--seeds", "1", "1", "--out", str(tmp_path / "runs"), "--labels",
             str(write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1) / "train.json"),
             "--results", str(tmp_path / "r.jsonl")]  # fmt: skip
    for commit, gain in (("first", 0.2), ("second", 0.3)):
        study_of_one = transfer.Study(settings(*flags))
        pretraining = study_of_one.todo[0]
        assert not (tmp_path / "cpu.json").exists()  # the first one's time does not count twice
        (tmp_path / "cpu.json").write_text("3600")
        log = {"settings": {}, "commit": commit}
        found = {"iou_gain": gain, "iou_gain_95": 0.02, "cos_gain": 0.1, "cos_gain_95": 0.01, "before": {}}
        study_of_one.record(pretraining, tmp_path, log, found)
    (line,) = numbers.read(tmp_path / "r.jsonl")
    assert (line["commit"], line["iou_gain"], line["cpu_seconds"]) == ("first", 0.2, 3600)
    assert [(one["commit"], one["iou_gain"], one["cpu_seconds"]) for one in line["again"]] == [("second", 0.3, 3600)]
    text = transfer_report.facts([line])
    assert "2.0 CPU-hours" in text and "1 made again" in text and "first, second" in text.replace("\n", " ")


def test_progress_counts_pretrainings_that_are_made_again_as_still_to_do(tmp_path, capsys):
    labels = write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1) / "train.json"
    flags = ["--arms", "Siamese", "--seeds", "2", "1", "--out", str(tmp_path / "runs"), "--labels", str(labels),
             "--results", str(tmp_path / "r.jsonl")]  # fmt: skip
    for _ in range(2):
        study_of_two = transfer.Study(settings(*flags))
        for done, pretraining in enumerate([run for run in study_of_two.todo if run.kind == "pretrain"], start=1):
            (tmp_path / "cpu.json").write_text("3600")
            study_of_two.record(pretraining, tmp_path, {"settings": {}, "commit": "abc"}, {"iou_gain": 0.2})
            assert f"[{done}/4]" in capsys.readouterr().out


def test_progress_has_a_dash_where_queries_were_told_of_no_region(tmp_path, capsys):
    labels = write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1) / "train.json"
    study_of_one = transfer.Study(settings("--arms", "DETReg", "--seeds", "1", "1", "--out", str(tmp_path / "runs"),
        "--labels", str(labels), "--results", str(tmp_path / "r.jsonl")))  # fmt: skip
    (tmp_path / "cpu.json").write_text("60")
    study_of_one.record(study_of_one.todo[0], tmp_path, {"settings": {}, "commit": "abc"}, {"before": {}})
    assert "IoU gain -;" in capsys.readouterr().out


def test_two_studies_into_one_file_of_results_are_refused(tmp_path):
    write_toy(tmp_path / "toy", unlabelled=1, train=2, val=1)
    results = tmp_path / "r.jsonl"
    flags = ["--labels", str(tmp_path / "toy" / "train.json"), "--results", str(results)]
    code = f"import time; from bench import transfer; study = transfer.Study(transfer.parse_args({flags} + ['--out', "
    code += f"{str(tmp_path / 'a')!r}])); study.write(); print('open', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "open\n"
        for out, named in (("b", str(tmp_path / "r.jsonl")), ("a", str(tmp_path / "a"))):
            with pytest.raises(ValueError, match=f"another process is writing {named}: wait"):
                transfer.Study(settings(*flags[:2], "--out", str(tmp_path / out), "--results",
                                        str(results if out == "b" else tmp_path / "other.jsonl")))  # fmt: skip
        transfer.Study(settings(*flags, "--out", str(tmp_path / "b"), "--dry-run"))  # this one writes nothing
    finally:
        first.kill()
        first.wait()


def test_runs_on_labels_that_were_changed_in_between_are_not_paired():
    lines = stored()
    for line in lines:
        sums = {"images and labels of --val": "67, checksum 1"} if line["method"] == "siamese" else {}
        line["settings"] = {} if line["kind"] == "pretrain" else sums  # older runs have none
    transfer_report.report(lines)
    for line in lines:
        if line["method"] == "scratch":
            line["settings"] = {"images and labels of --val": "67, checksum 2"}
    with pytest.raises(ValueError, match="Siamese DETR.*images and labels of --val.*67, checksum 1.*67, checksum 2"):
        transfer_report.report(lines)


def test_runs_that_wait_for_a_pretraining_leave_their_place_to_others(tmp_path, monkeypatch):
    args = settings("--questions", "1", "--seeds", "1", "2", "--jobs", "2", "--out", str(tmp_path),
                    "--results", str(tmp_path / "r.jsonl"), "--labels", str(ROOT / "tests" / "none"))  # fmt: skip
    monkeypatch.setattr(numbers, "open_labels", lambda _: type("Labels", (), {"dataset": {"images": []}}))
    case, order, lock, busy, most = transfer.Study(args), [], threading.Lock(), [], []

    def run(self, run, failed):
        with lock:
            assert not run.init or run.init in order or run.init in failed
            busy.append(run.name)
            most.append(sum(name.startswith("pretrain") for name in busy))
        time.sleep(0.3 if run.kind == "pretrain" else 0.02)
        with lock:
            busy.remove(run.name)
            order.append(run.name)
        if run.name.startswith("pretrain-conditional-detreg"):
            raise ValueError("no room")

    monkeypatch.setattr(transfer.Study, "run", run)
    monkeypatch.setattr(transfer.Study, "prepare", lambda self: None)
    assert case.work() == 1 and max(most) == 2  # the second pretraining does not wait for what follows the first
    assert sorted(order) == sorted(run.name for run in case.todo) and len(order) == 11
    kinds = [name.split("-")[0] for name in order]
    assert kinds.index("finetune") < kinds.index("pretrain")  # from scratch waits for nothing


def test_lines_and_bars_show_their_intervals_and_do_without(tmp_path, monkeypatch):
    drawn = []
    write = plots.write
    monkeypatch.setattr(plots, "write", lambda fig, path: (drawn.append(fig), write(fig, path))[1])
    lines = {"a": [(1, 2.0, 1.0, 3.0), (2, 4.0, 3.0, 5.0)], "b": [(1, 2.0, None, None)]}
    plots.save_bands(tmp_path / "b.png", {"one": lines, "two": {"a": lines["a"]}}, "epoch", "title")
    assert [len(ax.lines) for ax in drawn[0].axes] == [2, 1]
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[1, 2], [2, 4]]
    plots.save_bars(tmp_path / "c.png", {"a": (2.0, 1.0, 3.0), "b": (-1.0, None, None)}, "AP")
    (ax,) = drawn[1].axes
    assert [bar.get_width() for bar in ax.patches] == [2, -1]
    assert list(ax.lines[0].get_xdata()) == [1, 3] and len(ax.lines) == 2  # one interval, and zero


# ---------------------------------------------------------------- the whole


@pytest.mark.slow
def test_study_of_two_rows_and_two_seeds_is_interrupted_goes_on_and_is_reported(tmp_path, capsys):
    toy, out = write_toy(tmp_path / "my toy", unlabelled=12, train=8, val=4, size=64), tmp_path / "my runs"
    results = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "bench.transfer", "--data", str(toy / "unlabelled"), "--out", str(out),
               "--labels", str(toy / "train.json"), "--val", str(toy / "val.json"), "--results", str(results),
               "--arms", "Conditional, from", "Conditional, Siam", "--seeds", "1", "2", "--steps", "2", "--epochs", "1",
               "--extra", "--resolution 64"]  # fmt: skip
    begun = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not results.exists() or results.read_text().count("\n") < 2:  # from scratch and the pretraining are done
        assert begun.poll() is None
        time.sleep(0.2)
    begun.send_signal(signal.SIGTERM)
    words, _ = begun.communicate(timeout=60)
    first = numbers.read(results)
    assert begun.returncode == 75 and "5 runs, 0 done, 5 to do" in words and "goes on" in words and len(first) < 5
    handler = signal.getsignal(signal.SIGTERM)
    assert transfer.main(command[3:]) == 0, capsys.readouterr()
    lines = numbers.read(results)
    assert lines[: len(first)] == first and [line["kind"] for line in lines].count("finetune") == 4 == len(lines) - 1
    for line in lines:
        assert line["cpu_seconds"] > 0 and line["commit"] and line["settings"]["seed"] == line["seed"]
        assert "before" in line if line["kind"] == "pretrain" else len(line["grid"]["all"]) == 10
    assert not list(out.glob("finetune-*-1-*/*.pt")) and list(out.glob("finetune-*-0-*/step-*.pt"))
    capsys.readouterr()
    assert transfer.main(command[3:]) == 0 and "5 done, 0 to do" in capsys.readouterr().out
    assert transfer.main([*command[3:], "--report"]) == 0 and numbers.read(results) == lines
    signal.signal(signal.SIGTERM, handler)
    assert "Conditional, Siamese DETR" in capsys.readouterr().out and (out / "transfer.md").is_file()
    names = {path.name for path in (out / "docs").glob("*.png")}
    assert {"transfer-convergence.png", "transfer-before.png", "transfer-detections.png"} <= names
