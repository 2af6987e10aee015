"""The baselines' own packages, called where they are installed and the tensors are on a GPU; elsewhere their numerics are emulated.

A package is given the mask of this comparison, so that methods differ in what they compute, not in the order of tokens. What ran is in
the report. Signatures are those of SageAttention 2.2 (thu-ml/SageAttention), SpargeAttn (thu-ml/SpargeAttn) and fastvideo-kernel
(hao-ai-lab/FastVideo), whose kernels are not part of this library.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout.masks import BlockMask

if TYPE_CHECKING:
    from .methods import Context

STA_GRIDS = ((30, 48, 80), (36, 48, 48), (18, 48, 80))  # what fastvideo-kernel is compiled for, with tiles of 6x8x8
STA_TILE = (6, 8, 8)


@dataclass(frozen=True)
class Package:
    """Of one method: ``module``, the distribution it comes in, and ``call(module, q, k, v, mask, context, options)``, q, k, v ``(B, H, S, D)`` BF16."""

    module: str
    distribution: str
    call: Callable[..., Tensor]
    refuses: Callable[[BlockMask, Any], str | None] = lambda mask, window: None  # why not for this call

    def version(self) -> str:
        """Name and version, for reports."""
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return self.distribution


def _sage(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, context: Context, options: Any) -> Tensor:
    scale = q.shape[-1] ** -0.5 if context.scale is None else context.scale
    call = module.sageattn_qk_int8_pv_fp8_cuda_sm90
    return call(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


def _sparge(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, context: Context, options: Any) -> Tensor:
    """Its blocks are 64 queries x 128 keys; padding slots repeat a token of their block, and as keys they are attended."""
    layout = mask.layout
    slots = layout.token_of_slot.long().view(-1, 128)
    source = torch.where(slots < 0, slots[:, :1], slots).flatten()
    blocks = mask.to_blocks()[:, :, layout.tile_of_block.long()].repeat_interleave(2, 2)
    mask_id = blocks.expand(q.shape[0], q.shape[1], -1, -1).to(torch.int8).contiguous()
    scale = q.shape[-1] ** -0.5 if context.scale is None else context.scale
    out = module.block_sparse_sage2_attn_cuda(
        *(x.index_select(2, source) for x in (q, k, v)), mask_id=mask_id, scale=scale,
        pvthreshd=options.get("pv_threshold", 50.0), tensor_layout="HND", output_dtype=q.dtype,
    )  # fmt: skip
    return out.index_select(2, layout.slot_of_token.long())


def _sta_refuses(mask: BlockMask, window: Any) -> str | None:
    if tuple(mask.layout.grid) not in STA_GRIDS or tuple(mask.layout.tile) != STA_TILE or mask.layout.text_len:
        grids = ", ".join("x".join(map(str, grid)) for grid in STA_GRIDS)
        return f"fastvideo-kernel takes the grids {grids} in tiles of {'x'.join(map(str, STA_TILE))} without text"
    return None if window is not None else "fastvideo-kernel takes windows"


def _sta(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, context: Context, options: Any) -> Tensor:
    """Tiles of 384 tokens are whole blocks, so slots are its order. It scales by ``1 / sqrt(D)``."""
    layout = mask.layout
    if context.scale is not None and abs(context.scale - q.shape[-1] ** -0.5) > 1e-6:
        raise UnsupportedError(
            f"fpsattention.compare: softmax scale {context.scale}, which fastvideo-kernel does not take"
        )
    order = layout.token_of_slot.long()
    windows = [list(options["window"])] * q.shape[1]
    grid = "x".join(map(str, layout.grid))
    out = module.sliding_tile_attention(
        *(x.index_select(2, order).contiguous() for x in (q, k, v)), windows, 0, False, grid
    )
    return out.index_select(2, layout.slot_of_token.long())


PACKAGES = {
    "sage": Package("sageattention", "sageattention", _sage),
    "sparge": Package("spas_sage_attn", "spas_sage_attn", _sparge),
    "sta": Package("fastvideo_kernel", "fastvideo-kernel", _sta, _sta_refuses),
}


def installed(name: str) -> str | None:
    """Name and version of the package of method ``name`` where it is installed."""
    package = PACKAGES.get(name)
    return package.version() if package is not None and importlib.util.find_spec(package.module) is not None else None


def on_gpu(q: Tensor) -> bool:
    """Whether a package could take such a tensor."""
    return q.is_cuda


def implementation(name: str, q: Tensor, mask: BlockMask, window: Any = None) -> tuple[Package | None, str]:
    """The package that runs method ``name`` on q under ``mask``, or None; and what runs, in words."""
    package = PACKAGES.get(name)
    if package is None:
        return None, "emulated (no package is known)"
    if not on_gpu(q):
        return None, f"emulated ({package.distribution} needs a GPU)"
    if importlib.util.find_spec(package.module) is None:
        return None, f"emulated ({package.distribution} is not installed)"
    if (reason := package.refuses(mask, window)) is not None:
        return None, f"emulated ({reason})"
    return package, package.version()


def run(package: Package, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, context: Context, options: Any) -> Tensor:
    """The package's output ``(B, H, S, D)`` in the dtype of q. A package that is there and fails is an error, not a reason to emulate."""
    try:
        module = importlib.import_module(package.module)
        out = package.call(
            module, *(x.to(torch.bfloat16).contiguous() for x in (q, k, v)), mask.to(q.device), context, options
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"fpsattention.compare: {package.version()} cannot be called ({type(error).__name__}: {error}): install a version with the "
            "functions that compare/packages.py names, or uninstall it to have its numerics emulated"
        ) from error
    return out.to(q.dtype)
