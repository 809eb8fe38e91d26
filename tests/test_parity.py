"""The detectors equal those people use: Hugging Face transformers, live and as stored numbers, and the official code.

Weights come from no random generator but from `filled`, so that the stored numbers mean the same in every version of
torch. A transformers model has no outputs of inner decoder layers (5.23 with auxiliary_loss feeds the normed state on,
which is another network), so one is built for each depth: its last layer is our inner one.
"""

import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import formats
import losses
from detectors import Context
from model import VARIANTS, build_detector

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SMALL = dict(backbone="resnet18", hidden_dim=64, heads=4, ffn_dim=96, enc_layers=2, dec_layers=3, num_queries=20)
OPTIONS = {
    "deformable-ms refined": ("deformable-ms", {"box_refine": True}),
    "dab patterns": ("dab", {"patterns": 3, "num_queries": 7}),
    **{variant: (variant, {}) for variant in VARIANTS},
}
LABELS = [torch.tensor([2, 0, 5]), torch.tensor([4])]
BOXES = [
    torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.2, 0.3, 0.1, 0.1], [0.7, 0.6, 0.5, 0.7]]),
    torch.tensor([[0.4, 0.4, 0.6, 0.2]]),
]


# ---------------------------------------------------------------------- weights, inputs, and the twin


