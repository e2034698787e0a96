"""All layers of the candidate path of cached scoring, in one call.

`api` checks and dispatches, `reference` defines the meaning, every other module
is a backend with the same signature.
"""
