"""Other people's names for a detector's tensors, and the settings files beside them: Hugging Face and detrex.

convert.py calls to_hf and from_hf, to_detrex and from_detrex; the tables above them say what there is to know. A table
has one row per kind of tensor, our name left and theirs right, and serves in both directions: `#` stands for a number,
`*` for any part of a name. What is more than a name stands in a function: q, k and v are one tensor here and three
there, DN-DETR's label table becomes a pattern of DAB-DETR, some tensors have a second name.
"""

import json
import math
import re
from functools import cache

import torch
import torch.nn.functional as F

from model import VARIANTS

BODY = "backbone.0.body."  # what every official detector puts before torchvision's names
SIZES = {  # blocks, their number by stage and the channels of the first stage
    "resnet18": ("basic", [2, 2, 2, 2], 64), "resnet34": ("basic", [3, 4, 6, 3], 64),
    "resnet50": ("bottleneck", [3, 4, 6, 3], 256), "resnet101": ("bottleneck", [3, 4, 23, 3], 256),
}  # fmt: skip
ATTENTION = {  # Conditional's projections: ours, and spelled out
    "qcontent": "query_content", "kcontent": "key_content", "qpos": "query_pos", "kpos": "key_pos", "v": "value",
    "qpos_sine": "query_pos_sine",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(text):
    """The rows of a table: pairs (ours, theirs). The first that fits a name counts."""
    return [tuple(line.split()) for line in text.splitlines() if line.strip()]


def in_layers(part, rows, theirs, ours="transformer"):
    """Rows about a layer of the encoder or decoder with the full names."""
    return [(f"{ours}.{part}.layers.#.{a}", f"{theirs}.{part}.layers.#.{b}") for a, b in rows]


def attention_rows(sa, ca, names=ATTENTION):
    """Conditional's projections of self- and cross-attention."""
    rows = [(f"sa_{a}_proj.*", f"{sa}{b}_proj.*") for a, b in names.items() if a != "qpos_sine"]
    return rows + [(f"ca_{a}_proj.*", f"{ca}{b}_proj.*") for a, b in names.items()]


def few(items):
    """The first items, and how many more there are."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


@cache
def compiled(pattern):
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def rename(state, rows, back=False, strict=True):
    """Rename every tensor by the first row that fits its name; back: from their names to ours.

    Raises ValueError when no row fits (without `strict` such a name stays) or two tensors get the same name.
    """
    renamed, unknown = {}, []
    rows = [(b, a) for a, b in rows] if back else rows
    for name, tensor in state.items():
        for old, new in rows:
            match = compiled(old).fullmatch(name)
            if match:
                parts = iter(match.groups())
                name = re.sub(r"[#*]", lambda _, parts=parts: next(parts), new)
                break
        else:
            unknown.append(name)
        if name in renamed:
            raise ValueError(f"two tensors become {name}: the file mixes two layouts; save it again from one")
        renamed[name] = tensor
    if unknown and strict:
        raise ValueError(f"this layout has no name for {few(unknown)}: drop these, or choose another --to")
    return renamed


def split_qkv(state):
    """in_proj (3C, .) -> q_proj, k_proj, v_proj (C, .)."""
    split = {}
    for name, tensor in state.items():
        if ".in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split |= {name.replace("in_proj_", f"{letter}_proj."): part.clone() for letter, part in parts}
        else:
            split[name] = tensor
    return split


def join_qkv(state):
    """The reverse; raises ValueError when one of the three is absent."""
    joined = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+\.)[qkv]_proj\.(weight|bias)", name)
        if match:
            three = [f"{match[1]}{letter}_proj.{match[2]}" for letter in "qkv"]
            missing = [part for part in three if part not in state]
            if missing:
                raise ValueError(f"{name} is there, but not {missing[0]}: the file is incomplete")
            joined[f"{match[1]}in_proj_{match[2]}"] = torch.cat([state[part] for part in three])
        else:
            joined[name] = tensor
    return joined


def timm_mobilenet_v2():
    """Rows from torchvision's mobilenet_v2 to timm's mobilenetv2_100, from the structure both share."""
    rows = [("features.0.0", "conv_stem"), ("features.0.1", "bn1"), ("features.18.0", "conv_head"),
            ("features.18.1", "bn2")]  # fmt: skip
    index = 0
    for group, repeats in enumerate((1, 2, 3, 4, 3, 3, 1)):  # MobileNetV2 paper, Table 2
        parts = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
        if group == 0:  # no expansion: depthwise, project
            parts = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
        for block in range(repeats):
            index += 1
            rows += [(f"features.{index}.conv.{a}", f"blocks.{group}.{block}.{b}") for a, b in parts.items()]
    return [(f"{a}.*", f"{b}.*") for a, b in rows]


def resnet_rows(stem, block, conv, shortcut):
    """Rows from torchvision's ResNets to another library's. Each of the others is a pair (convolution, norm).

    In them {s} is the stage counted from 2, {z} stage or convolution counted from 0, {j} convolution from 1. Norms
    come first, since their names may begin with those of the convolutions.
    """
    rows = [("bn1.*", f"{stem[1]}.*"), ("conv1.*", f"{stem[0]}.*")]
    for stage in range(1, 5):
        there = block.format(s=stage + 1, z=stage - 1)
        for k, ours in ((1, "bn"), (0, "conv")):
            names = [(f"{ours}{j}", conv[k].format(j=j, z=j - 1)) for j in range(1, 4)]
            names.append((f"downsample.{k}", shortcut[k]))
            rows += [(f"layer{stage}.#.{a}.*", f"{there}{b}.*") for a, b in names]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# 2. Hugging Face transformers
# ---------------------------------------------------------------------------------------------------------------------

HF_CLASSES = {  # family: model_type, class, image processor (DAB has none of its own)
    "vanilla": ("detr", "DetrForObjectDetection", "DetrImageProcessor"),
    "conditional": ("conditional_detr", "ConditionalDetrForObjectDetection", "ConditionalDetrImageProcessor"),
    "deformable": ("deformable_detr", "DeformableDetrForObjectDetection", "DeformableDetrImageProcessor"),
    "dab": ("dab-detr", "DabDetrForObjectDetection", "ConditionalDetrImageProcessor"),
}
HF_BUILT = {  # what else config.json may ask for, without another name or shape of any tensor
    "dilation": False, "two_stage": False, "keep_query_pos": False, "normalize_before": False,
    "position_embedding_type": "sine", "sine_position_embedding_scale": None,
    "temperature_height": 20, "temperature_width": 20,
}  # fmt: skip
HF_BODY = "model.backbone.conv_encoder.model."
HF_WRAPPED = "_backbone."  # comes next for timm's networks in DAB
HF_LAYER = """
    sa_*                           sa_*
    ca_*                           ca_*
    self_attn.*                    self_attn.*
    multihead_attn.*               encoder_attn.*
    cross_attn.*                   encoder_attn.*
    linear#.*                      fc#.*
    activation.*                   activation_fn.*
"""
HF_ENCODER_NORMS = """
    norm1.*                        self_attn_layer_norm.*
    norm2.*                        final_layer_norm.*
"""
HF_DECODER_NORMS = """
    norm1.*                        self_attn_layer_norm.*
    norm2.*                        encoder_attn_layer_norm.*
    norm3.*                        final_layer_norm.*
"""
HF_DEFORMABLE_NORMS = """
    norm2.*                        self_attn_layer_norm.*
    norm1.*                        encoder_attn_layer_norm.*
    norm3.*                        final_layer_norm.*
"""
HF_DAB_LAYER = """
    self_attn.out_proj.*           self_attn.self_attn.output_proj.*
    cross_attn.out_proj.*          cross_attn.cross_attn.output_proj.*
    linear#.*                      mlp.fc#.*
    activation.*                   mlp.activation_fn.*
    norm1.*                        self_attn.self_attn_layer_norm.*
    norm2.*                        cross_attn.cross_attn_layer_norm.*
    norm3.*                        mlp.final_layer_norm.*
"""
HF_REST = """
    input_proj.*                   model.input_projection.*
    query_embed.*                  model.query_position_embeddings.*
    refpoint_embed.*               model.query_refpoint_embeddings.*
    transformer.decoder.norm.*     model.decoder.layernorm.*
    transformer.*                  model.*
    class_embed.*                  class_labels_classifier.*
    bbox_embed.*                   bbox_predictor.*
"""
HF_MEMORY = """
    model.backbone.conv_encoder.*  model.backbone.*
    *attn.out_proj.*               *attn.o_proj.*
    *.layers.#.fc#.*               *.layers.#.mlp.fc#.*
"""
HF_DIFFERENT = {  # rows that a family has instead
    "deformable": "input_proj.* model.input_proj.*\nclass_embed.* class_embed.*\nbbox_embed.* bbox_embed.*",
    "dab": "class_embed.* class_embed.*",
}
HF_RESNET = resnet_rows(
    ("embedder.embedder.convolution", "embedder.embedder.normalization"), "encoder.stages.{z}.layers.#.",
    ("layer.{z}.convolution", "layer.{z}.normalization"), ("shortcut.convolution", "shortcut.normalization"),
)  # fmt: skip


def hf_rows(family, native):
    """Our names -> those of transformers' files; native: with its own ResNet, else timm's with torchvision's names."""
    decoder = table(HF_LAYER)
    if family == "dab":
        decoder = attention_rows("self_attn.self_attn_", "cross_attn.cross_attn_") + table(HF_DAB_LAYER)
    elif family == "vanilla":
        decoder.remove(("cross_attn.*", "encoder_attn.*"))
    else:
        decoder.remove(("multihead_attn.*", "encoder_attn.*"))
    decoder += table(HF_DEFORMABLE_NORMS if family == "deformable" else HF_DECODER_NORMS)
    rows = [(BODY + a, HF_BODY + b) for a, b in (HF_RESNET if native else [("*", "*")])]
    rows += in_layers("encoder", table(HF_LAYER + HF_ENCODER_NORMS), "model") + in_layers("decoder", decoder, "model")
    return rows + table(HF_DIFFERENT.get(family, "")) + table(HF_REST)


def hf_memory_rows(family):
    """Names in transformers' files -> names in the memory of transformers 5. DAB has the same in both."""
    if family == "dab":
        return []
    rows = []
    if family == "conditional":  # q_content for query_content
        short = {old: re.sub("uery|(?<=k)ey|alue", "", new) for old, new in ATTENTION.items()}
        rows = in_layers("decoder", attention_rows("self_attn.", "encoder_attn.", short), "model", "model")
    return rows + table(HF_MEMORY)


def family_of(variant):
    """Under which name the tables here have a variant. Raises ValueError on one that they lack."""
    family = "dab" if variant == "dn" else variant.split("-")[0]
    if family not in HF_CLASSES:
        raise ValueError(f"variant {variant} has no names in Hugging Face's or detrex's layout: use --to official")
    return family


def hf_backbone(settings, native):
    """The lines of config.json about the backbone. Raises ValueError on one that transformers does not have."""
    name, stride = settings["backbone"], 8 if VARIANTS[settings["variant"]].levels > 1 else settings["stride"]
    if name not in SIZES:  # it replaces timm's norms by frozen ones, and MobileNetV2's activations go with them
        raise ValueError(f"transformers' detectors cannot run {name}, only ResNets: use --to export for that")
    if not native and stride == 16:  # with timm, transformers 4 and 5 disagree about its names
        raise ValueError("transformers reads timm's networks at stride 32: use --to hf-native for --stride 16")
    lines = {"use_timm_backbone": not native, "backbone": None if native else name, "use_pretrained_backbone": False}
    if native:
        kind, depths, width = SIZES[name]
        stages = {8: ["stage2", "stage3", "stage4"], 16: ["stage3"], 32: ["stage4"]}[stride]
        widths = {"embedding_size": 64, "hidden_sizes": [width * 2**s for s in range(4)]}
        resnet = {"model_type": "resnet", "layer_type": kind, "depths": depths, **widths, "out_features": stages}
        lines["backbone_config"] = resnet
    return lines


def to_hf(state, settings, native=False, memory=False):
    """A native state in transformers' names.

    settings: build_detector's; native: transformers' own ResNet, else timm's network; memory: the names that
    load_state_dict of transformers 5 wants, else those of files. DN-DETR becomes DAB-DETR with one pattern, which is
    the 'no object' label with indicator 0: the same outputs. The other labels, read in training only, are left out.
    """
    if settings["pre_norm"]:
        raise ValueError("transformers has no pre-norm DETR: use --to official")
    hf_backbone(settings, native)  # refuses what transformers cannot run
    family, state = family_of(settings["variant"]), with_alias(state, settings)
    if "label_enc.weight" in state:
        state["transformer.patterns.weight"] = F.pad(state.pop("label_enc.weight")[-1:], (0, 1))
    state = rename(split_qkv(state), hf_rows(family, native))
    if family == "dab" and not native:
        state = {name.replace(HF_BODY, HF_BODY + HF_WRAPPED): tensor for name, tensor in state.items()}
    return rename(state, hf_memory_rows(family), strict=False) if memory else state


def with_alias(state, settings):
    """The state with the second name of its box heads, where the decoder of official and other code owns them too."""
    if not VARIANTS[settings["variant"]].anchors and not settings["box_refine"]:
        return dict(state)
    heads = [name for name in state if name.startswith("bbox_embed.")]
    return state | {f"transformer.decoder.{name}": state[name] for name in heads}


def from_hf(state):
    """Transformers' names, of files or of memory, with timm's or its own backbone -> our names."""
    state = {name.replace("." + HF_WRAPPED, "."): tensor for name, tensor in state.items()}
    names, family = " ".join(state), "vanilla"
    if "model.level_embed" in state:
        family = "deformable"
    elif "model.query_refpoint_embeddings." in names:
        family = "dab"
    elif "model.decoder.query_scale." in names:
        family = "conditional"
    if "conv_encoder." not in names:
        state = rename(state, hf_memory_rows(family), back=True, strict=False)
    return join_qkv(rename(state, hf_rows(family, ".embedder.embedder." in names), back=True))


def hf_config(settings, names, native=False):
    """config.json: settings are build_detector's, names the classes'."""
    family = family_of(settings["variant"])
    model_type, architecture, _ = HF_CLASSES[family]
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size" if family == "dab" else "d_model": settings["hidden_dim"],
        "num_queries": settings["num_queries"],
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
        "dropout": settings["dropout"],
        "attention_dropout": settings["dropout"],
        "class_cost": 1 if family == "vanilla" else 2,  # of the matcher; transformers' Deformable has 1
        "auxiliary_loss": False,  # True: transformers 5.23 hands the *normed* state to the next layer
        **hf_backbone(settings, native),
    }
    for part in ("encoder", "decoder"):
        config |= {f"{part}_layers": settings[f"{part[:3]}_layers"], f"{part}_ffn_dim": settings["ffn_dim"]}
        config[f"{part}_attention_heads"] = settings["heads"]
    if family == "deformable":
        levels = VARIANTS[settings["variant"]].levels
        config |= {"num_feature_levels": levels, "with_box_refine": settings["box_refine"]}
    if family == "dab":
        config["num_patterns"] = 1 if settings["variant"] == "dn" else settings["patterns"]
    return config


