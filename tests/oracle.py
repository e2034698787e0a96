"""The ranker in NumPy float64, one user and one candidate at a time.

Written from the equations, with loops instead of masks and padding.
"""

import math

import numpy as np

from histjax import schema as schema_lib


def logits(variables, config, context, events, candidate, visible):
  """Logits `[T]` of one candidate.

  Args:
    variables: of `Ranker`.
    config: a `RankerConfig`.
    context: `{name: scalar}`.
    events: a list of `{name: scalar}`, all the events of the row.
    candidate: `{name: scalar}`.
    visible: how many of the events it may see.
  """
  params = {**variables['params'], **variables['tables']}
  p = _Params(params)
  schema = config.schema
  item = p['tokens']['item']
  tokens = []
  for event in events:
    token = item.dense(_vector(p, schema.item_features, event))
    if schema.action:
      action = _vector(p, schema.action, event)
      token = token + p['tokens']['action'].dense(action)
    tokens.append(token)
  features = _vector(p, schema.item_features, candidate)
  target = item.dense(features) + p['tokens'].array('undecided')
  fused = readout(
    params.get('fusion', {}),
    config.fusion,
    config.encoder,
    tokens,
    target,
    visible,
  )
  user = np.zeros(1)
  if schema.context:
    user = _vector(p, schema.context, context)
  return _head(p['head'], config.interaction, user, features, fused)


def readout(params, fusion, encoder, tokens, target, visible):
  """The fused candidate `[D]`.

  Args:
    params: of the fusion.
    fusion: its name.
    encoder: an `EncoderConfig`.
    tokens: a list of `[D]`, all the events of the row.
    target: `[D]`, the candidate.
    visible: how many of the events it may see.
  """
  p = _Params(params)
  if 'recency' in params:
    table = p.array('recency')
    distances = range(len(tokens), 0, -1)
    tokens = [
      x + table[min(distance, encoder.num_recency - 1)]
      for x, distance in zip(tokens, distances, strict=True)
    ]
    target = target + table[0]
  fuse = {
    'append_cross': _append_cross,
    'append_isolated': _append_isolated,
    'append_self': _append_self,
    'cross_only': _cross_only,
    'concat': _concat,
    'target_attention': _target_attention,
    'mean_pool': _mean_pool,
    'none': lambda *args: np.zeros_like(args[3]),
  }[fusion]
  return fuse(p, encoder, tokens, target, visible)


def _append_cross(p, encoder, tokens, target, visible):
  """Queries of events and the candidate, keys and values of events."""
  for i in range(encoder.num_layers):
    block = p[f'blocks_{i}']
    keys = [_turned(block, 'key', x, j, encoder) for j, x in enumerate(tokens)]
    values = [_turned(block, 'value', x, None, encoder) for x in tokens]
    seen = _last(visible, encoder)
    target = _block(block, target, visible, seen, keys, values, encoder)
    tokens = _updated(block, tokens, keys, values, encoder)
  return p['final_norm'].norm(target)


def _concat(p, encoder, tokens, target, visible):
  """`W [H_i ; C]` for the events it sees; the mean of their last states."""
  tokens = [
    p['event'].dense(x) + p['candidate'].dense(target) for x in tokens[:visible]
  ]
  for i in range(encoder.num_layers):
    block = p[f'blocks_{i}']
    keys = [_turned(block, 'key', x, j, encoder) for j, x in enumerate(tokens)]
    values = [_turned(block, 'value', x, None, encoder) for x in tokens]
    tokens = _updated(block, tokens, keys, values, encoder)
  read = [p['final_norm'].norm(tokens[j]) for j in _last(visible, encoder)]
  return sum(read, np.zeros_like(target)) / max(len(read), 1)


def _append_isolated(p, encoder, tokens, target, visible):
  """As `_append_cross`, and the candidate's own key and value."""
  for i in range(encoder.num_layers):
    block = p[f'blocks_{i}']
    keys = [_turned(block, 'key', x, j, encoder) for j, x in enumerate(tokens)]
    values = [_turned(block, 'value', x, None, encoder) for x in tokens]
    own_key = _turned(block, 'key', target, visible, encoder)
    own_value = _turned(block, 'value', target, None, encoder)
    target = _block(
      block,
      target,
      visible,
      [*_last(visible, encoder), len(tokens)],
      [*keys, own_key],
      [*values, own_value],
      encoder,
    )
    tokens = _updated(block, tokens, keys, values, encoder)
  return p['final_norm'].norm(target)


def _cross_only(p, encoder, tokens, target, visible):
  """Keys and values of the raw events in every layer; only it is updated."""
  for i in range(encoder.num_layers):
    block = p[f'blocks_{i}']
    seen = _last(visible, encoder)
    keys, values = {}, {}
    for j in seen:
      keys[j] = _turned(block, 'key', tokens[j], j, encoder)
      values[j] = _turned(block, 'value', tokens[j], None, encoder)
    target = _block(block, target, visible, seen, keys, values, encoder)
  return p['final_norm'].norm(target)


