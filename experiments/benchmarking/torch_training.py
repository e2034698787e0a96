"""The model of the suite `train_step` in PyTorch, as one would train it.

A dense mask and scaled_dot_product_attention in rows of one candidate
('pointwise') or with all of a user's candidates in one pass ('streaming', its
own user-level batching), Adam, and on a GPU autocast and `torch.compile`. The
parameters are those of the Flax module, by their paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from histjax import schema as schema_lib
from histjax.models.ranker import RankerConfig
from histjax.types import RankingBatch

Parameters = dict[str, torch.Tensor]
Tensors = dict[str, Any]


def loss_and_gradient(
  config: RankerConfig, variables: Mapping[str, Any], batch: RankingBatch
) -> tuple[float, Any]:
  """In float32, as `train_rows.gradients`."""
  device = _device()
  exact = torch.backends.cuda.matmul.allow_tf32
  torch.backends.cuda.matmul.allow_tf32 = False
  tensors, tree = _parameters(variables, device)
  loss = _loss(config, tensors, _tensors(batch, device))
  loss.backward()
  torch.backends.cuda.matmul.allow_tf32 = exact
  found = [
    np.zeros(x.shape) if x.grad is None else x.grad.cpu().numpy()
    for x in tensors.values()
  ]
  return loss.item(), jax.tree.unflatten(tree, found)


def updates(
  config: RankerConfig,
  variables: Mapping[str, Any],
  batches: Sequence[RankingBatch],
) -> list[Callable[[], Any]]:
  """An update by Adam for each batch, copied from the host."""
  device = _device()
  tensors, _ = _parameters(variables, device)
  optimizer = torch.optim.Adam(
    list(tensors.values()), lr=1e-3, fused=device.type == 'cuda'
  )

  def loss_of(values):
    with torch.autocast(
      device.type, torch.bfloat16, enabled=config.dtype == 'bfloat16'
    ):
      return _loss(config, tensors, values)

  if device.type == 'cuda':
    # A program a shape, as ours; with unknown sizes Inductor of 2.11 fails.
    loss_of = torch.compile(loss_of, dynamic=False)

  def update(batch):
    def call():
      optimizer.zero_grad(set_to_none=True)
      loss_of(_tensors(batch, device)).backward()
      optimizer.step()
      if device.type == 'cuda':
        torch.cuda.synchronize()

    return call

  return [update(batch) for batch in batches]


def _device() -> torch.device:
  return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def _parameters(variables, device) -> tuple[Parameters, Any]:
  leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
  return {
    '/'.join(k.key for k in path[1:]): torch.tensor(
      np.array(leaf), device=device, requires_grad=True
    )
    for path, leaf in leaves
  }, tree


def _tensors(batch: RankingBatch, device) -> Tensors:
  def put(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(
      device, non_blocking=True
    )

  return {
    'context': {k: put(x) for k, x in batch.context.items()},
    'history': {k: put(x) for k, x in batch.history.features.items()},
    'candidates': {k: put(x) for k, x in batch.candidates.features.items()},
    'labels': {k: put(x) for k, x in batch.labels.items()},
    'length': put(batch.history.length),
    'visible': put(batch.candidates.visible),
    'mask': put(batch.candidates.mask),
  }


def _loss(config: RankerConfig, p: Parameters, batch: Tensors) -> torch.Tensor:
  """The mean log loss over real candidates and tasks."""
  logits = _logits(config, p, batch)
  total = torch.zeros((), device=logits.device)
  for i, task in enumerate(config.schema.tasks):
    loss = functional.binary_cross_entropy_with_logits(
      logits[..., i].float(), batch['labels'][task.name], reduction='none'
    )
    total = total + (loss * batch['mask']).sum()
  return total / (len(config.schema.tasks) * batch['mask'].sum())


def _logits(config: RankerConfig, p: Parameters, batch: Tensors):
  schema, encoder = config.schema, config.encoder
  item = _embed(p, schema.item_features, batch['history'])
  action = _embed(p, schema.action, batch['history'])
  features = _embed(p, schema.item_features, batch['candidates'])
  event = _dense(p, 'tokens/item', item) + _dense(p, 'tokens/action', action)
  target = _dense(p, 'tokens/item', features) + p['tokens/undecided']
  number = item.shape[1]
  ordinal = torch.arange(number, device=item.device)[None]
  length, visible = batch['length'][:, None], batch['visible']
  stop = torch.cat([torch.minimum(ordinal + 1, length), visible], dim=1)
  position = torch.cat([ordinal.expand(len(visible), -1), visible], dim=1)
  start = torch.zeros_like(stop)
  if encoder.window is not None:
    start = torch.clamp(stop - encoder.window, min=0)
  seen = (ordinal[:, None] >= start[..., None]) & (
    ordinal[:, None] < stop[..., None]
  )  # [B, Q, L]
  some = (stop > 0)[..., None]
  seen = seen | (~some & (ordinal[:, None] == 0))  # No NaN of empty rows.
  turn = _turns(position, encoder.head_dim)
  x = torch.cat([event, target], dim=1)
  for i in range(encoder.num_layers):
    x, some_, seen_, turn_ = x, some, seen, turn
    block = f'fusion/blocks_{i}'
    normed = _norm(p, f'{block}/attention_norm', x)
    past = normed[:, :number]
    key = _heads(_dense(p, f'{block}/key', past), encoder)
    key = _turn(key, tuple(y[:, :, :number] for y in turn))
    value = _heads(_dense(p, f'{block}/value', past), encoder)
    if i + 1 == encoder.num_layers:  # Nothing reads the last layer's events.
      x, normed = x[:, number:], normed[:, number:]
      some_, seen_ = some[:, number:], seen[:, number:]
      turn_ = tuple(y[:, :, number:] for y in turn)
    query = _turn(_heads(_dense(p, f'{block}/query', normed), encoder), turn_)
    attended = functional.scaled_dot_product_attention(
      query, key, value, attn_mask=seen_[:, None]
    )
    attended = attended.transpose(1, 2).flatten(2) * some_
    x = x + _dense(p, f'{block}/output', attended)
    hidden = _dense(p, f'{block}/mlp_in', _norm(p, f'{block}/mlp_norm', x))
    hidden = functional.gelu(hidden, approximate='tanh')
    x = x + _dense(p, f'{block}/mlp_out', hidden)
  readout = _norm(p, 'fusion/final_norm', x)
  user = _embed(p, schema.context, batch['context'])
  return _head(config, p, user, torch.cat([features, readout], dim=-1))


def _head(config: RankerConfig, p: Parameters, user, candidate):
  """DCN-v2 beside an MLP, the user's half of both computed once a row."""
  hidden = functional.relu(
    _dense(p, 'head/mlp_user', user)[:, None]
    + _dense(p, 'head/mlp_candidate', candidate)
  )
  for i in range(len(config.interaction.mlp_widths) - 1):
    hidden = functional.relu(_dense(p, f'head/mlp_{i}', hidden))
  wide = user[:, None].expand(-1, candidate.shape[1], -1)
  x0 = torch.cat([wide, candidate], dim=-1)
  low = _dense(p, 'head/cross_user', user)[:, None]
  low = low + _dense(p, 'head/cross_candidate', candidate)
  x = x0 * _dense(p, 'head/cross_out_0', low) + x0
  for i in range(config.interaction.cross_layers - 1):
    low = _dense(p, f'head/cross_in_{i}', x)
    x = x0 * _dense(p, f'head/cross_out_{i + 1}', low) + x
  return _dense(p, 'head/logits', torch.cat([x, hidden], dim=-1))


def _embed(p: Parameters, spec, features: Tensors):
  return torch.cat(
    [
      functional.embedding(features[f.name], p[f'tables/{f.table}'])
      if isinstance(f, schema_lib.Categorical)
      else features[f.name][..., None]
      for f in spec
    ],
    dim=-1,
  )


def _dense(p: Parameters, name: str, x):
  y = x @ p[f'{name}/kernel']
  bias = p.get(f'{name}/bias')
  return y if bias is None else y + bias


def _norm(p: Parameters, name: str, x):
  scale = p[f'{name}/scale']
  return functional.layer_norm(x, scale.shape, scale, p[f'{name}/bias'], 1e-6)


def _heads(x, encoder):
  """`[B, T, D]` as `[B, N, T, H]`."""
  return x.unflatten(-1, (encoder.num_heads, -1)).transpose(1, 2)


def _turns(position, head_dim: int):
  """Cosine and sine of the rotary angles, `[B, 1, T, H / 2]`."""
  half = head_dim // 2
  rate = 1e4 ** -(torch.arange(half, device=position.device) / half)
  angle = position[:, None, :, None].float() * rate
  return torch.cos(angle), torch.sin(angle)


def _turn(x, turns):
  cos, sin = turns
  a, b = x.float().chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
