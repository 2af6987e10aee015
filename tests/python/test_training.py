"""The trainer: data, objective, learning rate, warm-up, exact resumption, LoRA, errors. Tiny models, a few steps each."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from fpsattention.errors import ConfigError
from fpsattention.schedule import Schedule
from fpsattention.training import LatentFolder, TrainConfig, flow_matching_loss, sample_sigma, train, write_synthetic
from fpsattention.training.data import shuffled
from fpsattention.training.learning_rate import AdaptiveLearningRate
from fpsattention.training.model import tiny_transformer
from fpsattention.training.trainer import check_gradients, read_losses
from fpsattention.training.warmup import SparsityWarmup, relaxed, relaxed_window

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (4, 3, 10, 14)  # token grid 3 x 5 x 7: primes
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def config(latents, output, **changes):
    return TrainConfig(
        **{"data": str(latents), "output": str(output), "steps": 4, "batch_size": 2, "warmup_steps": 2, **changes}
    )


def test_synthetic_data_is_deterministic_and_moves(latents, tmp_path):
    again = write_synthetic(tmp_path, num_samples=5, latent_shape=SHAPE, text_shape=(3, 16))
    first, second = LatentFolder(latents), LatentFolder(again)
    assert len(first) == 5 and first.latent_shape == SHAPE
    for a, b in ((first[i], second[i]) for i in range(5)):
        assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["prompt_embeds"], b["prompt_embeds"])
        assert (a["latents"][:, 0] - a["latents"][:, -1]).abs().max() > 0.3  # more than the noise of 0.02


def test_shuffled_is_one_sequence_however_it_is_cut():
    whole = shuffled(5, 3, 0, 17)
    assert whole == shuffled(5, 3, 0, 6) + shuffled(5, 3, 6, 11)
    assert sorted(whole[:5]) == sorted(whole[5:10]) == [0, 1, 2, 3, 4] and whole[:5] != whole[5:10]
    assert whole != shuffled(5, 4, 0, 17)


def test_sigma_sampling():
    sigma = sample_sigma(4000, torch.Generator().manual_seed(0), shift=3.0)
    assert sigma.min() > 0 and sigma.max() < 1
    # The median of a shifted uniform is 3 * 0.5 / (1 + 2 * 0.5) = 0.75; its sampling error is below 0.02.
    assert abs(sigma.median() - 0.75) < 0.02


def test_loss_is_zero_for_the_true_velocity_and_one_sigma_per_sample():
    latents, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    seen = {}

    class Oracle(torch.nn.Module):
        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            seen["timestep"], seen["x"] = timestep, hidden_states
            return (noise - latents,)

    sigma = torch.tensor([0.25, 1.0])
    loss = flow_matching_loss(Oracle(), latents, torch.zeros(2, 1, 8), sigma, noise)
    assert loss.shape == (2,) and loss.abs().max() == 0
    assert seen["timestep"].tolist() == [250.0, 1000.0]
    torch.testing.assert_close(seen["x"][0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(seen["x"][1], noise[1])


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_learning_rate_warms_up_then_falls_and_resumes_exactly(decay_steps):
    """Halved on a plateau, or linearly to nothing after 20 steps."""

    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return AdaptiveLearningRate(
            optimizer, warmup_steps=4, patience=3, smoothing=0.0, minimum=0.1, decay_steps=decay_steps
        )

    def run(rate, count):
        values = []
        for _ in range(count):
            values.append(rate.value)
            rate.step(1.0)
        return values

    whole = run(make(), 20)
    if decay_steps is None:
        assert whole[:4] == [0.25, 0.5, 0.75, 1.0] and whole[-1] <= 0.25
    else:
        assert whole == pytest.approx([0.25, 0.5, 0.75, 1.0, *(i / 16 for i in range(16, 0, -1))])
    first = make()
    begun = run(first, 9)
    second = make()
    second.optimizer.load_state_dict(first.optimizer.state_dict())  # holds the current rate, as in a checkpoint
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + run(second, 11) == whole


def test_relaxed_window_goes_from_dense_to_the_window():
    tiles = (3, 5, 4)
    assert relaxed_window((3, 3, 2), 0.0, tiles) is None and relaxed_window((3, 3, 2), 1.0, tiles) == (3, 3, 2)
    assert relaxed_window((3, 5, 2), 0.5, tiles) == pytest.approx(0.75) and relaxed_window(
        0.2, 0.5, tiles
    ) == pytest.approx(0.6)
    assert relaxed_window(None, 0.7, tiles) is None
    paper = Schedule.preset("paper")
    assert relaxed(paper, 1.0, tiles) == paper
    assert all(level.window is None for level in relaxed(paper, 0.0, tiles).levels.values())


def test_warmup_applies_each_stage_once(latents):
    model = tiny_transformer(LatentFolder(latents))
    warmup = SparsityWarmup(model, Schedule.preset("paper"), (3, 5, 7), warmup_steps=6, stages=3)
    assert [warmup.stage_at(step) for step in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    warmup.at(0)
    first = warmup.handle
    warmup.at(1)
    assert warmup.handle is first
    warmup.at(2)
    assert warmup.handle is not first
    warmup.remove()
    assert warmup.handle is None


@pytest.mark.parametrize("schedule", ["paper", None])
@pytest.mark.slow
def test_training_runs_and_leaves_its_files(latents, tmp_path, schedule):
    result = train(
        config(
            latents, tmp_path, schedule=schedule, validate_every=2, validation_samples=1, gradient_accumulation_steps=2
        )
    )
    assert len(result.train) == 4 and set(result.validation) == {2, 4}
    rows = read_losses(tmp_path / "loss.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and [row["loss"] for row in rows] == pytest.approx(
        result.train
    )
    assert "validation_loss" in rows[1] and "validation_loss" not in rows[0]
    assert (tmp_path / "transformer" / "config.json").exists()
    assert (tmp_path / "fps_schedule.json").exists() == (schedule is not None)
    if schedule:
        assert Schedule.load(tmp_path / "fps_schedule.json") == Schedule.preset("paper", flow_shift=3.0)


@pytest.mark.slow
def test_resume_continues_with_the_same_bits(latents, tmp_path):
    whole = train(config(latents, tmp_path / "whole", steps=5, sparsity_warmup_steps=3, sparsity_warmup_stages=3))
    part = config(
        latents, tmp_path / "part", steps=3, checkpoint_every=3, sparsity_warmup_steps=3, sparsity_warmup_stages=3
    )
    first = train(part)
    second = train(TrainConfig(**{**part.as_dict(), "steps": 5, "resume": True}))
    assert second.first_step == 3 and first.train + second.train == whole.train
    assert [r["step"] for r in read_losses(tmp_path / "part" / "loss.csv")] == [0, 1, 2, 3, 4]
    from safetensors.torch import load_file

    name = "transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "part" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_lora_trains_only_the_adapter_and_saves_it(latents, tmp_path):
    model = tiny_transformer(LatentFolder(latents))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(config(latents, tmp_path, steps=2, lora_rank=2, gradient_checkpointing=True), transformer=model)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora" not in name}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any((tmp_path / "lora").glob("*.safetensors")) and (tmp_path / "fps_schedule.json").exists()


def test_bf16_mixed_precision(latents, tmp_path):
    result = train(config(latents, tmp_path, steps=2, mixed_precision="bf16"))
    assert all(0 < loss < 10 for loss in result.train)


def test_a_diverging_run_stops_and_says_where(latents, tmp_path):
    model = tiny_transformer(LatentFolder(latents))
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train(config(latents, tmp_path, schedule=None), transformer=model)
    model.proj_out.weight.grad = torch.full_like(model.proj_out.weight, float("inf"))
    with pytest.raises(FloatingPointError, match="gradient not finite in proj_out.weight"):
        check_gradients(model)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 0}, "steps 0, expected at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision 'fp8', expected 'no' or 'bf16'"),
        ({"sigma_sampling": "cosine"}, "sigma_sampling 'cosine'"),
        ({"schedule": None, "sparsity_warmup_steps": 3}, "sparsity_warmup_steps 3, expected 0 without a schedule"),
        ({"learning_rate": -1.0}, "learning_rate -1.0, expected a positive number"),
        ({"weight_decay": float("nan")}, "weight_decay nan, expected a finite number"),
        ({"steps": "4"}, "steps '4', expected int"),
        ({"steps": True}, "steps True, expected int"),
        ({"learning_rate_decay": "linear", "warmup_steps": 4}, "warmup_steps 4, expected less than steps 4"),
        ({"keep_checkpoints": -1}, "keep_checkpoints -1, expected at least 0"),
    ],
)
def test_bad_settings(latents, tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        config(latents, tmp_path, **changes)


def test_bad_data(latents, tmp_path):
    with pytest.raises(ConfigError, match="no \\*.safetensors files"):
        LatentFolder(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        LatentFolder(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint-"):
        train(config(latents, tmp_path / "out", resume=True))
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        train(config(latents, tmp_path / "out", validate_every=1, validation_samples=5))


@pytest.mark.slow
def test_example_trainer_needs_one_line(latents, tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "train_with_accelerate.py"
    lines = [line for line in script.read_text().splitlines() if "fps." in line]
    assert len(lines) == 1 and lines[0].strip().startswith('fps.apply(model, "paper")')

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")

    run(latents, tmp_path / "out", "--steps", "2")
    assert (tmp_path / "out" / "config.json").exists() and "step 1: loss" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no \\*.safetensors files in '/nope'"):
        run("/nope", tmp_path / "x")


def test_command_line_names_the_missing_package(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fpsattention.cli import app

    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = CliRunner().invoke(app, ["train", "--synthetic", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert "'accelerate' cannot be imported" in result.stderr and 'pip install "fpsattention[train]"' in result.stderr


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    from fpsattention.cli import app

    runner = CliRunner()
    write_synthetic(tmp_path / "data", num_samples=3, latent_shape=SHAPE, text_shape=(3, 16))
    arguments = ["train", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--steps", "2", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 2 and (tmp_path / "run" / "fps_schedule.json").exists()
    result = runner.invoke(app, ["train", "--output", str(tmp_path / "x")])
    assert result.exit_code == 2 and "expected exactly one of them" in result.stderr
    (tmp_path / "data" / "sample_00001.safetensors").write_bytes(b"spoiled")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2 and "not a readable safetensors file" in json.loads(result.stdout)["error"]


def test_synthetic_latents_are_those_of_the_seed(tmp_path, monkeypatch):
    """Another seed in the same folder has data of its own; what an interrupted run left half made is made anew."""
    from typer.testing import CliRunner

    from fpsattention.cli import app
    from fpsattention.training.data import synthetic_folder

    used = []
    monkeypatch.setattr("fpsattention.training.trainer.train", lambda config, **_: used.append(Path(config.data)))
    monkeypatch.setattr("fpsattention.training.trainer.summary", lambda _: '{"loss_last_20": null}')
    half = synthetic_folder(tmp_path, seed=3)
    half.with_name(f"{half.name}.tmp").mkdir()
    for seed in ("2", "3", "2"):
        result = CliRunner().invoke(app, ["train", "--synthetic", "--output", str(tmp_path), "--seed", seed])
        assert result.exit_code == 0, result.output
    assert used[0] == used[2] != used[1] == half
    for folder, seed in zip(used, (2, 3), strict=False):
        write_synthetic(tmp_path / f"want{seed}", seed=seed, num_samples=1)
        first, want = (f / "sample_00000.safetensors" for f in (folder, tmp_path / f"want{seed}"))
        assert first.read_bytes() == want.read_bytes() and len(list(folder.glob("*.safetensors"))) == 64
    assert {path.name for path in tmp_path.glob("synthetic*")} == {used[0].name, used[1].name}


def test_command_line_has_an_option_for_every_setting():
    from typer.testing import CliRunner

    from fpsattention.cli import app

    text = CliRunner().invoke(app, ["train", "--help"]).stdout
    for setting in dataclasses.fields(TrainConfig):
        assert f"--{setting.name.replace('_', '-')} " in text, setting.name


@pytest.mark.slow
def test_the_newest_checkpoints_stay(latents, tmp_path):
    (tmp_path / "unfinished-checkpoint").mkdir()  # of a run that was killed while it saved
    train(config(latents, tmp_path, steps=4, checkpoint_every=1))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-000003", "checkpoint-000004"]
    train(config(latents, tmp_path, steps=6, checkpoint_every=1, keep_checkpoints=0, resume=True))
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4


def test_a_new_run_leaves_an_earlier_ones_checkpoints_alone(latents, tmp_path):
    """Its own, of fewer steps, would be the older ones: deleted at once, and resumed from the other's."""
    (tmp_path / "checkpoint-000100").mkdir()
    with pytest.raises(ConfigError, match="output .*, expected resume, or a folder without checkpoint-000100"):
        train(config(latents, tmp_path, steps=2, checkpoint_every=1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000100"]