def noise(name, shape):
    """Numbers of mean 0 and variance 1, uniform: splitmix64's hash of the position in a stream named `name`."""
    x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    x *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = ((x ^ (x >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy((x * 2 - 1) * 3**0.5).float().reshape(shape)


def filled(name, num_classes=7, **size):
    """A detector of OPTIONS in evaluation mode in which every tensor matters: no zero heads, no unit norms."""
    variant, options = OPTIONS[name]
    detector = build_detector(variant, num_classes, **SMALL | options | size).eval()
    for name, tensor in [*detector.named_parameters(), *detector.named_buffers()]:
        x = noise(name, tensor.shape)
        if tensor.dim() > 1 and not re.search("query_embed|refpoint_embed|label_enc|patterns|level_embed", name):
            x = x / tensor[0].numel() ** 0.5  # a matrix keeps the variance of its input
        elif tensor.dim() == 1:  # weights and variances of norms, PReLU's slope, biases
            place, scale = (1, 0.2) if name.endswith(("weight", "running_var")) else (0, 0.1)
            place, scale = (0.25, 0.1) if "activation" in name else (place, scale)
            x = place + scale * x if "sampling_offsets" not in name else 2 * x
        tensor.data.copy_(x)
    return detector


def inputs():
    """Two images of different sizes, neither filling the batch."""
    x, mask = torch.zeros(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate([(96, 104), (72, 128)]):
        x[i, :, :h, :w], mask[i, :h, :w] = noise(f"image {i}", (3, h, w)), False
    return x, mask


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("timm", reason="transformers' backbones come from timm, which is not installed")
    library = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
    library.logging.set_verbosity_error()
    return library


def twin(transformers, detector, depth):
    """The transformers model with the detector's weights and its first `depth` decoder layers."""
    settings = detector.settings | {"dec_layers": depth}
    config = formats.hf_config(settings, [str(k) for k in range(settings["num_classes"])], native=False)
    config["class_cost"] = int(detector.row.cost_class)  # 1 in its Deformable; the official code has 2
    # Tied: DAB's box head and its second name, Deformable's heads, but it refuses to tie the one head of one layer.
    config["tie_word_embeddings"] = detector.row.anchors or (depth > 1 and not detector.box_refine)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForObjectDetection.from_config(config).eval().requires_grad_(True)
    model.load_state_dict(theirs(detector.state_dict(), settings), strict=True)
    return model


def theirs(tensors, settings):
    """Tensors by our names, weights or gradients, by the names of a transformers model with settings' dec_layers."""
    deeper = re.compile(r"(transformer\.decoder\.layers|class_embed|bbox_embed)\.(\d+)\.")
    layer = {name: int(match[2]) for name in tensors for match in [deeper.match(name)] if match}
    kept = {name: tensor for name, tensor in tensors.items() if layer.get(name, 0) < settings["dec_layers"]}
    return formats.to_hf(kept, settings, native=False, memory=True)


def targets():
    """As losses.py takes them: labels (B, T), boxes (B, T, 4), valid (B, T)."""
    labels, boxes = pad_sequence(LABELS, batch_first=True), pad_sequence(BOXES, batch_first=True)
    return labels, boxes, boxes[..., 2] > 0


def loss_terms(row, logits, boxes, labels, target_boxes, valid):
    """{"class", "l1", "giou"}, (L,) each."""
    case = logits, boxes, labels, target_boxes, valid
    match = losses.match(*case, softmax=row.softmax, cost_class=row.cost_class)
    case = logits, boxes, match, labels, target_boxes
    return losses.detection_losses(*case, softmax=row.softmax, num_boxes=valid.sum())


# ---------------------------------------------------------------------- transformers, live


def each_depth(transformers, detector, first=1):
    for depth in range(first, detector.settings["dec_layers"] + 1):
        yield depth, twin(transformers, detector, depth)


def assert_outputs_equal(transformers, detector, first=1):
    x, mask = inputs()
    with torch.no_grad():
        pred = detector(x, mask)
        for depth, model in each_depth(transformers, detector, first):
            out = model(pixel_values=x, pixel_mask=(~mask).long())
            assert (out.logits - pred.logits[depth - 1]).abs().max() < 1e-4
            assert (out.pred_boxes - pred.boxes[depth - 1]).abs().max() < 1e-4
    return pred


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_layer_s_logits_and_boxes_equal_transformers(transformers, name):
    pred = assert_outputs_equal(transformers, filled(name))
    assert pred.logits.std() > 0.3 and pred.boxes.std(2).min() > 5e-4  # queries differ


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_at_the_papers_size_equal_transformers(transformers, name):
    size = dict(backbone="resnet50", hidden_dim=256, heads=8, ffn_dim=None, enc_layers=6, dec_layers=6)
    assert_outputs_equal(transformers, filled(name, 91, **size, num_queries=VARIANTS[name].num_queries), first=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "conditional", "deformable-ss", "deformable-ms", "dab", "dab patterns"])
def test_gradients_equal_transformers(transformers, name):
    """Of a random combination of each layer's outputs, with respect to every parameter and to the images."""
    detector, (x, mask) = filled(name), inputs()
    x.requires_grad_()
    parameters = dict(detector.requires_grad_(True).named_parameters(remove_duplicate=False))
    pred = detector(x, mask)
    weight = [noise(f"weight {i}", t.shape) for i, t in enumerate(pred[:2])]
    for depth, model in each_depth(transformers, detector):
        i = depth - 1
        loss = (pred.logits[i] * weight[0][i]).sum() + (pred.boxes[i] * weight[1][i]).sum()
        found = torch.autograd.grad(loss, [x, *parameters.values()], retain_graph=True, materialize_grads=True)
        ours = theirs(dict(zip(parameters, found[1:], strict=True)), detector.settings | {"dec_layers": depth})
        out = model(pixel_values=x, pixel_mask=(~mask).long())
        loss = (out.logits * weight[0][i]).sum() + (out.pred_boxes * weight[1][i]).sum()
        there = {"image": x} | dict(model.named_parameters(remove_duplicate=False))
        expected = dict(zip(there, torch.autograd.grad(loss, there.values(), materialize_grads=True), strict=True))
        assert ours.keys() == expected.keys() - {"image"}
        for name, gradient in expected.items():
            difference = ((ours | {"image": found[0]})[name] - gradient).norm()
            zero = 1e-5  # what rounding makes of it: softmax takes no notice of a key's bias
            assert difference <= 1e-3 * gradient.norm() + zero, (depth, name, difference, gradient.norm())


# ---------------------------------------------------------------------- transformers, stored


# What transformers 5.23.0 returned for `filled` weights and `inputs`, 20 numbers a variant, printed by
# `PYTHONPATH=. python tests/test_parity.py`: of the last layer the logits of classes 0 and 1, then the boxes, each of
# the first query of image 0 and the last of image 1; the mean logit of the first layer and of the last; then for each
# of these two layers loss_ce, loss_bbox and loss_giou against LABELS and BOXES.
STORED = {
    "vanilla": [-0.45619, 2.560695, -0.976116, 2.251809, 0.224523, 0.48688, 0.669645, 0.442451, 0.217795, 0.450755,
                0.65321, 0.473974, -0.173507, -0.351054, 2.127922, 0.698106, 0.898337, 3.33534, 0.808235, 0.927379],
    "conditional": [0.027353, 0.848112, -0.09413, 0.890029, 0.389858, 0.629883, 0.590784, 0.520847, 0.419206, 0.59916,
                    0.534678, 0.515328, 0.131279, 0.023151, 15.034277, 0.724158, 0.692241, 16.199253, 0.619045,
                    0.710979],
    "deformable-ss": [1.119488, -0.518224, 1.312454, 0.045337, 0.242206, 0.076724, 0.54745, 0.276161, 0.667994,
                      0.277133, 0.670742, 0.496195, -0.22592, -0.641976, 14.086979, 0.565593, 0.795523, 7.149848,
                      0.54466, 0.639606],
    "deformable-ms": [0.125136, -0.407576, 0.161522, -0.395006, 0.249754, 0.089659, 0.610374, 0.39169, 0.707128,
                      0.285664, 0.724624, 0.577469, -0.347653, -0.572844, 12.355405, 0.518574, 0.724024, 6.222449,
                      0.588195, 0.711013],
    "dab": [0.282262, 1.059669, -0.178006, 0.949908, 0.559132, 0.418366, 0.913283, 0.97199, 0.501831, 0.138317,
            0.339634, 0.752882, 0.139757, 0.164307, 14.886602, 0.670368, 0.744433, 19.492924, 1.080447, 0.84859],
    "dn": [0.491583, 0.692564, 0.04275, 0.56369, 0.562161, 0.368814, 0.910971, 0.952484, 0.537756, 0.096532, 0.341937,
           0.610397, 0.101123, 0.060473, 13.401494, 0.586251, 0.755549, 12.912288, 0.99948, 0.896814],
}  # fmt: skip


def digest(logits, boxes, terms):
    """The 20 numbers: logits (L, B, N, K), boxes (L, B, N, 4), terms {"class", "l1", "giou"} of (L,)."""
    parts = logits[-1, 0, 0, :2], logits[-1, 1, -1, :2], boxes[-1, 0, 0], boxes[-1, 1, -1]
    return torch.cat(
        [
            *parts,
            logits[[0, -1]].mean((1, 2, 3)),
            torch.stack([terms[k][i] for i in (0, -1) for k in ("class", "l1", "giou")]),
        ]
    )


def their_digest(transformers, detector):
    x, mask = inputs()
    labels = [{"class_labels": label, "boxes": boxes} for label, boxes in zip(LABELS, BOXES, strict=True)]
    with torch.no_grad():
        models = [model for _, model in each_depth(transformers, detector)]
        out = [model(pixel_values=x, pixel_mask=(~mask).long(), labels=labels) for model in models]
    names = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    terms = {ours: torch.stack([o.loss_dict[name] for o in out]) for ours, name in names.items()}
    return digest(torch.stack([o.logits for o in out]), torch.stack([o.pred_boxes for o in out]), terms)


def assert_digests_equal(found, stored):
    assert len(stored) <= 20
    outputs, terms = found.split([14, 6])
    assert outputs.tolist() == pytest.approx(stored[:14], abs=2e-4)
    assert terms.tolist() == pytest.approx(stored[14:], rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_losses_equal_numbers_stored_from_transformers(variant):
    detector = filled(variant)
    with torch.no_grad():
        pred = detector(*inputs())
        terms = loss_terms(detector.row, pred.logits, pred.boxes, *targets())
    assert_digests_equal(digest(pred.logits, pred.boxes, terms), STORED[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_numbers_are_what_transformers_returns(transformers, variant):
    assert_digests_equal(their_digest(transformers, filled(variant)), STORED[variant])


# ---------------------------------------------------------------------- names and shapes of the official repositories


def official_shapes(variant):
    """{name: shape} of the official state dict with 91 classes, as its repository prints it, without second names."""
    C, N, shapes = 256, 100 if variant in ("vanilla", "conditional") else 300, {}
    anchors, deformable, levels = variant in ("dab", "dn"), "deformable" in variant, 4 if "ms" in variant else 1

    def linear(name, out, dim=C):
        shapes.update({f"{name}.weight": (out, dim), f"{name}.bias": (out,)})

    def mlp(name, *dims):
        for i, (dim, out) in enumerate(zip(dims, dims[1:], strict=False)):
            linear(f"{name}.layers.{i}", out, dim)

    def norm(name):
        shapes.update({f"{name}.weight": (C,), f"{name}.bias": (C,)})

    def attention(name, joint):
        shapes.update({f"{name}.in_proj_weight": (3 * C, C), f"{name}.in_proj_bias": (3 * C,)} if joint else {})
        linear(f"{name}.out_proj", C)

    def deformable_attention(name):
        linear(f"{name}.sampling_offsets", 8 * levels * 4 * 2)
        linear(f"{name}.attention_weights", 8 * levels * 4)
        linear(f"{name}.value_proj", C), linear(f"{name}.output_proj", C)

    for part in ("encoder", "decoder"):
        for layer in (f"transformer.{part}.layers.{i}" for i in range(6)):
            linear(f"{layer}.linear1", 1024 if deformable else 2048)
            linear(f"{layer}.linear2", C, 1024 if deformable else 2048)
            for i in range(1, 3 if part == "encoder" else 4):
                norm(f"{layer}.norm{i}")
            if anchors:
                shapes[f"{layer}.activation.weight"] = (1,)
            if part == "encoder":
                (deformable_attention if deformable else lambda name: attention(name, True))(f"{layer}.self_attn")
                continue
            split = variant == "conditional" or anchors
            attention(f"{layer}.self_attn", joint=not split)
            if variant == "vanilla":
                attention(f"{layer}.multihead_attn", True)
            elif deformable:
                deformable_attention(f"{layer}.cross_attn")
            else:
                attention(f"{layer}.cross_attn", False)
                names = "sa_qcontent sa_qpos sa_kcontent sa_kpos sa_v ca_qcontent ca_kcontent ca_kpos ca_v ca_qpos_sine"
                for name in names.split() + (["ca_qpos"] if layer.endswith(".0") else []):
                    linear(f"{layer}.{name}_proj", C)
    if not deformable:
        norm("transformer.decoder.norm")
    if variant == "conditional" or anchors:
        mlp("transformer.decoder.query_scale", C, C, C)
        mlp("transformer.decoder.ref_point_head", *((2 * C, C, C) if anchors else (C, C, 2)))
    if anchors:
        mlp("transformer.decoder.ref_anchor_head", C, C, 2), mlp("transformer.encoder.query_scale", C, C, C)
    if deformable:
        shapes["transformer.level_embed"] = (levels, C)
        linear("transformer.reference_points", 2)
        for i, (dim, size) in enumerate([(512, 1), (1024, 1), (2048, 1), (2048, 3)] if levels == 4 else [(2048, 1)]):
            shapes.update({f"input_proj.{i}.0.weight": (C, dim, size, size), f"input_proj.{i}.0.bias": (C,)})
            norm(f"input_proj.{i}.1")
    else:
        shapes.update({"input_proj.weight": (C, 2048, 1, 1), "input_proj.bias": (C,)})
    shapes.update({"refpoint_embed.weight": (N, 4)} if anchors else {"query_embed.weight": (N, C + C * deformable)})
    shapes.update({"label_enc.weight": (92, C - 1)} if variant == "dn" else {})
    for copy in [f".{i}" for i in range(6)] if deformable else [""]:
        linear(f"class_embed{copy}", 92 if variant == "vanilla" else 91), mlp(f"bbox_embed{copy}", C, C, C, 4)
    with torch.device("meta"):
        resnet = torchvision.models.resnet50().state_dict()
    ours = {name for name in resnet if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    return shapes | {f"backbone.0.body.{name}": tuple(resnet[name].shape) for name in ours}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_have_the_official_names_and_shapes(variant):
    with torch.device("meta"):
        detector = build_detector(variant)
    assert {name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()} == official_shapes(variant)


# ---------------------------------------------------------------------- torch's own layers


@pytest.mark.parametrize("pre_norm", [False, True])
def test_vanilla_layers_equal_torchs_own_where_positions_are_zero(pre_norm):
    """The oracle of pre-norm, which transformers does not have; torch's layers know no positions."""
    ours = filled("vanilla", pre_norm=pre_norm).transformer
    options = dict(d_model=64, nhead=4, dim_feedforward=96, dropout=0, batch_first=True, norm_first=pre_norm)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**options), 2, nn.LayerNorm(64) if pre_norm else None, False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 3, nn.LayerNorm(64))
    for theirs, mine in ((encoder, ours.encoder), (decoder, ours.decoder)):
        theirs.load_state_dict(mine.state_dict())
    c, mask = noise("tokens", (2, 12, 64)), torch.arange(12) >= torch.tensor([[12], [9]])
    ctx, nothing = Context(c, torch.zeros_like(c), mask, [(3, 4)], None), torch.zeros(2, 20, 64)
    with torch.no_grad():
        memory = encoder.train()(c, src_key_padding_mask=mask)  # train: not the fused path, which zeroes padding
        assert torch.allclose(ours.encoder(ctx)[~mask], memory[~mask], atol=1e-5)
        states, _ = ours.decoder(nothing, None, None, ctx._replace(c=memory), None, None)
        assert torch.allclose(states[-1], decoder(nothing, memory, memory_key_padding_mask=mask), atol=1e-5)


# ---------------------------------------------------------------------- the official code, stored in ../shared/golden


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the official outputs' folder ../shared/golden is absent")
@pytest.mark.parametrize(("variant", "name"), {"vanilla": "detr", "deformable-ms": "def_ms", "dab": "dab"}.items())
def test_detector_reproduces_official_outputs_losses_and_detections(variant, name, monkeypatch):
    monkeypatch.syspath_prepend(GOLDEN)
    import golden_filler

    detector = build_detector(variant).eval()
    golden_filler.fill_model(detector)
    with torch.no_grad():
        x, mask = golden_filler.inputs()
        pred = detector(x, mask)
    official = json.loads((GOLDEN / "golden_variants.json").read_text())
    ours = golden_filler.digest(pred.logits, pred.boxes)
    for key, numbers in official[name].items():
        assert torch.allclose(torch.tensor(ours[key]), torch.tensor(numbers), atol=2e-4), key

    # against the filler's targets: the loss terms of every layer, the last one without suffix
    labels, boxes = ([t[key] for t in golden_filler.TARGETS] for key in ("labels", "boxes"))
    labels, boxes = pad_sequence(labels, batch_first=True), pad_sequence(boxes, batch_first=True)
    terms = loss_terms(detector.row, pred.logits, pred.boxes, labels, boxes, boxes[..., 2] > 0)
    official = official[f"loss_{name}"]
    for ours, theirs in {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}.items():
        layers = [official["losses"][f"{theirs}_{i}"] for i in range(5)] + [official["losses"][theirs]]
        assert torch.allclose(terms[ours], torch.tensor(layers), rtol=1e-4), ours
    found = detector.top_boxes(pred, torch.tensor([[112.0, 96.0], [128.0, 64.0]]))
    for (scores, kinds, boxes_xyxy), post in zip(found, official["post"], strict=True):
        assert len(scores) == post["n"]
        for i, box in enumerate(torch.tensor(post["boxes"]).view(-1, 4)):  # the official DETR does not sort them
            place = (boxes_xyxy - box).abs().amax(1).argmin()
            assert torch.allclose(boxes_xyxy[place], box, atol=2e-2) and kinds[place] == post["labels"][i]
            assert scores[place].item() == pytest.approx(post["scores"][i], abs=2e-5)
    sys.modules.pop("golden_filler")


# Of the same six sets, 20 and 18 numbers each: mean and deviation of each layer's logits, the first two boxes of the
# last layer; the class, L1 and GIoU losses of each layer.
OFFICIAL = {
    "vanilla": (
        [
            -0.16616,
            -0.161435,
            -0.178474,
            0.017256,
            -0.093894,
            0.02197,
            0.825499,
            0.774233,
            0.826892,
            0.814446,
            0.894965,
            0.773061,
            0.360672,
            0.506096,
            0.508082,
            0.680449,
            0.361046,
            0.504351,
            0.509426,
            0.680999,
        ],
        [
            5.031572,
            4.862783,
            5.395841,
            5.844573,
            5.851183,
            6.097667,
            0.699148,
            0.826566,
            0.763877,
            0.742597,
            0.780429,
            0.799793,
            0.87436,
            0.978173,
            0.918119,
            0.881927,
            0.846251,
            0.874536,
        ],
    ),
    "deformable-ms": (
        [
            0.067267,
            0.008566,
            -0.073472,
            -0.103741,
            -0.042192,
            -0.023026,
            0.806249,
            0.825373,
            0.894371,
            0.89082,
            0.852672,
            0.761738,
            0.608528,
            0.80498,
            0.547684,
            0.552836,
            0.135785,
            0.473161,
            0.558832,
            0.537853,
        ],
        [
            3233.826904,
            3072.189941,
            3007.147217,
            2858.50708,
            2988.571045,
            2802.358887,
            0.587816,
            0.438521,
            0.41223,
            0.405412,
            0.459383,
            0.497814,
            0.711763,
            0.601078,
            0.633558,
            0.552407,
            0.619394,
            0.617633,
        ],
    ),
    "dab": (
        [
            -0.095993,
            -0.129296,
            -0.010012,
            -0.036498,
            0.052484,
            0.081762,
            0.784292,
            0.827345,
            0.88016,
            0.814384,
            0.874842,
            0.918956,
            0.188122,
            0.936008,
            0.067649,
            0.930712,
            0.184054,
            0.952922,
            0.282753,
            0.958051,
        ],
        [
            2595.985596,
            2562.727539,
            3178.855469,
            2927.066895,
            3354.569336,
            3691.77417,
            0.250116,
            0.309794,
            0.45279,
            0.568813,
            0.778756,
            0.961826,
            0.589417,
            0.60283,
            0.857695,
            0.998463,
            1.156995,
            1.197752,
        ],
    ),
}


def official_fill(detector):
    """The weights of those sets: numpy's RandomState seeded by each tensor's name, heads of all layers alike."""
    for name, tensor in detector.state_dict().items():
        name = re.sub(r"^(class_embed|bbox_embed)\.\d\.", r"\1.0.", name)
        g = np.random.RandomState(zlib.crc32(name.encode()))
        n = g.standard_normal(tensor.shape).astype(np.float32)
        if name.endswith("running_var"):
            x = 0.75 + 0.5 * g.random_sample(tensor.shape).astype(np.float32)
        elif name.endswith("running_mean"):
            x = 0.05 * n
        elif tensor.dim() <= 1:
            x = 0.25 + 0.05 * n if "activation" in name else 0.8 + 0.1 * n if name.endswith("weight") else 0.05 * n
            x = 1.5 * n if "sampling_offsets" in name else x
        elif re.match(r"(query_embed|refpoint_embed|label_enc|transformer\.(patterns|level_embed))", name):
            x = n
        else:
            x = n * (1.4 if tensor.dim() == 4 else 1.0) / np.sqrt(tensor[0].numel())
            x = 0.3 * x if "sampling_offsets" in name else x
        tensor.copy_(torch.from_numpy(np.asarray(x, dtype=np.float32)))


@pytest.mark.parametrize("variant", OFFICIAL)
def test_outputs_and_losses_equal_numbers_stored_from_the_official_code(variant):
    detector, g = build_detector(variant).eval(), np.random.RandomState(0)
    official_fill(detector)
    x, mask = torch.zeros(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate([(96, 112), (64, 128)]):
        x[i, :, :h, :w], mask[i, :h, :w] = torch.from_numpy(g.standard_normal((3, h, w)).astype(np.float32)), False
    with torch.no_grad():
        pred = detector(x, mask)
    labels = pad_sequence([torch.tensor([3, 17, 62]), torch.tensor([1])], batch_first=True)
    boxes = pad_sequence(BOXES, batch_first=True)
    terms = loss_terms(detector.row, pred.logits, pred.boxes, labels, boxes, boxes[..., 2] > 0)
    found = [*pred.logits.mean((1, 2, 3)), *pred.logits.std((1, 2, 3)), *pred.boxes[-1, 0, :2].flatten()]
    outputs, losses = OFFICIAL[variant]
    assert [float(value) for value in found] == pytest.approx(outputs, abs=2e-4)
    assert torch.cat([terms[k] for k in ("class", "l1", "giou")]).tolist() == pytest.approx(losses, rel=1e-4)


if __name__ == "__main__":
    import transformers as library

    for variant in VARIANTS:
        print(f'    "{variant}": {[round(x, 6) for x in their_digest(library, filled(variant)).tolist()]},')
