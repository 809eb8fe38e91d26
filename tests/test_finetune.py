"""finetune.py: schedules, one step, resume, evaluation against pycocotools, prediction, and what it refuses."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torchvision
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import convert
import data
import finetune
import losses
import metrics
import plots
import runtime
import toyset
from bench import overfit
from model import VARIANTS, Siamese, build_detector
from proposals import Cache

ROOT = Path(__file__).parents[1]
SMALL = dict(backbone="mobilenet_v2", hidden_dim=32, enc_layers=1, dec_layers=2, num_queries=12, dropout=0.0)
SMALL_FLAGS = "".join(f"--{key.replace('_', '-')} {value} " for key, value in SMALL.items())
FAST = "--resolution 64 --workers 0 --log-every 1 --batch-size 4 --lr 1e-3 --lr-backbone 0 "
ONE = runtime.Run(torch.device("cpu"), 0, 1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    toy = toyset.write_toy(tmp_path_factory.mktemp("finetune") / "toy", unlabelled=1, train=8, val=10, size=64)
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2()
    for module in net.modules():
        module.momentum = 1.0  # batch norms fit their inputs, so that something of a picture reaches the last map
    net(torch.randn(8, 3, 64, 64))
    torch.save(net.state_dict(), toy.parent / "backbone.pth")
    return toy


@pytest.fixture(scope="module")
def trained(toy):
    return run(toy, toy.parent / "trained", "--epochs 2")


@pytest.fixture
def val(toy):
    return data.read_annotations(toy / "val.json")


def flags(toy, out, more="", train="train.json", val="val.json"):
    """Flags that fine-tune the small detector on the toy set."""
    files = f"--train {toy / train} --val {toy / val} --backbone-weights {toy.parent / 'backbone.pth'} --out {out} "
    return (files + SMALL_FLAGS + FAST + more).split()


def run(toy, out, more, code=0, **files):
    assert finetune.main(flags(toy, out, more, **files)) == code
    return out


def evaluate(init, table, out):
    """The results that --eval-only writes."""
    assert finetune.main(f"--eval-only --init {init} --val {table} --out {out} --workers 0".split()) == 0
    return json.loads((out / "detections.json").read_text())


def logged(out, key):
    return [row[key] for row in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if key in row]


def parse(*flags):
    return finetune.parse_args(["--train", "a.json", "--val", "b.json", *flags])


def truth(annotations):
    """The annotations as results of score 1."""
    ids = [number for number, _ in annotations.categories]
    return [{"image_id": image["id"], "category_id": ids[k], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": 1.0}
            for image, boxes, labels in zip(annotations.images, annotations.boxes_xyxy, annotations.labels, strict=True)
            for (x0, y0, x1, y1), k in zip(boxes.tolist(), labels.tolist(), strict=True)]  # fmt: skip


def disturbed(results, seed=0):
    """Results with moved boxes, random scores and some wrong classes: AP between 0 and 1."""
    g, out, ids = torch.Generator().manual_seed(seed), [], sorted({r["category_id"] for r in results})
    for r in results * 2:
        noise, score, wrong = torch.randn(4, generator=g), *torch.rand(2, generator=g).tolist()
        bbox = [v + n for v, n in zip(r["bbox"], (noise * 2).tolist(), strict=True)]
        out.append({**r, "bbox": bbox, "score": score, "category_id": ids[0] if wrong < 0.2 else r["category_id"]})
    return out


def test_recipes_hold_the_published_schedules():
    assert all(set(rows) == set(VARIANTS) for rows in finetune.RECIPES.values())
    assert finetune.RECIPES["coco"]["vanilla"][:5] == (150, 120, 1e-4, 5e-5, 32)  # paper Sec. 4.1
    assert finetune.RECIPES["voc"]["vanilla"][:5] == (50, 40, 1e-4, 5e-5, 32)
    assert finetune.RECIPES["coco"]["conditional"][:5] == (50, 40, 1e-4, 5e-5, 32)
    assert finetune.RECIPES["voc"]["deformable-ms"][:5] == (50, 40, 2e-4, 2e-5, 32)
    assert {r.slow for rows in finetune.RECIPES.values() for v, r in rows.items() if v.startswith("def")} == {0.1}
    assert {r.fraction for r in finetune.RECIPES["voc10"].values()} == {0.1}
    args = parse("--recipe", "voc", "--variant", "dab", "--lr", "3e-4", "--epochs", "7")  # a flag overrides its entry
    finetune.resolve(args, None)
    assert (args.lr, args.epochs, args.drop_epoch, args.lr_backbone, args.fraction) == (3e-4, 7, 6, 5e-5, 1.0)


def test_voc10_is_the_same_1655_of_16551_images_for_everyone(monkeypatch):
    """trainval of 2007 and of 2012 together; the published rule (DETReg) with its seed 0."""
    n = 16551
    images = [{"id": i + 1, "path": f"{i}.jpg", "width": 8, "height": 8} for i in range(n)]
    none = [[torch.zeros(0)] * n for _ in range(5)]
    everything = data.Annotations(Path("VOCdevkit"), images, *none, [(0, "aeroplane")], [])
    monkeypatch.setattr(data, "read_annotations", lambda paths, split: everything)
    args = parse("--recipe", "voc10")
    finetune.resolve(args, None)
    chosen = [image["id"] for image in finetune.labelled(args, args.train, "trainval").images]
    rule = np.random.default_rng(0).choice(np.arange(1, n + 1), 1655, replace=False)
    assert len(chosen) == 1655 and chosen == sorted(rule.tolist()) and chosen[:4] == [5, 41, 46, 57]
    assert len(finetune.labelled(args, args.val, "test").images) == n
    args.fraction_seed = 1
    assert [image["id"] for image in finetune.labelled(args, args.train, "trainval").images] != chosen


def write_voc(root, toy, names, part, split):
    """Some pictures of a toy set as a VOC root, every second object difficult."""
    labels = data.read_annotations(toy / f"{part}.json")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image, boxes_xyxy, kinds in zip(labels.images, labels.boxes_xyxy, labels.labels, strict=True):
        stem = Path(image["path"]).stem
        if stem not in names:
            continue
        shutil.copy(toy / image["path"], root / "JPEGImages" / Path(image["path"]).name)
        xml = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        for i, ((x0, y0, x1, y1), k) in enumerate(zip(boxes_xyxy.tolist(), kinds.tolist(), strict=True)):
            corners = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            xml += f"<object><name>{data.VOC_CLASSES[k]}</name><difficult>{i % 2}</difficult>"
            xml += f"<bndbox>{corners}</bndbox></object>"
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{xml}</annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))


def test_two_voc_roots_train_and_evaluate_like_their_json(toy, tmp_path):
    kit = tmp_path / "VOCdevkit"
    old, new = kit / "VOC2007", kit / "VOC2012"
    write_voc(old, toy, ["00000", "00001", "00002"], "train", "trainval")
    write_voc(new, toy, ["00003", "00004", "00005", "00006", "00007"], "train", "trainval")
    write_voc(old, toy, ["00008", "00009"], "val", "test")
    data.voc2coco([old, new], kit / "trainval.json")
    data.voc2coco([old], kit / "test.json", split="test")
    more = f"--backbone-weights {toy.parent / 'backbone.pth'} --epochs 1 --recipe voc --fraction 0.5 --metric voc07 "
    more += f"--difficult ignore {SMALL_FLAGS} {FAST}"
    sources = {"roots": (f"{old} {new}", old), "json": (kit / "trainval.json", kit / "test.json")}
    for name, (train, val) in sources.items():
        assert finetune.main(f"--train {train} --val {val} --out {tmp_path / name} {more}".split()) == 0
    first = json.loads((tmp_path / "roots" / "log.jsonl").read_text().splitlines()[0])
    assert (first["images"], first["val_images"], len(first["settings"]["classes"])) == (4, 2, 20)
    for key in ("loss", "AP", "AP50"):
        assert logged(tmp_path / "roots", key) == logged(tmp_path / "json", key) != []


def test_flags_are_the_documented_ones():
    assert set(vars(parse())) == set(
        "train val fraction fraction_seed limit overfit resolution workers init variant backbone backbone_weights "
        "stride hidden_dim enc_layers dec_layers num_queries dropout pre_norm box_refine recipe epochs drop_epoch "
        "batch_size micro_batch lr lr_backbone weight_decay clip metric difficult eval_only predict export_proposals "
        "threshold save_json out device amp seed log_every eval_every save_every keep_every".split()
    )


def test_parameter_groups_follow_the_recipe():
    args = parse("--variant", "deformable-ss")
    detector = build_detector(**finetune.resolve(args, None) | SMALL)
    detector.freeze_backbone(False)
    names = {id(p): name for name, p in detector.named_parameters()}
    made = finetune.parameter_groups(detector, args)
    rates, groups = [g["base_lr"] for g in made], [[names[id(p)] for p in g["params"]] for g in made]
    everything = [name for group in groups for name in group]
    assert rates == pytest.approx([2e-4, 2e-5, 2e-5]) and len(everything) == len(set(everything))
    assert all(name.startswith("backbone.0.body.") for name in groups[1])
    assert not [name for name in everything if ".features.0." in name or ".features.1." in name]  # never trained
    assert groups[2] and all("sampling_offsets" in name or "reference_points" in name for name in groups[2])


@pytest.mark.parametrize("variant", ["vanilla", "conditional", "deformable-ss"])
def test_backward_gradient_does_not_depend_on_the_micro_batch(variant):
    torch.manual_seed(0)
    detector = build_detector(variant, 6, **SMALL).train()
    detector.freeze_backbone(False)
    B, T = 4, 3  # of one size: padding would move convolution borders
    x, mask = torch.randint(256, (B, 3, 64, 96), dtype=torch.uint8), torch.zeros(B, 64, 96, dtype=torch.bool)
    boxes, labels = torch.rand(B, T, 4) * 0.4 + 0.2, torch.randint(6, (B, T))
    valid = torch.arange(T) < torch.tensor([[3], [0], [1], [2]])
    whole = data.DetectionBatch(x, mask, boxes, labels, valid, torch.arange(B), torch.ones(B, 2))
    gradients = []
    for size in (4, 2, 1):
        batches = [data.DetectionBatch(*(field[i : i + size] for field in whole)) for i in range(0, B, size)]
        detector.zero_grad()
        terms = finetune.backward(detector, detector.row, batches, {"class": 2.0, "l1": 5.0, "giou": 2.0}, ONE)
        flat = torch.cat([p.grad.flatten() for p in detector.parameters() if p.grad is not None])
        gradients.append((flat, torch.stack(list(terms.values()))))
    assert gradients[0][0].norm() > 0
    for flat, terms in gradients[1:]:
        assert (flat - gradients[0][0]).norm() < 1e-4 * gradients[0][0].norm()
        assert torch.allclose(terms, gradients[0][1], rtol=1e-5)


def slow_terms(row, pred, batch):
    """What `backward` should return for one batch, from loops over queries and targets."""
    count, slow = max(batch.valid.sum().item(), 1), dict.fromkeys(("class", "l1", "giou"), 0.0)
    case = reference.Case(pred.logits, pred.boxes, batch.labels, batch.boxes, batch.valid)
    match = losses.match(*case, softmax=row.softmax, cost_class=row.cost_class)
    for layer in range(len(pred.logits)):
        (logits, boxes, labels, targets), found = case.lists(layer), reference.as_dicts(match, layer)
        if row.softmax:
            slow["class"] += reference.cross_entropy(logits, found, labels)
        else:
            slow["class"] += reference.focal_loss(logits, found, labels, count)
        l1, giou = reference.box_losses(boxes, found, targets, count)
        slow["l1"], slow["giou"] = slow["l1"] + l1, slow["giou"] + giou
    if pred.dn is not None:
        slow |= {"dn_class": 0.0, "dn_l1": 0.0, "dn_giou": 0.0}
        for layer in range(len(pred.logits)):
            columns = pred.dn.logits[layer], pred.dn.boxes[layer], *pred.dn[2:4]
            images = [[x[i][keep].tolist() for x in columns] for i, keep in enumerate(pred.dn.valid)]
            terms = reference.denoising_losses(*zip(*images, strict=True), 5 * count)
            slow |= {key: slow[key] + term for key, term in zip(("dn_class", "dn_l1", "dn_giou"), terms, strict=True)}
    return slow


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("T", "N"), [(0, 300), (1, 300), (300, 300), (300, 12)])
def test_backward_of_0_1_and_300_targets_equals_slow_loops(variant, T, N):
    """The second image has one pixel and one target, or none; 12 queries leave targets over."""
    torch.manual_seed(0)
    detector = build_detector(variant, 6, **SMALL | {"num_queries": N}).train()
    sizes, counts = [(64, 96), (1, 1)], [T, min(T, 1)]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    boxes = [torch.rand(count, 4) * 0.4 + 0.2 for count in counts]
    labels = [torch.randint(6, (count,)) for count in counts]
    batch = data.collate_detections(list(zip(images, boxes, labels, range(2), sizes, strict=True)))
    torch.manual_seed(1)
    with torch.no_grad():
        pred = detector(data.normalise(batch.x, batch.mask), batch.mask, batch.labels, batch.boxes, batch.valid)
    slow = slow_terms(detector.row, pred, batch)
    torch.manual_seed(1)  # the same noisy queries
    terms = finetune.backward(detector, detector.row, [batch], dict.fromkeys(slow, 1.0), ONE)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(slow, rel=2e-4, abs=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    assert any(p.grad.abs().max() > 0 for p in detector.class_embed.parameters())


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("vanilla", "deformable-ss", "dab")]


@pytest.mark.parametrize("variant", ["conditional", "deformable-ms", "dn", *MORE])
def test_train_runs_one_step_of_each_variant(toy, tmp_path, variant):
    run(toy, tmp_path, f"--variant {variant} --overfit 2 --batch-size 2 --epochs 1 --amp")
    (row,) = [row for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "loss" in row]
    weights = {"class": VARIANTS[variant].weight_class, "l1": 5, "giou": 2}
    parts = [w * (row[k] + row.get(f"dn_{k}", 0)) for k, w in weights.items()]
    assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert ("dn_l1" in row) == (variant == "dn")


def test_train_lowers_the_loss(toy, tmp_path):
    run(toy, tmp_path, "--overfit 4 --epochs 40 --drop-epoch 30 --eval-every 100 --save-every 100")
    loss, lr = logged(tmp_path, "loss"), logged(tmp_path, "lr")
    assert sum(loss[-5:]) < 0.6 * sum(loss[:5]) and lr[29] == pytest.approx(1e-3) and lr[30] == pytest.approx(1e-4)
    assert len(logged(tmp_path, "AP")) == 1 and (tmp_path / "curves.png").stat().st_size > 0


def test_train_leaves_a_frozen_backbone_alone(toy, trained):
    before = torch.load(toy.parent / "backbone.pth")
    after = runtime.read_checkpoint(trained / "step-00000004.pt")["model"]
    assert all(torch.equal(v, before[k.removeprefix(convert.BODY)]) for k, v in after.items() if convert.BODY in k)


def test_resume_equals_uninterrupted(toy, tmp_path, monkeypatch):
    more = "--dropout 0.1 --lr-backbone 1e-4 --epochs 3 --eval-every 2 --save-every 3"
    run(toy, tmp_path / "whole", more)
    with monkeypatch.context() as patch:
        asked = iter([False, False, True])  # in the middle of the second epoch of two steps
        patch.setattr(runtime, "stop_on_signals", lambda: contextlib.nullcontext(lambda: next(asked)))
        run(toy, tmp_path / "parts", more, code=runtime.STOPPED)
    run(toy, tmp_path / "parts", more)
    whole, parts = (runtime.read_checkpoint(tmp_path / name / "step-00000006.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    for a, b in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole["best"] == parts["best"]
    for key in ("loss", "lr", "AP"):
        assert logged(tmp_path / "whole", key) == logged(tmp_path / "parts", key)


@pytest.mark.parametrize("end", ["kill", "signal"])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_that_ends_in_an_evaluation_or_just_before_goes_on_with_it(toy, tmp_path, monkeypatch, epoch, end):
    """A cluster may kill within seconds, and an evaluation takes minutes: it comes after the checkpoint."""
    more, evaluations, steps = "--epochs 3 --save-every 3", [], []
    run(toy, tmp_path / "whole", more)
    detect_all, backward = finetune.detect_all, finetune.backward

    def killed(*args):
        evaluations.append(0)
        if len(evaluations) == epoch:
            raise KeyboardInterrupt  # nothing of ours runs after it
        return detect_all(*args)

    with monkeypatch.context() as patch:
        if end == "kill":
            patch.setattr(finetune, "detect_all", killed)
            with pytest.raises(KeyboardInterrupt):
                run(toy, tmp_path / "parts", more)
        else:
            asked = iter([False] * (2 * epoch - 1) + [True])
            patch.setattr(runtime, "stop_on_signals", lambda: contextlib.nullcontext(lambda: next(asked)))
            run(toy, tmp_path / "parts", more, code=runtime.STOPPED)
    assert len(logged(tmp_path / "parts", "AP")) == epoch - 1
    monkeypatch.setattr(finetune, "detect_all", lambda *args: (evaluations.append(1), detect_all(*args))[1])
    monkeypatch.setattr(finetune, "backward", lambda *args: (steps.append(1), backward(*args))[1])
    run(toy, tmp_path / "parts", more)
    assert len(steps) == 2 * (3 - epoch) and sum(evaluations) == 3 - epoch + 1
    for key in ("step", "loss", "AP"):
        assert logged(tmp_path / "whole", key) == logged(tmp_path / "parts", key)
    for name in ("best.pt", "step-00000006.pt"):
        whole, parts = (runtime.read_checkpoint(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert whole["step"] == parts["step"] and whole.get("best") == parts.get("best")
        assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])
    assert (tmp_path / "parts" / "curves.png").exists()


def test_resume_of_a_finished_run_says_so_and_of_another_is_refused(toy, trained, capsys):
    before = (trained / "log.jsonl").read_bytes()
    run(toy, trained, "--epochs 2")
    assert "is finished, 4 of 4 steps" in capsys.readouterr().out and (trained / "log.jsonl").read_bytes() == before
    run(toy, trained, "--epochs 2 --lr 1e-4", code=2)
    assert "--lr was 0.001, is 0.0001" in capsys.readouterr().err


def test_finished_run_goes_on_with_more_epochs_as_it_says(toy, tmp_path, capsys):
    run(toy, tmp_path, "--epochs 1")
    run(toy, tmp_path, "--epochs 1")
    flag = re.search(r"raise --epochs, with (--drop-epoch \d+)", capsys.readouterr().out)[1]
    run(toy, tmp_path, f"--epochs 3 {flag}")
    assert max(logged(tmp_path, "step")) == 6


def test_resume_refuses_other_images_or_labels_by_name(toy, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(toy, tmp_path / "toy", dirs_exist_ok=True)
        (tmp_path / "backbone.pth").write_bytes((toy.parent / "backbone.pth").read_bytes())
        run(tmp_path / "toy", tmp_path / part, "--epochs 1")
        path = tmp_path / "toy" / f"{part}.json"
        table = json.loads(path.read_text())
        table["annotations"][0]["bbox"][2] += 1
        path.write_text(json.dumps(table))
        run(tmp_path / "toy", tmp_path / part, "--epochs 2 --drop-epoch 1", code=2)
        assert f"images and labels of --{part} was" in capsys.readouterr().err


def test_best_weights_are_kept_where_ap_is_not_defined(toy, tmp_path):
    table = json.loads((toy / "val.json").read_text())
    (toy / "empty.json").write_text(json.dumps({**table, "annotations": []}))
    run(toy, tmp_path, "--epochs 1", val="empty.json")
    assert logged(tmp_path, "AP") == [-1] and (tmp_path / "best.pt").exists()


def test_photographs_in_train_and_val_are_said(toy, tmp_path, capsys):
    run(toy, tmp_path / "a", "--epochs 1", val="train.json")
    assert "8 photographs are in --train and in --val" in capsys.readouterr().err
    run(toy, tmp_path / "b", "--epochs 1")
    assert "photographs are in" not in capsys.readouterr().err


def test_voc_roots_of_other_classes_are_matched_by_name_and_jsons_are_told_the_number(toy, tmp_path, capsys):
    for root, names in (("a", ["00000", "00001", "00002", "00003"]), ("b", ["00008", "00009"])):
        write_voc(tmp_path / root, toy, names, "train" if root == "a" else "val", "trainval")
        shutil.rmtree(tmp_path / root / "ImageSets")
        for xml in (tmp_path / root / "Annotations").iterdir():
            text = re.sub("<name>(.*?)</name>", r"<name>my \1</name>", xml.read_text())
            only = f"<name>my {data.VOC_CLASSES[1]}</name>"
            xml.write_text(re.sub("<name>.*?</name>", only, text) if root == "b" else text)
    weights = f"--backbone-weights {toy.parent / 'backbone.pth'} {SMALL_FLAGS} {FAST}"
    more = f"--train {tmp_path / 'a'} --epochs 1 --out {tmp_path / 'out'} {weights}"
    assert finetune.main(f"{more} --val {tmp_path / 'b'}".split()) == 0
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    ids = {name: k for k, name in first["settings"]["classes"]}
    assert len(ids) > 1 and ids[f"my {data.VOC_CLASSES[1]}"] > 0
    found = evaluate(tmp_path / "out" / "best.pt", tmp_path / "b", tmp_path / "look")
    assert {row["category_id"] for row in found} <= set(ids.values())
    data.voc2coco([tmp_path / "b"], tmp_path / "b" / "val.json")
    best = tmp_path / "out" / "best.pt"
    error = refused(capsys, f"--eval-only --init {best} --val {tmp_path / 'b' / 'val.json'} --out {tmp_path / 'o'}")
    assert f"number it {ids[f'my {data.VOC_CLASSES[1]}']} there" in error


def test_ap_per_class_stands_beside_its_name_where_ids_are_not_in_order(val):
    ids = dict(zip([name for _, name in val.categories], (7, 2, 30, 1, 5), strict=False))
    assert len(val.categories) > 2
    mixed = val._replace(categories=[(ids.get(name, 40 + k), name) for k, name in val.categories])
    one = val.categories[0][1]  # found, and nothing else is
    for annotations in (val, mixed):
        number = next(k for k, name in annotations.categories if name == one)
        found = [r for r in truth(annotations) if r["category_id"] == number]
        for metric in ("coco", "voc07"):
            per_class = metrics.evaluate(annotations, found, metric)[1]
            assert per_class[one] == 1 and set(v for name, v in per_class.items() if name != one) <= {0.0, -1.0}


def test_epochs_that_share_a_step_are_all_evaluated_and_kept(toy, tmp_path):
    """Eight images are less than a batch of 16: two epochs a step."""
    run(toy, tmp_path, "--batch-size 16 --epochs 5 --eval-every 3 --keep-every 3")
    assert logged(tmp_path, "AP") and [row for row in logged(tmp_path, "epoch") if row in (4, 5)]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows if "AP" in row] == [(2, 4), (3, 5)]  # 3 ends with step 2, as 4
    assert (tmp_path / "epoch-0003.pt").exists()


def test_voc_root_with_few_of_the_classes_is_evaluated_by_those_it_has_objects_of(toy, tmp_path):
    """A root of persons alone looks like VOC's 20 classes; the detector knows two, of which one is no class of VOC."""
    write_voc(tmp_path, toy, ["00008", "00009"], "val", "test")
    for xml in (tmp_path / "Annotations").iterdir():
        xml.write_text(re.sub("<name>.*?</name>", "<name>person</name>", xml.read_text()))
    found = finetune.evaluated(parse("--val", str(tmp_path)), [[0, "helmet"], [1, "person"]])
    assert found.categories == [(1, "person")] and {k for x in found.labels for k in x.tolist()} == {0}
    with pytest.raises(ValueError, match="category person .* is no class of the detector"):
        finetune.evaluated(parse("--val", str(tmp_path)), [[0, "helmet"]])