def write_hf(folder, state, settings, classes, resolution, native):
    """The files of a transformers model; classes [[category id, name], ...]."""
    config = hf_config(settings, [name for _, name in classes], native)
    config["categories"] = classes  # ours, for the way back
    processor = {
        "image_processor_type": HF_CLASSES[family_of(settings["variant"])][2],
        "format": "coco_detection",
        "size": {"shortest_edge": resolution, "longest_edge": round(resolution * 1333 / 800)},
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    write_safetensors(folder / "model.safetensors", state)
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_hf_settings(folder):
    """What the settings beside a transformers model say that its tensors do not: classes, build settings, resolution.

    Raises ValueError on a model that has the same tensors and other outputs.
    """
    config, processor = {}, {}
    try:
        config = json.loads((folder / "config.json").read_text())
        if (folder / "preprocessor_config.json").is_file():
            processor = json.loads((folder / "preprocessor_config.json").read_text())
        names = sorted((int(k), str(name)) for k, name in config.get("id2label", {}).items())
        ours = [(int(k), str(name)) for k, name in config.get("categories", [])]
        same = [name for _, name in ours] == [name for _, name in names]  # else transformers has trained another head
        classes = [list(pair) for pair in (ours if same else names)]  # none: two nameless ones are not written down
        meta = {"build": {}} | ({"classes": classes} if classes else {})
        for key, ours, kind in (("encoder_attention_heads", "heads", int), ("dropout", "dropout", float)):
            if key in config:
                meta["build"][ours] = kind(config[key])
        if "shortest_edge" in (processor.get("size") or {}):
            meta["resolution"] = int(processor["size"]["shortest_edge"])
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} has damaged settings ({error}): copy or download it again") from error
    one = {"activation_function": "prelu" if config.get("model_type") == "dab-detr" else "relu"}
    for key, built in (HF_BUILT | one | {"decoder_attention_heads": meta["build"].get("heads", 8)}).items():
        if config.get(key) not in (None, built):
            raise ValueError(f"{folder} has {key} {config[key]!r}, only {built!r} is built here: use another model")
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# 3. detrex
# ---------------------------------------------------------------------------------------------------------------------

