"""How much two small pictures differ once the frame of one is fitted to the other.

A copy that was cropped a little lies elsewhere in its frame. So the frame of one picture, its scale
and shift in both directions, is fitted to the other by damped Gauss-Newton steps on grey values,
first on blurred pictures (the registration of Lucas and Kanade, 1981), and only then are pixels
compared. What tells a copy from a look-alike is the *largest* difference of any small region:
recompressing changes everything a little, another hand of a clock changes one place a lot.
"""

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 0.08
"""How much of each border is left out, as a share of the side: there a crop has no match."""

_BLURS = (5, 3)  # widths in pixels, coarse to fine
_GREY_BLUR, _COLOUR_BLUR, _COLOUR_WEIGHT = 5, 9, 1.5
_STEPS = 5
_LARGEST_STEP, _WIDEST = 0.1, 0.25  # of half the side
_BLOCK = 4
_DAMPING = 1e-3
_FLATTEST = 0.02


def differences(first: Tensor, second: Tensor) -> Tensor:
    """The largest local difference of each pair after fitting, relative to the contrast.

    Args:
        first: [P, 3, S, S] float in [0, 1].
        second: [P, 3, S, S].

    Returns:
        [P] float32 >= 0; 0 for equal pictures, about 1 for unrelated ones: the mean difference
        over the worst block of 4 x 4 pixels, divided by the mean standard deviation of the two
        pictures' pixels (at least 0.02 of the range, so that empty pictures are equal).

    Raises:
        ValueError: for shapes that differ.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"Expected two batches [P, 3, S, S], but got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    moved = _sample(second, _fit(first, second))
    blocks = functional.avg_pool2d(_gap(moved - first), _BLOCK, stride=1)
    cut = max(1, round(MARGIN * first.shape[-1]))
    worst = blocks[:, :, cut:-cut, cut:-cut].amax(dim=(1, 2, 3))  # [P]
    contrast = (_contrast(first) + _contrast(second)) / 2
    return worst / contrast.clamp_min(_FLATTEST)


def _gap(difference: Tensor) -> Tensor:
    """[P, 1, S, S] how much pixels differ, slightly blurred; in colour more, as JPEG stores it."""
    grey = difference.mean(1, keepdim=True)
    colour = _blur(difference - grey, _COLOUR_BLUR).abs().mean(1, keepdim=True)
    return torch.maximum(_blur(grey, _GREY_BLUR).abs(), _COLOUR_WEIGHT * colour)


def _contrast(pictures: Tensor) -> Tensor:
    return pictures.flatten(2).std(dim=2).mean(dim=1)


def _blur(pictures: Tensor, width: int) -> Tensor:
    edge = width // 2
    padded = functional.pad(pictures, (edge, edge, edge, edge), mode="replicate")
    return functional.avg_pool2d(padded, width, stride=1)


def _fit(first: Tensor, second: Tensor) -> Tensor:
    """[P, 4] scale minus 1 in x and y, shift in x and y, that take `second` to `first`."""
    grey = first.mean(1, keepdim=True), second.mean(1, keepdim=True)
    frames = first.new_zeros(len(first), 4)
    for width in _BLURS:
        frames = _descend(_blur(grey[0], width), _blur(grey[1], width), frames)
    return frames


def _descend(first: Tensor, second: Tensor, frames: Tensor) -> Tensor:
    """The best frames seen in some steps from those given."""
    line = torch.linspace(-1, 1, first.shape[-1])
    y, x = torch.meshgrid(line, line, indexing="ij")
    inner = ((x.abs() <= 1 - 2 * MARGIN) & (y.abs() <= 1 - 2 * MARGIN)).float()
    best, least = frames, first.new_full((len(first),), torch.inf)
    for step in range(_STEPS + 1):
        moved = _sample(second, frames)
        error = (moved - first) * inner  # [P, 1, S, S]
        loss = error.square().sum(dim=(1, 2, 3))
        better = loss < least
        best, least = torch.where(better[:, None], frames, best), torch.where(better, loss, least)
        if step < _STEPS:
            change = _newton(moved, error, inner, x, y)
            frames = (frames - change).clamp(-_WIDEST, _WIDEST)
    return best


def _newton(moved: Tensor, error: Tensor, inner: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[P, 4] one damped Gauss-Newton step."""
    spacing = 2 / (moved.shape[-1] - 1)
    slope_y, slope_x = torch.gradient(moved, spacing=spacing, dim=(2, 3))
    columns = [slope_x * x, slope_y * y, slope_x, slope_y]
    jacobian = torch.stack([(column * inner).flatten(1) for column in columns], dim=2)
    normal = jacobian.mT @ jacobian  # [P, 4, 4]
    trace = normal.diagonal(dim1=1, dim2=2).mean(1)
    damping = (_DAMPING * trace + 1e-6)[:, None, None] * torch.eye(4)
    right = jacobian.mT @ error.flatten(1)[:, :, None]
    return torch.linalg.solve(normal + damping, right)[:, :, 0].clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _sample(pictures: Tensor, frames: Tensor) -> Tensor:
    zero = torch.zeros(len(frames))
    top = torch.stack([1 + frames[:, 0], zero, frames[:, 2]], dim=1)
    bottom = torch.stack([zero, 1 + frames[:, 1], frames[:, 3]], dim=1)
    grid = functional.affine_grid(
        torch.stack([top, bottom], dim=1), list(pictures.shape), align_corners=True
    )
    return functional.grid_sample(pictures, grid, padding_mode="border", align_corners=True)
