"""What torch.compile fuses around attention: calls in the code that inductor writes for one Wan block, as rows of ``docs/end_to_end.md``.

Tiny Wan, BF16, one block under ``compile_repeated_blocks(fullgraph=True)``, on the CPU, where inductor writes C++: ``python -m benchmarks.fusion``
(two minutes of a core).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._inductor.utils import run_and_get_code

import fpsattention as fps

LEVEL = {"precision": "fp8", "granularity": "block", "linears": "fp8"}
SCHEDULE = {
    "format": "fpsattn-schedule/2",
    "own_linears": [],
    "tile": [3, 4, 4],
    "levels": {"it": LEVEL},
    "phases": [{"sigma": [1.0, 0.0], "level": "it"}],
}
CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "FP8 attention and linears": {"prepare": False},
    "with `prepare`": {"prepare": True},
}
#: Calls in the body of the generated module, by kind.
KINDS = {
    "fused elementwise kernels": r"cpp_fused\w*\(",
    "matrix products": r"extern_kernels\.(?:mm|addmm|bmm)\(",
    "attentions": r"buf\d+ = torch\.ops\.\w+\.(?:_scaled_dot_product\w*|attention\w*)\.default\(",
}


def counted(code: str) -> list[int]:
    """Calls of each kind in a module that inductor wrote."""
    body = code[code.index("def call(") :]
    return [len(re.findall(rf"^\s+{pattern}", body, re.M)) for pattern in KINDS.values()]


def code_of(apply: dict[str, Any] | None) -> str:
    """Of one block, plain or with a schedule applied."""
    from diffusers import WanTransformer3DModel

    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "ffn_dim": 64,
        "text_dim": 32,
        "freq_dim": 64,
    }
    model = WanTransformer3DModel(**sizes, num_layers=1, cross_attn_norm=True, rope_max_seq_len=64).eval().bfloat16()
    if apply is not None:
        fps.apply(model, SCHEDULE, **apply)
    model.compile_repeated_blocks(fullgraph=True)
    latents, text = torch.randn(1, 16, 3, 16, 24).bfloat16(), torch.randn(1, 16, 32).bfloat16()
    with torch.no_grad():
        _, codes = run_and_get_code(lambda: model(latents, torch.tensor([900.0]), text))
    (code,) = codes
    return code


def main() -> None:
    print("| " + " | ".join(["block", *KINDS, "in all"]) + " |")
    print("| --- " * (len(KINDS) + 2) + "|")
    for name, apply in CONFIGURATIONS.items():
        counts = counted(code_of(apply))
        print("| " + " | ".join([name, *map(str, counts), str(sum(counts))]) + " |", flush=True)


if __name__ == "__main__":
    main()
