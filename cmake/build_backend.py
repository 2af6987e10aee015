"""PEP 517 backend: setuptools, plus torch as a build requirement only where none is installed.

pip builds in an isolated environment in which the torch of the target environment cannot be imported but still lies in its
site-packages; setup.py reads its headers there, by path. In an environment without torch the headers come from a pinned torch
in the build environment. That is safe: the extension uses torch's stable ABI, so it runs with any torch >= 2.10.
"""

import os
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks pip calls)

BUILD_TORCH = "torch==2.13.0"


def _torch_requirement() -> list[str]:
    installed = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    return [] if installed.is_dir() or os.environ.get("FPSATTN_TORCH_DIR") else [BUILD_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + _torch_requirement()
