"""``fpsattn compare``: packages of the baselines and LPIPS by their contracts (stubs with the published signatures), a model from a folder."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import fpsattention as fps
from fpsattention import UnsupportedError
from fpsattention.compare import packages
from fpsattention.compare.harness import CompareConfig, run_compare
from fpsattention.compare.methods import Context, methods
from fpsattention.compare.temporal import lpips_distance
from fpsattention.schedule import Schedule

GRID, TILE = (2, 16, 16), (2, 8, 8)  # tiles of whole blocks, as those of fastvideo-kernel


@pytest.fixture
def module(monkeypatch):
    """Installs a stub module of a name, as if it had been installed, and lets packages run on CPU tensors."""
    monkeypatch.setattr(packages, "on_gpu", lambda q: True)

    def install(name, **functions):
        stub = ModuleType(name)
        stub.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        stub.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, stub)

    return install


def run(name, grid=GRID, tile=TILE, dim=64):
    layout = fps.plan(grid, tile)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, dim, generator=generator) for _ in range(3))
    method = methods(Schedule.preset("fp8"), 0.3)[name]
    context = Context(layout, 0, 0.5, None)
    mask = method.mask(q, k, v, context)
    return method.attention(q, k, v, mask, context), method.implementation(q, mask)[1], (q, k, v), mask


def exact(tensors, mask):
    q, k, v = (x.bfloat16().float() for x in tensors)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.to_token_mask())


def test_sage(module):
    def sageattn_qk_int8_pv_fp8_cuda_sm90(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert q.dtype == torch.bfloat16 and q.is_contiguous() and tensor_layout == "HND" and not is_causal
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=sm_scale)

    module("sageattention", sageattn_qk_int8_pv_fp8_cuda_sm90=sageattn_qk_int8_pv_fp8_cuda_sm90)
    out, ran, tensors, mask = run("sage")
    assert ran == "sageattention" and out.dtype == torch.float32
    torch.testing.assert_close(out, exact(tensors, mask), rtol=2e-2, atol=2e-2)


def test_sparge_is_given_the_mask_in_its_blocks_and_our_order(module):
    def block_sparse_sage2_attn_cuda(
        q, k, v, mask_id=None, scale=None, pvthreshd=50, tensor_layout="HND", output_dtype=None
    ):
        rows, columns = q.shape[2] // 64, k.shape[2] // 128
        assert mask_id.shape == (1, 2, rows, columns) and mask_id.dtype == torch.int8 and pvthreshd == 50.0
        keep = mask_id.bool().repeat_interleave(64, 2).repeat_interleave(128, 3)
        out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), keep, scale=scale)
        return out.to(output_dtype)

    module("spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)
    # Tiles of 128 tokens: no padding, so its result is exact; content that a gate keeps apart: half of the keys point away.
    layout = fps.plan((2, 16, 16), (2, 8, 8))
    method = methods(Schedule.preset("fp8"))["sparge"]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 512, 64, generator=generator) for _ in range(3))
    keep = torch.rand(1, 2, 4, 4, generator=generator) > 0.5
    keep |= torch.eye(4, dtype=torch.bool)
    mask = fps.BlockMask.from_keep(layout, keep)
    out = method.attention(q, k, v, mask, Context(layout, 0, 0.5, None))
    torch.testing.assert_close(out, exact((q, k, v), mask), rtol=2e-2, atol=2e-2)


def test_sta_where_its_grids_fit_and_a_reason_elsewhere(module, monkeypatch):
    def sliding_tile_attention(q, k, v, window, text_length, has_text, grid):
        assert grid == "2x16x16" and text_length == 0 and not has_text and len(window) == 2
        mask = fps.layout.masks.sliding_tile_mask(layout, window[0]).to_blocks()[0, 0]
        keep = mask.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), keep).to(q.dtype)

    layout = fps.plan(GRID, TILE)
    module("fastvideo_kernel", sliding_tile_attention=sliding_tile_attention)
    _, ran, *_ = run("sta")
    assert (
        ran == "emulated (fastvideo-kernel takes the grids 30x48x80, 36x48x48, 18x48x80 in tiles of 6x8x8 without text)"
    )
    monkeypatch.setattr(packages, "STA_GRIDS", (GRID,))
    monkeypatch.setattr(packages, "STA_TILE", TILE)
    out, ran, tensors, mask = run("sta")
    assert ran == "fastvideo-kernel" and mask.density < 0.5
    torch.testing.assert_close(out, exact(tensors, mask), rtol=2e-2, atol=2e-2)


def test_what_runs_is_said_and_a_broken_package_is_an_error(module, monkeypatch):
    assert run("sage")[1] == "emulated (sageattention is not installed)"
    assert run("svg")[1] == "emulated (no package is known)" and run("fps-fp8")[1] == "this library"
    module("sageattention")
    with pytest.raises(UnsupportedError, match="sageattention cannot be called .*sageattn_qk_int8_pv_fp8_cuda_sm90"):
        run("sage")
    monkeypatch.setattr(packages, "on_gpu", lambda q: q.is_cuda)
    assert run("sage")[1] == "emulated (sageattention needs a GPU)"


def test_lpips_by_what_is_at_hand(module, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert lpips_distance() == (None, "the package lpips is not installed")

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.net = net

        def forward(self, a, b):
            assert a.shape == (1, 3, 4, 5) and float(a.min()) >= -1 and float(a.max()) <= 1
            return (a - b).abs().mean()

    module("lpips", LPIPS=LPIPS)
    assert lpips_distance()[0] is None and "no weights of AlexNet, VGG16, SqueezeNet" in lpips_distance()[1]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    distance, name = lpips_distance()
    assert name == "VGG16"
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    assert distance(frames, frames) == 0.0
    assert distance(frames, 255 - frames) == pytest.approx(np.abs(2.0 * frames - 255).mean() / 127.5, rel=1e-5)


def tiny_folder(path):
    """A Wan pipeline as a folder of weights: random, with a word-level tokenizer and a text encoder of one layer."""
    tiny_wan = pytest.importorskip("tiny_wan")
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "a", "fox", "sea"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = UMT5Config(vocab_size=len(words), d_model=tiny_wan.TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    pipe = tiny_wan.pipeline()
    pipe.register_modules(tokenizer=fast, text_encoder=UMT5EncoderModel(config).eval())
    pipe.save_pretrained(path)


@pytest.mark.slow
def test_a_model_from_a_folder(tmp_path):
    """Weights, tokenizer and text encoder are loaded from disk; prompts differ in what they give, and VBench's layout is written."""
    for name in ("imageio_ffmpeg", "skimage", "matplotlib"):
        pytest.importorskip(name)
    tiny_folder(tmp_path / "model")
    schedule = tmp_path / "schedule.json"
    level = {"precision": "fp8", "pattern": {"name": "topk_mean", "ratio": 0.5}}
    fps.Schedule.from_dict(
        {
            "format": "fpsattn-schedule/3",
            "tile": [1, 2, 3],
            "levels": {"l": level},
            "phases": [{"sigma": [1, 0], "level": "l"}],
        }
    ).save(schedule)
    config = CompareConfig(
        out=tmp_path / "out", methods=("fps",), schedule=str(schedule), model=str(tmp_path / "model"), prompts=("a fox", "a sea"),
        negative_prompt="sea", height=64, width=96, num_frames=5, num_inference_steps=1, max_rows=32, device="cpu",
    )  # fmt: skip
    report = run_compare(config)
    row = {row["method"]: row for row in report["table"]}["fps"]
    assert row["density"] < 0.8 and row["psnr_db"] is not None
    out = tmp_path / "out"
    latents = [torch.load(out / "runs" / f"p{i}-s0" / "dense" / "latents.pt") for i in range(2)]
    assert float((latents[0] - latents[1]).abs().max()) > 1e-4
    assert sorted(path.name for path in (out / "vbench" / "fps").iterdir()) == ["a fox-0.mp4", "a sea-0.mp4"]
    for entry in report["errors"]["fps"]:
        assert 0 < entry["selected_density"] <= entry["density"] < 0.8
    assert "this library" in (out / "report.md").read_text()
