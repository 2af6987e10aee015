"""Cosmos 3, which packs text, one video and sound without a batch: text attends itself causally, and has keys only for the rest."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from diffusers import Cosmos3OmniTransformer, UniPCMultistepScheduler
from test_adapters import SPARSE, observe
from tiny_models import GRID, TILE, rand
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fpsattention as fps
from fpsattention.errors import UnsupportedError
from fpsattention.integrations.state import CURRENT
from fpsattention.layout import masks, tiles
from fpsattention.schedule.schedule import FORMAT

TEXT, SOUND = 20, 9
VIDEO = GRID[0] * GRID[1] * GRID[2]
SEQUENCES = pytest.mark.parametrize("sound", [0, SOUND])


def build(layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    model = Cosmos3OmniTransformer(
        head_dim=64, hidden_size=32, intermediate_size=32, latent_channel=4, patch_latent_dim=16, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, rope_axes_dim=(12, 10, 10), sound_gen=True, sound_dim=4, action_gen=True, action_dim=3, num_embodiment_domains=2,
        vocab_size=32,
    )  # fmt: skip
    return model.eval()


def packed(sigma: float, sound: int = 0, text: int = TEXT) -> dict[str, Any]:
    """As the pipeline packs them; frame 0 of two is clean in a sequence without sound."""
    first = 0 if sound else 1
    count = text + VIDEO + sound
    grid = torch.cartesian_prod(*(torch.arange(float(n)) for n in GRID)).T + text
    places = [torch.arange(float(text)).expand(3, -1), grid, text + torch.arange(float(sound)).expand(3, -1)]
    frame = GRID[1] * GRID[2]
    arguments = {
        "input_ids": torch.arange(text) % 32,
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat(places, 1),
        "und_len": text,
        "sequence_length": count,
        "vision_tokens": [rand(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])],
        "vision_token_shapes": [GRID],
        "vision_sequence_indexes": torch.arange(text, text + VIDEO),
        "vision_mse_loss_indexes": torch.arange(text + first * frame, text + VIDEO),
        "vision_timesteps": torch.full((VIDEO - first * frame,), 1000.0 * sigma),
        "vision_noisy_frame_indexes": [torch.arange(first, GRID[0])],
    }
    if sound:
        at = torch.arange(text + VIDEO, count)
        arguments |= {
            "sound_tokens": [rand(4, sound)],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": at,
        }
        arguments |= {"sound_mse_loss_indexes": at, "sound_timesteps": torch.full((sound,), 1000.0 * sigma)}
        arguments |= {"sound_noisy_frame_indexes": [torch.arange(sound)]}
    return arguments


def predicted(model: torch.nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Of the video; sound with it, where there is some."""
    with torch.no_grad():
        video, sound, _ = model(**arguments, return_dict=False)
    return torch.cat([x.flatten() for x in (*video, *(sound or ()))])


