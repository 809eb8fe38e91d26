"""How fast a fine-tuning step is, against Hugging Face transformers training the same detector on the same images.

Both take the whole step: forward, matching, losses of all layers, backward, clipping, AdamW (fused: what its Trainer
uses too). The same are the weights, names apart, the images (already normalised for it), the targets, the trained
parameters (all but the backbone's stem and first stage), frozen batch norm, dropout, and the number of layers and of
losses. Not the same: each runs its own attention and its own deformable operator as it comes (transformers' needs a
GPU to be more than grid_sample), and its Conditional DETR with auxiliary losses hands each layer's *normed* state to
the next, which is another network for the same work.
"""

import re

import torch

import finetune
import formats
from bench.timing import compare_steps, record
from data import DetectionBatch, normalise
from model import build_detector
from runtime import Run

CLASSES = 20
WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0}  # transformers'; the official code, and finetune.py, weigh class by 2


def add_flags(command):
    command.add_argument("--variant", choices=["conditional", "deformable-ss", "deformable-ms"], default="conditional")
    command.add_argument("--batch-size", type=int, default=2)
    command.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of an image")
    command.add_argument("--dropout", type=float, default=0.1)


def labelled_noise(B, size, T=8):
    """A DetectionBatch of B images of noise without padding, with T objects each."""
    g, (h, w) = torch.Generator().manual_seed(0), size
    boxes = torch.cat([0.3 + 0.4 * torch.rand(B, T, 2, generator=g), 0.05 + 0.5 * torch.rand(B, T, 2, generator=g)], -1)
    x = torch.randint(0, 256, (B, 3, h, w), generator=g, dtype=torch.uint8)
    labels, valid = torch.randint(CLASSES, (B, T), generator=g), torch.ones(B, T, dtype=torch.bool)
    mask, size = torch.zeros(B, h, w, dtype=torch.bool), torch.tensor([[w, h]] * B, dtype=torch.float)
    return DetectionBatch(x, mask, boxes, labels, valid, torch.arange(B), size)


def twin(detector):
    """The transformers model of a detector, with its weights, that trains with the losses of all layers.

    Raises ValueError when transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        message = "bench.speed finetune compares with Hugging Face transformers: pip install 'transformers>=5.0' first"
        raise ValueError(message) from error
    config = formats.hf_config(detector.settings, [str(k) for k in range(CLASSES)], native=True)
    tied = {"auxiliary_loss": True, "tie_word_embeddings": True}  # the one head of all layers
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config | tied)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    model.load_state_dict(formats.to_hf(detector.state_dict(), detector.settings, native=True, memory=True))
    for name, p in model.named_parameters():  # 5.23 means to train these, but looks for "stage.1"
        p.requires_grad_(p.requires_grad or re.search(r"encoder\.stages\.[1-3]\.", name) is not None)
    return model.train()


def ours(detector, batch, amp=False):
    """-> the loss of a step as finetune.py takes it, its gradient left in the detector."""
    terms = finetune.backward(detector, detector.row, [batch], WEIGHTS, Run(batch.x.device, 0, 1), amp)
    return sum(WEIGHTS[name] * value for name, value in terms.items())


def theirs(model, batch, amp=False):
    labels = [{"class_labels": k, "boxes": b} for k, b in zip(batch.labels, batch.boxes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(pixel_values=batch.x, pixel_mask=(~batch.mask).long(), labels=labels).loss
    loss.backward()
    return loss.detach()


def finetune_step(args):
    """Seconds of a whole step, theirs over ours, in float32 and under bfloat16 autocast."""
    torch.manual_seed(0)
    detector = build_detector(args.variant, CLASSES, dropout=args.dropout)
    detector.freeze_backbone(False)
    detector.fold_backbone(trains=True)
    model, batch = twin(detector), labelled_noise(args.batch_size, args.size)
    normalised = batch._replace(x=normalise(batch.x, batch.mask))

    def contestant(is_ours, amp):
        net, backward, images = (detector, ours, batch) if is_ours else (model, theirs, normalised)
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True)

        def run():
            optimizer.zero_grad(set_to_none=True)
            backward(net, images, amp)
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()

        return run

    faster = compare_steps(contestant, "transformers", args)
    case = f"{args.variant}, batch {args.batch_size}, {args.size[0]} x {args.size[1]}, dropout {args.dropout:g}"
    print(f"{case}: " + "; ".join(f"{name} {r[0]} ({r[1]} to {r[2]})" for name, r in faster.items()))
    trained = {name: sum(p.numel() for p in net.parameters() if p.requires_grad)
               for name, net in (("ours", detector), ("transformers", model))}  # fmt: skip
    record({"bench": "finetune", "case": case, "ratios": faster, "trained": trained})
