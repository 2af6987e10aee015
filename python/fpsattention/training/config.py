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


_NO_RULES: dict[str, Any] = {"minimum": None, "maximum": None, "below": None, "positive": False, "choices": ()}


def _setting(default: Any, help: str, **rules: Any) -> Any:
    """A field with what it means (also the command line's help) and which values it takes: some of ``_NO_RULES``' keys."""
    assert rules.keys() <= _NO_RULES.keys()
    return dataclasses.field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class TrainConfig:
    """What ``fpsattn train`` is told; its options are these fields. Lengths are in optimizer steps; a step sees
    ``batch_size * gradient_accumulation_steps`` samples on every process (on every ``sequence_parallel`` processes together). Raises ConfigError on values that can never work.
    """

    data: str = dataclasses.field(
        metadata={"help": "Folder of precomputed latents (*.safetensors); with --noise-latents prompts are enough."}
    )
    output: str = dataclasses.field(
        metadata={"help": "Folder for weights, checkpoints, loss.csv and fps_schedule.json."}
    )
    model: str | None = _setting(
        None, "Wan transformer, or a pipeline that has one: folder or hub id. Default: a tiny random one."
    )
    schedule: str | None = _setting("paper", "Preset or schedule file; 'none' trains dense (the baseline).")
    objective: str = _setting(
        "flow_matching",
        "flow_matching, or velocity: the dense model as it is before training teaches the sparse one.",
        choices=("flow_matching", "velocity"),
    )
    noise_latents: str | None = _setting(
        None, "C,T,H,W: the teacher makes latents of this shape from noise, and none are read (objective velocity)."
    )
    data_share: float = _setting(
        0.0,
        "So much of flow matching's target in that of objective velocity, the rest the teacher's.",
        minimum=0,
        below=1,
    )
    rollout_steps: int = _setting(4, "Steps in which the teacher takes noise to a sample's sigma.", minimum=1)
    steps: int = _setting(200, "Optimizer steps.", minimum=1)
    batch_size: int = _setting(2, "Samples per process and micro-batch.", minimum=1)
    gradient_accumulation_steps: int = _setting(1, "Micro-batches per step.", minimum=1)
    learning_rate: float = _setting(1e-4, "Peak learning rate.", positive=True)
    warmup_steps: int = _setting(20, "Steps of linear learning-rate warm-up.", minimum=0)
    learning_rate_decay: str = _setting(
        "plateau",
        "plateau: halved when the smoothed loss stops falling; linear: falls to 0 at the last step.",
        choices=("plateau", "linear"),
    )
    plateau_patience: int = _setting(200, "Steps without progress before the learning rate is halved.", minimum=1)
    weight_decay: float = _setting(0.01, "Of AdamW.", minimum=0)
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.", positive=True)
    adam_eps: float = _setting(1e-8, "Epsilon of AdamW.", positive=True)
    ema_decay: float = _setting(
        0.0, "Decay of a moving average of the weights, which is then validated and saved; 0: none.", minimum=0, below=1
    )
    prompt_dropout: float = _setting(
        0.0, "Share of samples trained with the empty prompt, for classifier-free guidance.", minimum=0, maximum=1
    )
    lora_rank: int = _setting(0, "Rank of the LoRA adapter; 0 trains all weights.", minimum=0)
    mixed_precision: str = _setting("no", "no or bf16.", choices=("no", "bf16"))
    sigma_sampling: str = _setting(
        "uniform", "uniform or logit_normal, then shifted by the flow shift.", choices=("uniform", "logit_normal")
    )
    flow_shift: float = _setting(3.0, "Flow shift of the sampler trained for.", positive=True)
    sparsity_warmup_steps: int = _setting(0, "Steps over which the density falls from 1 to the schedule's.", minimum=0)
    sparsity_warmup_stages: int = _setting(4, "Stages in which it falls.", minimum=1)
    gradient_checkpointing: bool = _setting(False, "Less memory, more compute.")
    sequence_parallel: int = _setting(
        1, "Processes that share the tokens of a sample; those of all processes must be a multiple.", minimum=1
    )
    sequence_parallel_scheme: str = _setting(
        "ulysses",
        "How they attend: ulysses, halo, ring (docs/scale.md), or ulysses_bf16, which sends no FP8.",
        choices=("ulysses", "ulysses_bf16", "halo", "ring"),
    )
    validate_every: int = _setting(
        0, "Steps between validations on fixed samples, sigmas and noise; 0: never.", minimum=0
    )
    validation_samples: int = _setting(
        8, "With validate_every: the last so many samples are held out for validation.", minimum=1
    )
    checkpoint_every: int = _setting(0, "Steps between checkpoints; 0: never.", minimum=0)
    keep_checkpoints: int = _setting(2, "The newest so many checkpoints stay; 0: all.", minimum=0)
    resume: bool = _setting(False, "Continue from the last checkpoint in the output folder.")
    seed: int = _setting(0, "Of order, sigmas, noise and new weights.", minimum=0)
    debug: bool = _setting(False, "Name the layer whose values or gradients are not finite.")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for setting in dataclasses.fields(self):
            value, kind = getattr(self, setting.name), hints[setting.name]
            rules = {**_NO_RULES, **setting.metadata}
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
            if rules["maximum"] is not None and value > rules["maximum"]:
                raise _wrong(setting.name, value, f"at most {rules['maximum']}")
            if rules["below"] is not None and value >= rules["below"]:
                raise _wrong(setting.name, value, f"less than {rules['below']}")
        if self.learning_rate_decay == "linear" and self.warmup_steps >= self.steps:
            raise _wrong(
                "warmup_steps", self.warmup_steps, f"less than steps {self.steps} with learning_rate_decay 'linear'"
            )
        if self.schedule is None and self.sparsity_warmup_steps:
            raise _wrong("sparsity_warmup_steps", self.sparsity_warmup_steps, "0 without a schedule")
        if self.schedule is None and self.sequence_parallel > 1:
            raise _wrong(
                "sequence_parallel",
                self.sequence_parallel,
                "1 without a schedule: the model's own attention is not spread",
            )
        if self.objective == "velocity" and self.sequence_parallel > 1:
            raise _wrong(
                "sequence_parallel", self.sequence_parallel, "1 with objective 'velocity': the teacher is not spread"
            )
        if self.objective == "velocity" and self.schedule is None:
            raise _wrong("objective", self.objective, "a schedule: without one teacher and student are the same")
        if self.data_share and (self.objective != "velocity" or self.noise_latents is not None):
            raise _wrong("data_share", self.data_share, "0 but for objective 'velocity' that reads latents")
        if self.noise_latents is not None and (self.objective != "velocity" or self.latent_shape is None):
            raise _wrong("noise_latents", self.noise_latents, "'C,T,H,W', four whole numbers, and objective 'velocity'")

    @property
    def latent_shape(self) -> tuple[int, int, int, int] | None:
        """``noise_latents`` as numbers; None where latents are read (or where it is no such list, which is refused)."""
        parts = (self.noise_latents or "").split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            return None
        c, t, h, w = map(int, parts)
        return c, t, h, w

    def resume_from(self) -> Path | None:
        """The checkpoint to go on from; None for a new run.

        Raises:
            ConfigError: there is none, or a new run was asked for where an earlier one left some: it would delete its own as the older
                ones, and be resumed from the other's.
        """
        found = checkpoints(Path(self.output))
        if self.resume and not found:
            raise ConfigError(
                f"fpsattention.train: resume: no checkpoint-* folder in '{self.output}': train with checkpoint_every first"
            )
        if found and not self.resume:
            raise _wrong("output", self.output, f"resume, or a folder without {found[-1].name} of an earlier run")
        return found[-1] if found else None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"fpsattention.train: {name} {value!r}, expected {wanted}")


def checkpoints(output: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = {path.name.partition("-")[2]: path for path in output.glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]


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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"fpsattention.train: recipe {path} is not JSON: {error}") from error
    known_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(settings) - known_fields) if isinstance(settings, dict) else [type(settings).__name__]
    if unknown:
        raise ConfigError(f"fpsattention.train: recipe {path} holds {unknown[0]!r}, expected settings of TrainConfig")
    return settings
