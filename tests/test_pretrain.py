"""The pretraining loop: it learns, it resumes bit for bit, and its report tells whether regions are used."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import losses
from model import VARIANTS, Prediction, Siamese
from pretrain import (
    RECIPES,
    REGION_WEIGHT,
    best_of_group,
    build_data,
    inputs,
    main,
    paired_iou,
    parse_args,
    region_report,
)
from runtime import Run, latest_checkpoint, write_checkpoint
from views import collate_views

TINY = ["--backbone", "mobilenet_v2", "--backbone-weights", "random", "--hidden-dim", "32", "--enc-layers", "1",
        "--dec-layers", "2", "--num-queries", "6", "--num-regions", "3", "--dropout", "0", "--resolution", "64",
        "--batch-size", "4", "--steps", "6", "--workers", "0", "--log-every", "1", "--save-every", "3", "--lr", "1e-3",
        "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty pictures with something in them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(20):
        image = np.repeat(np.repeat(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def pretrain(photos, out, *flags):
    return main(["--data", str(photos), "--out", str(out), *TINY, *flags])


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    state = latest_checkpoint(out)[1]
    return {**state["model"], **state["pretext"]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_writes_settings_terms_report_and_picture(photos, tmp_path):
    assert pretrain(photos, tmp_path) == 0
    lines = log(tmp_path)
    assert lines[0]["settings"]["tau"] == 0.5 and lines[0]["weights"] == {
        "class": 1, "l1": 5, "giou": 2, "region": 5, "global": 10}  # fmt: skip
    terms = [line for line in lines if "loss" in line]
    assert [line["step"] for line in terms] == [1, 2, 3, 4, 5, 6]
    assert {"class", "l1", "giou", "region", "global", "batch_own_group", "grad_norm"} <= terms[0].keys()
    reports = [line for line in lines if "iou_own" in line]
    assert [line["step"] for line in reports] == [3, 6] and "iou_gain_95" in reports[0]
    assert (tmp_path / "regions-00000006.png").stat().st_size > 10_000
    state = latest_checkpoint(tmp_path)[1]
    assert state["meta"]["build"]["variant"] == "conditional" and state["step"] == 6


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(photos, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(photos, whole)
    shutil.copytree(whole, parts)
    (parts / "step-00000006.pt").unlink()  # as if it was killed after step 3
    assert pretrain(photos, parts, "--workers", "1") == 0
    assert same(weights(whole), weights(parts))
    assert [line["step"] for line in log(parts)] == [line["step"] for line in log(whole)]
    assert pretrain(photos, parts) == 0 and "finished" in capsys.readouterr().out
    assert pretrain(photos, parts, "--tau", "0.7") == 2 and "--tau was 0.5, is 0.7" in capsys.readouterr().err


@pytest.mark.parametrize("nth", [1, 2])
def test_run_killed_in_a_report_makes_it_when_it_goes_on(photos, tmp_path, monkeypatch, capsys, nth):
    """The report of many photographs takes a while, and a cluster may kill within seconds."""
    whole, parts, reports = tmp_path / "whole", tmp_path / "parts", []
    assert pretrain(photos, whole) == 0

    def killed(*args):
        reports.append(0)
        if len(reports) == nth:
            raise KeyboardInterrupt  # nothing of ours runs after it
        return region_report(*args)

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.region_report", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(photos, parts)
    assert pretrain(photos, parts) == 0
    rows = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in log(out)[1:]] for out in (whole, parts)]
    assert rows[0] == rows[1] and same(weights(whole), weights(parts))
    for name in ("regions-00000003.png", "regions-00000006.png", "curves.png"):
        assert (parts / name).stat().st_size > 10_000
    capsys.readouterr()
    assert pretrain(photos, parts) == 0 and "finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--augment-on", "device"], ["--compile"]], ids=lambda flags: flags[0])
def test_resumed_run_with_other_ways_of_computing_equals_an_uninterrupted_one(photos, tmp_path, flags):
    usual = ["--micro-batch", "2", "--backbone", "resnet18"]  # random MobileNetV2 maps hardly vary: rounding would show
    pretrain(photos, tmp_path / "plain", *usual)
    flags = [*flags, *usual]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(photos, whole, *flags)
    pretrain(photos, parts, *flags)
    (parts / "step-00000006.pt").unlink()
    assert pretrain(photos, parts, *flags) == 0
    assert same(weights(whole), weights(parts))
    first, usual = (next(line for line in log(tmp_path / name) if "loss" in line) for name in ("whole", "plain"))
    assert first["loss"] == pytest.approx(usual["loss"], rel=2e-2)  # a grey level, or the last bits of a convolution


def test_resume_refuses_other_photographs_and_another_scripts_run(photos, tmp_path, capsys):
    copy, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copy)
    pretrain(copy, out, "--steps", "3")
    (copy / "07.png").unlink()
    assert pretrain(copy, out) == 2
    error = capsys.readouterr().err
    assert re.search(r'photographs of --data was "20, checksum \w+", is "19, checksum \w+"', error)
    state = torch.load(out / "step-00000003.pt", weights_only=True)
    (out / "step-00000003.pt").unlink()
    write_checkpoint(out / "step-00000003.pt", {**state, "settings": {"train": "a.json"}})
    assert pretrain(copy, out) == 2 and "the run of another script, without --method" in capsys.readouterr().err


def test_clip_0_trains_and_checkpoints_to_keep_are_made(photos, tmp_path):
    pretrain(photos, tmp_path / "a", "--clip", "0", "--save-every", "2", "--keep-every", "3")
    pretrain(photos, tmp_path / "b", "--clip", "1e9")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert {path.name for path in (tmp_path / "a").glob("step-*.pt")} >= {"step-00000003.pt", "step-00000006.pt"}


def test_run_on_the_toy_set_goes_on_after_its_folder_has_moved(tmp_path, capsys):
    assert pretrain("toy", tmp_path / "a", "--steps", "2") == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert pretrain("toy", tmp_path / "b", "--steps", "2") == 0 and "finished" in capsys.readouterr().out


def test_loss_falls_on_a_repeated_batch(photos):
    args = parse_args(["--data", str(photos), "--out", "unused", *TINY, "--backbone", "resnet18"])
    net, batch = tiny_net(args), batch_of(args, 4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    totals = []
    for _ in range(12):
        terms, _ = losses.pretext_losses(net, net(*inputs(batch)), batch)
        total = losses.weighted_sum(terms, {"class": 1, "l1": 5, "giou": 2, "region": 5, "global": 10})
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]
    assert sum(v.numel() for v in terms.values()) == 4 * 2 + 1  # four terms a layer and the global one


def tiny_net(args):
    from pretrain import build_net

    torch.manual_seed(0)
    return build_net(args, Run(torch.device("cpu"), 0, 1))


def batch_of(args, n):
    train_set, _ = build_data(args, Run(torch.device("cpu"), 0, 1))
    return collate_views([train_set[0, i] for i in range(n)])


def test_report_sees_regions_used_and_ignored(photos):
    """A detector that reads the answer off z scores 1, and less when regions are exchanged; a deaf one does not."""
    args = parse_args(["--data", str(photos), "--out", "unused", *TINY])
    _, held_out = build_data(args, Run(torch.device("cpu"), 0, 1))

    class Oracle:
        """Takes the boxes of the other view for features and answers with them."""

        eval = train = lambda self: None

        def __init__(self, listens):
            self.listens, self.f_sem = listens, nn.Identity()
            self.asks, self.softmax, self.cost_class, self.first, self.other = True, True, 1.0, 1, 1

        def prepare(self, x, mask, rois, boxes, crops, valid):
            return None, boxes, boxes - 0.5

        def look(self, ctx, z):
            boxes = z if self.listens else torch.full_like(z, 0.5)
            logits = torch.zeros(2, len(z), 6, 3)
            logits[..., ::2, 1] = 5  # the first of each pair of queries is sure
            return Prediction(
                logits, boxes.repeat_interleave(2, 1).expand(2, -1, -1, -1), z.repeat_interleave(2, 1)[None] - 0.5
            )

    good, deaf = (region_report(Oracle(listens), held_out, "cpu") for listens in (True, False))
    assert good["iou_own"] == pytest.approx(1) and good["own_group"] > 0.99 and good["cos_own"] == pytest.approx(1)
    assert good["iou_gain"] > 0.2 and good["cos_gain"] > 0
    assert deaf["iou_gain"] == 0 and deaf["iou_own"] < good["iou_own"]


def test_report_matches_pseudo_classes_as_training_does(photos, monkeypatch):
    args, labels = parse_args(["--data", str(photos), "--out", "unused", *TINY, "--method", "detreg"]), []
    net, batch = tiny_net(args), batch_of(args, 2)
    net.pseudo_classes = 1
    net.make_heads(False, False)
    batch = batch._replace(labels=torch.tensor([[[0, -1, 0], [-1, 0, 0]]]))
    match = losses.match
    monkeypatch.setattr("losses.match", lambda *args, **kind: labels.append(args[2]) or match(*args, **kind))
    losses.pretext_losses(net, net(*inputs(batch)), batch)
    monkeypatch.setattr("pretrain.collate_views", lambda items: batch)
    region_report(net, {(0, 0): None}, "cpu")
    assert labels[0].tolist() == labels[1].tolist() == [[0, 1, 0], [1, 0, 0]]


def test_stride_of_regions_that_nobody_reads_is_named(photos, capsys):
    for method, read in (("siamese", True), ("updetr", False), ("detreg", False)):
        tiny_net(parse_args(["--data", "x", "--out", "y", *TINY, "--method", method, "--region-stride", "16"]))
        assert ("--region-stride 16 changes nothing" in capsys.readouterr().out) != read


def test_best_query_of_a_group_and_paired_iou():
    logits = torch.zeros(1, 1, 4, 3)
    logits[0, 0, [1, 2], 1] = 3.0
    boxes = torch.arange(16.0).view(1, 1, 4, 4)
    box, q_hat = best_of_group(Siamese, Prediction(logits, boxes, boxes), 2)
    assert torch.equal(box[0], boxes[0, 0, [1, 2]]) and torch.equal(q_hat, box)
    a, b = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.75, 0.5, 0.5, 0.5])
    assert paired_iou(a, b).item() == pytest.approx(1 / 3)


def test_recipes_are_the_published_ones():
    assert [RECIPES["imagenet"][k] for k in ("steps", "drop_step", "batch_size", "lr", "global")] == [
        300_000, 200_000, 256, 1e-4, 10]  # fmt: skip
    assert [RECIPES["coco"][k] for k in ("steps", "drop_step", "batch_size", "lr", "global")] == [
        120_000, 80_000, 64, 1e-4, 0.3]  # fmt: skip
    args = parse_args(["--data", "x", "--out", "y"])
    assert (args.tau, args.num_regions, args.clip, args.weight_decay, args.variant) == (
        0.5,
        10,
        0.1,
        1e-4,
        "conditional",
    )
    assert [RECIPES["imagenet"]["region"].get(v, REGION_WEIGHT["siamese"]) for v in VARIANTS] == [3, 5, 3, 3, 3, 3]
    assert RECIPES["coco"]["region"] == {} and list(REGION_WEIGHT.values()) == [3, 1, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-regions", "4"], "--num-queries 6 cannot be shared out evenly among --num-regions 4"),
        (["--backbone-weights", "none.pth"], "none.pth"),
        (["--backbone", "vgg"], "--backbone 'vgg'"),
        (["--proposals", "nowhere"], "nowhere"),
        (["--tau", "0"], "tau"),
        (["--micro-batch", "3"], "batch"),
        (["--hidden-dim", "40"], "--hidden-dim 40"),
        (["--micro-batch", "1"], "--micro-batch"),
        (["--method", "detreg", "--num-regions", "7"], "--num-regions 7 is more than --num-queries 6"),
    ],
)
def test_bad_settings_end_with_one_sentence(photos, tmp_path, capsys, flags, message):
    assert pretrain(photos, tmp_path, *flags) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert message in last and last.startswith("pretrain.py: ") and "Traceback" not in err


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in ("conditional", "deformable-ms")]


@pytest.mark.parametrize("variant", ["conditional", "deformable-ms", *MORE])
def test_every_variant_pretrains(photos, tmp_path, variant):
    assert pretrain(photos, tmp_path, "--variant", variant, "--steps", "1") == 0
    (terms,) = [line for line in log(tmp_path) if "loss" in line]
    (report,) = [line for line in log(tmp_path) if "iou_own" in line]
    assert 0 < terms["loss"] < 200 and 0 <= report["iou_own"] <= 1


@pytest.mark.slow
def test_toy_scenes_are_drawn_once_and_pretrained_on(tmp_path, capsys):
    assert pretrain("toy", tmp_path, "--steps", "1") == 0
    assert log(tmp_path)[0]["photographs"] + log(tmp_path)[0]["held_out"] == 600
    assert pretrain("toy", tmp_path, "--steps", "1") == 0 and "finished" in capsys.readouterr().out


def test_init_starts_from_a_checkpoints_detector(photos, tmp_path):
    pretrain(photos, tmp_path / "first", "--backbone", "resnet18")
    path = latest_checkpoint(tmp_path / "first")[0]
    flags = [*TINY, "--backbone-weights", "auto", "--seed", "5"]  # auto has none for a ResNet: the file's are used
    args = parse_args(["--data", str(photos), "--out", "unused", *flags, "--init", str(path), "--backbone", "resnet18"])
    state, old = tiny_net(args).detector.state_dict(), latest_checkpoint(tmp_path / "first")[1]["model"]
    assert all(torch.equal(v, old[k]) for k, v in state.items() if not k.startswith("class_embed"))


def test_resumed_run_needs_no_file_of_backbone_weights(photos, tmp_path, capsys):
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    flags = ["--backbone", "resnet18", "--backbone-weights", str(file)]
    assert pretrain(photos, tmp_path / "run", *flags) == 0
    file.unlink()
    assert pretrain(photos, tmp_path / "run", *flags) == 0 and "finished" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--method updetr --tau 0.6", "--method detreg --region-nms 0.5",
                                   "--method updetr --no-global", "--method updetr --decoder-consistency",
                                   "--variant deformable-ms --stride 16", "--init a --backbone-weights b",
                                   "--seed -1"])  # fmt: skip
def test_flag_that_would_do_nothing_is_refused_by_name(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--data", "x", "--out", "y", *flags.split()])
    named = flags.split()[-2 if flags[-1] in "0123456ab" else -1]
    assert stopped.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]  # usage: all flags


def test_gradient_norm_in_the_log_is_the_mean_since_the_last_line(photos, tmp_path):
    found = {}
    for every in ("1", "3"):
        assert pretrain(photos, tmp_path / every, "--log-every", every, "--micro-batch", "2") == 0
        found[every] = [line["grad_norm"] for line in log(tmp_path / every) if "grad_norm" in line]
    each = np.array(found["1"])
    assert found["3"] == pytest.approx([each[:3].mean(), each[3:].mean()]) and each.std() > 0


def test_group_matching_keeps_every_match_in_its_group_and_limit_cuts_the_data(photos, tmp_path):
    assert pretrain(photos, tmp_path, "--match", "group", "--limit", "10", "--region-target", "roi") == 0
    lines = log(tmp_path)
    assert lines[0]["photographs"] + lines[0]["held_out"] == 10
    assert all(line["batch_own_group"] == 1 for line in lines if "loss" in line)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_photograph_is_named_and_never_replaced(photos, tmp_path, capsys, workers):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in photos.iterdir():
        os.link(path, folder / path.name)
    (folder / "05x.png").write_bytes((photos / "05.png").read_bytes()[:100])
    assert pretrain(folder, tmp_path / "out", "--workers", workers, "--no-global", "--batch-size", "8") == 2
    assert "05x.png" in capsys.readouterr().err


def test_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert pretrain(tmp_path / "in", tmp_path / "out") == 2 and str(tmp_path / "in") in capsys.readouterr().err


ONE_SIZE = """
import sys, pretrain, views
views.outer_rectangle = lambda width, height, g: (0, 0, width, height)
pretrain.scaled = lambda recipe, resolution: ((64,), 64)
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(photos, tmp_path):
    """The same total batch gives the same losses and gradient in float32 too: normalisers span the ranks.

    All views have one size here; otherwise a batch's padding, which convolutions see, depends on who is in it. Without
    the global head, whose batch norm over four nearly equal images amplifies rounding; test_faults.py has it, and all
    methods, in double precision.
    """
    square, script = tmp_path / "square", tmp_path / "one_size.py"
    square.mkdir()
    script.write_text(ONE_SIZE)
    for path in photos.iterdir():
        Image.open(path).resize((96, 96)).save(square / path.name)
    root = Path(__file__).parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    flags = ["--data", str(square), *TINY, "--no-global", "--backbone", "resnet18"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in {"one": [], "two": torchrun}.items():
        command = [sys.executable, *start, str(script), *flags, "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, env=env, cwd=root)
    a, b = (log(tmp_path / name) for name in ("one", "two"))
    compared = [(x, y) for x, y in zip(a, b, strict=True) if "loss" in x and x["step"] <= 6]
    assert len(compared) == 6
    for x, y in compared:
        for key in {"loss", "class", "l1", "giou", "region", "global", "grad_norm"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-4), (x["step"], key)


@pytest.mark.slow
def test_two_processes_under_amp_say_nothing_that_a_user_cannot_act_on(photos, tmp_path):
    """PyTorch warned that gradients of 1 x 1 convolutions lie otherwise than their buckets, in each process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain.py"]
    flags = ["--data", str(photos), *TINY, "--amp", "--steps", "1", "--out", str(tmp_path / "amp")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, *torchrun, *flags], env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert not said.returncode and "UserWarning" not in said.stderr, said.stderr
