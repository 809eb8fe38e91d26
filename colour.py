"""Colour changes of views and crops, SimSiam's: drawn once, applied to an image by OpenCV or to a batch on its device.

Images are RGB, 0 to 255. Both ways follow torchvision on PIL images, which truncates after every step.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)  # grey = LUMA . rgb, as in PIL
REACH = 6  # pixels that a blur reads on either side, 3 times the widest sigma


def draw_colour(g, count):
    """Draw `count` colour changes as SimSiam does (Sec. 3.2: "pipeline in [8]"): (count, 11), a row per image.

    Columns: jitter or not, brightness, contrast, saturation, hue, the order of these four (4), grey or not, blur sigma.
    """
    u = torch.rand(count, 12, generator=g, dtype=torch.float64)
    jitter, gray = u[:, :1] < 0.8, u[:, 9:10] < 0.2
    factors, hue = 0.6 + 0.8 * u[:, 1:4], 0.2 * u[:, 4:5] - 0.1  # of brightness, contrast, saturation; of the circle
    order = u[:, 5:9].argsort(dim=1)  # in which these four act
    sigma = torch.where(u[:, 10:11] < 0.5, 0.1 + 1.9 * u[:, 11:12], 0.0)  # in pixels, 0 = no blur
    return torch.cat([jitter, factors, hue, order, gray, sigma], dim=1)


def change_colour(image, colour):
    """Apply a row of `draw_colour` to (h, w, 3) uint8, by OpenCV: 0.6 grey levels from PIL (blur, hue rounding)."""
    jitter, brightness, contrast, saturation, hue, *order, gray, sigma = colour
    for step in order if jitter else ():
        factor = (brightness, contrast, saturation, hue)[int(step)]
        if step == 3:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(int(factor * 255) % 256)  # wraps: the hue is a circle of 256 steps
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
            continue
        affine = factor * np.eye(3, 4)  # factor * image + (1 - factor) * (black | its mean grey | its grey)
        affine[:, 3] = -0.5  # OpenCV rounds, PIL truncates
        if step == 1:
            affine[:, 3] += (1 - factor) * np.dot(LUMA, cv2.mean(image)[:3])
        elif step == 2:
            affine[:, :3] += (1 - factor) * np.array(LUMA)
        image = cv2.transform(image, affine)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if gray else image
    image = cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) if sigma else image
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if gray else image


@torch.no_grad()
def change_colours(x, colours, mask=None):
    """Apply `colours` (..., 11) to x (..., 3, H0, W0) uint8, each image by its own row, as `change_colour` does.

    mask: (..., H0, W0), True = padding, at the bottom and right; it stays 0 and nothing is computed from it. No loop
    over images and no wait for the device: hue changes once in an image, after some of the three affine steps.
    """
    shape, x, colours = x.shape, x.flatten(0, -4).float(), colours.flatten(0, -2).to(x.device, torch.float32)
    inside = x.new_ones(len(x), 1, *shape[-2:]) if mask is None else (~mask.flatten(0, -3)).unsqueeze(1).float()
    jitter, *factors, hue, first, second, third, fourth, gray, sigma = colours.view(-1, 11, 1, 1, 1).unbind(1)
    order = torch.stack([first, second, third, fourth])
    hue_at = order.eq(3).float().argmax(0)
    for k in range(3):
        x = affine_step(x, order[k], factors, jitter * (k < hue_at), inside)
    x = torch.where(jitter > 0, turn_hue(x, (hue * 255).trunc() / 255), x)
    for k in range(1, 4):
        x = affine_step(x, order[k], factors, jitter * (k > hue_at), inside)
    x = torch.where(gray > 0, luma(x).round(), x)
    x = torch.where(sigma > 0, blur(x, sigma.clamp(min=1e-2), inside), x)
    return (x * inside).round_().to(torch.uint8).view(shape)


def luma(x):
    r, g, b = x.split(1, 1)
    return r + LUMA[1] * (g - r) + LUMA[2] * (b - r)  # LUMA adds up to 1; so grey stays what it is, to the last bit


def affine_step(x, step, factors, on, inside):
    """f x + (1 - f) (black | mean grey | grey) where `on`; step, factors and on are (B, 1, 1, 1), a row per image."""
    factor = sum((step == i) * factor for i, factor in enumerate(factors))
    grey = luma(x)
    mean = (grey * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True)
    other = (step == 1) * mean + (step == 2) * grey
    return torch.where(on > 0, (other + factor * (x - other)).clamp(0, 255).floor(), x)  # exact where x == other


def turn_hue(x, turn):
    """Turn the hue by a share of the circle; value and chroma stay."""
    r, g, b = x.split(1, 1)
    top, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    sextant = torch.where(top == r, g - b, torch.where(top == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sextant = sextant / chroma.clamp(min=1) + 6 * turn  # red 0, green 2, blue 4
    k = (torch.arange(5, 0, -2, device=x.device).view(3, 1, 1) + sextant) % 6
    return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x, sigma, inside):
    """Gaussian blur of each image by its sigma (B, 1, 1, 1); beyond its last row and column these are repeated."""
    B, channels = x.shape[:2]
    reach = torch.arange(-REACH, REACH + 1, device=x.device)
    kernel = (
        (-0.5 * (reach / sigma.view(B, 1, 1, 1)) ** 2).softmax(-1).repeat_interleave(channels, 0)
    )  # (B*3, 1, 1, 13)
    for _ in range(2):  # along columns, then along rows
        x, inside = x.mT, inside.mT
        last = inside.amax(2, keepdim=True).sum(3, keepdim=True).long() - 1  # (B, 1, 1, 1)
        at = torch.arange(-REACH, x.shape[3] + REACH, device=x.device).clamp(min=0).minimum(last)
        x = F.conv2d(torch.take_along_dim(x, at, 3).flatten(0, 1)[None], kernel, groups=B * channels)[0].unflatten(
            0, (B, channels)
        )
    return x
