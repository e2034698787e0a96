"""A layer's keys and values of events, written into a cache.

`api` checks and dispatches, `reference` defines the meaning, `pallas_gpu` is a
kernel with the same signature. `histories` is of all layers of a history.
"""
