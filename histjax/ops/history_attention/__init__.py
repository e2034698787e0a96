"""Attention from any queries to contiguous ranges of the history's keys.

`api` checks and dispatches, `reference` defines the meaning, every other module
but `ranges` is a backend with the same signature.
"""
