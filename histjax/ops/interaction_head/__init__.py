"""The candidates' half of the interaction head, in one call.

`api` checks and dispatches, `weights` says how the parameters are packed,
`reference` defines the meaning, `pallas_gpu` is a kernel with the same
signature.
"""
