"""The receipt in a video: nothing of the video changes, every kind of tampering is noticed."""

import json
import struct
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_wan

import fpsattention as fps
from fpsattention.cli.main import app
from fpsattention.errors import ConfigError
from fpsattention.integrations import receipt


def box(kind, payload):
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


VIDEO = box(b"ftyp", b"isom0000") + box(b"mdat", bytes(range(200))) + box(b"moov", b"index" * 9)
SCHEDULE = fps.Schedule.from_dict({**fps.Schedule.preset("paper", flow_shift=3.0).to_dict(), "tile": tiny_wan.TILE})


@pytest.fixture(scope="module")
def handle():
    model = tiny_wan.transformer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that the preset is not meant for: once per process
        handle = fps.apply(model, SCHEDULE)
    with handle, torch.no_grad():
        tiny_wan.run(model, [990.0])
        tiny_wan.run(model, [400.0])
        yield handle


def cli(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        app(["verify", *map(str, arguments)])
    return stopped.value.code, capsys.readouterr().out


def test_the_video_keeps_its_bytes_and_the_receipt_says_what_ran(handle, tmp_path, capsys):
    path = tmp_path / "video.mp4"
    path.write_bytes(VIDEO)
    assert handle.write_receipt(path) == path
    content = path.read_bytes()
    assert content.startswith(VIDEO) and content[len(VIDEO) + 4 : len(VIDEO) + 8] == b"uuid"
    assert struct.unpack(">I", content[len(VIDEO) : len(VIDEO) + 4])[0] == len(content) - len(VIDEO)
    assert handle.write_receipt(path) == path and path.read_bytes() == content  # in the place of the old one
    found, faults = receipt.read(path)
    assert not faults and fps.Schedule.from_dict(found["schedule"]) == SCHEDULE
    ran = {(row["level"], row["precision"], row["granularity"], row["calls"]) for row in found["levels"]}
    assert ran == {("coarse", "fp8", "block", 2), ("medium", "fp8", "block", 2)}  # two layers, one sample each
    assert found["density"] == pytest.approx(handle.report().density) and found["fallbacks"] == {}
    code, out = cli(capsys, path)
    assert code == 0 and "the receipt fits the file" in out and "coarse" in out
    SCHEDULE.save(tmp_path / "schedule.json")
    assert cli(capsys, path, "--schedule", tmp_path / "schedule.json")[0] == 0
    code, out = cli(capsys, path, "--schedule", "fp8", "--json")
    assert code == 1 and json.loads(out)["faults"] == ["another schedule than fp8 ran"]


def test_tampering_is_noticed(handle, tmp_path, capsys):
    path = tmp_path / "video.mp4"
    path.write_bytes(VIDEO)
    handle.write_receipt(path)
    good = path.read_bytes()
    # A byte of the video; a number of the receipt; a schedule in the place of another, everything else sealed anew.
    path.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    assert receipt.read(path)[1] == ["the video is not the one that the receipt was written for"]
    assert cli(capsys, path)[0] == 1
    path.write_bytes(good.replace(b'"calls": 2', b'"calls": 3'))
    assert receipt.read(path)[1] == ["the receipt was changed after it was written"]
    other = receipt.make(SCHEDULE, handle.report(), {})
    other["schedule"] = fps.Schedule.preset("dense").to_dict()
    path.write_bytes(VIDEO)
    receipt.write(path, other)
    assert receipt.read(path)[1] == ["the schedule in the receipt is not the one that its hash names"]


def test_fallbacks_are_in_it(tmp_path):

    model = tiny_wan.transformer(head_dim=192)  # wider than any kernel
    with pytest.warns(UserWarning, match="stays dense"):
        handle = fps.apply(model, "fp8", on_unsupported="dense")
    path = tmp_path / "video.mp4"
    path.write_bytes(VIDEO)
    with pytest.raises(ConfigError, match="no forward ran"):
        handle.write_receipt(path)
    receipt.write(path, receipt.make(handle.schedule, handle.report(), handle.skipped))
    found, faults = receipt.read(path)
    assert not faults and "head dimension 192" in found["dense_models"]["transformer"]


@pytest.mark.parametrize(
    "content",
    [b"\x1a\x45\xdf\xa3matroska", b"", box(b"ftyp", b"isom") + struct.pack(">I4s", 0, b"mdat") + b"to the end"],
)
def test_files_that_cannot_carry_it_get_a_sidecar(handle, tmp_path, content):
    path = tmp_path / "video.mkv"
    path.write_bytes(content)
    sidecar = handle.write_receipt(path)
    assert sidecar.name == "video.mkv.fpsattn.json" and path.read_bytes() == content
    assert receipt.read(path)[1] == []
    path.write_bytes(content + b"!")
    assert receipt.read(path)[1] == ["the video is not the one that the receipt was written for"]


def test_errors(handle, tmp_path):
    with pytest.raises(ConfigError, match=r"fpsattention\.write_receipt: .*none\.mp4 cannot be used"):
        handle.write_receipt(tmp_path / "none.mp4")
    (tmp_path / "plain.mp4").write_bytes(VIDEO)
    with pytest.raises(ConfigError, match=r"no receipt in .*plain\.mp4"):
        receipt.read(tmp_path / "plain.mp4")
    broken = VIDEO + struct.pack(">I4s", 29, b"uuid") + receipt.BOX + b"{...}"
    (tmp_path / "broken.mp4").write_bytes(broken)
    with pytest.raises(ConfigError, match=r"the receipt of .* cannot be read"):
        receipt.read(tmp_path / "broken.mp4")


def test_a_real_video_still_plays(handle, tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    from fpsattention.demo.pictures import write_video

    path = write_video(tmp_path / "video.mp4", torch.rand(3, 32, 48, 3).numpy())

    def frames():
        with imageio.get_reader(str(path)) as reader:
            return [frame for frame in reader]

    before = frames()
    assert handle.write_receipt(path) == path and receipt.read(path)[1] == []
    after = frames()
    assert len(before) == len(after) == 3 and all((a == b).all() for a, b in zip(before, after, strict=True))
