"""formats.py by way of convert.py: the same outputs in transformers, and everything back as it was. Offline, tiny."""

import functools
import json
import math
import re

import pytest
import torch

import convert
import finetune
import formats
from model import build_detector

TINY = dict(backbone="resnet18", hidden_dim=32, heads=2, ffn_dim=24, enc_layers=2, dec_layers=3, num_queries=12)
DETECTORS = {
    **{name: (name, {}) for name in ("vanilla", "conditional", "deformable-ss", "deformable-ms", "dab", "dn")},
    "refined": ("deformable-ms", {"box_refine": True}),
    "patterns": ("dab", {"patterns": 3}),
    "stride 16": ("conditional", {"stride": 16}),
    "bottleneck": ("vanilla", {"backbone": "resnet50"}),
}
REFUSED = ("stride 16", "hf")
CLASSES = [[3, "ant"], [7, "bee"], [8, "cat"], [20, "dog"], [21, "elk"]]


@functools.cache
def filled(name):
    """A detector whose every tensor counts: norms and heads away from their start, distinct queries. Not to change."""
    variant, options = DETECTORS[name]
    detector = build_detector(variant, 5, **TINY | options)
    stream = torch.Generator().manual_seed(7)
    for key, tensor in detector.state_dict().items():
        x = torch.randn(tensor.shape, generator=stream)
        unit = key.endswith("weight") and tensor.dim() == 1
        if tensor.dim() > 1 and "embed.weight" not in key:
            x *= math.sqrt(2 / tensor[0].numel())
        elif key.endswith("running_var") or unit:
            x = 0.8 + 0.4 * x.sigmoid()
        elif tensor.dim() == 1:
            x *= 2 if "sampling_offsets" in key else 0.1
        tensor.copy_(x)
    return detector.eval()


def inputs():
    """Two images of different sizes, both padded."""
    stream, x = torch.Generator().manual_seed(3), torch.zeros(2, 3, 96, 128)
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    for i, (h, w) in enumerate([(96, 104), (72, 128)]):
        x[i, :, :h, :w], mask[i, :h, :w] = torch.randn(3, h, w, generator=stream), False
    return x, mask


@torch.no_grad()
def difference(detector, model):
    """Largest difference of the last layer's logits and boxes from those of a transformers model."""
    x, mask = inputs()
    pred, out = detector(x, mask), model(pixel_values=x, pixel_mask=(~mask).long())
    assert pred.logits[-1].std() > 0.2 and pred.logits[-1].std(1).max() > 0.01  # queries differ
    return max((pred.logits[-1] - out.logits).abs().max(), (pred.boxes[-1] - out.pred_boxes).abs().max())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def checkpoint(path, detector):
    meta = {"build": detector.settings, "classes": CLASSES, "resolution": 96}
    torch.save({"model": detector.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("timm", reason="the backbones of transformers come from timm, which is not installed")
    library = pytest.importorskip("transformers", "5", reason="transformers 5 is not installed")
    library.logging.set_verbosity_error()
    return library


def opened(transformers, folder):
    """As a user opens it; every tensor must have found its place."""
    auto = transformers.AutoModelForObjectDetection
    model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert transformers.AutoImageProcessor.from_pretrained(folder).size == {"shortest_edge": 96, "longest_edge": 160}
    return model.eval()


def without_dn(name, state):
    """What must come back: of DN-DETR its DAB-DETR."""
    if name != "dn":
        return state
    label = state["label_enc.weight"][-1:]
    state = {key: tensor for key, tensor in state.items() if key != "label_enc.weight"}
    return state | {"transformer.patterns.weight": torch.cat([label, torch.zeros(1, 1)], 1)}


RARE = {name: pytest.mark.slow for name in ("bottleneck", "deformable-ss", "stride 16", "dn", "refined")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=RARE.get(name, ())) for name in DETECTORS])
@pytest.mark.parametrize("to", ["hf", "hf-native"])
def test_transformers_opens_the_folder_and_computes_the_same(name, to, transformers, tmp_path):
    if (name, to) == REFUSED:
        with pytest.raises(ValueError, match="--to hf-native"):
            convert.convert(checkpoint(tmp_path / "ours.pt", filled(name)), tmp_path / "hf", to)
        return
    detector = filled(name)
    lines = convert.convert(checkpoint(tmp_path / "ours.pt", detector), tmp_path / "hf", to)
    model = opened(transformers, tmp_path / "hf")
    assert difference(detector, model) < 1e-5
    memory = formats.to_hf(detector.state_dict(), detector.settings, to == "hf-native", memory=True)
    model.load_state_dict(memory, strict=True)  # the names in memory are known, too
    assert [model.config.id2label[k] for k in range(5)] == [class_name for _, class_name in CLASSES]

    assert any("label table" in line for line in lines) == (name == "dn")
    state = without_dn(name, detector.state_dict())
    model.save_pretrained(tmp_path / "theirs")  # without the copies that transformers ties
    torch.save(model.state_dict(), tmp_path / "memory.bin")
    for path in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors", tmp_path / "theirs", tmp_path / "memory.bin"):
        source, back, _, meta = convert.read_native(path)
        assert source == "hf" and equal(back, state), path
        assert meta.get("classes", CLASSES) == CLASSES and meta.get("build", {"heads": 2})["heads"] == 2


