"""A dense teacher for the sparse student: same inputs, gradients in the student only, data-free; adapters merged and measured again."""

from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

import tiny_wan

import fpsattention as fps
from fpsattention.errors import ConfigError
from fpsattention.training import (
    LatentFolder,
    Teacher,
    TrainConfig,
    rollout,
    step_distillation_loss,
    train,
    velocity_loss,
)  # fmt: skip
from fpsattention.training.model import tiny_transformer
from fpsattention.training.objective import predict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

SHAPE = (4, 3, 10, 14)  # token grid 3 x 5 x 7: primes
SPARSE = {
    "format": "fpsattn-schedule/2", "tile": [3, 3, 3], "levels": {"sparse": {"precision": "fp8", "window": [1, 1, 2]}},
    "phases": [{"sigma": [1.0, 0.0], "level": "sparse"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "sparse.json"
    fps.Schedule.from_dict(SPARSE).save(path)
    return str(path)


def config(latents, output, **changes):
    settings = {"data": str(latents), "output": str(output), "steps": 3, "batch_size": 2, "warmup_steps": 0, **changes}
    return TrainConfig(**settings)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, *SHAPE, generator=generator),
        torch.tensor([0.9, 0.3])[:batch],
        torch.randn(batch, 3, 16, generator=generator),
    )


def test_disabled_is_the_model_itself():
    model = tiny_wan.transformer()
    exact = tiny_wan.run(model, [900.0, 100.0])
    with fps.apply(model, {**SPARSE, "tile": tiny_wan.TILE}) as handle:
        sparse = tiny_wan.run(model, [900.0, 100.0])
        with handle.disabled():
            assert torch.equal(tiny_wan.run(model, [900.0, 100.0]), exact)
        assert torch.equal(tiny_wan.run(model, [900.0, 100.0]), sparse) and not torch.equal(sparse, exact)
        assert handle.report().forwards == {"transformer": 4}  # two samples, twice: the teacher's do not count
    with (
        fps.apply(model, {**SPARSE, "tile": tiny_wan.TILE, "own_linears": []}, linears="fp8") as handle,
        handle.disabled(),
    ):
        assert torch.equal(tiny_wan.run(model, [900.0, 100.0]), exact)  # projections, too
    with fps.apply(model, {**SPARSE, "tile": tiny_wan.TILE}) as handle:
        with pytest.raises(ZeroDivisionError), handle.disabled():
            raise ZeroDivisionError
        assert torch.equal(tiny_wan.run(model, [900.0, 100.0]), sparse)


def test_rollout_follows_the_teachers_sampler():
    """One Euler step per sample, by hand; a teacher of constant velocity is followed exactly in any number of steps."""
    x, sigma, prompt = inputs()
    v = torch.randn_like(x)
    for steps in (1, 3):
        out = rollout(lambda x, s, p: v, x, sigma, prompt, steps)
        torch.testing.assert_close(out, x + (sigma - 1).view(-1, 1, 1, 1, 1) * v, rtol=1e-5, atol=1e-5)
    seen = []
    rollout(lambda x, s, p: seen.append(s) or x, x, sigma, prompt, 4)
    torch.testing.assert_close(torch.stack(seen), torch.stack([1 + (sigma - 1) * i / 4 for i in range(4)]))


def test_velocity_loss_reaches_the_student_only(latents):
    data = LatentFolder(latents)
    student = tiny_transformer(data)
    teacher = Teacher(student, adapter=False)
    x, sigma, prompt = inputs()

    def velocity(x, sigma, prompt):
        return predict(student, x, sigma, prompt)

    assert torch.equal(velocity_loss(velocity, teacher, x, sigma, prompt), torch.zeros(2))  # the same model, both dense
    with fps.apply(student, SPARSE):
        loss = velocity_loss(velocity, teacher, x, sigma, prompt)
        assert (loss > 0).all()
        loss.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert student.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_a_share_of_the_data_in_the_target(latents):
    """The loss of ``share * data + (1 - share) * teacher``: its gradient is that blend of flow matching's and the teacher's."""
    data = LatentFolder(latents)
    student = tiny_transformer(data)
    teacher = Teacher(student, adapter=False)
    x, sigma, prompt = inputs()
    sample = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    def gradient(**options):
        student.zero_grad()
        velocity_loss(partial(predict, student), teacher, x, sigma, prompt, **options).sum().backward()
        return student.blocks[0].attn1.to_q.weight.grad.clone()

    with fps.apply(student, SPARSE):
        of_teacher, of_data, of_both = gradient(), *(gradient(data=sample, data_share=share) for share in (1.0, 0.25))
    torch.testing.assert_close(
        of_both, 0.75 * of_teacher + 0.25 * of_data, rtol=1e-3, atol=1e-6 * of_data.abs().max().item()
    )
    assert (of_data - of_teacher).norm() > of_teacher.norm()


def test_step_distillation_with_two_schedules_in_one_process(latents):
    """Teacher: FP8 with everything attended; student: sparse. Each reads its own schedule at its own sigmas."""
    data = LatentFolder(latents)
    student, teacher = tiny_transformer(data), tiny_transformer(data)
    x, sigma, prompt = inputs()
    with fps.apply(student, SPARSE) as ours, fps.apply(teacher, "fp8") as theirs:
        loss = step_distillation_loss(
            lambda *a: predict(student, *a),
            lambda *a: predict(teacher, *a),
            x,
            sigma,
            sigma / 2,
            prompt,
            teacher_steps=2,
        )
        loss.sum().backward()
        assert ours.report().forwards == {"transformer": 2} and theirs.report().forwards == {"transformer": 4}
        assert {row.level for row in ours.report().rows} == {"sparse"} and {
            row.level for row in theirs.report().rows
        } == {"fp8"}
        assert ours.report().density < theirs.report().density == 1.0
        # By hand: the mean of the teacher's velocities at the two sigmas is what one step of the student has to match.
        with torch.no_grad():
            first = predict(teacher, x, sigma, prompt)
            middle = x - (sigma / 4).view(-1, 1, 1, 1, 1) * first
            target = (first + predict(teacher, middle, 0.75 * sigma, prompt)) / 2
            wanted = (predict(student, x, sigma, prompt) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("lora_rank", "learning_rate"), [(0, 3e-5), (2, 3e-3)])
def test_training_without_data_closes_the_distance(latents, schedule, tmp_path, lora_rank, learning_rate):
    """Prompts alone: the files' latents are not even there. The distance to the dense model falls; the dense model is the one before training."""
    from safetensors.torch import load_file, save_file

    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for path in sorted(latents.glob("*.safetensors")):
        save_file({"prompt_embeds": load_file(path)["prompt_embeds"]}, prompts / path.name)
    settings = config(
        prompts, tmp_path / "run", objective="velocity", noise_latents="4,3,10,14", rollout_steps=2, steps=16, learning_rate=learning_rate,
        schedule=schedule, lora_rank=lora_rank, validate_every=4, validation_samples=2,
    )  # fmt: skip
    model = tiny_transformer(LatentFolder(latents))
    # An untrained model's output layer is far too small for its attention to show.
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    result = train(settings, transformer=model)
    losses = list(result.validation.values())
    assert losses[-1] < 0.95 * losses[0]
    assert not fps.status(model)  # the schedule is off


def test_the_adapters_teacher_is_the_model_without_it(latents):
    model = tiny_transformer(LatentFolder(latents))
    x, sigma, prompt = inputs()
    with torch.no_grad():
        exact = predict(model, x, sigma, prompt)
    from fpsattention.training.trainer import _add_lora

    _add_lora(model, TrainConfig(data="x", output="y", lora_rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    with fps.apply(model, SPARSE) as handle:
        teacher = Teacher(model, adapter=True, schedule_off=handle.disabled)
        assert torch.equal(teacher(x, sigma, prompt), exact)
        with torch.no_grad():
            assert not torch.allclose(predict(model, x, sigma, prompt), exact, atol=1e-3)  # both are on again


def test_evaluate_merges_and_measures_again(latents, schedule, tmp_path, capsys):
    """Merged weights are the adapter's to rounding; another adapter comes on top; the model that was given is left as it was."""
    pytest.importorskip("peft")
    from fpsattention.cli.main import app
    from fpsattention.training.evaluate import evaluate

    data = LatentFolder(latents)
    for name, seed in (("closing", 0), ("other", 5)):
        settings = config(
            latents, tmp_path / name, lora_rank=2, learning_rate=1e-2, steps=3, seed=seed,
            schedule=schedule if name == "closing" else None,
        )  # fmt: skip
        train(settings, transformer=tiny_transformer(data))
    model = tiny_transformer(data)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    chosen = fps.Schedule.load(schedule)
    gaps = evaluate(
        model, data, chosen, adapter=tmp_path / "closing" / "lora", other=tmp_path / "other" / "lora", samples=2
    )
    rows = {gap.name: gap for gap in gaps}
    assert list(rows) == [
        "before", "with the adapter", "adapter merged", "before, another adapter on top", "merged, another adapter on top",
    ]  # fmt: skip
    assert rows["before"].loss != rows["before"].dense == rows["before"].base
    adapted, merged = rows["with the adapter"], rows["adapter merged"]
    assert adapted.dense != adapted.base == merged.base == rows["before"].base
    assert merged.loss == pytest.approx(adapted.loss, rel=1e-3) and merged.dense == pytest.approx(
        adapted.dense, rel=1e-5
    )
    assert adapted.loss < rows["before"].loss  # three large steps of training do lower this loss
    top = rows["merged, another adapter on top"]
    assert top.base == rows["before, another adapter on top"].dense and top.loss != merged.loss
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    arguments = [
        "evaluate",
        "--data",
        str(latents),
        "--schedule",
        schedule,
        "--adapter",
        str(tmp_path / "closing" / "lora"),
    ]
    with pytest.raises(SystemExit) as stopped:
        app([*arguments, "--samples", "2"])
    assert stopped.value.code == 0 and "adapter merged" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"fpsattention\.evaluate: the adapter .* holds 0"):
        evaluate(model, data, chosen, adapter=tmp_path, samples=2)


def test_errors(latents):
    for changes, message in (
        ({"objective": "regression"}, "objective 'regression', expected 'flow_matching' or 'velocity'"),
        ({"objective": "velocity", "schedule": None}, "objective 'velocity', expected a schedule"),
        ({"noise_latents": "4,3,10,14"}, "noise_latents '4,3,10,14', expected"),
        ({"objective": "velocity", "sequence_parallel": 2}, "sequence_parallel 2, expected 1"),
        ({"objective": "velocity", "noise_latents": "4,3,10"}, "noise_latents '4,3,10', expected"),
        ({"data_share": 0.5}, "data_share 0.5, expected 0 but for objective 'velocity' that reads latents"),
        (
            {"objective": "velocity", "noise_latents": "4,3,10,14", "data_share": 0.5},
            "data_share 0.5, expected 0 but for objective 'velocity' that reads latents",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            config(latents, "x", **changes)
