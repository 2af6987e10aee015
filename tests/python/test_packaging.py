"""The package as users get it: the sdist holds the repository, a wheel built from it works, an editable install works.

The builds are marked slow (a minute or two each, CPU part only).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
USE = """
import json, sys, torch, fpsattention as fps
from fpsattention import _C
q, k, v = (torch.randn(1, 3 * 5 * 7, 2, 64) for _ in range(3))
out = fps.attention(q, k, v, grid=(3, 5, 7))
assert out.shape == q.shape and out.isfinite().all()
print(json.dumps({"file": fps.__file__, "version": fps.__version__, **_C.build_info()}))
"""


def run(*command, cwd, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FPSATTN_TORCH_DIR", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**clean, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """Paths of the files that git tracks."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: there is nothing to compare the sdist with")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in names.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def source(tracked, tmp_path_factory):
    """A copy of the tracked files, so that no build leaves anything in the checkout or takes anything untracked from it."""
    copy = tmp_path_factory.mktemp("source")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})", cwd=source)
    return next(out.glob("*.tar.gz"))


def bare_environment(folder):
    """A virtual environment without torch or pip; its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_sdist_is_the_repository(sdist, tracked):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert not tracked - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_from_sdist_without_torch(sdist, tmp_path):
    """No torch anywhere at build time: only headers are fetched. The result runs with the torch of this environment."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    stale = unpacked / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fpsattention"
    stale.mkdir(parents=True)  # what an older version, built in the same folder, would have left
    (stale / "removed_module.py").touch()
    python = bare_environment(tmp_path / "build_env")
    pip = [sys.executable, "-m", "pip", "--python", python]
    tools = {"PATH": "/usr/local/bin:/usr/bin:/bin", "FPSATTN_BUILD_CUDA": "OFF", "CUDA_HOME": ""}
    run(*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", unpacked, cwd=tmp_path, **tools)
    wheel = next((tmp_path / "wheels").glob("fpsattention-*.whl"))
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert not list(site.rglob("removed_module.py"))
    used = json.loads(run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site)))
    pinned = re.search(
        r"set\(FPSATTN_TORCH_HEADERS_VERSION (\S+)\)", (ROOT / "cmake/fpsattn_torch_headers.cmake").read_text()
    )
    assert used["file"].startswith(str(site)) and used["torch_version"] == pinned[1] and not used["cuda"]
    tests = ["-m", "not slow", *(f"tests/python/test_{name}.py" for name in ("tiles", "schedule"))]
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked, PYTHONPATH=str(site))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_editable_install_against_the_active_torch(source, tmp_path):
    """The build environment knows the target by VIRTUAL_ENV only, as uv's does: the target's torch is the one built against."""
    python = bare_environment(tmp_path / "env")
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-e", source, cwd=tmp_path,
        VIRTUAL_ENV=sys.prefix, FPSATTN_BUILD_CUDA="OFF",
    )  # fmt: skip
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (site / "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, numpy, ... of this environment
    used = json.loads(run(python, "-c", USE, cwd=tmp_path))
    assert Path(used["file"]) == source / "python" / "fpsattention" / "__init__.py"
    assert used["torch_version"] == torch.__version__ and used["version"] == "0.1.0"
