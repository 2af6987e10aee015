"""Methods side by side on one model: ``fpsattn compare``. See ``docs/compare.md``."""
