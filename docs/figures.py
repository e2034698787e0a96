"""Draws the pictures of the masks: `python docs/figures.py`.

Who attends to whom is computed by the ranges that the rankers use.
"""

import pathlib
import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from histjax import key_range as ranges

FOLDER = pathlib.Path(__file__).parent / 'images'
EVENTS, CANDIDATES = 5, 3
DARK, LIGHT, CANDIDATE, EDGE = '#2a5d8f', '#eef1f5', '#d9822b', '#ffffff'


def shared_history(events=EVENTS, visible=(EVENTS,) * CANDIDATES, **kind):
  """Who sees what in `append_cross`, bool `[L + C, L + C]`."""
  key_range = ranges.concatenate(
    ranges.history_range(jnp.array([events]), events, **kind),
    ranges.candidate_range(jnp.array([visible]), window=kind.get('window')),
  )
  seen = np.asarray(ranges.mask(key_range, events))[0]
  return np.pad(seen, ((0, 0), (0, len(visible))))  # None sees a candidate.


def isolated():
  """As `shared_history`, and each candidate sees itself."""
  seen = shared_history(causal=True)
  candidates = np.arange(EVENTS, EVENTS + CANDIDATES)
  seen[candidates, candidates] = True
  return seen


def draw(axes, seen, events, title, colors=None):
  """One mask: rows attend to columns."""
  size = seen.shape
  for q, k in np.ndindex(*size):
    color = LIGHT
    if seen[q, k]:
      color = CANDIDATE if k >= events else DARK
    axes.add_patch(
      plt.Rectangle((k, q), 1, 1, facecolor=color, edgecolor=EDGE, linewidth=2)
    )
  axes.set_xlim(0, size[1])
  axes.set_ylim(size[0], 0)
  axes.set_aspect('equal')
  for spine in axes.spines.values():
    spine.set_visible(False)
  axes.tick_params(length=0, labelsize=9, top=True, labeltop=True)
  axes.tick_params(bottom=False, labelbottom=False)

  def names(n):
    return [
      f'H{i + 1}' if i < events else f'C{i + 1 - events}' for i in range(n)
    ]

  axes.set_xticks(np.arange(size[1]) + 0.5, names(size[1]))
  axes.set_yticks(np.arange(size[0]) + 0.5, names(size[0]))
  axes.set_title(title, fontsize=10, pad=8)


def fusions():
  """The fusions that append, side by side."""
  whole = np.ones((EVENTS + 1, EVENTS + 1), bool)
  panels = (
    (shared_history(causal=True), 'append_cross: one pass for all'),
    (isolated(), 'append_isolated: one pass for all'),
    (whole, 'append_self: a pass for each candidate'),
  )
  figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.7))
  for ax, (seen, title) in zip(axes, panels, strict=True):
    draw(ax, seen, EVENTS, title)
  return figure


def key_ranges():
  """The rows of the table of ranges, with candidates that saw 0, 2 and 4."""
  visible = (0, 2, 4)
  kinds = (
    ('bidirectional', {'causal': False}, (4, 4, 4)),
    ('causal', {'causal': True}, visible),
    ('causal with a window of 2', {'causal': True, 'window': 2}, visible),
  )
  figure, axes = plt.subplots(1, 3, figsize=(9, 4))
  for ax, (title, kind, shown) in zip(axes, kinds, strict=True):
    draw(ax, shared_history(4, shown, **kind)[:, :4], 4, title)
  return figure


FIGURES = {'fusions.svg': fusions, 'ranges.svg': key_ranges}


def main(folder=FOLDER):
  """Writes the pictures; the same bytes each time with one Matplotlib."""
  matplotlib.rcParams['svg.hashsalt'] = 'histjax'
  for name, make in FIGURES.items():
    figure = make()
    figure.tight_layout()
    path = pathlib.Path(folder) / name
    figure.savefig(path, metadata={'Date': None}, facecolor='white')
    plt.close(figure)
    print(path)


if __name__ == '__main__':
  matplotlib.use('Agg')
  main(*sys.argv[1:])
