"""The model of the suite `request` in PyTorch, as one would write it to serve.

Weights are of the computation's type, products that read the same input are
one, and widths are padded to what matrix units like. All rows are full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from histjax import schema as schema_lib
from histjax.models.ranker import RankerConfig

Features = Mapping[str, torch.Tensor]
Cache = list[torch.Tensor]
"""Keys or values of each layer, `[B, N, L, H]`, rotated."""

_ALIGNMENT = 8  # Channels of 16 bits in the 16 bytes of a load.


class Ranker(nn.Module):
  """`histjax.Ranker` with the fusion 'append_cross' and a causal history."""

  def __init__(
    self,
    config: RankerConfig,
    variables: Mapping[str, Any],
    num_events: int,
    device: torch.device,
  ):
    """Converts parameters.

    Args:
      config: its interaction is 'dcn_v2', its positions are rotary.
      variables: of the Flax module, NumPy arrays.
      num_events: L, of every history when its candidates are scored.
      device: to put them on.
    """
    super().__init__()
    self.schema, self.num_heads = config.schema, config.encoder.num_heads
    self.num_events = num_events
    self.options: Any = {
      'device': device,
      'dtype': getattr(torch, config.dtype),
    }
    params = variables['params']
    tokens, fusion = params['tokens'], params['fusion']
    self.tables = nn.ParameterDict(
      {k: self._parameter(v) for k, v in variables['tables']['tables'].items()}
    )
    item, action = tokens['item'], tokens['action']['kernel']
    self.event = self._linear(
      np.concatenate([item['kernel'], action]), item['bias']
    )
    self.candidate = self._linear(
      item['kernel'], item['bias'] + tokens['undecided']
    )
    self.layers: Any = nn.ModuleList(
      _Layer(self, fusion[f'blocks_{i}'])
      for i in range(config.encoder.num_layers)
    )
    self.final_norm = self._norm(fusion['final_norm'])
    self.head = _Head(self, params['head'])
    half = config.encoder.head_dim // 2
    angle = np.outer(
      np.arange(num_events + 1), 1e4 ** -(np.arange(half) / half)
    )
    self.cos, self.sin = (
      torch.tensor(f(angle), dtype=torch.float32, device=device)
      for f in (np.cos, np.sin)
    )

  def score(
    self,
    context: Features,
    candidates: Features,
    keys: Cache,
    values: Cache,
  ) -> torch.Tensor:
    """Logits `[tasks, B, C]`, float32, from cached keys and values."""
    features = self._item(candidates)
    x = self.candidate(_align(features))
    for layer, key, value in zip(self.layers, keys, values, strict=True):
      query = self._turn(
        layer.heads(layer.query(layer.norm(x))), slice(-1, None)
      )
      attended = functional.scaled_dot_product_attention(query, key, value)
      x = layer.update(x, attended)
    return self.head(self._user(context), features, self.final_norm(x))

  def read_and_score(
    self,
    context: Features,
    candidates: Features,
    events: Features,
    cached: tuple[Cache, Cache] | None = None,
  ) -> tuple[torch.Tensor, Cache, Cache]:
    """Logits, keys and values: events and candidates go through together.

    Args:
      context: `[B]`.
      candidates: `[B, C]`.
      events: `[B, L]`, the whole history; or `[B, E]`, its last ones.
      cached: keys and values with room for L, the last E written in place.
    """
    features = self._item(candidates)
    event = torch.cat([self._item(events), self._action(events)], dim=-1)
    x = torch.cat(
      [self.event(_align(event)), self.candidate(_align(features))], dim=1
    )
    number, first = event.shape[1], self.num_events - event.shape[1]
    place = torch.arange(self.num_events, device=x.device)
    mask = None
    if cached is not None:
      mask = place[None, :] <= place[first:, None]
    # Candidates stand behind the last event.
    position = torch.cat(
      [place[first:], place.new_full((x.shape[1] - number,), self.num_events)]
    )
    keys, values = [], []
    attend = functional.scaled_dot_product_attention
    for i, layer in enumerate(self.layers):
      normed = layer.norm(x)
      key, value = layer.key_value(normed[:, :number]).chunk(2, dim=-1)
      key = self._turn(layer.heads(key), place[first:])
      value = layer.heads(value)
      if cached is not None:
        for cache, new in zip(cached, (key, value), strict=True):
          cache[i][:, :, place[first:]] = new
        key, value = cached[0][i], cached[1][i]
      keys.append(key)
      values.append(value)
      if i + 1 == len(self.layers):  # Nothing reads the last layer's events.
        x, normed, position = (
          x[:, number:],
          normed[:, number:],
          position[number:],
        )
      query = self._turn(layer.heads(layer.query(normed)), position)
      if i + 1 == len(self.layers):
        attended = attend(query, key, value)
      else:
        attended = torch.cat(
          [
            attend(
              query[:, :, :number],
              key,
              value,
              attn_mask=mask,
              is_causal=mask is None,
            ),
            attend(query[:, :, number:], key, value),
          ],
          dim=2,
        )
      x = layer.update(x, attended)
    logits = self.head(self._user(context), features, self.final_norm(x))
    return logits, keys, values

  def _user(self, context: Features):
    return self._embed(context, self.schema.context)

  def _item(self, features: Features):
    return self._embed(features, self.schema.item_features)

  def _action(self, features: Features):
    return self._embed(features, self.schema.action)

  def _embed(self, features: Features, spec):
    dtype = self.options['dtype']
    return torch.cat(
      [
        functional.embedding(features[f.name], self.tables[f.table])
        if isinstance(f, schema_lib.Categorical)
        else features[f.name][..., None].to(dtype)
        for f in spec
      ],
      dim=-1,
    )

  def _turn(self, x, position):
    """Rotates `[B, N, T, H]`."""
    cos, sin = self.cos[position], self.sin[position]
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.to(x.dtype)

  def _parameter(self, x) -> nn.Parameter:
    x = torch.from_numpy(np.array(x, np.float32)).to(**self.options)
    return nn.Parameter(x, requires_grad=False)

  def _linear(self, kernel, bias=None) -> nn.Linear:
    """Of a kernel `[in, out]`, both padded with zeros."""
    kernel = np.pad(kernel, [(0, -n % _ALIGNMENT) for n in kernel.shape])
    linear = nn.Linear(
      kernel.shape[0], kernel.shape[1], bias=bias is not None, device='meta'
    )
    linear.weight = self._parameter(kernel.T)
    if bias is not None:
      bias = np.pad(bias, (0, kernel.shape[1] - len(bias)))
      linear.bias = self._parameter(bias)
    return linear

  def _norm(self, params) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(params['scale']), eps=1e-6, device='meta')
    norm.weight = self._parameter(params['scale'])
    norm.bias = self._parameter(params['bias'])
    return norm


class _Layer(nn.Module):
  """A pre-norm block."""

  def __init__(self, model: Ranker, params):
    super().__init__()
    self.num_heads = model.num_heads
    self.norm = model._norm(params['attention_norm'])
    self.query = model._linear(params['query']['kernel'])
    self.key_value = model._linear(
      np.concatenate([params[k]['kernel'] for k in ('key', 'value')], axis=1)
    )
    self.mlp_norm = model._norm(params['mlp_norm'])
    self.output, self.mlp_in, self.mlp_out = (
      model._linear(params[k]['kernel'], params[k]['bias'])
      for k in ('output', 'mlp_in', 'mlp_out')
    )

  def heads(self, x):
    """`[B, T, D]` as `[B, N, T, H]`."""
    return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

  def update(self, x, attended):
    """The residual stream after attention and MLP."""
    x = x + self.output(attended.transpose(1, 2).flatten(2))
    hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate='tanh')
    return x + self.mlp_out(hidden)


class _Head(nn.Module):
  """DCN-v2 beside an MLP, the user's half of both computed once a row."""

  def __init__(self, model: Ranker, params):
    super().__init__()
    self.hidden = params['mlp_user']['kernel'].shape[1]
    user_bias = params['mlp_user']['bias']
    rank = params['cross_user']['kernel'].shape[1]
    self.user, self.candidate = (
      model._linear(
        np.concatenate(
          [params[f'{k}_{of}']['kernel'] for k in ('mlp', 'cross')], axis=1
        ),
        bias,
      )
      for of, bias in (
        ('user', np.pad(user_bias, (0, rank))),
        ('candidate', None),
      )
    )

    def layers(name):
      numbers = range(len([k for k in params if k.startswith(name + '_')]))
      found = [f'{name}_{i}' for i in numbers if f'{name}_{i}' in params]
      return nn.ModuleList(
        model._linear(params[k]['kernel'], params[k].get('bias')) for k in found
      )

    self.mlp, self.down, self.up = map(layers, ('mlp', 'cross_in', 'cross_out'))
    # The padding is between the crossed features and the hidden channels.
    kernel = np.array(params['logits']['kernel'])
    crossed = params['cross_out_0']['kernel'].shape[1]
    kernel = np.insert(kernel, [crossed] * (-crossed % _ALIGNMENT), 0, axis=0)
    float32 = {'dtype': torch.float32, 'device': model.options['device']}
    self.logits, self.bias = (
      nn.Parameter(torch.tensor(x, **float32), requires_grad=False)
      for x in (kernel.T.copy(), np.array(params['logits']['bias']))
    )

  def forward(self, user, features, readout):
    """Logits `[tasks, B, C]`, float32."""
    candidate = torch.cat([features, readout], dim=-1)
    both = self.user(_align(user))[:, None] + self.candidate(_align(candidate))
    hidden = functional.relu(both[..., : self.hidden])
    for layer in self.mlp:
      hidden = functional.relu(layer(hidden))
    user = user[:, None].expand(-1, candidate.shape[1], -1)
    x0 = _align(torch.cat([user, candidate], dim=-1))
    x = x0 * self.up[0](both[..., self.hidden :]) + x0
    for down, up in zip(self.down, self.up[1:], strict=True):
      x = x0 * up(down(x)) + x
    last = torch.cat([x, hidden], dim=-1).float()
    if not last.is_cuda:
      logits = functional.linear(last, self.logits, self.bias)
      return logits.movedim(-1, 0)
    # So few columns are no product for a matrix unit; this becomes one kernel.
    return torch.stack(
      [
        (last * weight).sum(-1) + bias
        for weight, bias in zip(self.logits, self.bias, strict=True)
      ]
    )


def _align(x: torch.Tensor) -> torch.Tensor:
  """Channels padded with zeros."""
  padding = -x.shape[-1] % _ALIGNMENT
  return functional.pad(x, (0, padding)) if padding else x
