"""Evaluation: error metrics, analysis of recorded q, k, v, and pictures. Nothing heavy is imported here."""

from .metrics import ErrorSum, compare, compare_videos, jsonable

__all__ = ["ErrorSum", "compare", "compare_videos", "jsonable"]