DETREX_LAYER = """
    linear1.*                      ffns.0.layers.0.0.*
    linear2.*                      ffns.0.layers.1.*
    activation.*                   ffns.0.layers.0.1.*
"""
DETREX_NORMS = """
    norm1.*                        norms.0.*
    norm2.*                        norms.1.*
    norm3.*                        norms.2.*
"""
DETREX_DECODER = {
    "vanilla": """
    self_attn.*                    attentions.0.attn.*
    multihead_attn.*               attentions.1.attn.*
""",
    "conditional": """
    self_attn.*                    attentions.0.*
    cross_attn.*                   attentions.1.*
""",
    "deformable": """
    self_attn.*                    attentions.0.attn.*
    cross_attn.*                   attentions.1.*
    norm2.*                        norms.0.*
    norm1.*                        norms.1.*
""",
}
DETREX_DEFORMABLE = """
    input_proj.3.0.*               neck.extra_convs.0.conv.*
    input_proj.3.1.*               neck.extra_convs.0.norm.*
    input_proj.#.0.*               neck.convs.#.conv.*
    input_proj.#.1.*               neck.convs.#.norm.*
    query_embed.*                  query_embedding.*
"""
DETREX_REST = """
    input_proj.*                   input_proj.*
    query_embed.*                  query_embed.*
    refpoint_embed.*               anchor_box_embed.*
    label_enc.*                    denoising_generator.label_encoder.*
    transformer.decoder.norm.*     transformer.decoder.post_norm_layer.*
    transformer.level_embed        transformer.level_embeds
    transformer.*                  transformer.*
    class_embed.*                  class_embed.*
    bbox_embed.*                   bbox_embed.*
"""
DETREX_RESNET = resnet_rows(
    ("stem.conv1", "stem.conv1.norm"), "res{s}.#.", ("conv{j}", "conv{j}.norm"), ("shortcut", "shortcut.norm")
)