def test_voc_roots_are_not_taken_by_position_where_the_detector_names_no_classes(toy, tmp_path):
    write_voc(tmp_path, toy, ["00008"], "val", "test")
    unnamed = [[k, str(k)] for k in range(91)]  # as an official detector's, whose column 0 is not in use
    with pytest.raises(ValueError, match=r"category .*aeroplane.* is no class of the detector, which has 0 \(0\)"):
        finetune.evaluated(parse("--val", str(tmp_path)), unnamed)


def test_fewer_epochs_than_a_stopped_run_has_had_say_so(toy, tmp_path, capsys, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(runtime, "stop_on_signals", lambda: contextlib.nullcontext(lambda: next(asked)))
    run(toy, tmp_path, "--epochs 4 --drop-epoch 3", code=runtime.STOPPED)  # after three steps of eight
    run(toy, tmp_path, "--epochs 1 --drop-epoch 3")
    assert "is finished, 3 of 2 steps" in capsys.readouterr().out


def test_a_converted_pretraining_file_has_nothing_to_predict_with_and_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    detector = build_detector("conditional", 2, **SMALL)
    detector.pretext_heads(3)
    meta = {"build": detector.settings, "method": "siamese"}
    torch.save({"model": detector.state_dict(), "meta": meta}, tmp_path / "pre.pt")
    convert.convert(tmp_path / "pre.pt", tmp_path / "official.pth")
    more = f"--predict {ROOT} --init {tmp_path / 'official.pth'} --export-proposals {tmp_path / 'boxes'}"
    assert "official.pth comes from pretraining and has no class head" in refused(capsys, more)


def test_clip_0_leaves_the_gradient_as_it_is(toy, tmp_path):
    losses = {}
    for clip in ("0", "1e9", "1e-12"):
        run(toy, tmp_path / clip, f"--epochs 1 --clip {clip} --weight-decay 0")
        losses[clip] = runtime.read_checkpoint(tmp_path / clip / "step-00000002.pt")["model"]["class_embed.bias"]
    assert torch.equal(losses["0"], losses["1e9"]) and not torch.equal(losses["0"], losses["1e-12"])


def test_checkpoints_are_the_best_and_the_newest_two_and_those_to_keep(toy, tmp_path):
    run(toy, tmp_path, "--epochs 4 --keep-every 3")
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {"best.pt", "epoch-0003.pt", "step-00000006.pt", "step-00000008.pt"}
    ap = logged(tmp_path, "AP")
    assert runtime.read_checkpoint(tmp_path / "best.pt")["step"] == 2 * (ap.index(max(ap)) + 1)


@pytest.fixture
def pretrained(tmp_path):
    """What pretrain.py writes, of a small vanilla detector with its own heads."""
    detector = build_detector("vanilla", 2, **SMALL)
    net = Siamese(detector, region_target="none", use_global=False)
    pretext = {k: v for k, v in net.state_dict().items() if not k.startswith("detector.")}
    meta = {"variant": "vanilla", "method": "siamese", "build": detector.settings}
    state = {"model": detector.state_dict(), "pretext": pretext, "step": 1, "settings": {}, "meta": meta}
    return runtime.save_checkpoint(tmp_path / "pre", 1, state)


def test_init_supplies_the_architecture_and_all_but_the_class_head(pretrained):
    args = parse("--init", str(pretrained))
    build = finetune.resolve(args, args.init)
    detector = finetune.open_detector(args, ONE, build, [[1, "a"], [5, "b"], [9, "c"]], args.init, resume=False)
    assert (args.variant, args.hidden_dim, args.backbone, args.num_queries) == ("vanilla", 32, "mobilenet_v2", 12)
    assert args.epochs == 150 and detector.class_embed.weight.shape == (4, 32)  # three classes and no-object
    file = runtime.read_checkpoint(pretrained)["model"]
    own = {name: tensor for name, tensor in detector.state_dict().items() if "class_embed" not in name}
    assert all(torch.equal(tensor, file[name]) for name, tensor in own.items())


def test_load_detector_reads_official_files(tmp_path):
    detector = build_detector("vanilla", 5, **SMALL)
    torch.save({"model": detector.state_dict()}, tmp_path / "detr.pth")
    again, classes = finetune.load_detector(tmp_path / "detr.pth")
    assert classes == ["0", "1", "2", "3", "4"] and again.resolution == 800  # its columns are category ids
    assert again.settings | {"dropout": 0.0} == detector.settings


def test_coco_metrics_equal_pycocotools_on_the_files(toy):
    table = json.loads((toy / "val.json").read_text())
    table["annotations"][0]["iscrowd"] = 1
    table["annotations"][1]["area"] *= 40  # another size range than its box
    (toy / "crowd.json").write_text(json.dumps(table))
    annotations, coco = data.read_annotations(toy / "crowd.json"), COCO(toy / "crowd.json")
    results = disturbed(truth(annotations))
    evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "bbox")
    for stage in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        stage()
    numbers, per_class = metrics.coco_metrics(annotations, results)
    assert list(numbers) == metrics.METRICS["coco"] and 0.1 < numbers["AP"] < 0.9
    assert list(numbers.values()) == pytest.approx(evaluation.stats.tolist(), abs=1e-9)
    found = [ap for ap in per_class.values() if ap >= 0]
    assert sum(found) / len(found) == pytest.approx(numbers["AP"])


