"""Tables and plots from results files. ``python -m benchmarks.report`` is the way in."""