def swapped(state):
    """split_qkv with q and k exchanged."""
    change = {".q_proj.": ".k_proj.", ".k_proj.": ".q_proj."}
    right = formats.split_qkv(state)
    return {next((k.replace(a, b) for a, b in change.items() if a in k), k): t for k, t in right.items()}


@pytest.mark.parametrize("name", ["deformable-ms", "vanilla", "conditional"])
def test_wrong_mappings_change_the_outputs(name, transformers, monkeypatch):
    detector = filled(name)
    config = formats.hf_config(detector.settings, "abcde")
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForObjectDetection.from_config(config).eval()
    right = formats.to_hf(detector.state_dict(), detector.settings, memory=True)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "HF_DEFORMABLE_NORMS", formats.HF_DECODER_NORMS)
        norms = formats.to_hf(detector.state_dict(), detector.settings, memory=True)
    slices = formats.to_hf(swapped(detector.state_dict()), detector.settings, memory=True)
    for wrong in [norms, slices] if name == "deformable-ms" else [slices]:
        assert wrong.keys() == right.keys()
        model.load_state_dict(wrong, strict=True)
        assert difference(detector, model) > 1e-2
    model.load_state_dict(right, strict=True)
    assert difference(detector, model) < 1e-5


def test_pipeline_finds_what_finetune_finds(transformers, tmp_path):
    from PIL import Image

    path = checkpoint(tmp_path / "ours.pt", filled("conditional"))
    convert.convert(path, tmp_path / "hf", "hf-native")
    pixels = (torch.rand(96, 112, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    image = Image.fromarray(pixels.numpy())  # of the size at which it is evaluated: no resizing
    pipe = transformers.pipeline("object-detection", str(tmp_path / "hf"), device="cpu")
    found = sorted(pipe(image, threshold=0.3), key=lambda row: -row["score"])
    detector, names = finetune.load_detector(path)
    expected = finetune.detect(detector, names, image, threshold=0.3)
    assert len(found) == len(expected) > 5
    for theirs, (label, score, box) in zip(found, expected, strict=True):
        assert theirs["label"] == label and abs(theirs["score"] - score) < 1e-4
        assert all(abs(a - b) <= 1 for a, b in zip(theirs["box"].values(), box, strict=True))  # whole pixels there


# --- names, without transformers --------------------------------------------------------------------------------------


def through(detector, to):
    """ours -> to -> ours."""
    state, settings = detector.state_dict(), detector.settings
    if to == "official":
        return convert.to_detector(formats.with_alias(state, settings), "official")[0]
    if to == "detrex":
        return convert.to_detector(formats.to_detrex(state, settings), "detrex")[0]
    return convert.to_detector(formats.to_hf(state, settings, to == "hf-native", memory=to == "memory"), "hf")[0]


@pytest.mark.parametrize("to", ["official", "hf", "hf-native", "memory", "detrex"])
@pytest.mark.parametrize("name", DETECTORS)
def test_round_trips_are_exact(name, to):
    detector = filled(name)
    if (name, to) in (("patterns", "detrex"), REFUSED, ("stride 16", "memory")):
        with pytest.raises(ValueError, match="use --to"):
            through(detector, to)
        return
    state = detector.state_dict()
    assert equal(through(detector, to), state if to in ("official", "detrex") else without_dn(name, state))


@pytest.mark.parametrize(
    "name, left_out",
    [
        ("deformable-ms", r"class_embed.[12].", ), ("deformable-ms", r"bbox_embed.[12]."),  # transformers 4 and 5
        ("refined", r"^bbox_embed."), ("refined", r"^model.decoder.bbox_embed."),
        ("dab", r"^bbox_predictor."), ("dab", r"^model.decoder.bbox_embed."),
    ],
)  # fmt: skip
def test_copies_that_transformers_leaves_out_are_filled(name, left_out):
    detector = filled(name)
    state = formats.to_hf(detector.state_dict(), detector.settings)
    fewer = {key: tensor for key, tensor in state.items() if not re.search(left_out, key)}
    assert len(fewer) < len(state)
    assert equal(convert.to_detector(fewer, "hf")[0], detector.state_dict())


FACTS = [  # our name, the name there (variants.md, section 6.2, 6.4 and 6.6)
    ("dab", "hf", "backbone.0.body.layer3.1.bn2.bias",
     "model.backbone.conv_encoder.model._backbone.layer3.1.bn2.bias"),
    ("vanilla", "hf", "backbone.0.body.conv1.weight", "model.backbone.conv_encoder.model.conv1.weight"),
    ("vanilla", "hf-native", "backbone.0.body.layer3.0.downsample.1.running_var",
     "model.backbone.conv_encoder.model.encoder.stages.2.layers.0.shortcut.normalization.running_var"),
    ("vanilla", "hf-native", "backbone.0.body.layer1.1.conv2.weight",
     "model.backbone.conv_encoder.model.encoder.stages.0.layers.1.layer.1.convolution.weight"),
    ("deformable-ms", "hf", "transformer.decoder.layers.2.norm1.bias",
     "model.decoder.layers.2.encoder_attn_layer_norm.bias"),
    ("deformable-ms", "hf", "transformer.encoder.layers.1.norm1.bias",
     "model.encoder.layers.1.self_attn_layer_norm.bias"),
    ("deformable-ms", "hf", "class_embed.2.bias", "class_embed.2.bias"),
    ("conditional", "hf", "class_embed.bias", "class_labels_classifier.bias"),
    ("conditional", "memory", "transformer.decoder.layers.0.ca_qpos_proj.bias",
     "model.decoder.layers.0.encoder_attn.q_pos_proj.bias"),
    ("dab", "hf", "transformer.decoder.layers.0.sa_kcontent_proj.bias",
     "model.decoder.layers.0.self_attn.self_attn_key_content_proj.bias"),
    ("dab", "hf", "class_embed.bias", "class_embed.bias"),
    ("vanilla", "detrex", "backbone.0.body.bn1.bias", "backbone.stem.conv1.norm.bias"),
    ("vanilla", "detrex", "backbone.0.body.layer4.0.downsample.0.weight", "backbone.res5.0.shortcut.weight"),
    ("vanilla", "detrex", "transformer.encoder.layers.1.self_attn.in_proj_bias",
     "transformer.encoder.layers.1.attentions.0.attn.in_proj_bias"),
    ("dab", "detrex", "transformer.decoder.layers.2.ca_qpos_sine_proj.bias",
     "transformer.decoder.layers.2.attentions.1.query_pos_sine_proj.bias"),
    ("dn", "detrex", "label_enc.weight", "denoising_generator.label_encoder.weight"),
    ("deformable-ms", "detrex", "transformer.decoder.layers.2.norm2.bias", "transformer.decoder.layers.2.norms.0.bias"),
    ("deformable-ms", "detrex", "transformer.encoder.layers.1.norm2.bias", "transformer.encoder.layers.1.norms.1.bias"),
    ("deformable-ms", "detrex", "input_proj.3.1.bias", "neck.extra_convs.0.norm.bias"),
]  # fmt: skip


@pytest.mark.parametrize("name, to, ours, theirs", FACTS)
def test_single_names_are_those_of_the_other_library(name, to, ours, theirs):
    detector = filled(name)
    state, settings = detector.state_dict(), detector.settings
    if to == "detrex":
        there = formats.to_detrex(state, settings)
    else:
        there = formats.to_hf(state, settings, to == "hf-native", memory=to == "memory")
    assert torch.equal(there[theirs], state[ours])


def test_detrex_has_second_names_for_slopes_and_box_heads():
    detector = filled("dab")
    there = formats.to_detrex(detector.state_dict(), detector.settings)
    assert "transformer.decoder.layers.1.ffns.0.activation.weight" in there
    assert "transformer.decoder.bbox_embed.layers.0.bias" in there


def test_rename_refuses_what_it_does_not_know_and_what_collides():
    rows = formats.table("a.#.*  b.#.*\nc  b.1.x")
    assert formats.rename({"a.12.x.y": 0}, rows) == {"b.12.x.y": 0}
    assert formats.rename({"b.12.x.y": 0}, rows, back=True) == {"a.12.x.y": 0}
    assert formats.rename({"d": 0}, rows, strict=False) == {"d": 0}
    with pytest.raises(ValueError, match="no name for d, e, f and 1 more"):
        formats.rename(dict.fromkeys("defg", 0), rows)
    with pytest.raises(ValueError, match="two tensors become b.1.x"):
        formats.rename({"a.1.x": 0, "c": 0}, rows)
    with pytest.raises(ValueError, match="not x.k_proj.bias"):
        formats.join_qkv({"x.q_proj.bias": torch.zeros(1), "x.v_proj.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    "changes, settings, expected",
    [
        ({"dilation": True}, {}, "has dilation True, only False is built here"),
        ({"two_stage": True, "with_box_refine": True}, {}, "two_stage"),
        ({"position_embedding_type": "learned"}, {}, "position_embedding_type 'learned'"),
        ({"activation_function": "gelu"}, {}, "activation_function 'gelu', only 'relu'"),
        ({"decoder_attention_heads": 4}, {}, "decoder_attention_heads 4, only 2"),
        ({"model_type": "dab-detr", "activation_function": "relu"}, {}, "activation_function 'relu', only 'prelu'"),
        ({"temperature_width": 10000}, {}, "temperature_width 10000, only 20"),
        ({"id2label": 3}, {}, "damaged settings"),
        ({"encoder_attention_heads": "two"}, {}, "damaged settings"),
        ({}, {"size": 3}, "damaged settings"),
        ({}, {"size": {"shortest_edge": None}}, "damaged settings"),
    ],
)
def test_settings_of_other_networks_are_refused(changes, settings, expected, tmp_path):
    convert.convert(checkpoint(tmp_path / "ours.pt", filled("conditional")), tmp_path / "hf", "hf")
    for name, new in (("config.json", changes), ("preprocessor_config.json", settings)):
        path = tmp_path / "hf" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | new))
    with pytest.raises(ValueError, match=expected) as error:
        convert.read_native(tmp_path / "hf")
    assert str(tmp_path / "hf") in str(error.value)
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged settings"):
        convert.read_native(tmp_path / "hf")


def test_classes_are_those_of_transformers_where_it_has_replaced_ours(tmp_path):
    convert.convert(checkpoint(tmp_path / "ours.pt", filled("conditional")), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    other = {"0": "fox", "1": "gnu", "2": "hen", "3": "owl", "4": "yak"}  # as many, and then fewer
    for names in (other, {k: other[k] for k in "012"}):
        path.write_text(json.dumps(config | {"id2label": names}))
        assert convert.read_native(tmp_path / "hf")[3]["classes"] == [[int(k), name] for k, name in names.items()]
    path.write_text(json.dumps(config))
    assert convert.read_native(tmp_path / "hf")[3]["classes"] == CLASSES


def test_two_classes_that_transformers_does_not_write_down_are_numbered(tmp_path):
    detector = build_detector("conditional", 2, **TINY | DETECTORS["conditional"][1])
    file = {"model": detector.state_dict(), "meta": {"build": detector.settings, "classes": [[0, "a"], [1, "b"]]}}
    torch.save(file, tmp_path / "ours.pt")
    convert.convert(tmp_path / "ours.pt", tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("id2label", "label2id", "categories")}))
    convert.convert(tmp_path / "hf", tmp_path / "official.pth")
    for init in (tmp_path / "hf", tmp_path / "official.pth"):
        assert finetune.load_detector(init)[1] == ["0", "1"]


