"""``fpsattn demo``: one small video with and without FPSAttention, and where the error comes from.

``config.DemoConfig`` is light; ``demo.run_demo`` needs torch and the packages of the extra ``demo``.
"""
