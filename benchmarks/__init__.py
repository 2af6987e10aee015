"""Benchmarks: ``benchmarks/run_gpu_suite.sh`` measures, ``python -m benchmarks.report`` reports. See benchmarks/README.md."""
