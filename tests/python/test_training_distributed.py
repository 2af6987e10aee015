"""The trainer in two processes (gloo, CPU): replicated (DDP) and sharded (FSDP2) weights, saved and resumed."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import distributed_training
from distributed_ranks import Ranks
from safetensors.torch import load_file

import fpsattention as fps
from fpsattention.training import write_synthetic
from fpsattention.training.trainer import read_losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return write_synthetic(folder, num_samples=6, latent_shape=(4, 3, 10, 14), text_shape=(3, 16))  # grid 3 x 5 x 7


def run(mode, latents, output, lora_rank, processes=2, **settings):
    """What train() returned: losses, validation losses."""
    settings |= {"data": str(latents), "output": str(output), "lora_rank": lora_rank}
    with tempfile.TemporaryDirectory() as folder:
        Ranks(Path(folder) / "ranks", processes, distributed_training.run, mode, settings).finish()
    return json.loads((output / "run.json").read_text())


@pytest.mark.parametrize("lora_rank, weights", [(0, "transformer"), (2, "lora")])
def test_sharded_weights_train_like_replicated_ones_and_resume_exactly(lora_rank, weights, latents, tmp_path):
    losses, validation = run("ddp", latents, tmp_path / "ddp", lora_rank)
    sharded = run("fsdp2", latents, tmp_path / "fsdp2", lora_rank)
    # The same sums in another order: gradients and their norm are reduced by shards.
    assert sharded[0] == pytest.approx(losses, rel=1e-4) and sharded[1] == pytest.approx(validation, rel=1e-4)
    assert losses[3] != pytest.approx(losses[0], rel=1e-3)

    shutil.rmtree(tmp_path / "fsdp2" / "checkpoint-000004")
    shutil.rmtree(tmp_path / "fsdp2" / weights)
    assert run("fsdp2", latents, tmp_path / "fsdp2", lora_rank, resume=True) == [sharded[0][2:], sharded[1][1:]]

    (path,) = (tmp_path / "ddp" / weights).glob("*.safetensors")
    replicated, gathered = load_file(path), load_file(tmp_path / "fsdp2" / weights / path.name)
    assert replicated.keys() == gathered.keys()
    # Adam divides by the gradient's own size, so a weight whose gradient is all rounding may move by the learning rate either way.
    for name, tensor in replicated.items():
        assert (tensor - gathered[name]).abs().max() <= 4 * 1e-3 and gathered[name].shape == tensor.shape, name
    assert torch.cat([(t - gathered[n]).abs().flatten() for n, t in replicated.items()]).mean() <= 1e-5


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    """Of tiles that are frames, so that there is more than one."""
    levels = {"dense": fps.Level("dense", "fp8", "block"), "window": fps.Level("window", "fp8", "block", (2, 1, 1))}
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    fps.Schedule(levels, (fps.Phase(1.0, 0.5, "dense"), fps.Phase(0.5, 0.0, "window")), tile=(1, 5, 7)).save(path)
    return str(path)


def test_sharded_weights_of_fp8_linears_train_like_replicated_ones(latents, tmp_path):
    """FSDP2 gathers the 16-bit master weights, whose rows are quantized whole, and shards their straight-through gradients."""
    losses = {}
    for linears in ("fp8", "bf16"):
        schedule = fps.Schedule(
            {"it": fps.Level("it", "fp8", "block", linears=linears)}, (fps.Phase(1.0, 0.0, "it"),), own_linears=()
        )
        schedule.save(tmp_path / f"{linears}.json")
        settings = {"schedule": str(tmp_path / f"{linears}.json")}
        losses[linears] = run("ddp", latents, tmp_path / linears, 0, **settings)[0]
        if linears == "fp8":
            sharded = run("fsdp2", latents, tmp_path / "sharded", 0, **settings)[0]
    # Sums in another order move a code here and there.
    assert sharded == pytest.approx(losses["fp8"], rel=1e-3)
    assert losses["bf16"][-1] != pytest.approx(losses["fp8"][-1], rel=1e-4)


def test_processes_that_share_samples_train_like_others_and_resume_exactly(latents, schedule, tmp_path):
    """Two processes, then a mesh of two samples by two shares of their tokens, weights sharded over all four; accumulation and checkpointing."""
    settings = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "schedule": schedule}
    losses, validation = run("ddp", latents, tmp_path / "two", 0, **settings)
    settings["sequence_parallel"] = 2
    four = run("fsdp2", latents, tmp_path / "four", 0, processes=4, **settings)
    assert four[0] == pytest.approx(losses, rel=1e-4) and four[1] == pytest.approx(validation, rel=1e-4)
    shutil.rmtree(tmp_path / "four" / "checkpoint-000004")
    assert run("fsdp2", latents, tmp_path / "four", 0, processes=4, **settings, resume=True) == [
        four[0][2:],
        four[1][1:],
    ]


def test_command_line_shares_samples(latents, schedule, tmp_path):
    """``fpsattn train --sequence-parallel 2`` in two processes, against one."""
    arguments = ["train", "--data", str(latents), "--schedule", schedule, "--steps", "2", "--json"]
    losses = {}
    for processes, more in ((1, []), (2, ["--sequence-parallel", "2", "--sequence-parallel-scheme", "halo"])):
        output = tmp_path / str(processes)
        ranks = Ranks(tmp_path / f"ranks {processes}", processes, distributed_training.command_line, *arguments, "--output", str(output), *more)  # fmt: skip
        ranks.finish()
        losses[processes] = [row["loss"] for row in read_losses(output / "loss.csv")]
    assert len(losses[1]) == 2 and losses[2] == pytest.approx(losses[1], rel=1e-4)
