"""Kernels that may begin before the kernel before them has ended.

CUDA calls it programmatic dependent launch: a block of the next kernel comes to
a multiprocessor, sets up its barriers and waits there, while the last blocks of
the kernel before are at work elsewhere. A kernel of `kernel_name(..)` calls
`wait` first; who launches it (`scoring.graphs`) may let it begin early. Where
kernels follow one another as usual, `wait` does nothing.
"""

from __future__ import annotations

from typing import Any

SUFFIX = '_dependent'
"""Of the names of kernels that wait by themselves."""


def kernel_name(name: str) -> str:
  """Of a kernel that calls `wait` before it reads or writes global memory."""
  return name + SUFFIX


def wait(plgpu: Any) -> None:
  """Until all is written that kernels before this one write; of all threads.

  Then the next one may begin, which waits likewise.
  """
  plgpu.inline_mgpu()(_wait)()


def _wait(ctx: Any) -> None:
  from jax.experimental.mosaic.gpu import utils

  del ctx
  newer: Any = utils  # The oldest JAX has not all of it.
  newer.inline_ptx(
    'griddepcontrol.wait; griddepcontrol.launch_dependents;',
    has_side_effects=True,
  )
