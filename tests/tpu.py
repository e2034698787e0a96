"""TPUs that are not there, for which libtpu compiles all the same."""

import functools
import os

# Before libtpu is loaded: it is not to look for a TPU, nor for other users.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

from jax.experimental import topologies

TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')


@functools.cache
def devices(topology: str):
  """The chips of a topology."""
  return topologies.get_topology_desc(topology, platform='tpu').devices
