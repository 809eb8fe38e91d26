"""The fast step is the released one: same loss terms and gradients, a fraction of the operations."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import pretrain
from bench import speed, timing, training
from bench.released import pretext_terms
from model import Siamese, build_detector
from views import ViewBatch

WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0, "region": 5.0, "global": 10.0}
RELEASED_OPERATIONS = 10_254  # non-view ATen operations of the released code, conditional, batch 2 (specification)


def batch(B=2, R=10, dtype=None):
    g = torch.Generator().manual_seed(0)
    corners = 0.3 + 0.4 * torch.rand(2, B, R, 2, generator=g), 0.1 + 0.4 * torch.rand(2, B, R, 2, generator=g)
    boxes = torch.cat(corners, -1)
    x = torch.randint(0, 256, (2, B, 3, 96, 128), generator=g, dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, B, R, 3, 32, 32), generator=g, dtype=torch.uint8)
    mask = torch.zeros(2, B, 96, 128, dtype=torch.bool)
    mask[:, 1, :, 96:] = True
    valid = torch.ones(2, B, R, dtype=torch.bool)
    return ViewBatch(x, mask, boxes, boxes, valid, crops, torch.arange(B), torch.zeros(B, dtype=torch.bool))


def ours(net, b):
    return losses.pretext_losses(net, net(*pretrain.inputs(b)), b)[0]


@pytest.mark.parametrize("variant", ["vanilla", "conditional", "deformable-ms", "dab"])
def test_fast_step_equals_the_released_one_in_double_precision(variant, monkeypatch):
    """Loss 1e-10 and gradients 1e-6 relative; in float32 the batch norm over two photographs amplifies rounding."""
    torch.manual_seed(0)
    small = dict(backbone="resnet18", hidden_dim=64, enc_layers=2, dec_layers=3, num_queries=20, dropout=0.0)
    net = Siamese(build_detector(variant, num_classes=2, **small)).double().train()
    for p in net.parameters():  # Deformable begins by looking at the edges of cells, where the derivative jumps
        p.data += 0.02 * torch.randn_like(p)
    as_double = lambda x, mask=None, f=pretrain.normalise: f(x, mask).double()  # noqa: E731
    monkeypatch.setattr(pretrain, "normalise", as_double)
    monkeypatch.setattr("bench.released.normalise", as_double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # boxes and pooled maps too
    b = batch(3)
    b = b._replace(boxes=b.boxes.double(), rois=b.rois.double())
    results = []
    for step in (ours, pretext_terms):
        net.zero_grad()
        state = {k: v.clone() for k, v in net.state_dict().items()}  # batch norm's running means move
        terms = step(net, b)
        losses.weighted_sum(terms, WEIGHTS).backward()
        results.append((terms, {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}))
        net.load_state_dict(state)
    (a, ga), (c, gc) = results
    for name in a:
        assert a[name].shape == c[name].shape
        torch.testing.assert_close(a[name], c[name], rtol=1e-10, atol=1e-12)
    largest = max(g.abs().max() for g in ga.values())
    for name in ga:  # a bias before batch norm has none but rounding
        assert (ga[name] - gc[name]).abs().max() <= 1e-6 * ga[name].abs().max() + 1e-12 * largest, name


class Count(TorchDispatchMode):
    """Operations that compute or copy (views and their bookkeeping left out), and reads of a number by the host."""

    def __init__(self):
        super().__init__()
        self.operations, self.reads = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func is not torch.ops.aten._unsafe_view.default:
            self.operations[str(func)] += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counted(step, B):
    torch.manual_seed(0)
    net = Siamese(build_detector("conditional")).train()
    net.detector.fold_backbone()
    with Count() as count:
        losses.weighted_sum(step(net, batch(B)), WEIGHTS).backward()
    return count


def test_step_takes_a_quarter_of_the_released_operations_and_hardly_ever_waits(monkeypatch):
    copies = []
    monkeypatch.setattr("backbone.CACHED_PIXELS", 2**40)  # all images at once, as on a GPU
    monkeypatch.setattr("ops.dense.INSTEAD_OF_MKL", False)  # as on a GPU
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x, f=torch.Tensor.cpu: (copies.append(x.shape), f(x))[1])
    two, four = counted(ours, 2), counted(ours, 4)
    assert two.operations.total() <= RELEASED_OPERATIONS / 4, two.operations.most_common(20)
    assert two.reads + len(copies) // 2 <= 3 and four.reads == two.reads and len(copies) == 2  # one a step: the costs
    assert four.operations.total() - two.operations.total() <= 10  # no loop over photographs
    literal = counted(pretext_terms, 2)
    assert len(copies) == 2 + 12 and literal.operations.total() > 1.5 * two.operations.total()
    print(f"operations: ours {two.operations.total()}, the released habits {literal.operations.total()}")


@pytest.mark.parametrize("pays", [True, False])
def test_step_bench_prints_and_records_paired_ratios(pays, tmp_path, monkeypatch, capsys):
    """Narrow: a machine that emulates bfloat16 would compute for minutes; there the bench itself leaves it out."""
    narrow = dict(backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=1, num_queries=10)
    monkeypatch.setattr(timing.runtime, "bfloat16_pays", lambda device: pays)
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "speed.jsonl")
    monkeypatch.setattr(training, "build_detector", lambda variant: build_detector(variant, **narrow))
    monkeypatch.setattr(training, "photographs", partial(training.photographs, R=2, side=32))
    speed.main(["step", "--size", "64", "64", "--rounds", "1"])
    (entry,) = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert entry["bench"] == "step" and len(entry["ratios"]) == (3 if pays else 1)
    assert all(r[0] > 0 for r in entry["ratios"].values())
    assert "released / ours" in capsys.readouterr().out and entry["commit"] and entry["threads"]
