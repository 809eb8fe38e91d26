"""Properties of matching and losses. O-31 ... O-40 are values worked out by hand from ln, p and areas."""

import math
from types import SimpleNamespace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, as_dicts, random_boxes, random_case
from torch.autograd import grad
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

import losses
from losses import Match

SOFTMAX, FOCAL = {"softmax": True, "cost_class": 1.0}, {"softmax": False, "cost_class": 2.0}
both_heads = pytest.mark.parametrize("options", [SOFTMAX, FOCAL], ids=["softmax", "focal"])
seeds, few_counts = st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=1, max_size=4)


def solve(case, options=SOFTMAX):
    return losses.match(*case, **options)


def terms_of(case, match, num_boxes, options=SOFTMAX):
    args = case.logits, case.boxes, match, case.labels, case.targets
    return losses.detection_losses(*args, softmax=options["softmax"], num_boxes=num_boxes)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pair(box, target):
    return torch.tensor(box).double().view(1, 1, 1, 4), torch.tensor(target).double().view(1, 1, 4)


def first_queries(L, B, T):
    return Match(torch.arange(T).expand(L, B, T), torch.ones(L, B, T, dtype=torch.bool))


@both_heads
@settings(max_examples=40, deadline=None)
@given(seed=seeds, N=st.integers(1, 6), counts=few_counts)
def test_match_equals_brute_force(options, seed, N, counts):  # O-37; T > N and empty images included
    case = random_case(seed, counts, N)
    match = solve(case, options)
    for layer in range(2):
        expected = [reference.match_image(*image, *options.values()) for image in zip(*case.lists(layer), strict=True)]
        assert as_dicts(match, layer) == expected


