"""The example that makes latents of clips: on made-up clips, which PCA can keep whole."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import real_video

from fpsattention.training import LatentFolder


def test_latents_of_clips(tmp_path):
    """Clips that are few patterns over and over: 16 components keep all of them, latents have unit variance, held-out crops are later frames."""
    generator = np.random.default_rng(0)
    basis = generator.normal(size=(6, real_video.FRAMES, real_video.SIZE, real_video.SIZE, 3)).astype(np.float32)
    clips = []
    for _ in range(2):
        weights = generator.normal(size=(16, 5, 7, 6)).astype(np.float32)  # t, h, w of patches
        x = np.einsum("thwk,kabcd->tahbwcd", weights, basis)
        clips.append(x.reshape(16 * real_video.FRAMES, 5 * real_video.SIZE, 7 * real_video.SIZE, 3))
    grid = real_video.patches(clips[0])
    assert grid.shape == (16, 5, 7, real_video.FRAMES * real_video.SIZE**2 * 3)
    assert np.array_equal(grid[1, 2, 3].view(4, 8, 8, 3).numpy(), clips[0][4:8, 16:24, 24:32])
    kept = real_video.write_latents(clips, tmp_path, (16, 2, 4, 5), 10, (3, 8), seed=0)
    assert kept > 0.999
    data = LatentFolder(tmp_path)
    assert len(data) == 10 and data.latent_shape == (16, 2, 4, 5) and data.text_shape == (3, 8)
    values = torch.stack([data[i]["latents"][:6] for i in range(10)])
    assert abs(values.mean()) < 0.2 and abs(values.std() - 1) < 0.15
    # A held-out sample lies in the last eighth of its clip's frames, and nowhere else.
    mean, directions, deviations = real_video.principal(
        torch.cat([real_video.patches(c)[:14].flatten(0, 2) for c in clips])
    )
    last = ((real_video.patches(clips[1]) - mean) @ directions / deviations)[14:, :, :, 0]
    crop = data[9]["latents"][0]
    found = [
        (h, w) for h in range(2) for w in range(3) if torch.allclose(last[:, h : h + 4, w : w + 5], crop, atol=1e-3)
    ]
    assert len(found) == 1