def test_coco_metrics_of_the_truth_are_one_and_of_nothing_zero(val):
    numbers, per_class = metrics.coco_metrics(val, truth(val))
    assert numbers["AP"] == numbers["AP50"] == numbers["AR100"] == pytest.approx(1.0)
    assert all(ap == pytest.approx(1.0) for ap in per_class.values())
    numbers, per_class = metrics.coco_metrics(val, [])
    assert numbers["AP"] == numbers["AP50"] == numbers["AR100"] == 0
    assert set(per_class.values()) == {0} and "0.000" in metrics.table(numbers, per_class)


def test_coco_metrics_can_ignore_difficult_objects(val):
    hard = [torch.zeros_like(d) for d in val.difficult]
    hard[0][0] = hard[3][0] = True
    annotations, everything = val._replace(difficult=hard), truth(val)
    easy = [r for r, h in zip(everything, torch.cat(hard).tolist(), strict=True) if not h]
    for results in (everything, easy):  # found or missed, it makes no difference
        assert metrics.coco_metrics(annotations, results, "ignore")[0]["AP"] == pytest.approx(1.0)
    assert metrics.coco_metrics(annotations, easy, "count")[0]["AP"] < 0.99


@pytest.mark.parametrize("difficult", ["count", "ignore"])
def test_voc07_metrics_equal_a_slow_loop(val, difficult):
    """Ties in overlap and score, doubles, difficult and crowd objects, classes and images without a detection."""
    g = torch.Generator().manual_seed(3)
    hard = [torch.rand(len(labels), generator=g) < 0.3 for labels in val.labels]
    crowd = [torch.rand(len(labels), generator=g) < 0.1 for labels in val.labels]
    annotations = val._replace(difficult=hard, crowd=crowd, categories=[*val.categories, (99, "absent")])
    results = disturbed(truth(val)) + disturbed(truth(val)[::2], seed=1)
    results = [r | {"score": round(r["score"], 4)} for r in results if r["image_id"] != val.images[3]["id"]]
    results += [r | {"category_id": 1000} for r in results[::9]]  # a class that the annotations do not have
    slow = {}
    for k, (number, name) in enumerate(val.categories):
        ignored = [c | h if difficult == "ignore" else c for c, h in zip(crowd, hard, strict=True)]
        objects = []
        for image, boxes_xyxy, labels, skips in zip(val.images, val.boxes_xyxy, val.labels, ignored, strict=True):
            corners = boxes_xyxy[labels == k].tolist()
            boxes = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in corners]
            objects += [(image["id"], *row) for row in zip(boxes, skips[labels == k].tolist(), strict=True)]
        mine = [(r["image_id"], r["bbox"], r["score"]) for r in results if r["category_id"] == number]
        slow[name] = [reference.eleven_point_ap(objects, mine, t / 100) for t in range(50, 100, 5)]
    numbers, per_class = metrics.evaluate(annotations, results, "voc07", difficult)
    assert per_class == pytest.approx({name: sum(ap) / 10 for name, ap in slow.items()} | {"absent": -1}, abs=1e-12)
    mean = [sum(column) / len(slow) for column in zip(*slow.values(), strict=True)]
    assert list(numbers.values()) == pytest.approx([sum(mean) / 10, mean[0], mean[5]], abs=1e-12)
    assert 0.1 < numbers["AP"] < numbers["AP50"] < 0.95


