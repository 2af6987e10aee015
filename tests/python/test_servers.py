"""Attention backends for vLLM-Omni and SGLang, against stubs of the interfaces that such backends see."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from outside import DIM, GRID, HEADS, sdpa, servers
from test_outside import SPARSE, masked, rand

from fpsattention.errors import ConfigError

VIDEO = GRID[0] * GRID[1] * GRID[2]


@pytest.fixture
def load(monkeypatch):
    def load(name: str, stubs: dict):
        for path, module in stubs.items():
            monkeypatch.setitem(sys.modules, path, module)
        monkeypatch.delitem(sys.modules, f"fpsattention.integrations.{name}", raising=False)
        module = importlib.import_module(f"fpsattention.integrations.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return load


def qkv(tokens: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(rand(batch, tokens + i, HEADS, DIM)[:, :tokens] for i in range(3))


def is_sparse(out: torch.Tensor, q, k, v, **others) -> bool:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    want = masked(q, k, v, **others)
    error = (out - want).abs().mean()
    return bool(error < 0.06 * want.abs().mean() and error < 0.5 * (out - sdpa(q, k, v)).abs().mean())


def test_vllm_omni(load, monkeypatch):
    monkeypatch.setattr(servers, "OVERRIDES", {})
    module = load("vllm_omni", servers.vllm_omni())
    with pytest.raises(ConfigError, match="different backends"):
        module.register("TORCH_SDPA", SPARSE)
    sys.modules[
        "vllm_omni.diffusion.attention.backends.registry"
    ].register_diffusion_backend = servers.OVERRIDES.__setitem__
    module = load("vllm_omni", servers.vllm_omni())
    module.register("SAGE_ATTN", SPARSE)
    backend = servers.OmniEnum.SAGE_ATTN.get_class()
    assert backend.get_name() == "SAGE_ATTN" and backend.supports_attention_mask()
    build = dict(num_heads=HEADS, head_size=DIM, softmax_scale=DIM**-0.5, causal=False, num_kv_heads=HEADS)
    layers = [backend.get_impl_cls()(**build, prefix=f"blocks.{i}.attn1", role="self") for i in range(2)]
    cross = backend.get_impl_cls()(**build, prefix="blocks.0.attn2", role="cross")
    context = servers.OMNI
    monkeypatch.setattr(context, "denoise_timestep", 0.9)
    monkeypatch.setattr(context, "latent_shape", (GRID[0], 2 * GRID[1], 2 * GRID[2]), raising=False)
    monkeypatch.setattr(context, "patch_size", (1, 2, 2), raising=False)
    q, k, v = qkv(VIDEO)
    dense = sdpa(q, k, v)
    for layer in layers:
        assert is_sparse(layer.forward(q, k, v, servers.OmniMetadata()), q, k, v)
    grouped = q, k[:, :, :1], v[:, :, :1]
    assert is_sparse(layers[0].forward(*grouped, servers.OmniMetadata()), *grouped)
    assert torch.equal(cross.forward(q, k, v), dense)
    context.denoise_timestep = 0.4
    assert torch.equal(layers[0].forward(q, k, v), dense)
    context.denoise_timestep = 0.9
    # Text before the video, as the metadata say.
    longer = qkv(VIDEO + 7)
    told = servers.OmniMetadata(video_layout=servers.VideoTokenLayout(prefix_len=7, latent_grid=GRID))
    assert is_sparse(layers[0].forward(*longer, told), *longer, others=7, position="prefix")
    # What cannot be served is the dense backend's, with all that it was told.
    mask = torch.rand(1, 1, VIDEO, VIDEO) > 0.5
    assert torch.equal(layers[0].forward(q, k, v, servers.OmniMetadata(attn_mask=mask)), sdpa(q, k, v, mask))
    assert torch.equal(layers[0].forward(*longer), sdpa(*longer))
    context.denoise_timestep = None
    assert torch.equal(layers[0].forward(q, k, v), dense)
    report = module.report()
    assert {(row.layer, row.level): row.calls for row in report.rows}[0, "narrow"] == 3
    reasons = " ".join(report.fallbacks)
    assert all(part in reasons for part in ("attention mask", "got 199 tokens", "denoise_timestep"))
    # Layers of a second transformer have the same names.
    again = backend.get_impl_cls()(**build, prefix="blocks.0.attn1")
    assert again.layer.transformer is not layers[0].layer.transformer


def test_sglang(load, monkeypatch):
    monkeypatch.setattr(servers.PLATFORM, "get_attn_backend_cls_str", servers.PLATFORM.get_attn_backend_cls_str)
    module = load("sglang", servers.sglang())
    module.register("SLIDING_TILE_ATTN", SPARSE)
    module.register("SLIDING_TILE_ATTN", SPARSE)  # once more: not around itself
    choose = servers.PLATFORM.get_attn_backend_cls_str
    assert servers.resolve(choose(servers.SGLangEnum.TORCH_SDPA, 64, torch.float32)) is servers.SDPABackend
    backend = servers.resolve(choose(servers.SGLangEnum.SLIDING_TILE_ATTN, 64, torch.float32))
    assert backend.get_enum() is servers.SGLangEnum.SLIDING_TILE_ATTN
    assert backend.get_builder_cls()().build(current_timestep=3, STA_param=None).current_timestep == 3
    build = dict(num_heads=HEADS, head_size=DIM, causal=False, softmax_scale=DIM**-0.5, num_kv_heads=HEADS)
    layer = backend.get_impl_cls()(**build, prefix="blocks.0.attn1.impl")
    local = backend.get_impl_cls()(**build)
    request = SimpleNamespace(
        raw_latent_shape=torch.Size((1, 16, GRID[0], 2 * GRID[1], 2 * GRID[2])), timesteps=torch.tensor([900.0, 400.0])
    )
    monkeypatch.setattr(servers.SGLANG, "forward_batch", request)
    q, k, v = qkv(VIDEO)
    monkeypatch.setattr(servers.SGLANG, "current_timestep", 0)
    assert is_sparse(layer.forward(q, k, v, attn_metadata=None), q, k, v)
    longer = qkv(VIDEO + 7)
    assert is_sparse(layer.forward(*longer, None), *longer, others=7)
    grouped = q, k[:, :, :1], v[:, :, :1]
    assert is_sparse(layer.forward(*grouped, None), *grouped)
    assert torch.equal(local.forward(q, k, v, None), sdpa(q, k, v))
    assert torch.equal(layer.forward(q, k[:, :50], v[:, :50], None), sdpa(q, k[:, :50], v[:, :50]))
    servers.SGLANG.current_timestep = 1
    assert torch.equal(layer.forward(q, k, v, None), sdpa(q, k, v))
    request.timesteps = None
    assert torch.equal(layer.forward(q, k, v, None), sdpa(q, k, v))
    report = module.report()
    assert {row.level: row.calls for row in report.rows} == {"narrow": 3, "dense": 1}
    assert "raw_latent_shape and timesteps" in " ".join(report.fallbacks)
