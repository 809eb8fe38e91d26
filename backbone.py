"""h = Backbone(x): a frozen-norm ResNet or MobileNetV2 with maps at strides 8, 16 and 32, and its fast copy.

Read after model.py. B images, H0 W0 the input, D channels, H W a feature map. Names of tensors below `body` are
torchvision's, which the official repositories share.
"""

import copy
from contextlib import nullcontext
from functools import partial

import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torchvision.ops import FrozenBatchNorm2d


class Backbone(nn.Module):
    """h = Backbone(x): a torchvision ResNet or MobileNetV2 with frozen batch norm; maps at strides 8, 16 and 32."""

    def __init__(self, name):
        super().__init__()
        if name not in ("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"):
            raise ValueError(f"--backbone {name!r}: choose resnet18, resnet34, resnet50, resnet101 or mobilenet_v2")
        net = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
        self.body = nn.Module()
        if name == "mobilenet_v2":
            self.body.features = net.features
            ranges = {8: range(7), 16: range(7, 14), 32: range(14, 19)}
            self.stages = {s: [f"features.{i}" for i in ranges[s]] for s in ranges}
            self.fixed = ("features.0.", "features.1.")  # stem and first stage: never trained
            self.stem = ("features.0.", "features.1.")  # never in bfloat16, see `folded`
            self.channels = {8: 32, 16: 96, 32: 1280}
        else:
            for child, module in list(net.named_children())[:-2]:  # without pooling and classifier
                self.body.add_module(child, module)
            self.stages = {8: ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"], 16: ["layer3"], 32: ["layer4"]}
            self.fixed, self.stem = ("conv1.", "layer1."), ("conv1.",)
            self.channels = {s: net.fc.in_features * s // 32 for s in self.stages}
        self.freeze(())

    def forward(self, x, strides):
        """x (B, 3, H0, W0) -> {stride: (B, D, H, W)}; stops after the deepest stride asked for."""
        h = {}
        for stride, names in self.stages.items():
            if stride <= max(strides):
                for name in names:
                    x = self.body.get_submodule(name)(x)
                h[stride] = x
        return h

    def freeze(self, trained):
        """Nothing trains but the stages that lead up to the strides `trained`, without the stem and first stage."""
        used = tuple(f"{name}." for s, names in self.stages.items() if s <= max(trained, default=0) for name in names)
        for name, p in self.body.named_parameters():
            p.requires_grad_(name.startswith(used) and not name.startswith(self.fixed))


CACHED_PIXELS = 2**18  # that a CPU takes at a time, two images at least; 160 crops at once take 1.4 to 2 times as long


def folded(backbone, dtype=torch.float32, compiled=False, trains=False):
    """A copy of a backbone for speed: frozen batch norms folded into the convolutions before them, channels last.

    Equal to the backbone up to rounding (about 1e-5 of the largest value). trains: folded anew at each call, so that
    the backbone's own weights get their gradient. Else once, without gradient: it takes and returns float32, inside
    `dtype`, but for the stem: MobileNetV2's pooled crops then keep a cosine of 0.994 or more with float32's; with the
    stem, 0.983 (bench/fidelity.py). compiled: by torch.compile at the first call, once for all sizes of images.
    """
    plain, pairs = copy.deepcopy(backbone).requires_grad_(False).to(memory_format=torch.channels_last), []
    onednn = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # as ops.dense
    onednn = onednn and next(plain.parameters()).device.type == "cpu"
    for name, parent in plain.named_modules():
        if onednn and isinstance(parent, nn.Conv2d) and parent.kernel_size == (1, 1):
            parent.dilation = (2, 2)  # nothing to a single cell; else few images in one thread are MKL's
        children = list(parent.named_children())
        for (a, conv), (b, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                conv.bias = nn.Parameter(norm.bias.clone(), requires_grad=False)
                setattr(parent, b, nn.Identity())
                pairs.append((f"{name}.{a}", f"{name}.{b}"))

    def tensors():
        new = {}
        for conv, norm in pairs:
            weight, norm = backbone.get_submodule(conv).weight, backbone.get_submodule(norm)
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            new[f"{conv}.weight"] = (weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
            new[f"{conv}.bias"] = norm.bias - norm.running_mean * scale
        return new

    def in_training(x, strides):
        return functional_call(plain, tensors(), (x.contiguous(memory_format=torch.channels_last), strides))

    if trains:
        plain.to("meta")  # its own tensors are never read
        return in_training
    plain.load_state_dict(tensors(), strict=False)
    for name, p in plain.body.named_parameters():
        if not name.startswith(backbone.stem):
            p.data = p.data.to(dtype)
    plain.body.get_submodule(backbone.stem[-1][:-1]).register_forward_hook(lambda _, inputs, x: x.to(dtype))
    settings = nullcontext
    if compiled:
        from torch._inductor import config  # takes seconds to import

        plain = torch.compile(plain, dynamic=True)
        settings = partial(config.patch, freezing=True)  # weights as constants: ReLU and sum join their convolution

    @torch.no_grad()
    def forward(x, strides):
        x = x.contiguous(memory_format=torch.channels_last)
        few = 2 * max(1, CACHED_PIXELS // 2 // x.shape[2:].numel()) if x.device.type == "cpu" else len(x)
        with torch.autocast(x.device.type, enabled=False), settings():
            maps = [plain(part, (max(strides),)) for part in x.split(few)]
        return {stride: torch.cat([h[stride] for h in maps]).float() for stride in maps[0]}

    return forward
