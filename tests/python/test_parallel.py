"""fpsattention.parallel in 2 and 4 processes (gloo, CPU). Each group runs all of its checks."""

import importlib.util
import json
import re
from pathlib import Path

import distributed_parallel
import pytest
import torch.distributed
from distributed_ranks import Ranks

import fpsattention as fps
from fpsattention.errors import ConfigError
from fpsattention.parallel import Network, choose, deal_heads
from fpsattention.parallel.choose import FORWARD_FLOPS
from fpsattention.parallel.scaling import WAN_14B, training_step, with_tables
from fpsattention.parallel.sharding import cut_evenly

pytestmark = pytest.mark.slow

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "parallel_generate.py"
TWO = (
    "equal_to_one_process",
    "options_of_the_call",
    "long_sequences_take_a_part_of_k_for_its_mean",
    "heads_are_dealt_by_cost",
    "patterns_after_the_exchange",
    "bytes_on_the_wire",
    "halo_sends_what_is_visited",
    "ring_is_exact_but_for_rounding_p",
    "fp8_output",
    "wrong_arguments",
    "differing_ranks_are_refused",
)
MODELS = (
    "models_are_whole_again",
    "levels_and_heads_of_a_schedule",
    "patterns_of_a_schedule",
    "long_sequences_of_a_model",
    "context_parallelism_of_diffusers",
    "gradients_are_those_of_one_process",
    "what_cannot_be_spread",
    "compiled_blocks_break_at_the_exchange",
)
FOUR = (
    "more_ranks_than_heads_and_two_meshes",
    "bytes_on_the_wire",
    "halo_sends_what_is_visited",
    "fsdp_on_a_mesh_of_samples_and_tokens",
)


def test_ranks(tmp_path, subtests):
    """All groups at a time, and in one test, so that one worker of pytest imports for them."""
    if importlib.util.find_spec("diffusers") is None:  # imported by the ranks alone
        pytest.skip("diffusers is not installed")
    groups = {2: (*TWO, *MODELS), 4: (*FOUR, "lost_ranks")}
    running = {size: Ranks(tmp_path / str(size), size, distributed_parallel.run, tmp_path / str(size), names) for size, names in groups.items()}  # fmt: skip
    example = Ranks(tmp_path / "example", 2, distributed_parallel.example, EXAMPLE, "--steps", "2", grouped=False)
    for size, names in groups.items():
        texts = running[size].wait()
        files = [tmp_path / str(size) / f"{rank}.json" for rank in range(size)]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        for name in names:
            with subtests.test(f"{name}, {size} ranks"):
                survivors = [0, 3] if name == "lost_ranks" else range(size)
                errors = [results[rank].get(name, f"did not run: {texts[rank][-2000:]}") for rank in survivors]
                assert not any(errors), "\n".join(
                    f"rank {rank}: {e}" for rank, e in zip(survivors, errors, strict=True)
                )

    with subtests.test("examples/parallel_generate.py"):
        said, silent = example.finish()
        assert len(re.findall(r"(?:exchange|halo): +the video equals that of one process, bit for bit", said)) == 3
        assert re.search(r"ring: +the video (equals|differs from that of one process by \d\.\de-)", said)
        assert said.count("training losses") == 4 and "training" not in silent  # it exits with 1 where they differ


def test_heads_are_dealt_evenly_or_by_cost():
    assert deal_heads(5, 2).of == ((0, 1, 2), (3, 4))
    assert deal_heads(2, 4).of == ((0,), (1,), (), ())
    assert deal_heads(3, 2, [1.0, 1.0, 1.0]).of == ((0, 1), (2,))  # equal: neighbours
    dealt = deal_heads(6, 3, [5.0, 1.0, 4.0, 2.0, 3.0, 3.0])
    assert dealt.of == ((0, 1), (2, 3), (4, 5)) and dealt.inverse is None
    dealt = deal_heads(4, 2, [1.0, 3.0, 1.0, 1.0])
    assert dealt.of == ((1,), (0, 2, 3)) and dealt.order == (1, 0, 2, 3) and dealt.inverse == (1, 0, 2, 3)
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=r"parallel\.deal_heads: .* expected at least 1"):
            deal_heads(*wrong)
    with pytest.raises(ConfigError, match="expected 2 finite numbers"):
        deal_heads(2, 1, [1.0, float("nan")])


