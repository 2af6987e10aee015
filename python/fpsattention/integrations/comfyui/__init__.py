"""A ComfyUI node, and a custom node folder: copy or link this folder into ``custom_nodes/``. See ``docs/comfyui.md``."""

from .node import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
