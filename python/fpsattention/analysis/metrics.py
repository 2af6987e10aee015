"""How far a result is from its reference: tensors (attention outputs, latents) and videos (decoded frames).

Tensor metrics are the field's three (relative L1, cosine, RMSE) plus the largest difference and the signal-to-noise
ratio, accumulated in FP64. Video metrics are PSNR and SSIM per frame, averaged over frames (the convention of
Sparse-VideoGen and FastVideo), always against the dense run of the same seed. Quality against a dense run is not
absolute quality: a control (the dense run repeated) must score "identical" first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .optional import require

if TYPE_CHECKING:
    import numpy as np
    import torch

_CHUNK = 1 << 24  # elements converted to FP64 at a time: 128 MiB per operand
_PSNR_OF_IDENTICAL_FRAME = 100.0  # dB, stands for infinity where some frames of a video are identical and others not
_SSIM_WINDOW = 7  # pixels, scikit-image's default


class ErrorSum:
    """Sums from which every tensor metric follows; add any number of (result, reference) pieces of one comparison."""

    def __init__(self) -> None:
        self.count = 0
        self.abs_diff = self.abs_ref = self.square_diff = self.square_ref = self.square_out = self.dot = 0.0
        self.max_abs = 0.0

    def add(self, out: torch.Tensor, ref: torch.Tensor) -> None:
        """Add a piece. Shapes must agree; any real dtype, any device."""
        import torch

        if out.shape != ref.shape:
            raise ConfigError(
                f"fpsattention.compare: out has shape {tuple(out.shape)} but ref has {tuple(ref.shape)}: compare equals"
            )
        out_flat, ref_flat = out.detach().reshape(-1), ref.detach().reshape(-1)
        for start in range(0, out_flat.numel(), _CHUNK):
            x = out_flat[start : start + _CHUNK].to(torch.float64)
            y = ref_flat[start : start + _CHUNK].to(device=x.device, dtype=torch.float64)
            diff = (x - y).abs()
            self.count += x.numel()
            self.abs_diff += float(diff.sum())
            self.abs_ref += float(y.abs().sum())
            self.square_diff += float((diff * diff).sum())
            self.square_ref += float((y * y).sum())
            self.square_out += float((x * x).sum())
            self.dot += float((x * y).sum())
            largest = float(diff.max())  # a NaN must not be lost in Python's max()
            self.max_abs = largest if math.isnan(largest) else max(self.max_abs, largest)

    def result(self) -> dict[str, Any]:
        """`rel_l1` sum|x-y|/sum|y|, `cosine`, `rmse`, `max_abs`, `snr_db`, `identical`, `finite`, `count`."""
        if self.count == 0:
            raise ConfigError("fpsattention.compare: out has no elements, expected at least one")
        identical = self.abs_diff == 0.0
        norm = math.sqrt(self.square_ref * self.square_out)
        noise = _ratio(self.square_diff, self.square_ref)
        return {
            "rel_l1": _ratio(self.abs_diff, self.abs_ref),
            "cosine": 1.0 if identical else (self.dot / norm if norm else 0.0),
            "rmse": math.sqrt(self.square_diff / self.count) if not math.isnan(self.square_diff) else math.nan,
            "max_abs": self.max_abs,
            "snr_db": math.inf if noise == 0.0 else -math.inf if math.isinf(noise) else -10.0 * math.log10(noise),
            "identical": identical,
            "finite": math.isfinite(self.abs_diff),
            "count": self.count,
        }


def _ratio(numerator: float, denominator: float) -> float:
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else math.nan if math.isnan(numerator) else math.inf
    return numerator / denominator


def compare(out: torch.Tensor, ref: torch.Tensor) -> dict[str, Any]:
    """Metrics of `out` against `ref` (same shape); keys as in `ErrorSum.result`."""
    sums = ErrorSum()
    sums.add(out, ref)
    return sums.result()


def compare_videos(out: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """PSNR and SSIM of a video against another.

    Args:
        out, ref: frames [F, H, W, 3], uint8, or floating point in [0, 1]; H, W >= 7 (SSIM's window).

    Returns:
        `psnr_db`, `ssim`: means over frames (an identical frame counts 100 dB unless all are: then infinity);
        `psnr_db_per_frame`, `ssim_per_frame`; `identical`.
    """
    import numpy as np

    skimage_metrics = require("skimage.metrics", "compare_videos")
    out, ref = np.asarray(out), np.asarray(ref)
    if out.shape != ref.shape or out.dtype != ref.dtype:
        raise ConfigError(
            f"fpsattention.compare_videos: out is {out.dtype} {out.shape} but ref is {ref.dtype} {ref.shape}: "
            "same frames, size and type expected"
        )
    if out.ndim != 4 or out.shape[-1] != 3 or out.shape[0] == 0 or min(out.shape[1:3]) < _SSIM_WINDOW:
        raise ConfigError(
            f"fpsattention.compare_videos: frames have shape {out.shape}, expected [frames, height, width, 3] with height "
            f"and width >= {_SSIM_WINDOW}"
        )
    data_range = 255.0 if out.dtype == np.uint8 else 1.0
    psnr, ssim = [], []
    for x, y in zip(out, ref, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        mean_square = float(np.mean((x - y) ** 2))
        psnr.append(math.inf if mean_square == 0.0 else 10.0 * math.log10(data_range**2 / mean_square))
        ssim.append(
            float(
                skimage_metrics.structural_similarity(
                    x, y, win_size=_SSIM_WINDOW, channel_axis=-1, data_range=data_range
                )
            )
        )
    identical = all(math.isinf(value) for value in psnr)
    capped = [min(value, _PSNR_OF_IDENTICAL_FRAME) for value in psnr]
    return {
        "psnr_db": math.inf if identical else sum(capped) / len(capped),
        "ssim": sum(ssim) / len(ssim),
        "psnr_db_per_frame": psnr,
        "ssim_per_frame": ssim,
        "identical": identical,
    }


def jsonable(value: Any) -> Any:
    """`value` with everything JSON lacks replaced: NaN and infinities become null, tuples lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # torch and numpy
        return jsonable(value.tolist())
    return str(value)
