"""Measurements on a Hopper GPU: parts are pytest files, ``plugin`` keeps the results. ``benchmarks/run_gpu_suite.sh`` is the way in."""
