"""The reference trainer: flow matching on precomputed latents, through the FP8 sparse forward, on ``accelerate``.

Nothing here is needed to train with fpsattention: ``fpsattention.apply(transformer, schedule)`` before the loop of any trainer is
enough (``examples/``). This one is small and complete: LoRA or full, bf16 mixed precision, gradient accumulation, adaptive learning
rate, sparsity warm-up, and resumption that continues exactly as if the run had not stopped.

Every random number is drawn from a generator seeded by (seed, step, micro-batch, process), and never carried across steps: a resumed
run needs no generator state.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import LORA_TARGETS, TrainConfig, checkpoints
from .data import LatentFolder, shuffled
from .ema import ExponentialMovingAverage, local
from .learning_rate import AdaptiveLearningRate
from .model import load_transformer, tiny_transformer, token_grid
from .objective import flow_matching_loss, noisy, predict, rollout, sample_sigma, velocity_loss
from .teacher import Teacher
from .warmup import SparsityWarmup

VALIDATION_SEED = 1_234_567  # the same noise and sigmas in every run that is compared


@dataclass
class TrainResult:
    """Losses of a run: ``train[i]`` belongs to step ``i + first_step``; ``validation`` maps a step to its loss."""

    output: Path
    first_step: int = 0
    train: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)


class _Progress:
    """The step counter, saved and restored by accelerate beside the model."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)