def test_count_of_tensors_read_is_that_of_the_file(tmp_path):
    convert.convert(checkpoint(tmp_path / "ours.pt", filled("vanilla")), tmp_path / "hf", "hf-native")
    inside = len(convert.read_weights(tmp_path / "hf")[0])  # q, k and v apart
    *_, line = convert.convert(tmp_path / "hf", tmp_path / "official.pth")
    assert f"{inside} tensors read" in line and inside > len(torch.load(tmp_path / "official.pth")["model"])


def test_finetune_starts_from_a_hugging_face_folder(tmp_path):
    source = filled("stride 16")
    convert.convert(checkpoint(tmp_path / "ours.pt", source), tmp_path / "hf", "hf-native")
    detector, names = finetune.load_detector(tmp_path / "hf")
    assert detector.classes == CLASSES and names == [name for _, name in CLASSES] and detector.resolution == 96
    assert detector.settings == source.settings
    with torch.no_grad():
        assert torch.equal(detector(*inputs()).logits, source(*inputs()).logits)
    convert.convert(tmp_path / "hf", tmp_path / "back.pth")
    assert finetune.load_detector(tmp_path / "back.pth")[0].classes == CLASSES


def test_safetensors_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    sample = {
        "a": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "b": torch.tensor([1.5, -2, 7], dtype=torch.bfloat16),
        "c": torch.tensor(5),
        "d": torch.tensor([[True, False]]),
    }
    formats.write_safetensors(tmp_path / "x.safetensors", sample)
    assert equal(library.load_file(tmp_path / "x.safetensors"), sample)
    assert equal(formats.read_safetensors(tmp_path / "x.safetensors"), sample)
    library.save_file({k: t.contiguous() for k, t in sample.items()}, tmp_path / "y.safetensors")
    assert equal(formats.read_safetensors(tmp_path / "y.safetensors"), sample)
