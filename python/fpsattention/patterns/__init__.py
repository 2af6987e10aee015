"""Sparsity patterns: published rules for which KV blocks a query tile visits, each as ``pattern(q, k, layout, ...) -> BlockMask``.

Content: :data:`topk_mean`, :data:`cdf_mean`, :data:`sparge`, :data:`draft`, :data:`vmoba`, :data:`svg`, :data:`blade`, :data:`antidiagonal`, :data:`exact`.
Static (``pattern(layout, ...)``): :data:`sliding_tile`, :data:`radial`, :data:`foreground`, :data:`part`, :data:`vorta`. With a permutation of its
own: :func:`svg2`. By name: :func:`get`. ``docs/patterns.md`` lists formulas, sources and costs.
"""

from ..layout.scale_groups import scale_groups
from .cluster import Clustered, clustered_attention, k_means, svg2
from .compensation import compensated_attention, pseudo_blocks
from .cost import Cost, cost
from .mean import cdf_mean, draft, sparge, topk_mean, vmoba
from .pattern import BoundPattern, Density, Pattern, from_dict, get, names
from .refresh import Refresh
from .routes import Coreset, coreset_attention, vorta
from .sampled import antidiagonal, blade, exact, svg
from .static import foreground, part, part_layout, radial, sliding_tile

__all__ = [
    "BoundPattern",
    "Clustered",
    "Coreset",
    "Cost",
    "Density",
    "Pattern",
    "Refresh",
    "antidiagonal",
    "blade",
    "cdf_mean",
    "clustered_attention",
    "compensated_attention",
    "coreset_attention",
    "cost",
    "draft",
    "exact",
    "foreground",
    "from_dict",
    "get",
    "k_means",
    "names",
    "part",
    "part_layout",
    "pseudo_blocks",
    "radial",
    "scale_groups",
    "sliding_tile",
    "sparge",
    "svg",
    "svg2",
    "topk_mean",
    "vmoba",
    "vorta",
]