def _append_self(p, encoder, tokens, target, visible):
  """A sequence of the events it sees and itself; everything sees everything."""
  first = _last(visible, encoder).start
  tokens = [*tokens[first:visible], target]
  everything = range(len(tokens))
  for i in range(encoder.num_layers):
    block = p[f'blocks_{i}']
    keys = [
      _turned(block, 'key', x, first + j, encoder) for j, x in enumerate(tokens)
    ]
    values = [_turned(block, 'value', x, None, encoder) for x in tokens]
    tokens = [
      _block(block, x, first + j, everything, keys, values, encoder)
      for j, x in enumerate(tokens)
    ]
  return p['final_norm'].norm(tokens[-1])


def _target_attention(p, encoder, tokens, target, visible):
  """Events, each weighed by an MLP of it, the candidate and their product."""
  slope = p['activation'].array('negative_slope')
  total = np.zeros_like(target)
  for j in _last(visible, encoder):
    x = p['event'].dense(tokens[j]) + p['candidate'].dense(target)
    x = x + p['product'].dense(tokens[j] * target)
    x = np.maximum(x, 0) + slope * np.minimum(x, 0)
    total = total + p['weight'].dense(x)[0] * tokens[j]
  return total


def _mean_pool(p, encoder, tokens, target, visible):
  """The mean of the events it sees."""
  del p
  read = [tokens[j] for j in _last(visible, encoder)]
  return sum(read, np.zeros_like(target)) / max(len(read), 1)


def _updated(block, tokens, keys, values, encoder):
  """The events after a block."""
  return [
    _block(
      block,
      x,
      j,
      _last(j + 1, encoder) if encoder.causal else range(len(tokens)),
      keys,
      values,
      encoder,
    )
    for j, x in enumerate(tokens)
  ]


def _last(stop, encoder):
  """The events before `stop`, within the window."""
  first = 0 if encoder.window is None else max(0, stop - encoder.window)
  return range(first, stop)


def _head(p, config, user, features, readout):
  x0 = np.concatenate([user, features, readout])
  split = len(user)
  hidden = p['mlp_user'].dense(user) + p['mlp_candidate'].dense(x0[split:])
  hidden = np.maximum(hidden, 0)
  for i in range(len(config.mlp_widths) - 1):
    hidden = np.maximum(p[f'mlp_{i}'].dense(hidden), 0)
  if config.kind == 'mlp':
    return p['logits'].dense(hidden)
  down = np.concatenate(
    [p['cross_user'].array('kernel'), p['cross_candidate'].array('kernel')]
  )
  x = x0
  for i in range(config.cross_layers):
    v = down if i == 0 else p[f'cross_in_{i - 1}'].array('kernel')
    x = x0 * p[f'cross_out_{i}'].dense(x @ v) + x
  return p['logits'].dense(np.concatenate([x, hidden]))


def _block(p, x, position, seen, keys, values, encoder):
  query = _turned(p, 'query', x, position, encoder)  # [N, H]
  attended = np.zeros_like(query)
  for n in range(encoder.num_heads):
    if len(seen):
      score = np.array([query[n] @ keys[j][n] for j in seen])
      weight = np.exp((score - score.max()) / math.sqrt(encoder.head_dim))
      weight = weight / weight.sum()
      attended[n] = sum(
        w * values[j][n] for w, j in zip(weight, seen, strict=True)
      )
  x = x + p['output'].dense(attended.reshape(-1))
  hidden = p['mlp_in'].dense(p['mlp_norm'].norm(x))
  # The tanh form of GELU, as flax.linen.gelu.
  hidden = (
    0.5
    * hidden
    * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
  )
  return x + p['mlp_out'].dense(hidden)


def _turned(p, name, x, position, encoder):
  x = p[name].dense(p['attention_norm'].norm(x))
  x = x.reshape(encoder.num_heads, encoder.head_dim)
  if position is None or encoder.positions != 'rotary':
    return x
  half = encoder.head_dim // 2
  out = np.zeros_like(x)
  for i in range(half):
    angle = position * 10_000.0 ** (-i / half)
    a, b = x[:, i], x[:, i + half]
    out[:, i] = a * math.cos(angle) - b * math.sin(angle)
    out[:, i + half] = a * math.sin(angle) + b * math.cos(angle)
  return out


def _vector(p, spec, values):
  parts = []
  for feature in spec:
    value = values[feature.name]
    if isinstance(feature, schema_lib.Categorical):
      parts.append(p['tables'].array(feature.table)[value])
    else:
      parts.append(np.array([value], np.float64))
  return np.concatenate(parts)


class _Params:
  """A subtree of the parameters, in float64."""

  def __init__(self, tree):
    self._tree = tree

  def __getitem__(self, name):
    return _Params(self._tree[name])

  def array(self, name):
    return np.asarray(self._tree[name], np.float64)

  def dense(self, x):
    y = x @ self.array('kernel')
    return y + self.array('bias') if 'bias' in self._tree else y

  def norm(self, x):
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    return x * self.array('scale') + self.array('bias')
