"""One sequence on many GPUs: sequence-parallel attention that sends FP8. See ``docs/scale.md``.

``fps.parallel.shard(model, mesh)`` for models, :func:`attention` for tensors, :func:`choose` for which scheme pays where.
"""

from .attention import attention
from .choose import Choice, Estimate, Network, choose
from .collectives import count_bytes
from .heads import Heads, deal_heads
from .model import ShardedModel, shard
from .sharding import Sharding, shard_tokens

__all__ = [
    "Choice",
    "Estimate",
    "Heads",
    "Network",
    "ShardedModel",
    "Sharding",
    "attention",
    "choose",
    "count_bytes",
    "deal_heads",
    "shard",
    "shard_tokens",
]
