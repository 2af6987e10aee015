"""One part in one process: ``python -m benchmarks.suite.worker SETTINGS.json``. The supervisor writes the settings.

Exit status: 0 the part ran to its end (its cases say how it went), 70 the process is no longer sound (a CUDA context
after an illegal access) and a fresh one should go on, 3 the part was skipped.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from . import parts
from .context import Context, Journal, Skip

UNSOUND = 70
SKIPPED = 3


def device_is_sound(device: str) -> bool:
    """Whether the device still computes: after an illegal access every later CUDA call fails in the same process."""
    torch = sys.modules.get("torch")
    if device != "cuda" or torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") * 2).sum().item() == 16.0)
    except Exception:
        return False


def make_context(settings: dict[str, Any]) -> Context:
    path = lambda key: Path(settings[key]) if settings.get(key) else None  # noqa: E731
    context = Context(
        mode=settings["mode"], out=Path(settings["out"]), scratch=Path(settings["scratch"]), part=settings["part"],
        limit_s=settings["limit_s"], build_dir=path("build_dir"), hopper_facts=path("hopper_facts"),
        emulator=path("emulator"), peers_files=[Path(item) for item in settings.get("peers_files", [])],
        only_peers=settings.get("only_peers", []), done=set(settings.get("done", [])), banned=settings.get("banned", {}),
    )  # fmt: skip
    context.journal = Journal(Path(settings["journal"]), settings["part"])
    return context


def run_units(context: Context, module: Any) -> int:
    """Every unit that is not done yet and still fits. A failing unit is recorded and the next one is begun."""
    journal = context.journal
    journal.event("alive")
    for unit in module.units(context):
        if unit.id in context.done:
            continue
        if context.remaining() < unit.estimate_s:
            reason = f"{context.remaining():.0f} s left of the part's time, about {unit.estimate_s:.0f} s needed"
            journal.case(unit.id, "skipped", reason=reason)
            continue
        journal.event("unit-begin", unit=unit.id)
        try:
            unit.run()
        except Skip as skip:
            journal.case(unit.id, "skipped", reason=str(skip))
        except Exception as error:
            traceback.print_exc()
            if not device_is_sound(context.device):
                return UNSOUND  # the unit is still open: the supervisor knows what died
            reason = f"{type(error).__name__}: {error}"[:600]
            journal.case(unit.id, "failed", reason=reason, correct=False if module.OWN_CODE else None)
        journal.event("unit-end", unit=unit.id)
    return 0


def main(argv: list[str]) -> int:
    settings = json.loads(Path(argv[0]).read_text())
    context = make_context(settings)
    module = parts.load(context.part)
    try:
        return run_units(context, module)
    except Skip as skip:
        context.journal.event("skip", reason=str(skip))
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
