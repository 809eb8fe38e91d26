"""How fast a pretraining step is, against the same step under the released code's habits (bench/released.py)."""

import torch

import losses
import pretrain
from bench.released import pretext_terms
from bench.timing import compare_steps, record
from model import VARIANTS, Siamese, build_detector
from views import ViewBatch


def add_flags(command):
    command.add_argument("--variant", choices=VARIANTS, default="conditional")
    command.add_argument("--batch-size", type=int, default=2)
    command.add_argument("--size", type=int, nargs=2, default=(384, 416), metavar=("H", "W"), help="of a view")
    command.add_argument("--compile", action="store_true", help="ours with pretrain.py --compile")


def photographs(B, size, R=10, side=128):
    """A ViewBatch of B pairs of noise, (h, w) each, with R regions and their crops, `side` pixels high and wide."""
    g, (h, w) = torch.Generator().manual_seed(0), size
    corners = 0.3 + 0.4 * torch.rand(2, B, R, 2, generator=g), 0.1 + 0.4 * torch.rand(2, B, R, 2, generator=g)
    boxes, valid = torch.cat(corners, -1), torch.ones(2, B, R, dtype=torch.bool)
    x = torch.randint(0, 256, (2, B, 3, h, w), generator=g, dtype=torch.uint8)
    crops = torch.randint(0, 256, (2, B, R, 3, side, side), generator=g, dtype=torch.uint8)
    mask = torch.zeros(2, B, h, w, dtype=torch.bool)
    return ViewBatch(x, mask, boxes, boxes, valid, crops, torch.arange(B), torch.zeros(B, dtype=torch.bool))


def step(args):
    """Seconds of a whole step: forward, losses, backward, clipping, AdamW; ours against the released habits."""
    weights = {"class": 1.0, "l1": 5.0, "giou": 2.0, "region": 5.0, "global": 10.0}
    batch = photographs(args.batch_size, args.size)

    def contestant(ours, amp):
        torch.manual_seed(0)
        net, terms = Siamese(build_detector(args.variant)).train(), fast_terms if ours else pretext_terms
        if ours:
            net.detector.fold_backbone(torch.bfloat16 if amp else torch.float32, args.compile)
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=ours or None)

        def run():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                found = terms(net, batch)
            losses.weighted_sum(found, weights).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()

        return run

    def fast_terms(net, batch):
        return losses.pretext_losses(net, net(*pretrain.inputs(batch)), batch)[0]

    faster = compare_steps(contestant, "released", args)
    case = f"{args.variant}, batch {args.batch_size}, {args.size[0]} x {args.size[1]}"
    print(f"{case}: " + "; ".join(f"{name} {r[0]} ({r[1]} to {r[2]})" for name, r in faster.items()))
    record({"bench": "step", "case": case, "compile": args.compile, "rounds": args.rounds, "ratios": faster})