def test_voc07_metrics_of_the_truth_are_one_and_of_nothing_zero(val):
    assert set(metrics.voc07_metrics(val, truth(val))[0].values()) == {1.0}
    assert set(metrics.voc07_metrics(val, [])[0].values()) == {0.0}
    half = [r for r in truth(val) if r["image_id"] != val.images[0]["id"]]  # found without a mistake up to some recall
    found = metrics.voc07_metrics(val, half)[0]["AP50"]
    assert round(found * 11 * len(val.categories)) == pytest.approx(found * 11 * len(val.categories), abs=1e-9)


def test_train_and_eval_only_use_the_chosen_metric(toy, trained, val, tmp_path, capsys):
    more = f"--eval-only --init {trained / 'best.pt'} --val {toy / 'val.json'} --out {tmp_path} --workers 0"
    assert finetune.main([*more.split(), "--metric", "voc07"]) == 0
    numbers = capsys.readouterr().out.splitlines()
    expected = metrics.voc07_metrics(val, json.loads((tmp_path / "detections.json").read_text()))[0]
    assert numbers[0].split() == ["AP", "AP50", "AP75"] and numbers[1].split() == [
        f"{v:.3f}" for v in expected.values()
    ]
    run(toy, tmp_path / "run", "--overfit 2 --batch-size 2 --epochs 1 --metric voc07")
    assert logged(tmp_path / "run", "AP") and not logged(tmp_path / "run", "AR100")


