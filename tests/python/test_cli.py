"""The command line through typer's runner: results, JSON, and the contract of all commands (docs/cli.md)."""

import io
import json
import subprocess
import sys
import time

import pytest
from rich.console import Console
from test_analysis import save_capture
from typer.testing import CliRunner

import fpsattention as fps
from fpsattention.cli import output
from fpsattention.cli.main import app
from fpsattention.cli.plan import parse_sizes
from fpsattention.errors import ConfigError

COMMANDS = ("doctor", "plan", "models", "demo", "analyze", "train")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


@pytest.mark.slow
def test_help_and_version():
    assert run("--version").stdout.startswith("fpsattn ")
    for flag in ("-h", "--help"):
        text = run(flag).stdout
        assert all(command in text for command in COMMANDS)
        assert "..." not in text.partition("Commands:")[2]  # no line is cut
        for command in COMMANDS:
            result = run(command, flag)
            assert result.exit_code == 0 and "\u2026" not in result.stdout and "--help" in result.stdout
    assert "--gradient-accumulation-steps" in run("train", "-h").stdout  # the longest name


def test_help_is_quick_and_does_without_torch():
    code = (
        "import sys, time; sys.argv = ['fpsattn', 'train', '--help']\n"
        "from fpsattention.cli import app\n"
        "try: app()\n"
        "except SystemExit: print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch, numpy = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 1 and torch == numpy == "False"


@pytest.mark.slow
def test_import_costs_little_above_torch():
    code = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import fpsattention as fps\n"
        "fps.attention, fps.plan, fps.BlockMask, fps.Schedule\n"
        "print(time.process_time() - start, [m for m in ('torch._dynamo', 'torch._inductor', 'diffusers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    assert float(seconds) < 0.3 and heavy == "[]"


def test_public_names():
    assert dir(fps) == sorted([*fps.__all__, "__version__"])
    assert all(getattr(fps, name) is not None for name in dir(fps))
    assert fps.Schedule.preset("fp8").phases[0].__class__ is fps.Phase and fps.Level("fine").name == "fine"
    with pytest.raises(AttributeError, match="no attribute 'importlib'"):
        _ = fps.importlib


def test_parse_sizes():
    assert parse_sizes("21x45x80", "x") == parse_sizes("21,45,80", "x") == (21, 45, 80)
    for bad in ("21x45", "21x45,80", "a,b,c", "", "1x2x3x4", "-1x2x3", "0x1x1"):
        with pytest.raises(ConfigError, match="expected"):
            parse_sizes(bad, "plan: grid")


@pytest.mark.slow
def test_plan_json(tmp_path):
    picture = tmp_path / "plan.png"
    result = run("plan", "21x45x80", "--window", "3,3,6", "--json", "--png", picture)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["num_tokens"] == 75600 and plan["window"] == [3, 3, 6]
    assert plan["num_slots"] / plan["num_tokens"] <= 1.016
    assert picture.stat().st_size > 10_000
    paper = json.loads(run("plan", "21x45x80", "--tile", "6,8,8", "--text-len", "77", "--json").stdout)
    assert paper["tile"] == [6, 8, 8] and paper["num_tokens"] == 75677 and paper["density"] == pytest.approx(1.0)
    assert paper["table_bytes"] > 4 * paper["num_slots"]


def test_plan_text():
    result = run("plan", "4x8x8", "--tile", "2,4,4", "--window", "1,1,1", "--text-len", "5")
    assert result.exit_code == 0
    assert "density" in result.stdout and "o" in result.stdout.splitlines()[-2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "21x45"], "fpsattention.plan: grid '21x45', expected three sizes"),
        (["plan", "21x45x80", "--window", "9,9,9"], "window (9, 9, 9)"),
        (["plan", "4x4x4", "--tile", "1,2"], "fpsattention.plan: tile '1,2', expected three sizes"),
        (["plan", "4x4x0"], "expected sizes of at least 1"),
        (["plan", "4x4x4", "--text-len", "-3"], "fpsattention.plan: text_len"),
        (["plan", "4x4x4", "--text-position", "middle"], "text_position 'middle'"),
        (["plan", "4x4x4", "--png", "x.gif"], "picture 'x.gif', expected a name that ends in .png, .jpg"),
        (["plan", "2000x2000x500"], "7,875,000 tiles that attend 7,875,000 tiles each: its tables need about"),
        (["plan"], "Missing argument 'grid'"),
        (["plan", "4x4x4", "--text-len", "many"], "Invalid value for '--text-len'"),
        (["plan", "4x4x4", "--frobnicate"], "No such option: --frobnicate"),
        (["nonsense"], "No such command 'nonsense'"),
        (["analyze", "/does/not/exist"], "/does/not/exist is not a folder"),
        (["demo", "--height", "100"], "size 100x384, expected height and width that are multiples of 16"),
        (["demo", "--num-frames", "32"], "num_frames 32, expected 4k + 1"),
        (["demo", "--device", "tpu"], "device 'tpu'"),
        (["demo", "--preset", "nope"], "'nope', expected a Schedule, a preset"),
        (["demo", "--model", "/nope"], "model '/nope' is neither a folder here nor the form of a hub id"),
        (["demo", "--small", "--out", __file__], f"File exists: {__file__}"),
        (["demo", "--small", "--out", "/proc/nowhere"], "/proc/nowhere"),
        (["train", "--output", "x"], "--data and --synthetic: expected exactly one of them"),
        (["train", "--output", "x", "--synthetic", "--steps", "0"], "fpsattention.train: steps 0, expected at least 1"),
        (
            ["train", "--output", "x", "--synthetic", "--learning-rate", "nan"],
            "learning_rate nan, expected a finite number",
        ),
        (["train", "--output", "x", "--synthetic", "--schedule", "nope"], "'nope', expected a Schedule, a preset"),
        (["train", "--output", "x", "--data", "/nope"], "data '/nope', expected a folder of *.safetensors files"),
        (["train", "--output", __file__, "--synthetic"], f"output '{__file__}' is a file, expected a folder"),
        (["train", "--output", "x", "--synthetic", "--resume"], "resume: no checkpoint-* folder in 'x'"),
    ],
)
def test_bad_input(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and text in result.stderr and len(result.stderr.splitlines()) == 1
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2 and text in json.loads(as_json.stdout)["error"]
    assert not list(tmp_path.iterdir())  # arguments are checked before anything is made


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: the package 'torch' is not installed: fpsattn doctor says how to install it\n",
        ),
        (MemoryError(), 2, "error: out of memory\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "error: Permission denied: /a/b\n"),
        (ConfigError("fpsattention.plan: two\nlines"), 2, "error: fpsattention.plan: two lines\n"),
    ],
)
def test_what_a_command_raises(monkeypatch, error, status, text):
    def fail(*_):
        raise error

    monkeypatch.setattr("fpsattention.layout.plan", fail)
    result = run("plan", "4x4x4")
    assert result.exit_code == status and result.stderr == text and result.stdout == ""


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("fpsattention.layout.plan", lambda *_: 1 / 0)
    assert isinstance(run("plan", "4x4x4").exception, ZeroDivisionError)


