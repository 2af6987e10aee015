"""A receipt in the video: which schedule made it, what ran, and what did not. ``docs/diffusers.md`` says what it proves.

In MP4 and MOV files it is a ``uuid`` box of its own at the end of the file (ISO/IEC 14496-12, 11.1): players skip it, and no byte of the video changes.
Beside other files it is ``NAME.fpsattn.json``. It holds a hash of the video's bytes, of the schedule and of itself: an edited file, or a
receipt that belongs to another one, is noticed. It is no signature: who can write the file can write a receipt.
"""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..analysis.metrics import jsonable
from ..errors import ConfigError
from ..schedule import Schedule
from .report import Report

FORMAT = "fpsattn-receipt/1"
BOX = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/fpsattention/receipt").bytes
_SIDECAR = ".fpsattn.json"


def schedule_hash(schedule: Schedule) -> str:
    """SHA-256 of what a schedule does: everything but its provenance."""
    data = {key: value for key, value in schedule.to_dict().items() if key != "provenance"}
    return _hash(data)


def make(schedule: Schedule, report: Report, skipped: dict[str, str]) -> dict[str, Any]:
    """The receipt of a run, without what depends on the file."""
    from .. import __version__

    levels: dict[tuple[str, str, str, str], list[float]] = {}
    for row in report.rows:
        entry = levels.setdefault((row.model, row.level, row.precision, row.granularity), [0.0, 0.0])
        entry[0] += row.calls
        entry[1] += row.calls * row.density
    return jsonable({  # type: ignore[no-any-return]
        "format": FORMAT, "version": __version__, "schedule_sha256": schedule_hash(schedule), "schedule": schedule.to_dict(),
        "density": report.density,
        "levels": [
            {"model": model, "level": level, "precision": precision, "granularity": granularity, "calls": int(calls), "density": attended / calls}
            for (model, level, precision, granularity), (calls, attended) in levels.items() if calls
        ],
        "grids": report.grids, "fallbacks": report.fallbacks, "replaced": report.replaced, "nonfinite": report.nonfinite, "dense_models": skipped,
    })  # fmt: skip


def write(path: str | Path, receipt: dict[str, Any]) -> Path:
    """Put a receipt into a file, in the place of one that is there, or beside it. Returns the file that holds it.

    Raises:
        ConfigError: there is no such file, or it cannot be written.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        boxes = _boxes(content)
        if boxes is not None:  # without an older receipt
            content = b"".join(content[a:b] for a, b, kind in boxes if kind != BOX)
        sealed = _sealed(receipt, content)
        payload = json.dumps(sealed).encode()
        if boxes is None:
            target = path.with_name(path.name + _SIDECAR)
            target.write_bytes(payload + b"\n")
            return target
        part = path.with_name(path.name + ".part")
        part.write_bytes(content + struct.pack(">I4s", 24 + len(payload), b"uuid") + BOX + payload)
        part.replace(path)  # whole, or as it was
        return path
    except OSError as error:
        raise ConfigError(
            f"fpsattention.write_receipt: {path} cannot be used ({error.strerror}), expected a video that is there"
        ) from error


def read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The receipt of a file, and what is wrong with it (nothing: an empty list).

    Raises:
        ConfigError: there is no such file, or no receipt in it or beside it.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        boxes = _boxes(content)
        sidecar = path.with_name(path.name + _SIDECAR)
        if boxes is not None:
            payloads = [content[a + 24 : b] for a, b, kind in boxes if kind == BOX]
            content = b"".join(content[a:b] for a, b, kind in boxes if kind != BOX)
        else:
            payloads = [sidecar.read_bytes()] if sidecar.is_file() else []
    except OSError as error:
        raise ConfigError(f"fpsattention.verify: {path} cannot be read ({error.strerror}), expected a video") from error
    if not payloads:
        raise ConfigError(
            f"fpsattention.verify: no receipt in {path} or beside it, expected a file that handle.write_receipt() was called on: other "
            "programs that rewrite a video drop it"
        )
    try:
        receipt = json.loads(payloads[-1])
        if receipt["format"] != FORMAT:
            raise ValueError(f"format {receipt['format']!r}, expected {FORMAT!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"fpsattention.verify: the receipt of {path} cannot be read: {error}") from error
    return receipt, _faults(receipt, content)


def _faults(receipt: dict[str, Any], content: bytes) -> list[str]:
    faults = []
    if receipt.get("receipt_sha256") != _hash({k: v for k, v in receipt.items() if k != "receipt_sha256"}):
        faults.append("the receipt was changed after it was written")
    if receipt.get("video_sha256") != hashlib.sha256(content).hexdigest():
        faults.append("the video is not the one that the receipt was written for")
    try:
        if schedule_hash(Schedule.from_dict(receipt["schedule"])) != receipt.get("schedule_sha256"):
            faults.append("the schedule in the receipt is not the one that its hash names")
    except (ConfigError, KeyError) as error:
        faults.append(f"the schedule in the receipt cannot be read: {error}")
    return faults


def _sealed(receipt: dict[str, Any], content: bytes) -> dict[str, Any]:
    sealed = {**receipt, "video_sha256": hashlib.sha256(content).hexdigest()}
    return {**sealed, "receipt_sha256": _hash(sealed)}


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _boxes(content: bytes) -> list[tuple[int, int, bytes]] | None:
    """Top-level boxes (begin, end, type; of ``uuid`` boxes the UUID) of an ISO base media file; None: it is none, or its last box is
    open-ended, so that nothing can come after it."""
    if content[4:8] not in (b"ftyp", b"moov", b"wide", b"mdat", b"free", b"skip"):
        return None
    found = []
    try:
        for begin, end, kind in _walk(content):
            found.append((begin, end, kind))
    except ValueError:
        return None
    return found


def _walk(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at < len(content):
        if len(content) - at < 8:
            raise ValueError("cut off")
        size, kind = struct.unpack_from(">I4s", content, at)
        header = 8
        if size == 1 and len(content) - at >= 16:
            size, header = struct.unpack_from(">Q", content, at + 8)[0], 16
        if size < header or at + size > len(content):  # 0: to the end of the file
            raise ValueError("open or cut off")
        yield at, at + size, content[at + header : at + header + 16] if kind == b"uuid" else kind
        at += size