def check_gradients(model: torch.nn.Module) -> None:
    """Raise FloatingPointError naming the first parameters whose gradient is not finite."""
    bad = [
        name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(local(p.grad)).all()
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise FloatingPointError(f"fpsattention.train: gradient not finite in {', '.join(bad[:3])}{more}")


def validation_loss(
    model: torch.nn.Module, data: LatentFolder, config: TrainConfig, num_samples: int, teacher: Teacher | None = None
) -> float:
    """Mean loss over the last ``num_samples`` samples of the folder, at evenly spread sigmas, with fixed noise.

    The loss is flow matching's, or with a teacher the distance from its velocity.
    """
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    generator = _generator(VALIDATION_SEED)
    total = 0.0
    with torch.no_grad():
        for i in range(num_samples):
            batch = data.batch([len(data) - 1 - i % len(data)])
            batch["noise"] = torch.randn((1, *data.latent_shape), generator=generator)
            batch = {name: t.to(parameter.device, parameter.dtype) for name, t in batch.items()}
            sigma = torch.tensor([(i + 0.5) / num_samples], device=parameter.device)
            total += _loss(model, batch, sigma, config, teacher).item()
    model.train(was_training)
    return total / num_samples


def _loss(
    model: torch.nn.Module, batch: dict[str, Tensor], sigma: Tensor, config: TrainConfig, teacher: Teacher | None
) -> Tensor:
    """Loss per sample ``[B]`` of a batch of ``prompt_embeds``, ``noise`` and, where they are read, ``latents``."""
    noise, prompt = batch["noise"], batch["prompt_embeds"]
    if teacher is None:
        return flow_matching_loss(model, batch["latents"], prompt, sigma, noise)
    student, share = partial(predict, model), config.data_share
    if "latents" in batch:
        latents = batch["latents"]
        x = noisy(latents, noise, sigma)
        return velocity_loss(
            student, teacher, x, sigma, prompt, data=noise - latents if share else None, data_share=share
        )
    return velocity_loss(student, teacher, rollout(teacher, noise, sigma, prompt, config.rollout_steps), sigma, prompt)


def num_training_samples(data: LatentFolder, config: TrainConfig) -> int:
    """All samples, less the held-out ones where there is validation."""
    count = len(data) - (config.validation_samples if config.validate_every else 0)
    if count < 1:
        raise ConfigError(
            f"fpsattention.train: {len(data)} samples in '{config.data}' and validation_samples {config.validation_samples}: nothing "
            "is left to train on"
        )
    return count


def _prepare_weights(model: Any, config: TrainConfig) -> None:
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.lora_rank:
        model.requires_grad_(False)
        _add_lora(model, config)


def _add_lora(model: Any, config: TrainConfig) -> None:
    from peft import LoraConfig

    model.add_adapter(
        LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
    )


def _save_weights(accelerator: Any, model: Any, config: TrainConfig, output: Path, schedule: Any) -> None:
    """Called by all processes: with FSDP2 each holds a shard, and putting them together takes all of them."""
    from diffusers import WanTransformer3DModel

    weights = accelerator.unwrap_model(model)
    if accelerator.num_processes > 1:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:  # a whole copy on the CPU: save methods of models know nothing of shards
            weights = WanTransformer3DModel.from_config(weights.config)
            if config.lora_rank:
                _add_lora(weights, config)
            weights.load_state_dict(state, assign=True)  # in the dtypes that were trained
    if accelerator.is_main_process:
        if config.lora_rank:
            weights.save_lora_adapter(output / "lora")
        else:
            weights.save_pretrained(output / "transformer")
        if schedule is not None:
            schedule.save(output / "fps_schedule.json")
    accelerator.wait_for_everyone()


def _spread(accelerator: Any, transformer: torch.nn.Module, config: TrainConfig) -> list[Any]:
    """Spreads tokens over neighbouring processes: the inner dimension of a mesh (data parallel, sequence parallel).

    Weights stay replicated or sharded over all processes. The mean of gradients over all of them, which DDP and FSDP take, is the mean over
    samples (``fpsattention.parallel.shard``).
    """
    if config.sequence_parallel == 1:
        return []
    from ..parallel import shard

    groups, rest = divmod(accelerator.num_processes, config.sequence_parallel)
    if rest or not groups:
        raise ConfigError(
            f"fpsattention.train: sequence_parallel {config.sequence_parallel} with {accelerator.num_processes} processes, expected a divisor of "
            "them: start with torchrun or accelerate launch"
        )
    mesh = torch.distributed.init_device_mesh(
        accelerator.device.type, (groups, config.sequence_parallel), mesh_dim_names=("dp", "sp")
    )
    if config.sequence_parallel_scheme == "ulysses_bf16":
        return list(shard(transformer, mesh["sp"], exchange="bf16"))
    return list(shard(transformer, mesh["sp"], scheme=config.sequence_parallel_scheme))


def train(
    config: TrainConfig,
    *,
    transformer: torch.nn.Module | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Run the training that ``config`` describes.

    Args:
        transformer: train this model instead of loading ``config.model``.
        on_step: called with (step, loss) after every optimizer step.

    Raises:
        ConfigError: unusable data, model or settings.
        FloatingPointError: the loss (or, with ``debug``, a gradient) is not finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    import fpsattention as fps

    output, checkpoint = Path(config.output), config.resume_from()
    output.mkdir(parents=True, exist_ok=True)
    data = LatentFolder(config.data, config.latent_shape)
    num_training_samples(data, config)
    empty_prompt = data.empty_prompt() if config.prompt_dropout else None
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=_trackers(),
        project_dir=str(output),
    )
    set_seed(config.seed)
    if transformer is None:
        transformer = load_transformer(config.model) if config.model else tiny_transformer(data)
    _prepare_weights(transformer, config)

    spread = _spread(accelerator, transformer, config)
    schedule = None
    if config.schedule is not None:  # a preset's fractions of steps are those of a sampler with this shift
        schedule = fps.Schedule.resolve(config.schedule).with_flow_shift(config.flow_shift)
    grid = token_grid(transformer, data.latent_shape)
    warmup = SparsityWarmup(
        transformer, schedule, grid, config.sparsity_warmup_steps, config.sparsity_warmup_stages, config.debug
    )

    teacher = None
    if config.objective == "velocity":
        teacher = Teacher(transformer, config.lora_rank > 0, warmup.off, accelerator.autocast).to(accelerator.device)

    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_eps
    )
    learning_rate = AdaptiveLearningRate(
        optimizer,
        warmup_steps=config.warmup_steps,
        patience=config.plateau_patience,
        minimum=config.learning_rate * 1e-2,
        decay_steps=config.steps if config.learning_rate_decay == "linear" else None,
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    progress = _Progress()
    average = None
    if config.ema_decay:
        average = ExponentialMovingAverage((p for p in model.parameters() if p.requires_grad), config.ema_decay)
    accelerator.register_for_checkpointing(learning_rate, progress, *([average] if average else []))
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    if accelerator.is_main_process:
        config.save(output / "config.json")
    accelerator.init_trackers("fpsattention")

    result = TrainResult(output, first_step=progress.step)
    log = _LossLog(output / "loss.csv", progress.step) if accelerator.is_main_process else None
    model.train()
    try:
        while progress.step < config.steps:
            step = progress.step
            warmup.at(step)
            started = time.perf_counter()
            loss, grad_norm = _step(accelerator, model, optimizer, data, config, step, empty_prompt, teacher)
            progress.step += 1
            if average:
                average.update()
            learning_rate.step(loss)
            result.train.append(loss)
            row: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "learning_rate": learning_rate.value,
                "grad_norm": grad_norm,
            }
            if config.validate_every and (progress.step % config.validate_every == 0 or progress.step == config.steps):
                with average.swapped() if average else nullcontext():
                    value = validation_loss(model, data, config, config.validation_samples, teacher)
                result.validation[progress.step] = row["validation_loss"] = value
            row["seconds"] = time.perf_counter() - started
            accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
            if log:
                log.write(row)
            if on_step:
                on_step(step, loss)
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0:
                _save_checkpoint(accelerator, output, progress.step, config.keep_checkpoints)
        with average.swapped() if average else nullcontext():
            _save_weights(accelerator, model, config, output, schedule)
    finally:
        warmup.remove()
        for one in spread:
            one.remove()
        if log:
            log.close()
        accelerator.end_training()
    return result