def test_eval_only_repeats_the_logged_ap_and_writes_ids_of_the_json(toy, trained, val, tmp_path, capsys):
    results = evaluate(trained / "best.pt", toy / "val.json", tmp_path)
    assert len(results) == 12 * 6 * len(val.images)  # all queries x classes, since these are no more than 100
    assert {r["image_id"] for r in results} == {image["id"] for image in val.images}
    assert {r["category_id"] for r in results} == {number for number, _ in val.categories}
    assert metrics.coco_metrics(val, results)[0]["AP"] == pytest.approx(max(logged(trained, "AP")), abs=1e-9)
    printed = capsys.readouterr().out
    assert "AP50" in printed and all(name in printed for _, name in val.categories)


def test_classes_come_from_the_json_with_its_gaps(toy, tmp_path):
    for part in ("train", "val"):
        table = json.loads((toy / f"{part}.json").read_text())
        new = dict(zip([c["id"] for c in table["categories"]], (3, 7, 11, 40, 90, 91), strict=True))
        for row, key in [(c, "id") for c in table["categories"]] + [(a, "category_id") for a in table["annotations"]]:
            row[key] = new[row[key]]
        (toy / f"gaps_{part}.json").write_text(json.dumps(table))
    run(toy, tmp_path, "--epochs 1", train="gaps_train.json", val="gaps_val.json")
    state = runtime.read_checkpoint(tmp_path / "step-00000002.pt")
    assert state["model"]["class_embed.weight"].shape[0] == 6
    results = evaluate(tmp_path / "step-00000002.pt", toy / "gaps_val.json", tmp_path)
    assert {r["category_id"] for r in results} == {3, 7, 11, 40, 90, 91} == set(dict(state["meta"]["classes"]))


