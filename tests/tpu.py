"""TPUs that are not there, for which libtpu compiles all the same."""

import functools
import importlib.util
import os
import pathlib
import sys

# Before libtpu is loaded: it is not to look for a TPU, nor for other users.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

from jax.experimental import topologies

TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
LIBRARY = pathlib.Path(sys.prefix) / 'libtpu' / 'libtpu' / 'libtpu.so'
"""Where `make test` has it; elsewhere JAX finds it by itself."""


@functools.cache
def devices(topology: str):
  """The chips of a topology."""
  if LIBRARY.exists():
    os.environ.setdefault('TPU_LIBRARY_PATH', str(LIBRARY))
  elif importlib.util.find_spec('libtpu') is None:
    if 'TPU_LIBRARY_PATH' not in os.environ:
      raise ImportError(
        'libtpu is not there, which compiles for TPUs: run the tests by `make '
        'test`, or set TPU_LIBRARY_PATH to a libtpu.so'
      )
  return topologies.get_topology_desc(topology, platform='tpu').devices