def _step(
    accelerator: Any,
    model: torch.nn.Module,
    optimizer: Any,
    data: LatentFolder,
    config: TrainConfig,
    step: int,
    empty_prompt: Tensor | None,
    teacher: Teacher | None,
) -> tuple[float, float]:
    """One optimizer step; returns (mean loss, gradient norm)."""
    # Processes that share a sample draw the same one, with the same noise.
    rank, world = (n // config.sequence_parallel for n in (accelerator.process_index, accelerator.num_processes))
    micro_batches = config.gradient_accumulation_steps
    per_step = config.batch_size * micro_batches * world
    order = shuffled(num_training_samples(data, config), config.seed, step * per_step, per_step)
    losses: list[Tensor] = []
    grad_norm = torch.zeros(())
    for micro in range(micro_batches):
        begin = (micro * world + rank) * config.batch_size
        batch = data.batch(order[begin : begin + config.batch_size])
        generator = _generator(config.seed, step, micro, rank)
        sigma = sample_sigma(
            config.batch_size, generator, shift=config.flow_shift, logit_normal=config.sigma_sampling == "logit_normal"
        )
        batch["noise"] = torch.randn((config.batch_size, *data.latent_shape), generator=generator)
        if empty_prompt is not None:
            dropped = torch.rand(config.batch_size, generator=generator) < config.prompt_dropout
            batch["prompt_embeds"] = torch.where(dropped.view(-1, 1, 1), empty_prompt, batch["prompt_embeds"])
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        batch = {name: t.to(accelerator.device, dtype) for name, t in batch.items()}
        with accelerator.accumulate(model):
            loss = _loss(model, batch, sigma.to(accelerator.device), config, teacher).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"fpsattention.train: loss is {loss.item()} at step {step}: lower the learning rate, or rerun with debug=True "
                    "to see which layer's values are not finite"
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if config.debug:
                    check_gradients(model)
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
    whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # of all shards
    return mean.item(), float(whole)


def _trackers() -> list[str]:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


def _save_checkpoint(accelerator: Any, output: Path, step: int, keep: int) -> None:
    """A checkpoint has its name once it is whole, so an interrupted run leaves none that cannot be resumed; older ones go."""
    unfinished = output / "unfinished-checkpoint"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(output / f"checkpoint-{step:06d}")
        for old in checkpoints(output)[:-keep] if keep else []:
            shutil.rmtree(old)


class _LossLog:
    """``loss.csv``, a row per step, flushed at once. On resumption rows at or after the first step are dropped."""

    COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "validation_loss", "seconds")

    def __init__(self, path: Path, first_step: int):
        kept: list[dict[str, str]] = []
        if first_step and path.exists():
            with path.open() as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < first_step]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(kept)

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_losses(path: str | Path) -> list[dict[str, float]]:
    """The rows of a ``loss.csv``, numbers parsed, empty cells left out."""
    with Path(path).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def summary(result: TrainResult) -> str:
    """The run's result as JSON text."""
    tail = result.train[-20:]
    return json.dumps(
        {
            "output": str(result.output),
            "steps": result.first_step + len(result.train),
            "loss_last_20": sum(tail) / len(tail) if tail else None,
            "validation": result.validation,
        },
        indent=2,
    )
