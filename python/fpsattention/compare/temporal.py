"""Quality of a video over time, from its pixels alone: no network, no weights. Values of two runs of one seed are to be compared.

The names are VBench's, the networks are not: flicker is VBench's own formula; motion smoothness and subject consistency there use an
interpolation network and DINO features. These stand in for them and are not comparable with VBench's numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_CELLS = 8  # rows and columns of cells in the frame features
_BINS = 8  # directions of gradients in a cell
_BACKBONES = (
    ("alex", "AlexNet", "alexnet*.pth"),
    ("vgg", "VGG16", "vgg16*.pth"),
    ("squeeze", "SqueezeNet", "squeezenet1_1*.pth"),
)


def temporal_metrics(frames: np.ndarray) -> dict[str, float | None]:
    """Metrics of a video, all in [0, 1], higher is steadier; None where there are too few frames.

    Args:
        frames: uint8 ``[F, H, W, 3]``.

    Returns:
        ``flicker``: 1 - mean |x_t - x_{t-1}| / 255 (VBench's temporal flickering).
        ``smoothness``: 1 - mean |x_t - (x_{t-1} + x_{t+1}) / 2| / 255: how well a frame is foretold by its neighbours.
        ``subject``: mean over t of (cos(f_t, f_0) + cos(f_t, f_{t-1})) / 2 with f the :func:`frame_features` (VBench's subject consistency with other
        features); 1 minus it is the drift.
    """
    import numpy as np

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ConfigError(
            f"fpsattention.compare: frames are {frames.dtype} {frames.shape}, expected uint8 [frames, height, width, 3]"
        )
    x = frames.astype(np.float32)
    result: dict[str, float | None] = {"flicker": None, "smoothness": None, "subject": None}
    if len(x) > 1:
        result["flicker"] = 1.0 - float(np.abs(x[1:] - x[:-1]).mean()) / 255.0
        features = np.stack([frame_features(frame) for frame in frames])
        cosines = [(f @ features[0] + f @ before) / 2 for f, before in zip(features[1:], features, strict=False)]
        result["subject"] = float(np.mean(cosines))
    if len(x) > 2:
        result["smoothness"] = 1.0 - float(np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean()) / 255.0
    return result


def frame_features(frame: np.ndarray) -> np.ndarray:
    """Unit vector of a frame: per cell of an 8 x 8 raster its mean colour and a histogram of gradient directions."""
    import numpy as np

    x = frame.astype(np.float32) / 255.0
    gray = x.mean(-1)
    dy, dx = np.gradient(gray)
    direction = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * _BINS).astype(int) % _BINS
    strength = np.hypot(dx, dy)
    rows, columns = (np.linspace(0, size, _CELLS + 1).astype(int) for size in gray.shape)
    parts = []
    for top, bottom in zip(rows, rows[1:], strict=False):
        for left, right in zip(columns, columns[1:], strict=False):
            cell = np.s_[top:bottom, left:right]
            parts.append(x[cell].mean((0, 1)))
            weights = strength[cell].ravel()
            histogram = np.bincount(direction[cell].ravel(), weights, _BINS)
            parts.append(histogram / (weights.sum() + 1e-8))
    vector = np.concatenate(parts)
    return vector / (np.linalg.norm(vector) + 1e-12)


def lpips_distance() -> tuple[object | None, str]:
    """``(frames, frames) -> mean LPIPS`` if the package lpips and the weights of a backbone are at hand; else None and the reason.

    Nothing is fetched: torchvision's weights of AlexNet (the published metric), else VGG16 or SqueezeNet, must lie in torch's cache.
    """
    from pathlib import Path

    import torch

    try:
        import lpips
    except ImportError:
        return None, "the package lpips is not installed"
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = [(net, name) for net, name, files in _BACKBONES if list(cache.glob(files))]
    if not found:
        return None, f"no weights of {', '.join(name for _, name, _ in _BACKBONES)} in {cache}"
    net, backbone = found[0]
    network = lpips.LPIPS(net=net, verbose=False).eval()

    def distance(out: np.ndarray, ref: np.ndarray) -> float:
        def tensor(frames: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1.0

        with torch.no_grad():
            values = [float(network(tensor(a[None]), tensor(b[None]))) for a, b in zip(out, ref, strict=True)]
        return sum(values) / len(values)

    return distance, backbone
