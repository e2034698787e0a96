"""Feature interaction and the task heads, the user's half computed once.

The input of the head is `x0 = [user ; candidate]`. Its first matrix products
split into `W_user user + W_candidate candidate`; the first term is one per
row, whatever the number of candidates, and is what `user_half` returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from histjax import config as dicts
from histjax import ops


@dataclasses.dataclass(frozen=True)
class InteractionConfig:
  """The DLRM's interaction network.

  Attributes:
    kind: 'dcn_v2' crosses features beside the MLP; 'mlp' has the MLP alone.
    cross_layers: cross layers of 'dcn_v2'.
    cross_rank: rank of their matrices, `W = U V`.
    mlp_widths: hidden channels of the MLP.
    dropout: probability, after each hidden layer of the MLP.
    implementation: that of `ops.interaction_head`, which scores; 'xla': layer
      by layer, as in training; None: a kernel where there is one.
  """

  kind: Literal['dcn_v2', 'mlp'] = 'dcn_v2'
  cross_layers: int = 2
  cross_rank: int = 64
  mlp_widths: tuple[int, ...] = (128, 64)
  dropout: float = 0.0
  implementation: Literal['pallas_gpu', 'numba_cpu', 'xla'] | None = None

  def __post_init__(self):
    dicts.normalize(self)
    for field in ('cross_layers', 'cross_rank'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'interaction.{field}={getattr(self, field)} must be at least 1'
        )
    if not self.mlp_widths or min(self.mlp_widths) < 1:
      raise ValueError(
        f'interaction.mlp_widths={self.mlp_widths} must name at least one '
        'layer, each at least 1 wide'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f'interaction.dropout={self.dropout} must be in [0, 1)')


class InteractionHead(nn.Module):
  """`[user ; candidate] -> DCN-v2 beside an MLP -> one logit per task`.

  A cross layer is `x_{l+1} = x_0 * (U (V x_l) + b) + x_l` (Wang et al.,
  DCN V2, arXiv 2008.13535, equations 1 and 2), the parallel structure of its
  figure 1.
  """

  config: InteractionConfig
  num_tasks: int
  user_width: int
  candidate_width: int
  dtype: DTypeLike = jnp.float32

  def setup(self):
    config = self.config
    width = self.user_width + self.candidate_width
    self.mlp_user = nn.Dense(config.mlp_widths[0], dtype=self.dtype)
    self.mlp_candidate = nn.Dense(
      config.mlp_widths[0], use_bias=False, dtype=self.dtype
    )
    self.mlp = [nn.Dense(n, dtype=self.dtype) for n in config.mlp_widths[1:]]
    self.dropout = nn.Dropout(config.dropout)
    if config.kind == 'dcn_v2':
      self.cross_user = nn.Dense(
        config.cross_rank, use_bias=False, dtype=self.dtype
      )
      self.cross_candidate = nn.Dense(
        config.cross_rank, use_bias=False, dtype=self.dtype
      )
      self.cross_in = [
        nn.Dense(config.cross_rank, use_bias=False, dtype=self.dtype)
        for _ in range(config.cross_layers - 1)
      ]
      self.cross_out = [
        nn.Dense(width, dtype=self.dtype) for _ in range(config.cross_layers)
      ]
    # Logits are float32 whatever the rest is computed in.
    self.logits = nn.Dense(self.num_tasks, dtype=jnp.float32)

  def user_half(self, user: Float[Array, 'B ... U']) -> dict[str, Array]:
    """What the head needs of the user: `{'user', 'mlp', 'cross'}: [B, ..]`.

    Of packed rows, `[B, C, ..]`, the user of each candidate.
    """
    half = {'user': user, 'mlp': self.mlp_user(user)}
    if self.config.kind == 'dcn_v2':
      half['cross'] = self.cross_user(user)
    return half

  def __call__(
    self,
    user_half: dict[str, Float[Array, 'B ...']],
    candidate: Float[Array, 'B C V'],
    *,
    train: bool = False,
  ) -> Float[Array, 'B C T']:
    """Logits of the tasks, float32."""
    half = {k: x[:, None] if x.ndim == 2 else x for k, x in user_half.items()}
    hidden = half['mlp'] + self.mlp_candidate(candidate)
    hidden = self.dropout(nn.relu(hidden), deterministic=not train)
    for layer in self.mlp:
      hidden = self.dropout(nn.relu(layer(hidden)), deterministic=not train)
    if self.config.kind == 'mlp':
      return self.logits(hidden)
    user = half['user']
    user = jnp.broadcast_to(user, (*candidate.shape[:2], user.shape[-1]))
    x0 = jnp.concatenate([user, candidate], axis=-1)
    low_rank = half['cross'] + self.cross_candidate(candidate)
    x = x0 * self.cross_out[0](low_rank) + x0
    for down, up in zip(self.cross_in, self.cross_out[1:], strict=True):
      x = x0 * up(down(x)) + x
    return self.logits(jnp.concatenate([x, hidden], axis=-1))

  def score(
    self,
    user: Float[Array, 'B ... U'],
    features: Float[Array, 'B C F'],
    readout: Float[Array, 'B C D'],
    *,
    count: Int[Array, 'B'] | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C T']:
    """`__call__` for the candidates `[features ; readout]`.

    In a kernel of `ops.interaction_head`, if the collection `tower` has the
    packed parameters, the target such a kernel, and the config names no other.

    Args:
      user: `[B, U]`; of packed rows, which have no kernel, `[B, C, U]`.
      features: `[B, C, F]`.
      readout: `[B, C, D]`.
      count: int32 `[B]`; logits of candidates from there on mean nothing.
      train: whether dropout is on.

    Raises:
      NotImplementedError: the config names the kernel, and the target or these
        sizes have none.
    """
    named = self.config.implementation
    packed = self.has_variable('tower', 'weights') and not train
    packed &= user.ndim == 2
    if packed and named != 'xla':
      try:
        return ops.interaction_head(
          user.astype(self.dtype),
          features.astype(self.dtype),
          readout.astype(self.dtype),
          self.get_variable('tower', 'weights'),
          count=count,
          implementation=named,
          kernels_only=True,
        )
      except NotImplementedError:  # Not here, or not of these sizes.
        if named is not None:
          raise
    candidate = jnp.concatenate([features, readout], axis=-1)
    return self(self.user_half(user), candidate, train=train)

  @staticmethod
  def pack(
    config: InteractionConfig,
    params: Mapping[str, Any],
    readout_width: int,
    dtype: DTypeLike,
  ) -> dict[str, Any]:
    """The collection `tower`: the parameters packed for the kernel.

    Args:
      config: of the module.
      params: its parameters.
      readout_width: D, of the V candidate's channels.
      dtype: of the matrices, the type that candidates are computed in.
    """
    of_user = params['mlp_user']['kernel'].shape[0]
    of_candidate = params['mlp_candidate']['kernel'].shape[0]
    cross_layers = config.cross_layers if config.kind == 'dcn_v2' else 0
    logits, bias = params['logits']['kernel'], params['logits']['bias']
    shape = ops.HeadShape(
      user=of_user,
      features=of_candidate - readout_width,
      readout=readout_width,
      mlp=tuple(config.mlp_widths),
      cross_layers=cross_layers,
      rank=config.cross_rank,
      tasks=logits.shape[1],
    )

    def joined(name):
      halves = [params[f'{name}_{x}']['kernel'] for x in ('user', 'candidate')]
      return jnp.concatenate(halves)

    matrices = {'mlp_0': joined('mlp')}
    vectors = {'mlp_0': params['mlp_user']['bias'], 'logits_bias': bias}
    for i in range(1, len(config.mlp_widths)):
      matrices[f'mlp_{i}'] = params[f'mlp_{i - 1}']['kernel']
      vectors[f'mlp_{i}'] = params[f'mlp_{i - 1}']['bias']
    for i in range(cross_layers):
      matrices[f'down_{i}'] = (
        params[f'cross_in_{i - 1}']['kernel'] if i else joined('cross')
      )
      matrices[f'up_{i}'] = params[f'cross_out_{i}']['kernel']
      vectors[f'up_{i}'] = params[f'cross_out_{i}']['bias']
    # The logits are of x, if there is one, and then of the MLP.
    split = shape.width if cross_layers else 0
    for task in range(shape.tasks):
      vectors[f'logits_x_{task}'] = logits[:split, task]
      vectors[f'logits_mlp_{task}'] = logits[split:, task]
    return {'weights': ops.HeadWeights.pack(shape, matrices, vectors, dtype)}