def detrex_rows(family):
    """Our names -> detrex's."""
    family = "conditional" if family == "dab" else family
    encoder = [("self_attn.*", "attentions.0.*" if family == "deformable" else "attentions.0.attn.*")]
    encoder += table(DETREX_LAYER + DETREX_NORMS)
    decoder = attention_rows("attentions.0.", "attentions.1.") if family == "conditional" else []
    decoder += table(DETREX_DECODER[family] + DETREX_LAYER + DETREX_NORMS)
    rows = [(BODY + a, "backbone." + b) for a, b in DETREX_RESNET]
    rows += in_layers("encoder", encoder, "transformer") + in_layers("decoder", decoder, "transformer")
    return rows + table(DETREX_DEFORMABLE if family == "deformable" else "") + table(DETREX_REST)


def to_detrex(state, settings):
    """A native state in detrex's names, with its second names."""
    if settings["pre_norm"] or settings["patterns"] or settings["backbone"] not in SIZES:
        raise ValueError("detrex has no pre-norm DETR, no patterns and only ResNets: use --to official")
    state = rename(with_alias(state, settings), detrex_rows(family_of(settings["variant"])))
    slopes = [name for name in state if name.endswith(".ffns.0.layers.0.1.weight")]
    return state | {name.replace("layers.0.1", "activation"): state[name] for name in slopes}