@pytest.mark.slow
def test_long_work_is_announced(monkeypatch):
    monkeypatch.setattr("fpsattention.layout.plan", lambda *_: time.sleep(1.5) or 1 / 0)
    assert "planning 4x4x4 ..." in run("plan", "4x4x4").stderr
    assert run("plan", "4x4x4", "--json").stderr == ""


def test_planning_lets_other_threads_run():
    """The announcement comes from a thread: the planner must not hold the interpreter's lock."""
    import threading

    from fpsattention.layout.tiles import core

    ticks = []
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: [ticks.append(time.perf_counter()) for _ in iter(lambda: stop.wait(0.01), True)]
    )
    thread.start()
    start = time.perf_counter()
    core().plan((40, 500, 1000), None, 0, "suffix")  # 20 million tokens: some tenths of a second
    middle = start + (time.perf_counter() - start) / 4
    stop.set()
    thread.join()
    assert any(start < tick < middle for tick in ticks)


@pytest.mark.parametrize("width", [20, 80])
def test_tables_lose_nothing(width):
    columns = ("layer", "sigma", "level", "density", "quantization", "sparsity", "total", "total cosine")
    rows = [["29", "0.9512", "coarse_level", "0.1944", "0.0521", "0.1234", "0.2345", "0.99876"]] * 2
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    output.print_table(console, "a title", columns, rows)
    lines = console.file.getvalue().splitlines()
    assert all(any(cell in line for line in lines) for cell in rows[0]) and "\u2026" not in console.file.getvalue()
    assert width < 80 or max(map(len, lines)) <= width


