"""``attention_selected``: quantize, lists from the sums by block that this leaves behind, forward. Against two calls that read q and k twice."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fpsattention as fps
from fpsattention import ConfigError, UnsupportedError, patterns
from fpsattention.ops import core, hidden
from fpsattention.ops.attend import attend, attend_selected
from fpsattention.ops.selection import Selection, sizes_of
from fpsattention.patterns.pattern import pooling

LAYOUTS = [((5, 11, 13), (2, 4, 5), 0), ((3, 7, 11), (3, 4, 4), 17), ((4, 12, 11), (2, 7, 11), 5)]
RULES = [
    {"name": "topk_mean", "ratio": 0.34},
    {"name": "cdf_mean", "mass": 0.6},
    {"name": "cdf_mean", "mass": 0.4, "window": [1, 1, 1], "by_size": True},
    {"name": "draft", "sparsity": 0.6},
    {"name": "vmoba", "layer": 1},
]


def selection_of(rule, layout, transposed=True):
    text, width = json.dumps(rule), patterns.from_dict(rule).list_width(layout)
    tables = (layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets)
    return Selection(*tables, sizes_of(layout, width), text, transposed)


def tensors(layout, dim=64, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, layout.num_tokens, dim)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def test_every_rule_of_means_is_here():
    assert pooling() == sorted({rule["name"] for rule in RULES})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule))
@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
@pytest.mark.slow
def test_lists_output_and_gradients_are_those_of_two_calls(grid, tile, text, rule):
    """The lists are those of the pattern called with q and k, and everything else has the bits of attention under these lists."""
    layout, bound = fps.plan(grid, tile, text), patterns.from_dict(rule)
    q, k, v = tensors(layout)
    options = {"tensor_layout": "HND", "granularity": "block", "scale": 0.2}
    out, lists, densities = attend_selected(q, k, v, selection_of(rule, layout), **options)
    mask, of_tokens = bound.pattern.measured(q, k, layout, **bound.hyperparameters)
    assert torch.equal(fps.BlockMask(layout, lists.kv_num_blocks, lists.kv_indices).to_blocks(), mask.to_blocks())
    assert torch.equal(densities, of_tokens[None])
    visits = torch.zeros(1, 2, layout.num_blocks, layout.num_blocks + 1, dtype=torch.bool)
    listed = torch.arange(layout.num_blocks) < lists.q_num_blocks.unsqueeze(-1)
    visits.scatter_(-1, torch.where(listed, lists.q_indices, layout.num_blocks).long(), True)
    assert torch.equal(visits[..., :-1].transpose(-1, -2), mask.to_blocks()[:, :, layout.tile_of_block])
    wanted, _ = attend(q, k, v, mask, **options)
    assert torch.equal(out, wanted)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim, more", [(40, {}), (80, {}), (128, {"precision": "int8", "granularity": "block"})])
@torch.no_grad()
@pytest.mark.slow
def test_padded_channels_and_int8(dim, more):
    """Channels that are appended change neither scores nor lists; INT8 operands do not either."""
    layout = fps.plan(*LAYOUTS[0])
    q, k, v = tensors(layout, dim, batch=2)
    out, lists, densities = attend_selected(q, k, v, selection_of(RULES[1], layout, False), tensor_layout="HND", **more)
    mask, of_tokens = patterns.cdf_mean.measured(q, k, layout, mass=0.6)
    assert torch.equal(fps.BlockMask(layout, lists.kv_num_blocks, lists.kv_indices).to_blocks(), mask.to_blocks())
    assert torch.equal(out, attend(q, k, v, mask, tensor_layout="HND", **more)[0])
    assert lists.q_num_blocks is None and torch.equal(densities, of_tokens.expand(2, 2))


@torch.no_grad()
def test_hidden_keys():
    layout = fps.plan(*LAYOUTS[1])
    q, k, v = (x.transpose(1, 2) for x in tensors(layout, batch=2))
    unseen = torch.zeros(2, layout.num_tokens, dtype=torch.bool)
    unseen[0, -5:] = True
    k, v = hidden.fill(k, v, unseen, False)
    out, lists, _ = attend_selected(q, k, v, selection_of(RULES[0], layout), hidden=unseen)
    assert torch.equal(out, attend(q, k, v, lists, hidden=unseen)[0])
    assert not torch.equal(out, attend(q, k, v, lists)[0])


class _Readers(TorchDispatchMode):
    """Names of the operations that read a tensor of the memory of one of these."""

    def __init__(self, *watched):
        super().__init__()
        self.watched, self.seen = {x.untyped_storage().data_ptr() for x in watched}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage().data_ptr() in self.watched for x in given) and not func.is_view:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule))
@torch.no_grad()
@pytest.mark.slow
def test_q_and_k_are_read_by_the_quantizer_alone(rule):
    """The memory of q and k is touched by one operation, ``quantize``; a pattern that is called with q and k reads them again."""
    layout = fps.plan(*LAYOUTS[0])
    q, k, v = tensors(layout)
    given = selection_of(rule, layout)
    options = {"granularity": 0, "softmax_scale": 0.125, "smooth_k": True, "pow2_scales": False}
    with _Readers(q, k) as readers:
        core._attention_selected(
            q, k, v, *given[:4], None, None, None, pattern=given.pattern, transposed=False, head_dim=64, **options
        )
    assert readers.seen == ["fpsattn::quantize"]
    with _Readers(q, k) as readers:
        patterns.from_dict(rule)(q, k, layout)
    assert len(readers.seen) >= 2


@pytest.mark.slow
def test_opcheck_and_transforms():
    layout = fps.plan(*LAYOUTS[0])
    inputs = tensors(layout)
    given = selection_of(RULES[0], layout)
    options = {"granularity": 0, "softmax_scale": 0.125, "smooth_k": True, "pow2_scales": False, "head_dim": 64}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fpsattn.attention_selected.default, (*inputs, *given[:4], None, None, None),
        {**options, "pattern": given.pattern, "transposed": True}, test_utils=checks,
    )  # fmt: skip

    def run(*qkv):
        return attend_selected(*qkv, given, tensor_layout="HND")[0]

    mask = patterns.topk_mean(*inputs[:2], layout, ratio=0.34)

    def known(*qkv):
        return attend(*qkv, mask, tensor_layout="HND")[0]

    q, k, v = (x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    for a, b in zip(*(torch.func.jvp(f, (q, k, v), tangents) for f in (run, known)), strict=True):
        assert torch.equal(a, b)
    stacked = [torch.stack(x) for x in zip((q, k, v), (k, v, q), strict=True)]
    assert torch.equal(torch.vmap(run)(*stacked)[1], run(k, v, q))


def test_what_is_refused():
    layout = fps.plan(*LAYOUTS[0])
    q, k, v = tensors(layout)
    with pytest.raises(ConfigError, match="sparge: sums over blocks.*expected cdf_mean, draft, topk_mean, vmoba"):
        attend(q, k, v, selection_of({"name": "sparge"}, layout), tensor_layout="HND")
    with pytest.raises(UnsupportedError, match="selection by sums over blocks.*supported are ready lists"):
        attend(q, k, v, selection_of(RULES[0], layout), tensor_layout="HND", backend="reference")
    with pytest.raises(ConfigError, match="q_num_blocks and q_indices are missing"):
        attend(q, k, v, selection_of(RULES[0], layout, False), tensor_layout="HND")
