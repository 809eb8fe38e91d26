"""bench/peers.py, bench/scaling.py, docs/scaling.md: equal work on both sides, and a page that the code prints."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import data
import metrics
from bench import peers, scaling, speed, timing
from bench.training import photographs
from model import Siamese, build_detector

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
SMALL = dict(backbone="resnet18", hidden_dim=64, enc_layers=1, dec_layers=2, num_queries=20)


def small(monkeypatch, module):
    monkeypatch.setattr(module, "build_detector", lambda variant, k, **more: build_detector(variant, k, **SMALL | more))


# ---- transformers


@pytest.fixture
def transformers():
    library = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    library.logging.set_verbosity_error()


@pytest.mark.parametrize("variant", ["conditional", "deformable-ss", "deformable-ms"])
def test_both_sides_of_the_fine_tuning_bench_train_the_same_with_the_same_loss(variant, transformers):
    torch.manual_seed(0)
    detector = build_detector(variant, peers.CLASSES, dropout=0.0, **SMALL).train()
    detector.freeze_backbone(False)
    model, batch = peers.twin(detector), peers.labelled_noise(2, (64, 96), T=3)
    losses = peers.ours(detector, batch), peers.theirs(model, batch._replace(x=data.normalise(batch.x, batch.mask)))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = [[p.grad for p in net.parameters() if p.requires_grad] for net in (detector, model)]
    assert sum(g.numel() for g in gradients[0]) == sum(g.numel() for g in gradients[1])
    norms = [torch.stack([g.norm() for g in each]).norm().item() for each in gradients]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_fine_tuning_bench_prints_and_records_a_ratio(transformers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "speed.jsonl")
    small(monkeypatch, peers)
    speed.main(["finetune", "--size", "64", "64", "--rounds", "1"])
    entry = json.loads((tmp_path / "speed.jsonl").read_text())
    assert entry["bench"] == "finetune" and entry["trained"]["ours"] == entry["trained"]["transformers"]
    assert "transformers / ours" in capsys.readouterr().out


def test_fine_tuning_bench_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'transformers"):
        peers.twin(build_detector("conditional", peers.CLASSES, **SMALL))


# ---- one process and many


def test_gradient_buckets_hold_what_trains_and_nothing_else(tmp_path):
    net = Siamese(build_detector("deformable-ms", 2, **SMALL)).train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, seen, sizes = DistributedDataParallel(net), [], []

        def hook(_, bucket):
            seen.extend(bucket.parameters())
            sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model.register_comm_hook(None, hook)
        batch = photographs(2, (64, 96), R=2)
        out = model(*scaling.pretrain.inputs(batch))
        terms, _ = scaling.losses.pretext_losses(net, out, batch)
        scaling.losses.weighted_sum(terms, scaling.TERMS).backward()
    finally:
        dist.destroy_process_group()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sorted(map(id, seen)) == sorted(map(id, trained))
    assert sum(sizes) == 4 * sum(p.numel() for p in trained)  # as docs/scaling.md counts
    assert not any(p.requires_grad for p in net.detector.backbone.parameters())


@pytest.mark.slow
def test_scaling_bench_runs_one_and_two_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "speed.jsonl")
    speed.main("scaling --rounds 1 --steps 1 --batch-size 2 --size 64 64 --backbone resnet18".split())
    entry = json.loads((tmp_path / "speed.jsonl").read_text())
    net = Siamese(build_detector("conditional", 2, backbone="resnet18"))
    assert entry["bytes"] == 4 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert entry["buckets"] >= 1 and 0 <= entry["overlap"] <= 1 and entry["samples_per_s"].keys() == {"1", "2"}
    assert entry["mb_per_image"] >= 0 and "all-reduce" in capsys.readouterr().out


# ---- the arithmetic


@pytest.mark.parametrize(("task", "variant"), [("pretraining", "conditional"), ("finetuning", "deformable-ms")])
def test_arithmetic_without_data_counts_what_real_tensors_do(task, variant, monkeypatch):
    small(monkeypatch, scaling)
    size = {"size": (64, 96)} | ({"crop": 32} if task == "pretraining" else {})
    without = scaling.arithmetic(variant, getattr(scaling, task), **size)
    monkeypatch.setattr(scaling, "FakeTensorMode", contextlib.nullcontext)
    assert scaling.arithmetic(variant, getattr(scaling, task), **size) == without
    assert without["flops"] > 0 and without["kept"] > 0


def test_arithmetic_counts_the_products_of_attention_also_where_one_kernel_makes_them(monkeypatch):
    """DAB has no dropout, so that torch's flash kernel takes its attention; that of others is products on a CPU."""
    small(monkeypatch, scaling)
    fused = scaling.arithmetic("dab", scaling.finetuning, size=(64, 96))["flops"]
    with sdpa_kernel(SDPBackend.MATH):
        apart = scaling.arithmetic("dab", scaling.finetuning, size=(64, 96))["flops"]
    assert 1 <= fused / apart < 1.01  # the flash kernel's backward pass makes the scores again