@both_heads
def test_matching_cost_equals_reference(options):
    case = random_case(1, (3, 3), N=5)
    cost = losses.matching_cost(*case[:4], *options.values(), 5, 2)
    assert cost.shape == (2, 2, 5, 3)  # no pairs across images
    for layer, image, q, t in torch.cartesian_prod(*[torch.arange(n) for n in cost.shape]).tolist():
        logits, boxes, labels, targets = (x[image] for x in case.lists(layer))
        expected = reference.pair_cost(logits[q], boxes[q], labels[t], targets[t], *options.values())
        assert cost[layer, image, q, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target, cost", [((0.5, 0.5, 0.5, 0.5), -7 / 3), ((0.5, 0.5, 1, 1), 25 / 6)])
def test_matching_cost_oracle(target, cost):  # O-37
    box, target = pair((0.5, 0.5, 0.5, 0.5), target)
    logits, label = torch.zeros(1, 1, 1, 3).double(), torch.tensor([[1]])
    found = losses.matching_cost(logits, box, label, target, True, 1, 5, 2)
    assert found.item() == pytest.approx(cost, abs=1e-9)


def test_match_of_identical_targets_and_identical_queries_is_one_to_one():  # O-37
    case = random_case(2, (10, 4), N=30)
    case.targets[:], case.labels[:] = case.targets[0, 0], 1
    assert [len(set(found.values())) for found in as_dicts(solve(case), 0)] == [10, 4]
    case.logits[:], case.boxes[:] = case.logits[0, 0, 0].clone(), case.boxes[0, 0, 0].clone()
    assert [len(set(found.values())) for found in as_dicts(solve(case), 1)] == [10, 4]


@both_heads
def test_match_of_batch_equals_match_of_each_image_and_layer(options):  # O-37
    case = random_case(3, (4, 0, 7, 1), N=20, L=6)
    joint = solve(case, options)
    for i in range(4):
        assert equal([x[:, [i]] for x in joint], solve(case.images([i]), options))
    for i in range(6):
        assert equal([x[[i]] for x in joint], solve(Case(case.logits[[i]], case.boxes[[i]], *case[2:]), options))


def test_match_does_not_see_other_images():
    case = random_case(4, (3, 5), N=8)
    before = solve(case)
    case.logits[:, 1].neg_(), case.boxes[:, 1].mul_(0.5), case.targets[1].mul_(0.3)
    after = solve(case)
    assert equal([x[:, 0] for x in before], [x[:, 0] for x in after])
    assert not torch.equal(before.query[:, 1], after.query[:, 1])


def test_match_ignores_padding_wherever_it_stands():
    case = random_case(6, (2, 4, 0), T=6, N=7)
    before = solve(case)
    case.targets[~case.valid], case.labels[~case.valid] = math.nan, 0
    assert equal(before, solve(case))
    assert torch.equal(before.matched, case.valid.expand(2, 3, 6)) and before.query[~before.matched].sum() == 0
    order = torch.tensor([5, 0, 4, 2, 1, 3])  # padding before, between and after the targets
    assert equal([x[..., order] for x in before], solve(Case(*case[:2], *[x[:, order] for x in case[2:]])))


def test_match_is_permutation_equivariant():  # O-26
    case = random_case(7, (4, 4), N=6)
    match, order = solve(case), torch.tensor([5, 3, 1, 0, 2, 4])
    moved = Case(case.logits[:, :, order], case.boxes[:, :, order], *case[2:])
    assert torch.equal(order[solve(moved).query], match.query)
    terms = [terms_of(x, solve(x), 8) for x in (case, moved)]
    assert all(torch.allclose(terms[0][name], terms[1][name], rtol=1e-12) for name in terms[0])


@both_heads
def test_match_survives_nan_and_infinite_predictions(options):
    case = random_case(8, (3, 2), N=5)
    case.boxes[0, 0, 1], case.boxes[0, 1, 2, 0], case.logits[1, 0, 3] = math.nan, math.inf, math.nan
    match = solve(case, options)
    assert torch.equal(match.matched, case.valid.expand(2, 2, 3))
    assert 1 not in match.query[0, 0] and 2 not in match.query[0, 1, :2] and 3 not in match.query[1, 0]
    case.boxes[:] = math.nan
    assert len(set(solve(case, options).query[0, 0].tolist())) == 3  # still one to one: the NaN shows in the loss


def test_match_copies_to_the_host_once(monkeypatch):
    case, copies, cpu = random_case(9, (3, 0, 2), L=6), [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(tuple(x.shape)) or cpu(x))
    for name in ("item", "tolist", "__bool__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, None)  # each would wait for the device
    match = solve(case)
    terms_of(case, match, 5), terms_of(case, match, 5, FOCAL)
    assert copies == [(6, 3, 5, 3)]


@both_heads
def test_match_groups_equals_reference(options):
    case = random_case(10, (3, 3, 3, 3), N=15)
    match = losses.match_groups(*case, **options)
    for layer in range(2):
        images = zip(*case.lists(layer), strict=True)
        assert as_dicts(match, layer) == [reference.match_image_groups(*image, *options.values()) for image in images]
    assert torch.equal(match.query // 5, torch.arange(3).expand(2, 4, 3))
    case.valid[1, 1] = False
    match = losses.match_groups(*case, **options)
    assert torch.equal(match.matched, case.valid.expand(2, 4, 3)) and (match.query[:, 1, 1] == 0).all()
    for N, R in ((8, 3), (5, 0), (2, 4)):
        with pytest.raises(ValueError, match=rf"{N} queries .* {R} regions"):
            losses.match_groups(*random_case(11, (R,), N=N), **options)


def test_take_matched_picks_rows_of_the_own_layer_and_image():
    match, x = solve(random_case(12, (3, 1))), torch.randn(2, 2, 5, 7)
    rows = torch.arange(2).view(2, 1, 1), torch.arange(2).view(1, 2, 1), match.query
    assert torch.equal(losses.take_matched(x, match), x[rows])
    assert torch.equal(losses.take_matched(x[..., 0], match), x[..., 0][rows])


@both_heads
@settings(max_examples=25, deadline=None)
@given(seed=seeds, counts=few_counts, spare=st.integers(0, 2), N=st.integers(2, 5))
def test_detection_losses_equal_reference(options, seed, counts, spare, N):
    case, num_boxes = random_case(seed, counts, N, T=max(counts) + spare), sum(counts) or 1e-300
    match = solve(case, options)
    terms = terms_of(case, match, num_boxes, options)
    for layer in range(2):
        (logits, boxes, labels, targets), found = case.lists(layer), as_dicts(match, layer)
        expected = reference.cross_entropy(logits, found, labels)
        if not options["softmax"]:
            expected = reference.focal_loss(logits, found, labels, num_boxes)
        if not options["softmax"] or N >= max(counts):  # the cross-entropy takes every target as matched
            assert terms["class"][layer].item() == pytest.approx(expected, rel=1e-10)
        expected = reference.box_losses(boxes, found, targets, num_boxes)
        assert [terms["l1"][layer].item(), terms["giou"][layer].item()] == pytest.approx(expected, abs=1e-10)


@both_heads
@pytest.mark.parametrize("T", [0, 3])
def test_detection_losses_without_targets_still_train_the_classes(options, T):
    case = random_case(13, (0, 0), T=T)
    case.logits.requires_grad_(), case.boxes.requires_grad_()
    match = solve(case, options)
    assert match.query.shape == match.matched.shape == (2, 2, T)
    terms = terms_of(case, match, 1, options)
    losses.weighted_sum(terms, losses.PRETEXT_WEIGHTS).backward()
    assert terms["l1"].tolist() == terms["giou"].tolist() == [0, 0] and case.boxes.grad.abs().max() == 0
    assert (terms["class"] > 0).all() and (case.logits.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("row, at_100, at_300", [((0, 2, 0), 1.186913, 1.726724), ((0, 0, 3), 1.673870, 0.864154)])
def test_class_loss_of_constant_logits_oracle(row, at_100, at_300):  # O-32
    for N, expected in ((100, at_100), (300, at_300)):
        logits, labels = torch.tensor(row).double().expand(1, 2, N, 3), torch.ones(2, 10).long()
        loss = losses.class_loss(logits, first_queries(1, 2, 10), labels, softmax=True, num_boxes=20)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "box, target, l1, giou",
    [
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1, 1), 1.0, 0.75),
        ((0.5, 0.5, 0.5, 0.5), (0.25, 0.25, 0.5, 0.5), 0.5, 1.079365),
        ((0.25, 0.25, 0.5, 0.5), (0.75, 0.75, 0.5, 0.5), 1.0, 1.5),
        ((0.3, 0.6, 0.2, 0.1), (0.3, 0.6, 0.2, 0.1), 0.0, 0.0),
        ((0.5, 0.5, 0.2, 0.2), (0.5, 0.5, 0.4, 0.4), 0.4, 0.75),
    ],
)
def test_box_losses_oracle(box, target, l1, giou):  # O-33
    found = losses.box_losses(*pair(box, target), first_queries(1, 1, 1), 1)
    assert [x.item() for x in found] == pytest.approx([l1, giou], abs=5e-7)


def test_generalized_iou_equals_torchvision_and_bears_tiny_and_degenerate_boxes():
    g = torch.Generator().manual_seed(14)
    a, b = random_boxes(40, generator=g).requires_grad_(), random_boxes(30, generator=g)
    a_xyxy, b_xyxy = (box_convert(x, "cxcywh", "xyxy") for x in (a, b))
    assert torch.allclose(losses.generalized_iou(a[:, None], b), generalized_box_iou(a_xyxy, b_xyxy), atol=1e-12)
    theirs = grad(generalized_box_iou_loss(a_xyxy[:30], b_xyxy, eps=1e-15).sum(), a)[0]
    assert torch.allclose(grad(-losses.generalized_iou(a[:30], b).sum(), a)[0], theirs, atol=1e-9)
    tiny, point = torch.tensor([0.9, 0.1, 1e-4, 1e-4]), torch.tensor([0.5, 0.5, 0, 0], requires_grad=True)
    assert losses.generalized_iou(tiny, tiny) == 1
    for other in (tiny, point.detach(), torch.tensor([0.7, 0.5, 0, 0])):
        value = losses.generalized_iou(point, other)
        assert -1 <= value <= 1 and grad(value, point)[0].isfinite().all()


@both_heads
def test_normalisers_make_the_mean_over_ranks_the_joint_loss(options):  # O-34; ranks or micro-batches of 2 images
    case = random_case(16, (4, 1, 0, 2, 0, 0), N=6)
    case.logits.requires_grad_(), case.boxes.requires_grad_()

    def total(images, num_boxes):
        part = case.images(images)
        terms = terms_of(part, solve(part, options), num_boxes, options)
        return losses.weighted_sum(terms, losses.PRETEXT_WEIGHTS)

    joint, share = total([0, 1, 2, 3, 4, 5], 7), torch.tensor(7 / 3, dtype=torch.float64)  # a number or a tensor
    chunks = sum(total([i, i + 1], share) for i in (0, 2, 4)) / 3
    assert chunks.item() == pytest.approx(joint.item(), rel=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(grad(joint, case[:2]), grad(chunks, case[:2]), strict=True))
    assert total([0, 1, 3, 0, 1, 3], 14).item() == pytest.approx(total([0, 1, 3], 7).item(), rel=1e-12)


def test_detection_losses_gradient_reaches_matched_boxes_and_all_classes():
    case = random_case(17, (3, 1), T=4, N=6)
    case.targets[~case.valid] = math.nan  # padding must not leak, not even as 0 * NaN
    case.logits.requires_grad_(), case.boxes.requires_grad_()
    match = solve(case)
    terms = terms_of(case, match, 4)
    answering = losses.query_classes(match, torch.ones_like(case.labels), 6, nothing=0) == 1
    assert torch.equal(grad(terms["l1"].sum() + terms["giou"].sum(), case.boxes)[0].abs().sum(-1) > 0, answering)
    assert (grad(terms["class"].sum(), case.logits)[0].abs().sum(-1) > 0).all()


@both_heads
def test_losses_of_half_precision_are_computed_in_float32(options):
    case = random_case(18, (19, 17), N=60)
    half = Case(*[x.bfloat16() for x in case[:2]], case.labels, case.targets.float(), case.valid)
    whole = Case(*[x.float() for x in half[:2]], *half[2:])
    match = solve(half, options)
    assert equal(match, solve(whole, options))
    terms, expected = (terms_of(x, match, 5, options) for x in (half, whole))
    assert all(terms[name].dtype == torch.float32 and torch.equal(terms[name], expected[name]) for name in terms)
    assert losses.global_loss(*torch.randn(4, 2, 9).bfloat16()).dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(seeds, few_counts, st.floats(1e-3, 1e3))
def test_region_loss_equals_reference_at_any_scale(seed, counts, scale):  # O-35
    case, num_boxes = random_case(seed, counts, T=max(counts) + 1, N=5), max(sum(counts), 1)
    match, g = solve(case), torch.Generator().manual_seed(seed)
    p_hat = torch.randn(2, len(counts), 5, 6, generator=g, dtype=torch.float64)  # of all queries
    p = torch.randn(len(counts), max(counts) + 1, 6, generator=g, dtype=torch.float64)
    loss = losses.region_loss(losses.take_matched(p_hat, match), p, match.matched, num_boxes)
    expected = [reference.region_loss(p_hat[x].tolist(), as_dicts(match, x), p.tolist(), num_boxes) for x in range(2)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-10)
    for a, b in ((scale, 1), (1, scale)):
        scaled = losses.region_loss(losses.take_matched(a * p_hat, match), b * p, match.matched, num_boxes)
        assert torch.allclose(scaled, loss, atol=1e-10)


def test_region_and_global_loss_of_identical_orthogonal_opposite_features():  # O-35, O-36
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    for x, expected in ((a, 0), (b, 2), (-a, 4)):
        region = losses.region_loss(x.expand(1, 2, 3, 4), a.expand(2, 3, 4), first_queries(1, 2, 3).matched, 6)
        whole = losses.global_loss(x[None], x[None], a[None], a[None])
        assert [region.item(), whole.item()] == pytest.approx([expected, expected], abs=1e-9)


def test_region_loss_gradient_stops_at_the_target_and_the_unmatched():  # O-35
    p_hat, p = torch.randn(2, 2, 3, 5).requires_grad_(), torch.randn(2, 3, 5).requires_grad_()
    matched = torch.tensor([[True, True, False], [True, False, False]]).expand(2, 2, 3)
    losses.region_loss(p_hat, p, matched, 3).sum().backward()
    assert p.grad is None and torch.equal(p_hat.grad.abs().sum(-1) > 0, matched)
    zero = torch.zeros(2, 2, 3, 5, requires_grad=True)
    assert grad(losses.region_loss(zero, p, matched, 3).sum(), zero)[0].isfinite().all()


def test_global_loss_equals_reference_and_has_the_gradient_of_the_papers_negative_cosines():  # O-36, Eq. (11)
    pred1, pred2, proj1, proj2 = features = [x.requires_grad_() for x in torch.randn(4, 3, 8).double().unbind()]
    loss = losses.global_loss(*features)
    assert loss.item() == pytest.approx(reference.global_loss(*[x.tolist() for x in features]), abs=1e-12)
    found = grad(loss, features, allow_unused=True)
    assert found[2] is found[3] is None
    paper = -torch.cosine_similarity(pred1, proj2).mean() - torch.cosine_similarity(pred2, proj1).mean()
    assert all(torch.allclose(a, b) for a, b in zip(found[:2], grad(paper, features[:2]), strict=True))


def siamese(case, q_hat, p=None, context=(None, None), f_sem=lambda q_hat: q_hat, how="hungarian", **more):
    kind = {
        "softmax": True,
        "cost_class": 1.0,
        "cosine": True,
        "asks": True,
        "consistency": None,
        "first": 1,
        "other": 1,
    }
    return losses.pretext_losses(SimpleNamespace(f_sem=f_sem, **kind | more), *case.pretext(q_hat, p, *context), how)


def zero_head_terms(N=100, L=6, B=2, R=10, region=True, whole=True):
    """Zero class and box heads, every target the whole view, orthogonal features (O-31)."""
    logits, boxes = torch.zeros(L, 2 * B, N, 3).double(), torch.full((L, 2 * B, N, 4), 0.5).double()
    targets = torch.tensor([0.5, 0.5, 1, 1]).double().expand(2 * B, R, 4)
    a, b = torch.eye(12).double()[:2]
    context = (a.expand(2 * B, 12), b.expand(2 * B, 12)) if whole else (None, None)
    case = Case(logits, boxes, None, targets, torch.ones(2 * B, R).bool())
    return siamese(case, a.expand(L, 2 * B, N, 12), b.expand(2 * B, R, 12) if region else None, context)[0]


@pytest.mark.parametrize("w_f, w_g, total", [(3, 10, 101.5917), (5, 10, 125.5917), (3, 0.3, 82.1917)])
def test_total_of_zero_heads_oracle(w_f, w_g, total):  # O-31: vanilla, conditional ImageNet; conditional COCO
    terms = zero_head_terms()
    for name, value in {"class": math.log(3), "l1": 1.0, "giou": 0.75, "region": 2.0, "global": 2.0}.items():
        assert torch.allclose(terms[name], torch.tensor(value).double(), atol=1e-9), name
    found = losses.weighted_sum(terms, {**losses.PRETEXT_WEIGHTS, "region": w_f, "global": w_g})
    assert found.item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("region, whole, count", [(1, 1, 25), (0, 1, 19), (0, 0, 18), (1, 0, 24)])
def test_number_of_weighted_terms(region, whole, count):  # O-40
    terms, weights = zero_head_terms(region=region, whole=whole), {**losses.PRETEXT_WEIGHTS, "region": 3, "global": 10}
    assert sum(term.numel() for term in terms.values()) == count
    hand = sum(weights[name] * value for name, term in terms.items() for value in term.flatten().tolist())
    assert losses.weighted_sum(terms, {name: weights[name] for name in terms}).item() == pytest.approx(hand, rel=1e-12)


@pytest.mark.parametrize("terms, weights, named", [("ab", "abc", "'c'"), ("abc", "ab", "'c'"), ("a", "b", "'a'.*'b'")])
def test_weighted_sum_names_what_lacks_its_partner(terms, weights, named):
    with pytest.raises(ValueError, match=named):
        losses.weighted_sum({name: torch.ones(2) for name in terms}, dict.fromkeys(weights, 1.0))


def test_pretext_losses_are_the_mean_of_both_directions():  # O-38, O-24
    case = random_case(19, (3, 3, 3, 3), N=6)  # view 1 of two photographs, then view 2
    q_hat, p, context = torch.randn(2, 4, 6, 7), torch.randn(4, 3, 7), torch.randn(2, 4, 7)

    def terms(images, p=p):
        return siamese(case.images(images), q_hat[:, images], p[images], context[:, images])[0]

    both, one, two, swapped = (terms(images) for images in ([0, 1, 2, 3], [0, 1], [2, 3], [2, 3, 0, 1]))
    assert all(torch.allclose(both[name], swapped[name]) for name in both)
    assert all(torch.allclose(both[name], (one[name] + two[name]) / 2) for name in ("class", "l1", "giou", "region"))
    assert torch.equal(both["global"], losses.global_loss(*context.unflatten(1, (2, 2)).flatten(0, 1)))
    changed = p.clone()
    changed[0, 1] += 1  # a crop of the other view, the target of one direction only
    assert [name for name, term in terms([0, 1], changed).items() if not torch.equal(term, one[name])] == ["region"]
    assert all(torch.equal(term, two[name]) for name, term in terms([2, 3], changed).items())


def test_pretext_losses_match_by_the_chosen_rule_and_report_the_own_share():
    case, f_sem = random_case(21, (3, 3, 3, 3), N=6, K=3), torch.nn.Linear(7, 5)
    case.labels[:] = 1
    half = Case(*[x.float().bfloat16() for x in case[:2]], *case[2:])
    q_hat, p = torch.randn(2, 4, 6, 7).bfloat16(), torch.randn(4, 3, 5).bfloat16()
    for how, rule in (("hungarian", losses.match), ("group", losses.match_groups)):
        terms, share = siamese(half, q_hat, p, f_sem=f_sem, how=how)
        match = rule(*half, **SOFTMAX)
        assert torch.equal(terms["l1"], terms_of(half, match, 12)["l1"])
        assert torch.equal(terms["region"], siamese(half, q_hat.float(), p.float(), f_sem=f_sem, how=how)[0]["region"])
        assert share == (match.query[-1] // 2 == torch.arange(3)).float().mean() and (share == 1 or how == "hungarian")
    with pytest.raises(ValueError, match="greedy"):
        siamese(half, q_hat, p, how="greedy")


@settings(max_examples=25, deadline=None)
@given(seed=seeds, counts=few_counts)
def test_denoising_losses_equal_reference(seed, counts):
    T, num = max(counts) + 2, max(sum(counts), 1)
    case = random_case(seed, counts, T=T, N=T)
    terms = losses.denoising_losses(*case, num)
    for layer in range(2):
        found = [terms[name][layer].item() for name in ("dn_class", "dn_l1", "dn_giou")]
        assert found == pytest.approx(reference.denoising_losses(*case.lists(layer), num), abs=1e-10)


def test_denoising_losses_train_only_queries_with_a_target():
    case = random_case(20, (2, 0), T=3, N=3)
    case.logits.requires_grad_(), case.boxes.requires_grad_()
    terms = losses.denoising_losses(*case, 2)
    for gradient in grad(sum(term.sum() for term in terms.values()), case[:2]):
        assert torch.equal(gradient.abs().sum(-1) > 0, case.valid.expand(2, 2, 3))
    nothing = losses.denoising_losses(*case[:4], torch.zeros_like(case.valid), 1)
    assert all(term.tolist() == [0, 0] for term in nothing.values())
