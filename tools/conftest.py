"""The tests of the tools import them as packages, ``import sassbudget``: pytest puts the folder of this file on the path."""
