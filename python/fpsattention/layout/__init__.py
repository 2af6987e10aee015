"""Tokens, blocks, and who attends whom: the tile planner and block masks."""

from .masks import BlockMask, dense_mask, sliding_tile_mask
from .tiles import TileLayout, clear_plan_cache, plan

__all__ = ["BlockMask", "TileLayout", "clear_plan_cache", "dense_mask", "plan", "sliding_tile_mask"]
