"""``python -m fpsattention.cli``, for launchers that want a module."""

from . import app

app()
