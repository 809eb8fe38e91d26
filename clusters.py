"""Pseudo-classes of proposals: which boxes of a data set look alike (`proposals.py --cluster K`).

Pretraining then classifies regions, not only finds them (`pretrain.py --pseudo-classes FILE`). The idea is AlignDet's
(ICCV 2023): k-means on pooled features of a frozen backbone, after a PCA. Layer, sizes and unit length are ours.
Read `cluster` first. Boxes are (x0, y0, x1, y1) in pixels of the photograph.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torchvision.ops import roi_align
from tqdm import tqdm

from convert import load_backbone
from data import load_image, normalise, resize_size, to_tensor
from model import build_detector

STRIDE, SHORT, LONGEST = 16, 256, 600  # ours: boxes of one photograph look alike on the stride-32 map
SAMPLE = 2000  # ours: photographs from which directions and centres are learned
DIMS = 64  # ours: principal directions that are kept (AlignDet: 256)
PER_IMAGE = 30  # ours: the best boxes of a draw that get a class, as many as DETReg reads


def cluster(cache, source, out, K, backbone="resnet50", weights="auto", seed=0):
    """Write to `out` the class (int16, -1 beyond the best 30 of a draw) of every box of a proposals cache.

    source: the photographs of the cache. Centres are learned on at most 2000 of them, drawn by `seed`; every box then
    takes the nearest. Returns how many boxes each class has, (K,). Raises ValueError when there are fewer boxes than K.
    """
    if not 2 <= K <= 32767:
        raise ValueError(f"--cluster {K}: want 2 to 32767 clusters")
    images = cache.image_list(source)
    detector = build_detector("conditional", backbone=backbone, hidden_dim=32, enc_layers=1, dec_layers=1)
    print("\n".join(load_backbone(detector, weights)))
    detector.fold_backbone()

    def features(index, draw):
        return box_features(detector, images.root / images.paths[index], cache.boxes(index, draw)[:PER_IMAGE])

    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(seed))[:SAMPLE].tolist()
    x = torch.cat([features(i, 0) for i in tqdm(order, "learn", unit="image")])
    if len(x) < K:
        raise ValueError(f"--cluster {K}: the sample has {len(x)} boxes only; ask for fewer clusters")
    mean = x.mean(0)
    torch.manual_seed(seed)  # of pca_lowrank's random start
    directions = torch.pca_lowrank(x - mean, min(DIMS, *x.shape), center=False)[2]
    centres = kmeans2(project(x, mean, directions).numpy(), K, minit="++", seed=seed, missing="warn")[0]
    centres = torch.from_numpy(centres).float()
    classes = np.full(cache.meta["boxes"], -1, np.int16)
    for index in tqdm(range(len(cache)), "label", unit="image"):
        for draw in range(cache.draws):
            rows = cache.rows(index, draw)
            nearest = torch.cdist(project(features(index, draw), mean, directions), centres).argmin(1)
            classes[rows.start : rows.start + len(nearest)] = nearest.numpy()
    np.save(out, classes)
    return np.bincount(classes[classes >= 0], minlength=K)


def project(x, mean, directions):
    """Features (n, D) in the principal directions, at unit length."""
    return F.normalize((x - mean) @ directions, dim=1)


@torch.no_grad()
def box_features(detector, path, boxes_xyxy):
    """(k, D) features of boxes: RoIAlign of the stride-16 map, averaged."""
    image = load_image(path)
    w, h = resize_size(*image.size, SHORT, LONGEST)
    x = normalise(to_tensor(image.resize((w, h))))[None]
    boxes = torch.from_numpy(boxes_xyxy) * torch.tensor([w / image.width, h / image.height] * 2)
    return roi_align(detector.features(x, {STRIDE})[STRIDE], [boxes], 7, 1 / STRIDE).mean((2, 3))
