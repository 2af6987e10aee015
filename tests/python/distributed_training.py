"""Trainings that test_training_distributed.py runs on every rank of a group."""

import json
import os
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from fpsattention.cli import app
from fpsattention.training import TrainConfig, train

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def run(mode, settings):
    """``mode``: "ddp" or "fsdp2". Writes what train() returned to ``run.json``: losses, validation losses."""
    process = PartialState(cpu=True)
    if mode == "fsdp2":
        # accelerate only shards where it sees several GPUs; torch shards on gloo as well, which is what this test needs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        os.environ.update(FSDP2)
    config = TrainConfig(
        steps=4, batch_size=1, validate_every=2, validation_samples=2, learning_rate=1e-3, warmup_steps=1, ema_decay=0.5,
        prompt_dropout=0.3, checkpoint_every=2, debug=True, **settings,
    )  # fmt: skip
    result = train(config)
    if process.is_main_process:
        (Path(config.output) / "run.json").write_text(json.dumps([result.train, list(result.validation.values())]))
    if mode == "fsdp2":
        assert AcceleratorState().distributed_type == DistributedType.FSDP


def command_line(*arguments):
    """``fpsattn`` with these arguments, on every process of a torchrun."""
    PartialState(cpu=True)
    app(list(arguments), standalone_mode=False)