@SEQUENCES
def test_a_latent_cell_is_the_predicted_token(sound):
    """Moving one latent cell moves one row of q and, behind those of the text, one row of k."""
    model, arguments = build(), packed(0.9, sound)
    with fps.apply(model, SPARSE) as handle:
        seen = observe(handle)
        predicted(model, arguments)
        _, q, k, *_ = seen[0]
        for t, h, w in ((0, 0, 1), (0, 1, 0), (1, 7, 11), (1, 4, 4)):
            seen.clear()
            moved = arguments["vision_tokens"][0].clone()
            moved[0, :, t, 2 * h, 2 * w + 1] += 1.0
            predicted(model, {**arguments, "vision_tokens": [moved]})
            row = (t * GRID[1] + h) * GRID[2] + w
            for before, now, place in ((q, seen[0][1], row), (k, seen[0][2], TEXT + row)):
                assert (before != now).any(-1).any(-1).nonzero().tolist() == [[0, place]]
        tokens = next(iter(handle.installations[0].counts()))[0]
    assert (tokens.grid, tokens.text_len, tokens.alone) == (GRID, TEXT + sound, TEXT)
    assert q.shape[1:3] == (VIDEO + sound, 4) and k.shape[1:3] == (TEXT + VIDEO + sound, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, sound: int, sparse: bool) -> Tensor:
    """SDPA of the queries there are over all keys, those of the text first."""
    layout = tiles.plan(GRID, tile=TILE, text_len=sound + TEXT)
    mask = masks.sliding_tile_mask(layout, (1, 1, 1) if sparse else layout.tile_grid).to_token_mask()[0, 0]
    mask = mask[: VIDEO + sound].roll(TEXT, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@SEQUENCES
def test_sparse_is_masked_sdpa_and_not_dense(sound):
    model, arguments = build(), packed(0.9, sound)
    with fps.apply(model, SPARSE) as handle:
        seen = observe(handle)
        predicted(model, arguments)
        report = handle.report()
    assert [name for name, *_ in seen] == ["transformer.layers.0.self_attn", "transformer.layers.1.self_attn"]
    assert report.fallbacks == {"transformer: the causal attention of its text, of every layer": 0}
    for _, q, k, v, out in seen:
        masked, dense = (_reference(q, k, v, sound, sparse) for sparse in (True, False))
        error = float((out - masked).abs().sum() / masked.abs().sum())
        assert error < 0.06 and float((out - dense).abs().sum() / dense.abs().sum()) > 2.5 * error


@SEQUENCES
def test_the_noisiest_step_has_the_first_phase(sound):
    model = build()
    for sigma, level in ((0.9, "narrow"), (0.1, "dense")):
        arguments = packed(sigma, sound)
        plain = predicted(model, arguments)
        with fps.apply(model, SPARSE) as handle:
            out = predicted(model, arguments)
            assert {(row.level, row.calls) for row in handle.report().rows if row.calls} == {(level, 1)}
        assert torch.equal(out, plain) == (level == "dense")  # bf16 levels are the model's own attention
        assert torch.equal(predicted(model, arguments), plain)  # removed


def test_the_text_is_the_models_own_to_the_bit():
    """Also where the video is sparse; and nothing is computed for queries that the text has not."""
    model, arguments = build(), packed(0.9)
    texts: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda module, args, output: texts.append(output[0]))
    predicted(model, arguments)
    with fps.apply(model, SPARSE) as handle:
        predicted(model, arguments)
        tables = handle.installations[0].tables
        (tokens,) = {tokens for tokens, *_ in handle.installations[0].counts()}
        mask = tables.tables(tokens).mask(0, 0 if tables.group_levels[0][0].name == "narrow" else 1)
    hook.remove()
    assert torch.equal(*texts)
    lengths = mask.kv_num_blocks[0, 0]
    assert lengths[-1] == 0 and bool((lengths[:-1] > 0).all())
    last = mask.layout.num_blocks - 1  # of the text: every tile of the video visits it
    assert bool((mask.kv_indices[0, 0, :-1] == last).any(-1).all())


@pytest.mark.parametrize(
    "level",
    [{"precision": "int8"}, {"precision": "paper"}, {"precision": "fp8", "granularity": "token", "hadamard": True}],
    ids=["int8", "paper", "token-hadamard"],
)
def test_levels_of_every_kind(level):
    schedule = {
        **SPARSE,
        "format": FORMAT,
        "levels": {"narrow": {**level, "window": [1, 1, 1]}, "dense": {"precision": "bf16"}},
    }
    model = build(1)
    with fps.apply(model, schedule) as handle:
        seen = observe(handle)
        predicted(model, packed(0.9, SOUND))
    ((_, q, k, v, out),) = seen
    masked = _reference(q, k, v, SOUND, True)
    assert float((out - masked).abs().sum() / masked.abs().sum()) < 0.06