def test_output_to_a_pipe_is_not_folded():
    long = "word " * 60
    console = output.stdout()
    with console.capture() as capture:
        output.print_table(console, "t", ("check", "finding"), [["a", long.strip()]], fold="finding")
    assert console.is_terminal or long.strip() in capture.get()


@pytest.mark.slow
def test_pictures_are_what_their_names_say(tmp_path):
    for suffix, magic in ((".png", b"\x89PNG"), (".jpg", b"\xff\xd8\xff"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        path = tmp_path / "made" / f"plan{suffix}"
        assert run("plan", "4x8x8", "--png", path).exit_code == 0
        assert path.read_bytes().startswith(magic)


def test_missing_package_in_demo(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    result = run("demo", "--small", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (
        result.exit_code == 2 and "'imageio'" in result.stderr and 'pip install "fpsattention[demo]"' in result.stderr
    )


@pytest.mark.parametrize("command", ["demo", "compare", "tune"])
def test_sizes_have_one_name_in_either_spelling(command, tmp_path, monkeypatch):
    """diffusers writes underscores; ``fpsattn`` knows both, in all commands that make videos."""
    monkeypatch.chdir(tmp_path)
    for dash in "-_":
        sizes = [f"--num{dash}inference{dash}steps", "4", f"--guidance{dash}scale", "5", f"--num{dash}frames", "32"]
        result = run(command, "--height", "96", "--width", "160", f"--negative{dash}prompt", "", *sizes)
        assert result.exit_code == 2 and "num_frames 32, expected 4k + 1" in result.stderr, result.output
    text = run(command, "--help").stdout
    names = (
        "model",
        "prompt",
        "negative-prompt",
        "height",
        "width",
        "num-frames",
        "num-inference-steps",
        "guidance-scale",
        "device",
    )
    assert all(f"--{name} " in text for name in names)


@pytest.mark.slow
def test_analyze(tmp_path):
    save_capture(tmp_path / "a.safetensors", 0, 0.95)
    save_capture(tmp_path / "b.safetensors", 1, 0.3)
    out = tmp_path / "out"
    result = run("analyze", tmp_path, "--schedule", "fp8", "--out", out)
    assert result.exit_code == 0, result.output
    assert "quantization" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "transformer_error_vs_sigma.png", "transformer_quantization_by_layer.png",
        "transformer_sparsity_by_layer.png", "transformer_total_by_layer.png",
    }  # fmt: skip
    records = json.loads(run("analyze", tmp_path, "--level", "coarse", "--rows", "0", "--json").stdout)["captures"]
    assert [record["level"] for record in records] == ["coarse", "coarse"]
    assert all(0 < record["quantization"]["rel_l1"] < 0.1 for record in records)
    bad = run("analyze", tmp_path, "--rows", "-1")
    assert bad.exit_code == 2 and "rows -1" in bad.stderr
