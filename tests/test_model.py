"""The detectors are the official ones in size and names, and the pretext method asks about the regions it was given."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from backbone import folded
from detectors import image_encoding, inverse_sigmoid
from model import VARIANTS, BatchNorm, Siamese, build_detector, main, noisy_targets, swap_views
from ops import dense

SMALL = dict(backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=2, num_queries=12, dropout=0.0)
LEVELS = {"vanilla": 1, "conditional": 1, "deformable-ss": 1, "deformable-ms": 4, "dab": 1, "dn": 1}
# (parameters, tensors) of the official detectors with 91 classes; DAB and DN without their aliased copies of bbox_embed
OFFICIAL = {
    "vanilla": (41_524_768, 458),
    "conditional": (43_367_201, 564),
    "deformable-ss": (34_066_593, 549),
    "deformable-ms": (40_069_665, 561),
    "dab": (43_671_517, 590 - 6),
    "dn": (43_694_977, 591 - 6),
}


def small(variant, **overrides):
    torch.manual_seed(0)
    return build_detector(variant, num_classes=7, **{**SMALL, **overrides})


def lively(module):
    """Move every parameter above the backbone off its initial value, so that zero heads and offsets matter."""
    g = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        if "backbone" not in name:
            p.data.add_(torch.randn(p.shape, generator=g) * 0.05)
    return module


def images(B=3, H=96, W=128):
    g = torch.Generator().manual_seed(2)
    x, mask = torch.randn(B, 3, H, W, generator=g), torch.ones(B, H, W, dtype=torch.bool)
    for b in range(B):
        mask[b, : H - 32 * (b % 2), : W - 32 * (b % 3)] = False
    return x.masked_fill(mask[:, None], 0), mask


def pretext(variant, B=3, R=4, **settings):
    """A small Siamese net and inputs of B pairs of R regions."""
    net = lively(Siamese(small(variant), **settings))
    x, mask = images(2 * B)
    g = torch.Generator().manual_seed(3)
    centre = 0.3 + 0.4 * torch.rand(2 * B, R, 2, generator=g)
    boxes = torch.cat([centre, 0.1 + 0.4 * torch.rand(2 * B, R, 2, generator=g)], -1)
    crops = torch.randn(2 * B * R, 3, 64, 64, generator=g)
    return net, [x, mask, boxes, boxes, crops]


@pytest.mark.parametrize("variant", VARIANTS)
def test_detector_has_the_official_number_of_parameters_and_tensors(variant):
    with torch.device("meta"):
        detector = build_detector(variant)
    count = sum(p.numel() for p in detector.parameters())
    assert (count, len(detector.state_dict())) == OFFICIAL[variant]


@pytest.mark.parametrize(
    ("variant", "trainable"),
    [
        ("vanilla", 19_494_663),
        ("conditional", 21_337_353),
        ("deformable-ss", 12_036_745),
        ("deformable-ms", 18_958_857),
    ],
)
def test_pretext_has_the_released_number_of_trainable_parameters(variant, trainable):
    with torch.device("meta"):
        net = Siamese(build_detector(variant))
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert not [name for name in names if "backbone" in name]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable


@pytest.mark.slow
def test_main_prints_the_size_of_every_variant(capsys):
    main()
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()[1:]}
    assert rows.keys() == set(VARIANTS)
    for variant, (parameters, tensors) in OFFICIAL.items():
        N, K = VARIANTS[variant].num_queries, 92 if variant == "vanilla" else 91
        assert f"{parameters:,}" in rows[variant] and f" {tensors} " in rows[variant]
        assert f"(6, 1, {N}, {K})" in rows[variant] and f"(6, 1, {N}, 4)" in rows[variant]
        assert float(rows[variant].split()[-1]) > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_have_one_entry_per_layer_and_query(variant):
    detector = small(variant).eval()
    pred = detector(*images())
    K = 7 + (variant == "vanilla")
    assert pred.logits.shape == (2, 3, 12, K) and pred.boxes.shape == (2, 3, 12, 4) and pred.q_hat.shape[-1] == 32
    assert pred.dn is None and ((pred.boxes >= 0) & (pred.boxes <= 1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_rebuild_the_detector(variant):
    detector = small(variant)
    again = build_detector(**detector.settings)
    again.load_state_dict(detector.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_a_batch_do_not_see_each_other(variant):
    detector = lively(small(variant)).eval()
    x, mask = images()
    with torch.no_grad():
        together = detector(x, mask)
        changed = detector(torch.cat([x[:1], torch.randn_like(x[1:])]), mask)
    assert torch.equal(together.boxes[:, 0], changed.boxes[:, 0])
    assert not torch.allclose(together.boxes[:, 1], changed.boxes[:, 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_in_the_transformer(variant):
    detector = lively(small(variant)).eval()
    g = torch.Generator().manual_seed(5)
    sizes = [(12, 16), (6, 8), (3, 4)] if LEVELS[variant] > 1 else [(3, 4)]
    dims = [128, 256, 512][-len(sizes) :]
    maps = [torch.randn(2, D, *hw, generator=g) for D, hw in zip(dims, sizes, strict=True)]
    wide = [torch.randn(2, D, 2 * h, 2 * w, generator=g) for D, (h, w) in zip(dims, sizes, strict=True)]
    for a, b in zip(maps, wide, strict=True):
        b[..., : a.shape[2], : a.shape[3]] = a
    if LEVELS[variant] > 1:  # the fourth level is a convolution of the raw map: the border of its kernel sees zeros
        wide[-1][..., 3:, :] = wide[-1][..., 4:] = 0
    mask, wide_mask = torch.zeros(2, 96, 128, dtype=torch.bool), torch.ones(2, 192, 256, dtype=torch.bool)
    wide_mask[:, :96, :128] = False
    if variant.startswith("deformable"):
        for proj in detector.input_proj:
            proj[1] = nn.Identity()  # group norm runs over the padded map, in the official code too
    with torch.no_grad():
        a, b = detector.decode(detector.encode(maps, mask)), detector.decode(detector.encode(wide, wide_mask))
    assert torch.allclose(a.q_hat, b.q_hat, atol=5e-5) and torch.allclose(a.boxes, b.boxes, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_tiny_image_in_a_padded_batch_works(variant):
    x, mask = torch.zeros(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.bool)
    mask[0], mask[1, :1, :1] = False, False
    pred = small(variant).eval()(x, mask)
    assert pred.boxes.isfinite().all() and pred.logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_region_conditions_exactly_its_own_queries_of_its_own_image(variant):
    detector = small(variant).eval()
    x, mask = images()
    with torch.no_grad():
        ctx = detector.encode([detector.features(x, detector.strides)[s] for s in detector.strides], mask)
        z = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(4))
        moved = z.clone()
        moved[1, 2] += 1
        pick = 1 if detector.row.anchors else 0  # DAB, DN: z is the content query
        before, after = (detector._queries(3, t.repeat_interleave(3, 1))[pick] for t in (z, moved))
        rows = (before != after).any(-1)
        assert rows.nonzero().tolist() == [[1, 6], [1, 7], [1, 8]]
        a, b = detector.decode(ctx, z=z), detector.decode(ctx, z=moved)
    assert torch.equal(a.q_hat[:, [0, 2]], b.q_hat[:, [0, 2]]) and not torch.equal(a.q_hat[:, 1], b.q_hat[:, 1])
    with pytest.raises(ValueError, match="--num-queries 12 .* --num-regions 5"):
        detector.decode(ctx, z=torch.zeros(3, 5, 32))


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision, so that a gradient is zero or is not."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_trained(net, loss, idle):
    """Every trainable parameter gets a gradient, not zero unless `idle` has its name; no frozen one gets any."""
    loss.backward()
    norms = {name: -1.0 if p.grad is None else p.grad.norm().item() for name, p in net.named_parameters()}
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name, norm in norms.items() if norm < 0} == norms.keys() - trainable
    assert {name for name in trainable if norms[name] < 1e-9} == {name for name in trainable if re.search(idle, name)}


def varied(*outputs):
    """A scalar that depends on every number of every output in its own way."""
    g = torch.Generator().manual_seed(6)
    return sum((x * torch.randn(x.shape, generator=g)).sum() for x in outputs)


# Oracle O-30c, and the like: a key's bias shifts all of a softmax; norms take away what all of a batch (or here of a
# group, with 32 groups of one channel) share; with equal contents, the first self-attention weighs equal values.
KEY_BIAS, BEFORE_NORM = r"_k(content|pos)_proj\.bias", r"(projector\.[0367]|predictor\.0|input_proj\.\d\.0)\.bias"
SAME_CONTENT = r"decoder\.layers\.0\.(self_attn\.in_proj_weight|sa_[qk](content|pos)_proj|sa_v_proj\.weight)"


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_decoder_layer_trains_whole_so_that_ddp_does_not_wait_for_a_gradient(variant):
    net = build_detector(variant, backbone="resnet18", hidden_dim=32, enc_layers=1, dec_layers=1, num_queries=4)
    out = net.train()(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    (out.logits.sum() + out.boxes.sum()).backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretext_gradients_reach_every_trainable_parameter_and_no_frozen_one(variant, float64):
    net, inputs = pretext(variant)
    out = net.train()(*inputs)
    assert not out.p.requires_grad
    same_content = [SAME_CONTENT] if variant in ("vanilla", "conditional") else []  # z is a position there
    idle = "|".join([KEY_BIAS, BEFORE_NORM, *same_content])
    assert_trained(net, varied(*out.pred[:2], net.f_sem(out.pred.q_hat), out.predicted_context), idle)
    assert not any(p.requires_grad for p in net.detector.backbone.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_fine_tuning_gradients_reach_every_trainable_parameter_and_no_frozen_one(variant, float64):
    detector = lively(small(variant)).train()
    detector.freeze_backbone(False)
    labels, valid = torch.tensor([[1, 2], [3, 0], [0, 0]]), torch.tensor([[True, True], [True, False], [False, False]])
    pred = detector(*images(), labels, torch.rand(3, 2, 4) * 0.3 + 0.2, valid)
    same_content = [SAME_CONTENT] if variant in ("vanilla", "conditional", "dab") else []  # DN: noisy labels
    assert_trained(detector, varied(*pred[:2], *(pred.dn or ())[:2]), "|".join([KEY_BIAS, BEFORE_NORM, *same_content]))
    frozen = {n.split(".")[2] for n, p in detector.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_the_views_swaps_the_answers(variant):
    net, inputs = pretext(variant)
    net.eval()
    with torch.no_grad():
        a, b = net(*inputs), net(*(torch.cat(t.chunk(2)[::-1]) for t in inputs))
    assert torch.allclose(a.pred.boxes, torch.cat(b.pred.boxes.chunk(2, 1)[::-1], 1), atol=1e-6)
    assert torch.allclose(a.p, swap_views(b.p), atol=1e-5)
    assert torch.allclose(a.predicted_context, swap_views(b.predicted_context), atol=1e-5)


def test_answers_depend_on_the_other_views_regions_only():
    net, (x, mask, rois, boxes, crops) = pretext("conditional")
    net.eval()
    moved = rois.clone()
    moved[:3] = moved[:3] * 0.7  # view 1's regions
    with torch.no_grad():
        a, b = net(x, mask, rois, boxes, crops).pred, net(x, mask, moved, boxes, crops).pred
    assert torch.equal(a.boxes[:, :3], b.boxes[:, :3]) and not torch.allclose(a.boxes[:, 3:], b.boxes[:, 3:])


def test_targets_are_the_clean_regions_of_the_view_that_asks():
    net, (x, mask, rois, boxes, crops) = pretext("conditional", region_target="roi")
    net.eval()
    with torch.no_grad():
        p = net(x, mask, rois * 0.9, boxes, None).p
        h = net.detector.features(x, (32,))
        assert torch.allclose(p[:3], net.region_features(h, boxes, mask)[3:])  # answers of view 1 <- regions of view 2
    net, inputs = pretext("conditional")
    net.eval()
    with torch.no_grad():
        a = net(*inputs).p
        inputs[4] = inputs[4].clone()
        inputs[4][0] += 1  # the crop of view 1's first region
        rows = (net(*inputs).p != a).any(-1).nonzero().tolist()
    assert rows == [[3, 0]]  # moves the target of view 2's answer to region 0 of image 0, nothing else


def test_switched_off_tasks_leave_no_parameters():
    names = {
        n.split(".")[0] for n, _ in pretext("vanilla", region_target="none", use_global=False)[0].named_parameters()
    }
    assert names == {"detector", "patch2query"}
    net, inputs = pretext("vanilla", region_target="none", use_global=False)
    out = net(*inputs[:4])
    assert out.p is None and out.predicted_context is None


def test_region_features_of_a_ramp_are_its_legacy_aligned_mean():
    net = Siamese(small("conditional"))
    ramp = {32: torch.arange(8.0).expand(1, 512, 8, 8)}
    box = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])  # pixels 64..192 of 256
    z = net.region_features(ramp, box, torch.zeros(1, 256, 256, dtype=torch.bool))
    assert torch.allclose(z, torch.full((1, 1, 512), 4.0))
    assert torch.allclose(
        net.region_features({32: torch.ones(1, 512, 8, 8)}, box, torch.zeros(1, 256, 256).bool()), z / 4
    )


def test_global_context_ignores_padded_cells():
    net, (x, mask, *_) = pretext("vanilla")
    net.eval()
    det = net.detector
    with torch.no_grad():
        ctx = det.encode([det.features(x, (32,))[32]], mask)
        noise = ctx._replace(c=torch.where(ctx.mask[..., None], torch.randn_like(ctx.c), ctx.c))
        assert torch.allclose(net.global_context(ctx)[0], net.global_context(noise)[0], atol=1e-6)


def test_global_head_normalises_each_view_on_its_own():
    """A joint batch norm over both views is another function (oracle O-27)."""
    net, (x, mask, *_) = pretext("vanilla")
    net.train()
    ctx = net.detector.encode([net.detector.features(x, (32,))[32]], mask)
    projected = net.global_context(ctx)[1]
    for view in projected.chunk(2):
        assert torch.allclose(view.mean(0), net.projector[-1].bias, atol=1e-4)
    small_batch = ctx._replace(c=ctx.c[:2], mask=ctx.mask[:2])
    with pytest.raises(ValueError, match="two images"):
        net.global_context(small_batch)


def test_batch_norm_equals_torch_s_on_one_process():
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5)
    x = torch.randn(6, 5)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_batch_norm_of_all_ranks_equals_torch_s_however_large_the_mean_is(mean, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.mul_(2))  # the other rank has the same rows
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5).double()
    x = (torch.randn(6, 5) + mean).requires_grad_()
    y, want = ours(x), theirs(x.double().repeat(2, 1))[:6]
    assert y.dtype == torch.float32 and torch.allclose(y.double(), want, atol=1e-5)
    assert torch.allclose(ours.running_var.double(), theirs.running_var, rtol=1e-5)
    (grad,), (wanted,) = (torch.autograd.grad(out[:, 0].square().sum() + out[0, 1], x) for out in (y, want))
    assert (
        torch.allclose(grad, wanted.to(grad), atol=1e-4) or mean == 1e5
    )  # there the gradient is of float32's rounding


def test_frozen_backbone_stays_bit_identical_in_a_step():
    net, inputs = pretext("conditional")
    net.train()
    before = {k: v.clone() for k, v in net.detector.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(*inputs).pred.boxes.sum().backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in net.detector.backbone.state_dict().items())


def random_backbone(name):
    """A backbone whose batch norms do something."""
    backbone = build_detector("vanilla", **{**SMALL, "backbone": name}).backbone[0].eval()
    g = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=g)
            module.bias.normal_(0, 0.1, generator=g)
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
    return backbone


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_folded_backbone_equals_the_backbone(name):
    backbone = random_backbone(name)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        a, b = backbone(x, (8, 16, 32)), folded(backbone)(x, (8, 16, 32))
    assert a.keys() == b.keys() == {8, 16, 32}
    for stride, h in a.items():
        assert h.shape == (2, backbone.channels[stride], 64 // stride, 96 // stride)
        assert (h - b[stride]).abs().max() <= 1e-4 * h.abs().max()


@pytest.mark.parametrize("B", [0, 1, 3, 7])
def test_folded_backbone_takes_many_images_a_few_at_a_time(B, monkeypatch):
    monkeypatch.setattr("backbone.CACHED_PIXELS", 5 * 64 * 96)
    backbone, seen = random_backbone("resnet18"), []
    fast = folded(backbone)
    x, convolve = torch.randn(B, 3, 64, 96), torch.nn.functional.conv2d
    with torch.no_grad(), monkeypatch.context() as patch:
        a = backbone(x, (32,))[32]
        patch.setattr(torch.nn.functional, "conv2d", lambda x, w, *r: (seen.append(len(x)), convolve(x, w, *r))[1])
        b = fast(x, (32,))[32]
    assert sorted(set(seen), reverse=True) == {0: [0], 1: [1], 3: [3], 7: [4, 3]}[B]
    assert a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-4 * a.abs().max().item() if B else 0)


@pytest.mark.skipif(not dense.CHOICE, reason="this torch has no MKL or no oneDNN")
@pytest.mark.parametrize("trains", [False, True])
def test_folded_backbone_takes_onednn_in_one_thread_too(trains):
    """torch's own choice for 1 x 1 convolutions of few images in one thread takes twice as long on some processors."""
    backbone, threads = random_backbone("mobilenet_v2"), torch.get_num_threads()
    backbone.freeze((32,))
    x, used = torch.randn(2, 3, 64, 96), {}
    try:
        torch.set_num_threads(1)
        for name, f in (("plain", backbone), ("folded", folded(backbone, trains=trains))):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                h = f(x, (32,))[32]
                if h.requires_grad:
                    h.sum().backward()
            used[name] = {event.key for event in profile.key_averages()}
    finally:
        torch.set_num_threads(threads)
    slow = {name: any("slow_conv" in key for key in keys) for name, keys in used.items()}
    assert slow == {"plain": True, "folded": False}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_backbone_folded_in_training_has_the_gradients_of_the_backbone(name):
    backbone = random_backbone(name).double()
    backbone.freeze((32,))
    fast = folded(backbone, trains=True)
    x, w = torch.randn(2, 3, 64, 96).double(), torch.randn(2, backbone.channels[32], 2, 3).double()
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    for step in range(2):  # the second time with other weights
        a, b = (torch.autograd.grad((f(x, (32,))[32] * w).sum(), trained.values()) for f in (backbone, fast))
        for name, g, h in zip(trained, a, b, strict=True):
            assert g.abs().max() > 0 and (g - h).abs().max() <= 1e-12 * g.abs().max(), (step, name)
        for p, g in zip(trained.values(), a, strict=True):
            p.data -= 1e-3 * p.abs().mean() / g.abs().mean() * g


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_folded_backbone_keeps_its_stem_out_of_bfloat16(name):
    backbone, seen = random_backbone(name), {}
    half = folded(backbone, torch.bfloat16)
    exact = folded(backbone)
    x = torch.randn(2, 3, 64, 96)
    convolve = torch.nn.functional.conv2d

    def watch(x, w, *rest):
        seen.setdefault(x.dtype, []).append(len(seen))
        return convolve(x, w, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", watch)
        a, b = half(x, (32,))[32], exact(x, (32,))[32]
    stem = {"resnet18": 1, "mobilenet_v2": 3}[name]
    total = len(seen[torch.bfloat16]) + stem  # of one backbone
    assert len(seen[torch.float32]) == stem + total
    assert a.dtype == torch.float32 and torch.nn.functional.cosine_similarity(a, b, dim=1).min() > 0.99


@pytest.mark.slow
def test_compiled_backbone_equals_the_backbone_and_is_compiled_once_for_all_sizes():
    backbone = random_backbone("resnet18")
    compiled = folded(backbone, compiled=True)
    torch._dynamo.utils.counters.clear()
    for B, H, W in ((2, 64, 96), (3, 96, 128), (2, 128, 96), (5, 160, 160)):
        x = torch.randn(B, 3, H, W)
        with torch.no_grad():
            a, b = backbone(x, (32,)), compiled(x, (32,))
        assert (a[32] - b[32]).abs().max() <= 1e-4 * a[32].abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_freeze_trains_all_used_stages_but_the_first():
    detector = small("conditional", stride=16)
    detector.freeze_backbone(False)
    trained = {n.split(".")[1] for n, p in detector.backbone[0].named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3"}  # layer4 is not read at stride 16
    detector.freeze_backbone(True)
    assert not any(p.requires_grad for p in detector.backbone.parameters())


def test_position_encoding_of_the_first_cell():
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    first_x = 128  # the y half comes first
    assert image_encoding(mask, 256, 1e4, 0.0)[0, 0, first_x].item() == pytest.approx(0.7071068, abs=1e-5)
    assert image_encoding(mask, 256, 1e4, -0.5)[0, 0, first_x].item() == pytest.approx(0.3826834, abs=1e-5)


def test_dn_without_noise_equals_dab():
    """DN's matching queries carry [label of 'nothing', 0] where DAB's carry zeros."""
    dab, dn = lively(small("dab")).eval(), small("dn").eval()
    state = {**dab.state_dict(), "label_enc.weight": torch.zeros(8, 31)}
    dn.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(dab(*images()).boxes, dn(*images()).boxes)


def test_dn_groups_see_the_matching_queries_but_no_other_group():
    detector = small("dn")
    labels, boxes = torch.zeros(3, 4, dtype=torch.long), torch.full((3, 4, 4), 0.5)
    noisy = noisy_targets(labels, boxes, torch.ones(3, 4, dtype=torch.bool), 7)
    _, content, anchor = detector._queries(3, None)
    content, anchor, blocked = detector._prepend_noisy(noisy, content, anchor)
    assert content.shape[1] == anchor.shape[1] == 5 * 4 + 12 and blocked.shape == (32, 32)
    group = torch.arange(20) // 4
    assert torch.equal(blocked[:20, :20], group[:, None] != group[None])
    assert blocked[20:, :20].all() and not blocked[:, 20:].any()


def test_dn_matching_queries_ignore_the_noise():
    detector = lively(small("dn")).train()
    x, mask = images()
    targets = (
        torch.tensor([[1, 2], [3, 0], [0, 0]]),
        torch.rand(3, 2, 4) * 0.3 + 0.2,
        torch.tensor([[True, True], [True, False], [False, False]]),
    )
    a, b = detector(x, mask, *targets), detector(x, mask)
    assert torch.allclose(a.boxes, b.boxes, atol=1e-6) and a.dn.boxes.shape == (2, 3, 10, 4) and b.dn is None
    assert detector(x, mask, *(t[:, :0] for t in targets)).dn is None  # no target in the whole batch


def test_noisy_targets_have_the_published_distribution():
    torch.manual_seed(0)
    labels, valid = torch.full((8, 2000), 3), torch.ones(8, 2000, dtype=torch.bool)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(8, 2000, 4)
    noisy = noisy_targets(labels, boxes, valid, 10)
    flipped = (noisy.noisy_labels != 3).float().mean().item()
    assert flipped == pytest.approx(0.2 * 0.9, abs=0.005)  # a flip may draw the true class again
    shift = (noisy.noisy_boxes - noisy.target_boxes) / torch.tensor([0.2, 0.4, 0.2, 0.4])
    assert shift[..., :2].abs().max() <= 0.2 + 1e-6 and shift[..., 2:].abs().max() <= 0.4 + 1e-6
    assert torch.allclose(shift.std((0, 1)), torch.tensor([0.4, 0.4, 0.8, 0.8]) / 12**0.5, atol=2e-3)


def test_noisy_anchors_keep_off_the_borders_that_an_inverse_sigmoid_cannot_say():
    labels, valid = torch.zeros(1, 500, dtype=torch.long), torch.ones(1, 500, dtype=torch.bool)
    for box in ([0.999, 0.001, 1.0, 3e-4], [0.5, 0.5, 0.2, 0.4]):
        noisy = noisy_targets(labels, torch.tensor(box).expand(1, 500, 4), valid, 10).noisy_boxes
        assert noisy.min() > 0.9e-3 and noisy.max() < 1 - 0.9e-3
        again = inverse_sigmoid(noisy, 1e-3).sigmoid()  # what the decoder makes of it
        assert torch.allclose(noisy, again, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "override", "message"),
    [
        ("yolo", {}, "--variant 'yolo'"),
        ("vanilla", {"two_stage": True}, "two-stage"),
        ("vanilla", {"width": 3}, "unknown override 'width'"),
        ("conditional", {"pre_norm": True}, "pre_norm=True has no meaning"),
        ("vanilla", {"box_refine": True}, "box_refine"),
        ("dn", {"patterns": 3}, "patterns"),
        ("deformable-ms", {"stride": 16}, "stride"),
        ("vanilla", {"stride": 8}, "--stride 8"),
        ("vanilla", {"hidden_dim": 100}, "--hidden-dim 100"),
        ("vanilla", {"backbone": "vgg"}, "--backbone 'vgg'"),
        ("vanilla", {"dec_layers": 0}, "dec_layers=0"),
        ("vanilla", {"heads": 0}, "heads=0"),
        ("vanilla", {"num_classes": 0}, "num_classes=0"),
        ("dab", {"patterns": -1}, "patterns=-1"),
        ("dab", {"num_queries": 2.5}, "num_queries=2.5"),
    ],
)
def test_build_refuses_what_does_not_exist(variant, override, message):
    with pytest.raises(ValueError, match=message):
        build_detector(variant, **override)


@pytest.mark.parametrize(("variant", "options"), [("vanilla", {"pre_norm": True}), ("dab", {"patterns": 3}),
                                                  ("deformable-ms", {"box_refine": True})])  # fmt: skip
def test_options_run_and_train(variant, options):
    detector = small(variant, **options)
    pred = detector(*images())
    assert pred.boxes.shape[2] == 12 * options.get("patterns", 1)
    (pred.boxes.sum() + pred.logits.sum()).backward()
    unused = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_vanilla_keeps_a_detection_of_every_query():
    detector = small("vanilla", num_queries=130).eval()
    with torch.no_grad():
        (scores, labels, boxes), *_ = detector.top_boxes(detector(*images()), torch.tensor([[128.0, 96.0]] * 3))
    assert len(scores) == len(labels) == len(boxes) == 130 and (scores.diff() <= 0).all()


def test_top_boxes_are_in_pixels_and_sorted():
    for variant in ("vanilla", "conditional"):
        detector = lively(small(variant)).eval()
        with torch.no_grad():
            found = detector.top_boxes(detector(*images()), torch.tensor([[128.0, 96.0]] * 3))
        for scores, labels, boxes in found:
            assert (scores[:-1] >= scores[1:]).all() and labels.max() < 7 and boxes.shape[1] == 4
            assert len(scores) == (12 if variant == "vanilla" else 12 * 7)
