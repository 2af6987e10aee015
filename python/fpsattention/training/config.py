"""Settings of a training run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclass(frozen=True)
class TrainConfig:
    """What ``fpsattn train`` is told. Lengths are in optimizer steps; a step sees ``batch_size * gradient_accumulation_steps``
    samples on every process.

    Attributes:
        model: folder or hub id of a diffusers ``WanTransformer3DModel`` (or of a pipeline that has one as ``transformer``);
            None: a tiny random one (for trying things out).
        data: folder of precomputed latents (see ``training.data``).
        output: receives checkpoints, weights, ``loss.csv``, ``fps_schedule.json``.
        schedule: preset name or file; None: dense training (the baseline).
        lora_rank: 0 trains all weights.
        sparsity_warmup_steps: over so many steps the density falls from 1 to the schedule's own, in ``sparsity_warmup_stages`` stages.
        sigma_sampling: "uniform" or "logit_normal", then shifted by ``flow_shift``.
        adam_eps: epsilon of AdamW.
        ema_decay: of an exponential moving average of the trained weights, per step; 0: none. With it the averaged weights are validated and saved,
            and checkpoints hold both.
        prompt_dropout: probability that a sample is trained with the folder's empty prompt (``training.data``), for
            classifier-free guidance.
        validate_every: 0: never. The validation loss uses fixed samples, sigmas and noise.
    """

    data: str
    output: str
    model: str | None = None
    schedule: str | None = "paper"
    steps: int = 200
    batch_size: int = 2
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    plateau_patience: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    adam_eps: float = 1e-8
    ema_decay: float = 0.0
    prompt_dropout: float = 0.0
    lora_rank: int = 0
    mixed_precision: str = "no"
    sigma_sampling: str = "uniform"
    flow_shift: float = 3.0
    sparsity_warmup_steps: int = 0
    sparsity_warmup_stages: int = 4
    gradient_checkpointing: bool = False
    validate_every: int = 0
    validation_samples: int = 8
    checkpoint_every: int = 0
    resume: bool = False
    seed: int = 0
    debug: bool = False

    def __post_init__(self) -> None:
        def wanted(condition: bool, name: str, text: str) -> None:
            if not condition:
                raise ConfigError(f"fpsattention.train: {name} {getattr(self, name)!r}, expected {text}")

        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "sparsity_warmup_stages",
            "validation_samples",
        ):
            wanted(getattr(self, name) >= 1, name, "at least 1")
        for name in ("lora_rank", "sparsity_warmup_steps", "validate_every", "checkpoint_every", "warmup_steps"):
            wanted(getattr(self, name) >= 0, name, "at least 0")
        wanted(self.learning_rate > 0, "learning_rate", "a positive number")
        wanted(self.adam_eps > 0, "adam_eps", "a positive number")
        wanted(0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)")
        wanted(0 <= self.prompt_dropout <= 1, "prompt_dropout", "a probability")
        wanted(self.flow_shift > 0, "flow_shift", "a positive number")
        wanted(self.mixed_precision in ("no", "bf16"), "mixed_precision", "'no' or 'bf16'")
        wanted(self.sigma_sampling in ("uniform", "logit_normal"), "sigma_sampling", "'uniform' or 'logit_normal'")
        wanted(
            self.schedule is not None or self.sparsity_warmup_steps == 0,
            "sparsity_warmup_steps",
            "0 without a schedule",
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


RECIPES = Path(__file__).with_name("recipes")


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Settings from a recipe: a JSON file of :class:`TrainConfig`'s fields, or the name of one that comes with the library ("paper").

    Raises:
        ConfigError: if it cannot be read, or names what is no setting.
    """
    path = Path(name) if Path(name).suffix == ".json" else RECIPES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.json")))
        raise ConfigError(f"fpsattention.train: recipe {str(name)!r}, expected a JSON file or one of {known}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"fpsattention.train: recipe {path} is not JSON: {error}") from error
    known_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(settings) - known_fields) if isinstance(settings, dict) else [type(settings).__name__]
    if unknown:
        raise ConfigError(f"fpsattention.train: recipe {path} holds {unknown[0]!r}, expected settings of TrainConfig")
    return settings
