"""Ranks of a process group for tests: gloo, on the CPU.

Importing torch and diffusers takes longer than most checks, so all ranks are forked from one server that has imported them once.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distributed_parallel_models", "distributed_training"])
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(sys.path),  # before Python 3.12 the server imports nothing else
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}


class Ranks:
    """``target(*arguments)`` in ``size`` new processes, with the environment that torchrun gives; each prints to ``<rank>.log`` in ``folder``.

    ``grouped``: the default process group is made before.
    """

    def __init__(
        self, folder: Path, size: int, target: Callable[..., None], *arguments: Any, grouped: bool = True
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.size = folder, size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with mock.patch.dict(os.environ, ENVIRONMENT):  # of the server, if this starts it
            self._processes = [
                CONTEXT.Process(
                    target=_rank,
                    args=(folder, {**common, "RANK": rank, "LOCAL_RANK": rank}, target, arguments, grouped),
                    daemon=True,
                )
                for rank in range(size)
            ]
            for process in self._processes:
                process.start()

    def wait(self, timeout: float = 500) -> list[str]:
        """What each rank printed; a rank that failed, or did not end in time, says so last."""
        end = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        texts = []
        for rank, process in enumerate(self._processes):
            late = process.exitcode is None
            process.kill()
            log = self.folder / f"{rank}.log"
            text = log.read_text() if log.exists() else ""
            texts.append(text + f"rank {rank} {'did not end' if late else f'exit status {process.exitcode}'}\n")
        return texts

    def finish(self, timeout: float = 500) -> list[str]:
        """What each rank printed; all must end well."""
        texts = self.wait(timeout)
        assert all(p.exitcode == 0 for p in self._processes), "\n".join(text[-3000:] for text in texts)
        return texts


def _rank(
    folder: Path, environment: dict[str, Any], target: Callable[..., None], arguments: tuple[Any, ...], grouped: bool
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    log = os.open(folder / f"{environment['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    status = 0
    try:
        if grouped:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=environment["RANK"],
                world_size=environment["WORLD_SIZE"], timeout=datetime.timedelta(seconds=300),
            )  # fmt: skip
        target(*arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else bool(error.code)
        print(error.code or "", file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # without the handlers of the server