def test_detect_gives_the_boxes_of_the_evaluation(toy, trained, val):
    detector, classes = finetune.load_detector(trained / "best.pt")
    assert not detector.training and classes == [name for _, name in val.categories]
    image = val.images[2]
    found = finetune.detect(detector, classes, val.root / image["path"], threshold=0.0)
    rows = finetune.detect_all(
        detector, data.DetectionSet(val, False, 64), detector.classes, ONE, parse("--workers", "0")
    )
    mine = [r for r in rows if r["image_id"] == image["id"]]
    assert len(found) == len(mine) and [s for _, s, _ in found] == sorted((s for _, s, _ in found), reverse=True)
    theirs = torch.tensor(
        [[classes.index(dict(val.categories)[r["category_id"]]), r["score"], *r["bbox"]] for r in mine]
    )
    for name, score, (x0, y0, x1, y1) in found:  # the order of equal scores is open
        row = torch.tensor([classes.index(name), score, x0, y0, x1 - x0, y1 - y0])
        assert (theirs - row).abs().amax(1).min() < 1e-2
    assert finetune.detect(detector, classes, val.root / image["path"], threshold=1.0) == []


def test_predict_writes_a_picture_an_image_and_a_json(toy, trained, tmp_path):
    more = f"--predict {toy / 'train'} {next((toy / 'val').iterdir())} --out {tmp_path} --threshold 0 --init"
    listed = tmp_path / "a" / "new" / "folder" / "found.json"
    assert finetune.main([*more.split(), str(trained / "best.pt"), "--save-json", str(listed)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 9
    found = json.loads(listed.read_text())
    assert len(found) == 9 * 72 and set(found[0]) == {"file_name", "category", "score", "bbox"}
    assert {Path(row["file_name"]).name for row in found} >= {path.name for path in (toy / "train").iterdir()}


def test_unreadable_images_are_skipped_by_name_in_pictures_and_in_an_export(toy, trained, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(toy / "val", folder)
    (folder / "00000-broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (10, 40)).save(folder / "tiny.png")
    init = f"--predict {folder} --init {trained / 'best.pt'} --resolution 64 --out {tmp_path / 'out'}"
    assert finetune.main(f"{init} --threshold 0 --save-json {tmp_path / 'a.json'}".split()) == 1
    assert "skipped: " in (said := capsys.readouterr().err) and "00000-broken.jpg" in said
    good = {path.name for path in folder.iterdir()} - {"00000-broken.jpg"}
    assert {Path(row["file_name"]).name for row in json.loads((tmp_path / "a.json").read_text())} == good
    assert len(list((tmp_path / "out").glob("*.png"))) == len(good)
    assert finetune.main(f"{init} --export-proposals {tmp_path / 'cache'}".split()) == 0
    cache = Cache(tmp_path / "cache")
    assert [path for path, _ in cache.rejected] == ["00000-broken.jpg", "tiny.png"]
    assert "2 images were rejected" in capsys.readouterr().err and len(cache) == len(good) - 1


def test_classes_keep_their_colour_from_picture_to_picture(toy, trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "save_detections", lambda *args: seen.append(args))
    finetune.main(f"--predict {toy / 'val'} --init {trained / 'best.pt'} --out {tmp_path}".split())
    assert len(seen) > 1 and all(args[6] == finetune.load_detector(trained / "best.pt")[1] for args in seen)


def test_detect_takes_16_bit_images_as_their_files(trained, tmp_path):
    detector, classes = finetune.load_detector(trained / "best.pt")
    grey = np.linspace(0, 65535, 64 * 80).reshape(64, 80).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    found = finetune.detect(detector, classes, Image.open(tmp_path / "g.png"), 0)
    assert found == finetune.detect(detector, classes, tmp_path / "g.png", 0)


@pytest.mark.parametrize(
    "job, flags",
    [("predict", "--predict a"), ("export_proposals", "--predict a --export-proposals b"),
     ("evaluate_file", "--eval-only --val a"), ("train", "--train a --val b")],
)  # fmt: skip
def test_a_signal_ends_what_has_nothing_to_save(monkeypatch, tmp_path, job, flags):
    seen, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(finetune, job, lambda *_: seen.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert finetune.main([*flags.split(), "--init", "x", "--out", str(tmp_path)]) == 0
    assert (seen == [before]) is (job != "train")


def refused(capsys, more):
    """The one line on stderr of a run that ends with code 2."""
    assert finetune.main(more.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("finetune.py: ") and "Traceback" not in error
    return error


@pytest.mark.parametrize("flag", ["--variant dab", "--hidden-dim 64", "--backbone resnet50", "--pre-norm"])
def test_init_refuses_contradicting_flags_by_name(toy, trained, tmp_path, capsys, flag):
    files = f"--train {toy / 'train.json'} --val {toy / 'val.json'} --init {trained / 'best.pt'} --out {tmp_path}"
    error = refused(capsys, f"{files} {flag}")
    assert flag.split()[0] in error and "best.pt" in error


def test_bad_files_are_refused_in_a_sentence(toy, trained, pretrained, tmp_path, capsys):
    best, val, both = trained / "best.pt", toy / "val.json", f"--train {toy / 'train.json'} --val {toy / 'val.json'}"
    table = json.loads(val.read_text())
    table["categories"][0]["name"] = "sphere"
    (toy / "other.json").write_text(json.dumps(table))
    (tmp_path / "torn.pt").write_bytes(best.read_bytes()[:5000])
    cases = {
        "no class head": f"--eval-only --init {pretrained} --val {val}",
        "sphere": f"--eval-only --init {best} --val {toy / 'other.json'}",
        "nowhere.json": f"--train nowhere.json --val {val}",
        "torn.pt": f"{both} --init {tmp_path / 'torn.pt'}",
        "only a backbone": f"{both} --init {toy.parent / 'backbone.pth'}",
        "nofile.pt": f"--predict {toy / 'val'} --init nofile.pt",
        "settings.json": f"--predict {toy / 'settings.json'} --init {best}",
        "divisible by 3": f"{both} {SMALL_FLAGS} --batch-size 4 --micro-batch 3",
    }
    for words, case in cases.items():
        assert words in refused(capsys, f"{case} --out {tmp_path / 'out'}")


def test_rates_drop_at_the_recipes_share_of_the_epochs_unless_told():
    for flags, drop in ((["--epochs", "25"], 20), (["--epochs", "25", "--drop-epoch", "7"], 7), ([], 40)):
        args = parse(*flags)
        finetune.resolve(args, None)
        assert args.drop_epoch == drop


def test_predict_and_export_refuse_more_than_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune.runtime, "setup", lambda *_: finetune.runtime.Run(torch.device("cpu"), 0, 2))
    assert "leave torchrun out" in refused(capsys, f"--predict a.jpg --init b.pt --out {tmp_path}")


@pytest.mark.parametrize("more", ["--train a", "--eval-only --val b", "--predict c", "--train a --val b --epochs 0",
                                  "--train a --val b --fraction 1.5", "--train a --val b --fraction nan",
                                  "--predict a --init b --export-proposals c --limit 3",
                                  "--eval-only --init a --overfit 8", "--train a --val b --workers -1",
                                  "--train a --val b --init c --backbone-weights d",
                                  "--train a --val b --lr=-1", "--train a --val b --lr nan",
                                  "--train a --val b --clip -0.1", "--train a --val b --lr-backbone=-1e-5",
                                  "--train a --val b --drop-epoch -3", "--eval-only --init a --val b --predict c",
                                  "--eval-only --init a --val b --overfit 8"])  # fmt: skip
def test_parse_args_refuses_what_cannot_run(more):
    with pytest.raises(SystemExit) as stopped:
        finetune.parse_args(more.split())
    assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec(convert.PACKAGE), reason="the wheel of MobileNetV2 is not installed")
def test_small_detectors_overfit_eight_scenes_from_scratch_and_pretrained(tmp_path):
    assert overfit.main(["--out", str(tmp_path / "a run"), "--variants", "conditional", "deformable-ss"]) == 0


@pytest.mark.slow
def test_two_processes_evaluate_each_image_once_and_train_as_one(toy, trained, tmp_path):
    def torchrun(*more):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "finetune.py",
        ]
        subprocess.run([*command, *more], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)

    best, val = trained / "best.pt", toy / "val.json"
    torchrun(*f"--eval-only --init {best} --val {val} --workers 0 --out {tmp_path / 'two'}".split())
    one, two = evaluate(best, val, tmp_path), json.loads((tmp_path / "two" / "detections.json").read_text())
    assert [r["image_id"] for r in one] == [r["image_id"] for r in two]
    assert [r["score"] for r in one] == pytest.approx([r["score"] for r in two], abs=1e-6)

    table = json.loads((toy / "train.json").read_text())  # images of one size: padding moves convolution borders
    for image in table["images"][:4]:
        Image.open(toy / image["file_name"]).resize((96, 64)).save(toy / image["file_name"])
        image.update(width=96, height=64)
    (toy / "equal.json").write_text(json.dumps(table))
    more = "--overfit 4 --epochs 3 --device cpu"
    run(toy, tmp_path / "three", more, train="equal.json")
    torchrun(*flags(toy, tmp_path / "four", more, train="equal.json"), "--micro-batch", "1")
    for key in ("loss", "grad_norm", "l1"):
        three, four = (logged(tmp_path / name, key) for name in ("three", "four"))
        assert three == pytest.approx(four, rel=1e-4)