def page_tables(variants):
    """The table lines of docs/scaling.md as its own command prints them."""
    per_core = float(re.search(r"python -m bench\.scaling --samples-per-core ([\d.]+)", PAGE)[1])
    return [line for line in scaling.tables(variants, per_core) if line]


@pytest.mark.slow
def test_page_on_scaling_has_the_numbers_of_every_variant():
    lines = page_tables(list(scaling.VARIANTS))
    assert [line for line in lines if line not in PAGE] == []
    assert lines == [line for line in PAGE.splitlines() if line.startswith("|")]


def test_loader_figure_comes_from_the_newest_bench_or_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "speed.jsonl")
    with pytest.raises(ValueError, match="--samples-per-core"):
        scaling.measured_samples_per_core()
    rows = [{"bench": "data", "samples_per_s": {"ours": n}} for n in (40.0, 50.0)] + [{"bench": "ops"}]
    timing.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scaling.measured_samples_per_core() == 50.0


# ---- evaluation


def test_faster_evaluation_gives_pycocotools_numbers(monkeypatch):
    """Random detections with ties, crowds, difficult objects, images and classes without any."""
    faster = pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    g, K, n = torch.Generator().manual_seed(0), 4, 30

    def boxes(count):
        corner = 400 * torch.rand(count, 2, generator=g)
        return torch.cat([corner, corner + 2 + 200 * torch.rand(count, 2, generator=g)], 1)

    counts = torch.randint(0, 8, (n,), generator=g).tolist()
    truth = [boxes(t) for t in counts]
    labels = [torch.randint(K - 1, (t,), generator=g) for t in counts]  # none of the last class
    crowd, hard = ([torch.rand(t, generator=g) < share for t in counts] for share in (0.1, 0.2))
    area = [0.7 * (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in truth]
    images, classes = [{"id": 3 * i + 5} for i in range(n)], [(2 * k + 1, f"class {k}") for k in range(K)]
    annotations = data.Annotations(Path(), images, truth, labels, crowd, area, hard, classes, [])
    results = []
    for image, near, of in zip(images, truth, labels, strict=True):
        near = torch.cat([near + 8 * torch.randn(near.shape, generator=g), near, boxes(5)])
        of = torch.cat([of, torch.randint(K, (len(near) - len(of),), generator=g)]).tolist()
        sides = torch.cat([near[:, :2], (near[:, 2:] - near[:, :2]).clamp(min=1)], 1).double().tolist()
        scores = torch.randint(1, 20, (len(near),), generator=g).tolist()
        results += [{"image_id": image["id"], "category_id": classes[k][0], "score": s / 20, "bbox": box}
                    for k, s, box in zip(of, scores, sides, strict=True)]  # fmt: skip
    for difficult in ("count", "ignore"):
        monkeypatch.setattr(metrics, "COCO", faster.COCO)
        monkeypatch.setattr(metrics, "COCOeval", faster.COCOeval_faster)
        ours, each = metrics.coco_metrics(annotations, results, difficult)
        monkeypatch.setattr(metrics, "COCO", COCO)
        monkeypatch.setattr(metrics, "COCOeval", COCOeval)
        theirs, each_of_theirs = metrics.coco_metrics(annotations, results, difficult)
        assert ours == theirs and each == each_of_theirs and 0.05 < ours["AP"] < 0.95
        assert metrics.coco_metrics(annotations, [], difficult)[0]["AP"] == 0
