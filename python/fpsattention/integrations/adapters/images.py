"""Large images, worth it from about 2048 x 2048 pixels: text, then the image, a grid of one frame (several images of one size: as many)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .adapter import (
    Adapter,
    Arguments,
    Geometry,
    Grid,
    Preparation,
    each_twice,
    own_sigma,
    read_once,
    submodules,
    thousandths,
)


def _one_size(images: list[Grid]) -> Grid:
    """Images of one size, one after the other, as frames."""
    if not images or any(image[1:] != images[0][1:] for image in images):
        raise UnsupportedError(f"fpsattention.apply: images of sizes {images} in one sequence, expected one size")
    return (sum(image[0] for image in images), *images[0][1:])


def _images(ids: Tensor) -> list[Grid]:
    """The images that ids tell of, in order; UnsupportedError where they are no rasters."""
    heads: dict[float, list[list[float]]] = {}
    for row in ids.reshape(-1, ids.shape[-1])[: ids.shape[-2]].tolist():
        heads.setdefault(row[0], []).append(row[1:3])
    images: list[Grid] = []
    for tokens in heads.values():
        h, w = (int(max(token[axis] for token in tokens)) + 1 for axis in (0, 1))
        if tokens != [[i, j] for i in range(h) for j in range(w)]:
            raise UnsupportedError(
                "fpsattention.apply: img_ids are not the rows and columns of images in raster order, expected that"
            )
        images.append((1, h, w))
    return images


def image_ids(model: Any, arguments: Arguments) -> Geometry:
    """Rows of ``img_ids`` are (image, row, column, ...) of each token; a tensor of them is read once. Images after the first are references."""
    grid = _one_size(read_once(arguments["img_ids"], _images))
    text_len = arguments["encoder_hidden_states"].shape[1]
    exact = tuple(range(1, grid[0]))
    return Geometry(grid, arguments["hidden_states"], arguments["timestep"], text_len, "prefix", exact=exact)


def image_and_reference_ids(model: Any, arguments: Arguments) -> Geometry:
    """Text, the image, then references with ids of their own: in one order with the image, as if they were its."""
    ids, references = arguments["img_ids"], arguments.get("image_cond_ids")
    images = read_once(ids, _images) + ([] if references is None else read_once(references, _images))
    grid, text_len = _one_size(images), arguments["encoder_hidden_states"].shape[1]
    exact = tuple(range(len(read_once(ids, _images)), grid[0]))
    return Geometry(grid, arguments["hidden_states"], arguments["timestep"], text_len, "prefix", exact=exact)


def image_shapes(model: Any, arguments: Arguments) -> Geometry:
    """``img_shapes`` has (frames, rows, columns) of the images, per sample in a list; text may be padded."""
    samples = [sample if isinstance(sample, list) else [sample] for sample in arguments["img_shapes"]]
    grid = _one_size([tuple(image) for image in samples[0]])  # type: ignore[misc]
    if any(sample != samples[0] for sample in samples):
        raise UnsupportedError(f"fpsattention.apply: samples of sizes {samples} in one batch, expected one size")
    return Geometry(
        grid,
        arguments["hidden_states"],
        arguments["timestep"],
        arguments["encoder_hidden_states"].shape[1],
        "prefix",
        tuple(range(samples[0][0][0], grid[0])),  # type: ignore[index]
    )


def text_then_image(tables: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """Complex ``(n, D/2)``: of the image, then of the text, which comes first in the sequence."""
    cos, sin = (torch.cat([part(x) for x in reversed(tables)])[None, None] for part in (torch.real, torch.imag))
    return cos, sin


PREPARE = Preparation("rms", "image_rotary_emb", each_twice, twice=True, text_rotated=True)

FLUX = Adapter(
    "Flux.1", ("FluxTransformer2DModel",), submodules(transformer_blocks="attn", single_transformer_blocks="attn"),
    image_ids, own_sigma, scheduled=thousandths, kind="image", note="IP-Adapter: refused", prepare=PREPARE,
)  # fmt: skip
FLUX2 = Adapter(
    "Flux.2", ("Flux2Transformer2DModel",), submodules(transformer_blocks="attn", single_transformer_blocks="attn"),
    image_ids, own_sigma, scheduled=thousandths, kind="image", prepare=PREPARE,
    note="reference images: of the size of the image only, dense in both directions",
)  # fmt: skip
FLUX3 = Adapter(
    "Flux.3", ("Flux3Transformer2DModel",), submodules(single_transformer_blocks="attn"), image_and_reference_ids, own_sigma,
    scheduled=thousandths, kind="image",
    note="joint blocks; blocks of the image alone stay dense; reference images: of the size of the image only, dense in both directions",
)  # fmt: skip
QWEN = Adapter(
    "Qwen-Image", ("QwenImageTransformer2DModel",), submodules(transformer_blocks="attn"), image_shapes, own_sigma, scheduled=thousandths, kind="image",
    text_mask=True,
    note="input images: of the size of the image only, dense in both directions; prepare: without padded text",
    prepare=Preparation("rms", "image_rotary_emb", text_then_image, text_rotated=True),
)  # fmt: skip

ADAPTERS = (FLUX, FLUX2, FLUX3, QWEN)
