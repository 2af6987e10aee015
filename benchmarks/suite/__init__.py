"""The GPU suite: parts with time budgets, each in its own process, every case on disk as soon as it is known.

Standard library and torch only. ``runner`` supervises, ``worker`` runs one part, ``parts/`` holds the parts,
``schema`` says what a results file is.
"""