def test_ranges_are_cut_near_equal_shares():
    assert cut_evenly([4, 4, 4, 4], 2) == [0, 2, 4]
    assert cut_evenly([10, 1, 1, 1], 3) == [0, 1, 2, 4]
    assert cut_evenly([1] * 3, 3) == [0, 1, 2, 3]
    bounds = cut_evenly([7, 5, 3, 9, 2, 8, 4], 4)
    assert bounds[0] == 0 and bounds[-1] == 7 and all(a < b for a, b in zip(bounds, bounds[1:], strict=False))


def test_without_a_process_group():
    with pytest.raises(ConfigError, match=r"parallel\.shard_tokens: torch\.distributed is not initialized"):
        fps.parallel.shard_tokens(fps.plan((2, 4, 4)))


# What it costs -----------------------------------------------------------------------------------------------------------------

LAYOUT = fps.plan((16, 16, 16), (2, 8, 16))  # 16 tiles of 2 blocks, without padding


def estimates(*arguments, **options):
    return choose(*arguments, **options).estimates


def test_estimates_are_the_bytes_that_are_sent():
    """By hand, for 4 ranks, 8 heads of 64: 1024 tokens each; a window of 3 tiles along T is a frame of tiles on either side."""
    bf16, fp8, halo, ring = estimates(LAYOUT, 4, heads=8, head_dim=64, window=(3, 2, 1))
    rows = 1024 * 8 * 3 / 4  # of which 3 of 4 heads travel
    assert bf16.sent == rows * 8 * 64
    assert fp8.sent == pytest.approx(rows * (3 * 64 + 2 * 4 / 128 + 2 * 64 + 4))
    # 8 frames of 2 tiles: 2 frames a rank. Windows at the border are shifted inwards: an inner rank needs 1 frame of each neighbour.
    assert halo.sent == ring.sent == 2 * 512 * 8 * (2 * 64 + 4 / 128)
    assert (
        halo.compute_seconds == pytest.approx(fp8.compute_seconds) == 4 * 4096**2 * (3 / 8) * 8 * 64 / 4 / FORWARD_FLOPS
    )
    assert ring.seconds < halo.seconds  # hidden
    trained = estimates(LAYOUT, 4, heads=8, head_dim=64, window=(3, 2, 1), backward=True)
    assert trained[0].sent == 2 * bf16.sent and trained[2].sent == halo.sent + 2 * 512 * 8 * 4 * 64
    uneven = estimates(LAYOUT, 3, heads=4, head_dim=64)[1]  # two heads on one of three ranks
    assert uneven.compute_seconds == pytest.approx(
        1.5 * estimates(LAYOUT, 3, heads=3, head_dim=64)[1].compute_seconds * 4 / 3
    )


def test_choose_says_why():
    slow = Network("slow", 1e9, 1e-6)
    assert (
        choose(LAYOUT, 4, heads=8, head_dim=64, window=(1, 2, 1), network=slow).best.scheme == "halo"
    )  # nothing to fetch
    assert choose(LAYOUT, 8, heads=8, head_dim=64, network=slow).arguments == {"scheme": "ulysses", "exchange": "fp8"}
    free = choose(LAYOUT, 4, heads=8, head_dim=64, network=slow, exact=False)
    assert "ms per layer" in str(free) and len(free.reasons) == 4
    dynamic = choose(LAYOUT, 4, heads=8, head_dim=64, dynamic=True, density=0.2)
    assert dynamic.arguments == {"scheme": "ulysses", "exchange": "bf16"} and "halo: cannot" in str(dynamic)
    assert "16 video tiles for 32 ranks" in str(choose(LAYOUT, 32, heads=8, head_dim=64))
    assert "not the bits of one process" in str(choose(LAYOUT, 4, heads=8, head_dim=64))
    for text, changes in (
        ("ranks 0, expected at least 1", {"ranks": 0}), ("network 'carrier pigeon', expected", {"network": "carrier pigeon"}),
        ("density 2, expected", {"density": 2}), ("dynamic with a window", {"dynamic": True, "window": (1, 1, 1)}),
        ("layout is a tuple", {"layout": (1, 2, 3)}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"fpsattention\.parallel\.choose: {text}"):
            choose(**{"layout": LAYOUT, "ranks": 2, "heads": 4, "head_dim": 64, **changes})
    with pytest.raises(ConfigError, match=r"training_step: 8 gpus, sequence_parallel 3"):
        training_step(WAN_14B, 8, 3, 8)


def test_tables_of_the_document_are_computed():
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    changed = text.replace("| 2 | 52.52 ms", "| 2 | 12.34 ms")
    assert changed != text and with_tables(changed) == text
