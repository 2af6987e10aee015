"""The paper's recipe in the trainer: moving average, dropped prompts, epsilon, recipe files."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fpsattention.errors import ConfigError
from fpsattention.training import LatentFolder, TrainConfig, train
from fpsattention.training.config import load_recipe
from fpsattention.training.data import EMPTY_PROMPT
from fpsattention.training.model import tiny_transformer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def config(latents, output, **changes):
    return TrainConfig(**{"data": str(latents), "output": str(output), "steps": 4, "warmup_steps": 1, **changes})


def test_the_recipe_is_the_papers():
    """arXiv 2506.04648, appendix: the numbers as they are published."""
    published = {
        "learning_rate": 5e-6, "warmup_steps": 200, "weight_decay": 1e-4, "max_grad_norm": 1.0, "ema_decay": 0.99,
        "adam_eps": 1e-15, "prompt_dropout": 0.1, "sigma_sampling": "logit_normal", "flow_shift": 5.0,
    }  # fmt: skip
    recipe = load_recipe("paper")
    assert {name: recipe[name] for name in published} == published
    TrainConfig(data="d", output="o", **recipe)


@pytest.mark.slow
def test_the_moving_average_is_validated_and_saved(latents, tmp_path):
    model = tiny_transformer(LatentFolder(latents))
    seen = [[p.detach().clone() for p in model.parameters()]]
    result = train(
        config(latents, tmp_path, learning_rate=1e-2, ema_decay=0.75, validate_every=4, validation_samples=1),
        transformer=model,
        on_step=lambda *_: seen.append([p.detach().clone() for p in model.parameters()]),
    )
    average = [p.clone() for p in seen[0]]
    for weights in seen[1:]:
        average = [0.75 * a + 0.25 * w for a, w in zip(average, weights, strict=True)]
    saved = load_file(tmp_path / WEIGHTS)
    for (name, parameter), want in zip(model.named_parameters(), average, strict=True):
        torch.testing.assert_close(saved[name], want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parameter, seen[-1][list(dict(model.named_parameters())).index(name)])  # put back
    assert any(not torch.equal(a, w) for a, w in zip(average, seen[-1], strict=True))
    plain = train(config(latents, tmp_path / "raw", learning_rate=1e-2, validate_every=4, validation_samples=1))
    assert plain.train == result.train and plain.validation != result.validation


@pytest.mark.slow
def test_a_run_with_everything_resumes_with_the_same_bits(latents, tmp_path):
    options = {"learning_rate": 1e-2, "ema_decay": 0.9, "prompt_dropout": 0.5, "sigma_sampling": "logit_normal"}
    whole = train(config(latents, tmp_path / "whole", **options))
    part = config(latents, tmp_path / "part", checkpoint_every=2, **{**options, "steps": 2})
    first = train(part)
    second = train(TrainConfig(**{**part.as_dict(), "steps": 4, "resume": True}))
    assert first.train + second.train == whole.train
    a, b = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "part" / WEIGHTS)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_prompts_are_dropped_per_sample_at_their_rate(latents, tmp_path):
    model = tiny_transformer(LatentFolder(latents))
    empty = torch.full((3, 16), 7.0)
    save_file({"prompt_embeds": empty}, latents / EMPTY_PROMPT)
    assert len(LatentFolder(latents)) == 5  # it is no sample
    dropped = []

    def look(_module, _args, kwargs):
        dropped.extend((p == empty).all().item() for p in kwargs["encoder_hidden_states"])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    train(config(latents, tmp_path, steps=20, batch_size=4, prompt_dropout=0.25, schedule=None), transformer=model)
    assert len(dropped) == 80 and 8 <= sum(dropped) <= 34  # 20 expected, 3.6 standard deviations
    assert any(len(set(dropped[i : i + 4])) == 2 for i in range(0, 80, 4))  # within a batch
    dropped.clear()
    train(config(latents, tmp_path, steps=2, batch_size=4, schedule=None), transformer=model)
    assert not any(dropped)
    hook.remove()


@pytest.mark.slow
def test_adam_eps_reaches_the_optimizer(latents, tmp_path):
    runs = [train(config(latents, tmp_path / str(eps), adam_eps=eps)).train for eps in (1e-8, 1.0)]
    assert runs[0][0] == runs[1][0] and runs[0] != runs[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ema_decay": 1.0}, r"ema_decay 1\.0, expected less than 1"),
        ({"prompt_dropout": 1.5}, r"prompt_dropout 1\.5, expected at most 1"),
        ({"adam_eps": 0.0}, r"adam_eps 0\.0, expected a positive number"),
    ],
)
def test_settings_are_checked(changes, text):
    with pytest.raises(ConfigError, match=text):
        TrainConfig(data="d", output="o", **changes)


def test_a_missing_empty_prompt_is_named_before_training(latents, tmp_path):
    (latents / EMPTY_PROMPT).unlink(missing_ok=True)
    with pytest.raises(
        ConfigError, match=r"no empty_prompt/prompt_embeds\.safetensors in .*, expected the prompt_embeds"
    ):
        train(config(latents, tmp_path, prompt_dropout=0.1))
    save_file({"prompt_embeds": torch.zeros(3, 8)}, latents / EMPTY_PROMPT)
    with pytest.raises(ConfigError, match=r"has prompt_embeds \(3, 8\), expected \(3, 16\)"):
        train(config(latents, tmp_path, prompt_dropout=0.1))
    save_file({"prompt_embeds": torch.zeros(3, 16)}, latents / EMPTY_PROMPT)


def test_recipe_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe 'papers', expected a JSON file or one of paper"):
        load_recipe("papers")
    bad = tmp_path / "r.json"
    bad.write_text(json.dumps({"lr": 1}))
    with pytest.raises(ConfigError, match=r"r\.json holds 'lr', expected settings of TrainConfig"):
        load_recipe(bad)
    bad.write_text("{")
    with pytest.raises(ConfigError, match=r"r\.json is not JSON"):
        load_recipe(bad)


@pytest.mark.slow
def test_twenty_steps_of_paper_mode_from_the_command_line(tmp_path):
    """The paper's recipe, phases and tile on the tiny Wan; options given on the command line win over the recipe."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fpsattention.cli import app
    from fpsattention.paper import PaperMode

    schedule, out = tmp_path / "paper_mode.json", tmp_path / "run"
    PaperMode(0.2, 0.8).schedule(FlowMatchEulerDiscreteScheduler(shift=5.0), 50).save(schedule)
    arguments = [
        "train",
        "--synthetic",
        "--output",
        str(out),
        "--recipe",
        "paper",
        "--steps",
        "20",
        "--batch-size",
        "1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--schedule", str(schedule), "--warmup-steps", "5", "--json"])
    assert result.exit_code == 0, result.output
    used = json.loads((out / "config.json").read_text())
    recipe = {**load_recipe("paper"), "schedule": str(schedule), "warmup_steps": 5}
    assert {name: used[name] for name in recipe} == recipe
    trained = json.loads((out / "fps_schedule.json").read_text())
    assert trained["tile"] == [6, 8, 8] and [p["level"] for p in trained["phases"]] == [
        "coarse",
        "fine",
        "intermediate",
    ]
    losses = json.loads(result.stdout)
    assert losses["steps"] == 20 and 0 < losses["loss_last_20"] < 10