def from_detrex(state):
    """detrex's names -> ours. The second names of slopes are dropped before (convert.DROPS)."""
    names, family = " ".join(state), "vanilla"
    if "transformer.level_embeds" in state:
        family = "deformable"
    elif "_content_proj." in names:
        family = "conditional"
    return rename(state, detrex_rows(family), back=True)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Safetensors
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
# The safetensors package would be one more run-time dependency; these forty lines also name the entry that is damaged.


def read_safetensors(path):
    """Read a safetensors file: header length (8 bytes), JSON header, raw buffer without holes or overlaps."""
    tensors, position, total = {}, 0, path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(total - 8, 100_000_000):  # the limit of the safetensors library
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                if any(type(n) is not int or n < 1 for n in shape):
                    raise ValueError(f"{name} has shape {shape}")
                size = math.prod(shape) * dtype.itemsize
                if (begin, end) != (position, position + size) or end > total - 8 - length:
                    raise ValueError(f"{name} stands at bytes {begin} to {end}")
                tensors[name] = torch.frombuffer(bytearray(file.read(size)), dtype=dtype).reshape(shape)
                position = end
        if position != total - 8 - length:
            raise ValueError("bytes left over")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged safetensors file ({error}): copy or download it again") from error
    return tensors


def write_safetensors(path, tensors):
    """Write the tensors one after the other, under a header that transformers recognises as PyTorch's."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        entry = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        header[name], position = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the buffer is aligned, as the library's is
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