@SEQUENCES
def test_patterns_that_read_q_and_k(sound):
    pattern = {"name": "cdf_mean", "mass": 0.5}
    schedule = {
        "format": FORMAT,
        "tile": TILE,
        "levels": {"read": {"precision": "fp8", "pattern": pattern}},
        "phases": [{"sigma": [1.0, 0.0], "level": "read"}],
    }
    model, arguments = build(), packed(0.9, sound)
    with fps.apply(model, schedule) as handle:
        seen = observe(handle)
        predicted(model, arguments)
        (density,) = {row.density < 1 for row in handle.report().rows}
    _, q, k, v, out = seen[0]
    dense = _reference(q, k, v, sound, False)
    assert density and float((out - dense).abs().sum() / dense.abs().sum()) < 0.5
    if sound:  # dense in both directions
        error = (out - dense)[:, VIDEO:].abs().sum() / dense[:, VIDEO:].abs().sum()
        assert float(error) < 0.06


def test_gradients_reach_the_keys_of_the_text():
    model = build()
    with fps.apply(model, SPARSE):
        model(**packed(0.9, SOUND), return_dict=False)[0][0].square().mean().backward()
    for name in ("to_k", "to_v", "add_q_proj", "add_k_proj"):
        grad = getattr(model.layers[0].self_attn, name).weight.grad
        assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0


def test_phases_follow_the_steps_of_a_pipeline():
    """The pipeline makes timesteps anew in every step, so their place in the run is that of the scheduler's."""
    model = build()
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    pipe = type("Pipe", (), {"components": {"transformer": model, "scheduler": scheduler}, "scheduler": scheduler})()
    scheduler.set_timesteps(8)
    levels = []

    def note(*_: Any) -> None:
        (segment,) = CURRENT.forward.segments
        levels.append(handle.installations[0].tables.group_levels[0][int(segment)].name)

    with fps.apply(pipe, "training_free") as handle:
        hook = model.register_forward_pre_hook(note)
        for t in scheduler.timesteps:
            predicted(model, packed(float(t) / 1000))
        hook.remove()
    assert [(level, len(list(group))) for level, group in groupby(levels)] == [("dense", 2), ("careful", 6)]


def test_what_is_refused_says_why():
    model, arguments = build(), packed(0.9, SOUND)
    plain = predicted(model, arguments)
    two = {"vision_token_shapes": 2 * [GRID]}
    clean = {f"{part}_timesteps": torch.zeros(0) for part in ("vision", "sound")}
    apart = {"vision_sequence_indexes": arguments["vision_sequence_indexes"] + SOUND}
    with fps.apply(model, SPARSE) as handle:
        for change, text in (
            (two, "2 videos or images"),
            (clean, "no token has a timestep"),
            (apart, "begins at token 29"),
        ):
            with pytest.raises(UnsupportedError, match=text):
                predicted(model, {**arguments, **change})
        model._cp_shard_fn = lambda *given: given
        with pytest.raises(UnsupportedError, match="_cp_shard_fn"):
            predicted(model, arguments)
        model._cp_shard_fn = None
        with pytest.raises(UnsupportedError, match="Cosmos 3 has keys without queries"):
            handle.record(dir="never")
    with fps.apply(model, SPARSE, on_unsupported="dense") as handle:
        model._cp_shard_fn = lambda *given: given
        assert torch.equal(predicted(model, arguments), plain)
        assert any("_cp_shard_fn" in reason for reason in handle.report().fallbacks)


@pytest.mark.slow
def test_compiled_blocks_are_eager_ones():
    """One graph for all levels, and for prompts of any length once it has met a second one."""
    model = build(1)
    sequences = [packed(0.9), packed(0.1), packed(0.9, text=33), packed(0.1, text=27), packed(0.9, text=140)]
    with fps.apply(model, SPARSE):
        eager = [predicted(model, arguments) for arguments in sequences]
        model.layers[0].compile(fullgraph=True, backend="eager")
        for known, (arguments, wanted) in enumerate(zip(sequences, eager, strict=True)):
            with torch._dynamo.config.patch(error_on_recompile=known in (1, 3, 4)):
                torch.testing.assert_close(predicted(model, arguments), wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
