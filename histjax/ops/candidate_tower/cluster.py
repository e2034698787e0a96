"""What clusters need in PTX: above all copies between their shared memories.

Pallas can store registers into a peer's memory, four bytes at a time and each
counted by a barrier. A bulk copy moves a whole tile and is counted once. The
functions are called through `plgpu.inline_mgpu`; a barrier is two int32 of
shared memory.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_THREADS = 128  # Of a warpgroup.
utils: Any = mosaic_utils  # Not all of it in the oldest JAX.


def initialize(ctx, barriers, *, count: int) -> None:
  """Two barriers for `count` warpgroups; they must meet before use.

  Called by one warpgroup.
  """
  del ctx
  first = _flag(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP))
  utils.inline_ptx(
    '{ .reg .pred p; setp.ne.b32 p, $1, 0; '
    f'@p mbarrier.init.shared::cta.b64 [$0], {count * _THREADS}; '
    f'@p mbarrier.init.shared::cta.b64 [$0+8], {count * _THREADS}; '
    '@p fence.mbarrier_init.release.cluster; }',
    _address(barriers),
    first,
    has_side_effects=True,
  )


def send(ctx, block, barrier, *, blocks: int) -> None:
  """Copies `block` to the same address of all peers, counted by their barriers.

  The block must have been written and committed by the warpgroup that calls.
  """
  del ctx
  kind = ir.MemRefType(block.type)
  size = utils.bytewidth(kind.element_type)
  for n in kind.shape:
    size *= n
  copy = (
    'cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes'
  )
  copies = ''.join(
    f'xor.b32 r, self, {peer}; '
    'mapa.shared::cluster.u32 d, $0, r; mapa.shared::cluster.u32 m, $1, r; '
    f'@p {copy} [d], [$0], {size}, [m]; '
    for peer in range(1, blocks)
  )
  utils.inline_ptx(
    '{ .reg .pred p; .reg .b32 self, r, d, m; setp.ne.b32 p, $2, 0; '
    f'mov.u32 self, %cluster_ctarank; {copies}}}',
    _address(block),
    _address(barrier),
    _flag(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)),
    has_side_effects=True,
  )


def receive(ctx, barrier, *, size: int) -> None:
  """Waits for `size` bytes for each warpgroup that calls, from all of them."""
  del ctx
  utils.inline_ptx(
    '{ .reg .pred p; .reg .b64 s; '
    f'mbarrier.arrive.expect_tx.shared::cta.b64 s, [$0], {size // _THREADS}; '
    'again: mbarrier.try_wait.shared::cta.b64 p, [$0], s; '
    '@!p bra again; }',
    _address(barrier),
    has_side_effects=True,
  )


def sleep(ctx, *, cycles: int) -> None:
  """Passes some clock cycles."""
  del ctx
  utils.inline_ptx(
    '{ .reg .pred p; .reg .u32 from, now; mov.u32 from, %clock; '
    'again: mov.u32 now, %clock; sub.u32 now, now, from; '
    f'setp.lt.u32 p, now, {cycles}; @p bra again; }}',
    has_side_effects=True,
  )


def _address(ref):
  i32 = ir.IntegerType.get_signless(32)
  return llvm.ptrtoint(i32, utils.memref_ptr(ref))


def _flag(predicate):
  return arith.extui(ir.IntegerType.get_signless(32), predicate)
