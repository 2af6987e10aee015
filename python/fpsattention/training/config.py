"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import ConfigError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def _setting(
    default: Any, help: str, *, minimum: int | None = None, positive: bool = False, choices: tuple[str, ...] = ()
) -> Any:
    """A field with what it means (also the command line's help) and which values it takes."""
    wanted = {"minimum": minimum, "positive": positive, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **wanted})


@dataclass(frozen=True)
class TrainConfig:
    """What ``fpsattn train`` is told; its options are these fields. Lengths are in optimizer steps; a step sees
    ``batch_size * gradient_accumulation_steps`` samples on every process. Raises ConfigError on values that can never work.
    """

    data: str = dataclasses.field(metadata={"help": "Folder of precomputed latents (*.safetensors)."})
    output: str = dataclasses.field(
        metadata={"help": "Folder for weights, checkpoints, loss.csv and fps_schedule.json."}
    )
    model: str | None = _setting(
        None, "Wan transformer, or a pipeline that has one: folder or hub id. Default: a tiny random one."
    )
    schedule: str | None = _setting("paper", "Preset or schedule file; 'none' trains dense (the baseline).")
    steps: int = _setting(200, "Optimizer steps.", minimum=1)
    batch_size: int = _setting(2, "Samples per process and micro-batch.", minimum=1)
    gradient_accumulation_steps: int = _setting(1, "Micro-batches per step.", minimum=1)
    learning_rate: float = _setting(1e-4, "Peak learning rate.", positive=True)
    warmup_steps: int = _setting(20, "Steps of linear learning-rate warm-up.", minimum=0)
    plateau_patience: int = _setting(200, "Steps without progress before the learning rate is halved.", minimum=1)
    weight_decay: float = _setting(0.01, "Of AdamW.", minimum=0)
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.", positive=True)
    lora_rank: int = _setting(0, "Rank of the LoRA adapter; 0 trains all weights.", minimum=0)
    mixed_precision: str = _setting("no", "no or bf16.", choices=("no", "bf16"))
    sigma_sampling: str = _setting(
        "uniform", "uniform or logit_normal, then shifted by the flow shift.", choices=("uniform", "logit_normal")
    )
    flow_shift: float = _setting(3.0, "Flow shift of the sampler trained for.", positive=True)
    sparsity_warmup_steps: int = _setting(0, "Steps over which the density falls from 1 to the schedule's.", minimum=0)
    sparsity_warmup_stages: int = _setting(4, "Stages in which it falls.", minimum=1)
    gradient_checkpointing: bool = _setting(False, "Less memory, more compute.")
    validate_every: int = _setting(
        0, "Steps between validations on fixed samples, sigmas and noise; 0: never.", minimum=0
    )
    validation_samples: int = _setting(8, "Samples held out for validation.", minimum=1)
    checkpoint_every: int = _setting(0, "Steps between checkpoints; 0: never.", minimum=0)
    keep_checkpoints: int = _setting(2, "The newest so many checkpoints stay; 0: all.", minimum=0)
    resume: bool = _setting(False, "Continue from the last checkpoint in the output folder.")
    seed: int = _setting(0, "Of order, sigmas, noise and new weights.", minimum=0)
    debug: bool = _setting(False, "Name the layer whose values or gradients are not finite.")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for setting in dataclasses.fields(self):
            value, kind = getattr(self, setting.name), hints[setting.name]
            rules = {"minimum": None, "positive": False, "choices": (), **setting.metadata}
            fits = isinstance(value, (int, float) if kind is float else kind)
            if isinstance(value, bool) and kind is not bool:
                fits = False
            if not fits:
                raise _wrong(setting.name, value, f"{getattr(kind, '__name__', kind)}")
            if rules["choices"] and value not in rules["choices"]:
                raise _wrong(setting.name, value, " or ".join(map(repr, rules["choices"])))
            if kind is float and not math.isfinite(value):
                raise _wrong(setting.name, value, "a finite number")
            if rules["positive"] and value <= 0:
                raise _wrong(setting.name, value, "a positive number")
            if rules["minimum"] is not None and value < rules["minimum"]:
                raise _wrong(setting.name, value, f"at least {rules['minimum']}")
        if self.schedule is None and self.sparsity_warmup_steps:
            raise _wrong("sparsity_warmup_steps", self.sparsity_warmup_steps, "0 without a schedule")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"fpsattention.train: {name} {value!r}, expected {wanted}")
