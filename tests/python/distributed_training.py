"""Run by test_training_distributed.py in every process of a torchrun. Arguments: ddp or fsdp2, data, output, LoRA rank, settings as JSON."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

mode, data, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
process = PartialState(cpu=True)
if mode == "fsdp2":
    # accelerate only shards where it sees several GPUs; torch shards on gloo as well, which is what this test needs.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }  # fmt: skip

from fpsattention.training import TrainConfig, train  # noqa: E402  (after the environment is set)

config = TrainConfig(
    data=data, output=str(output), steps=4, batch_size=1, validate_every=2, validation_samples=2, learning_rate=1e-3,
    warmup_steps=1, ema_decay=0.5, prompt_dropout=0.3, checkpoint_every=2, debug=True, lora_rank=int(sys.argv[4]),
    **json.loads(sys.argv[5]),
)  # fmt: skip
result = train(config)
if process.is_main_process:
    (output / "run.json").write_text(json.dumps([result.train, list(result.validation.values())]))
if mode == "fsdp2":
    from accelerate.state import AcceleratorState

    assert AcceleratorState().distributed_type == DistributedType.FSDP
