"""Runs that cannot be right are refused before they start."""

import dataclasses
import functools
import types

import numpy as np
import pytest

from histjax.data import pipeline, rows
from histjax.models import ranker
from histjax.nn import encoder
from histjax.training import config as config_lib
from histjax.training import losses
from tests import support

MODEL = support.config()


def make(**fields):
  return config_lib.TrainConfig(**{'model': MODEL, 'num_steps': 10, **fields})


def with_encoder(**fields):
  return dataclasses.replace(MODEL, encoder=encoder.EncoderConfig(**fields))


def with_rows(field='rows', **fields):
  config = make().data
  return dataclasses.replace(config, **{field: rows.RowConfig(**fields)})


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'num_steps': None}, 'num_epochs=None and num_steps=None: set one'),
    ({'num_epochs': 1}, 'num_epochs=1 and num_steps=10: set one'),
    ({'num_steps': 0}, 'num_steps=0 must be at least 1'),
    ({'log_every': 0}, 'log_every=0 must be at least 1'),
    ({'patience': 0}, 'patience=0 must be at least 1'),
    ({'average': 1.0}, r'average=1.0 must be in \[0, 1\), as 0.99, or None'),
    (
      {
        'rank_loss': losses.RankLossConfig(0.1),
        'data': with_rows(kind='pointwise'),
      },
      r"rank_loss\.weight=0\.1 with data\.rows\.kind='pointwise'.*'streaming'",
    ),
    ({'eval_every': 0}, 'eval_every=0 must be at least 1'),
    ({'seed': 2**31}, r'seed=2147483648 must be below 2\*\*31'),
    (
      {'select': {'like/acu': 1.0}},
      r"select has 'like/acu', .* choose from \['auc', .*'click/auc'",
    ),
    ({'select': {'lik/auc': 1.0}}, "select has 'lik/auc', which is not"),
    ({'select': {'auc': -1.0}}, r"select\['auc'\]=-1.0 must be >= 0"),
    ({'select': {'ne': float('inf')}}, r"select\['ne'\]=inf must be"),
    ({'select': {'auc': 0.0}}, "select={'auc': 0.0}: nothing to choose"),
    ({'task_weights': {'lik': 1.0}}, "task_weights has 'lik'.*'click', 'like'"),
    ({'task_weights': {'like': -1.0}}, r"task_weights\['like'\]=-1.0 must be"),
    ({'task_weights': {'like': float('nan')}}, "'like'.=nan must be >= 0"),
    ({'task_weights': {'like': 0, 'click': 0}}, 'all tasks weigh 0'),
    (
      {
        'pipeline': pipeline.PipelineConfig(pack=True),
        'data': with_rows(kind='request'),
        'model': with_encoder(causal=False),
      },
      r'encoder\.causal=False cannot take packed rows.*pipeline\.pack=False',
    ),
    (
      {'model': with_encoder(causal=False)},
      r"data\.rows\.kind='streaming' with model\.encoder\.causal=False.*"
      r'Set model\.encoder\.causal=True, or data\.rows\.kind=',
    ),
    (
      {'model': with_encoder(positions='recency')},
      r"positions='recency'.*positions='rotary'",
    ),
    (
      {'data': with_rows(history_length=9)},
      r'history_length=9 .*window=None, model.encoder.num_layers=2 .* a score '
      r'reads the whole history.*Set model\.encoder\.window to 5 or less, or '
      r'data\.rows\.history_length=None',
    ),
    (
      {
        'data': with_rows(history_length=9),
        'model': with_encoder(num_layers=2, window=6),
      },
      r'window=6, .* reads 11: .* to 5 or less',
    ),
    (  # No window is that small.
      {'data': with_rows(history_length=0)},
      r'cut into rows\. Set data\.rows\.history_length=None',
    ),
    (  # The mean reads events that have seen two windows.
      {
        'data': with_rows(history_length=9),
        'model': dataclasses.replace(
          with_encoder(num_layers=2, window=5), fusion='concat'
        ),
      },
      r"fusion='concat' a score reads 13: .* to 3 or less",
    ),
    (
      {
        'data': with_rows('eval_rows', history_length=9),
      },
      r'data\.eval_rows\.history_length=9',
    ),
  ],
)
def test_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


@pytest.mark.parametrize(
  'fields',
  [
    {'num_steps': None, 'num_epochs': 2},
    {'rank_loss': losses.RankLossConfig(0.1, 4)},
    {'select': {'like/gauc': 1.0}, 'task_weights': {'like': 0.0}},
    {'model': with_encoder(causal=False), 'data': with_rows(kind='request')},
    {
      'model': with_encoder(positions='recency'),
      'data': with_rows(kind='pointwise', history_length=9),
    },
    {'data': with_rows(history_length=9, on_overflow='error')},
    {
      'data': with_rows(history_length=9),
      'model': with_encoder(num_layers=2, window=5),
    },
  ],
)
def test_takes(fields):
  assert isinstance(make(**fields).model, ranker.RankerConfig)


def test_what_the_best_is_chosen_by():
  assert make().criterion == {'click/auc': 1.0}
  select = {'auc': 1.0, 'like/ne': 0.3, 'click/auc': 2.0, 'gauc': 0.0}
  assert make(select=select).criterion == {'click/auc': 3.0, 'like/ne': 0.3}


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'num_steps': '10'}, "num_steps='10' is of type str; it must be int"),
    ({'num_steps': [10]}, r'num_steps=\[10\] is of type list'),
    ({'seed': 1.0}, 'seed=1.0 is of type float'),
    ({'patience': True}, 'patience=True is of type bool'),
    ({'select': ['auc']}, r"select=\['auc'\] is of type list"),
    ({'select': {'auc': '1'}}, "select.auc='1' is of type str"),
    ({'task_weights': 1.0}, 'task_weights=1.0 is of type float'),
    ({'model': {}}, 'schema is missing'),
    ({'data': 'log.csv'}, "data='log.csv' is of type str; it must be DataConf"),
    ({'average': '0.9'}, "average='0.9' is of type str"),
  ],
)
def test_values_of_the_wrong_kind(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


class TestMetricsToSelectBy:
  """They must be defined on validation and test, before training."""

  def check(self, labels, user, select):
    log = types.SimpleNamespace(labels=labels, user=np.asarray(user))
    split = types.SimpleNamespace(log=log, events=np.arange(1, len(user)))
    split.label_summary = functools.partial(rows.Rows.label_summary, split)
    config_lib.check_defined(make(select=select), 'test', split)

  @pytest.mark.parametrize(
    'click, user, select, message',
    [
      # Event 0 is in another split, and does not count.
      ([0, 1, 1, 1], [0, 0, 1, 1], {'auc': 1.0}, "click/auc' .* are 1"),
      ([1, 0, 0, 0], [0, 0, 1, 1], {'ne': 1.0}, "click/ne' .* are 0"),
      ([0, 1, 0, 0], [0, 0, 1, 1], {'auc': 1, 'gauc': 1}, 'no user has both'),
      ([1, 1, 1, 0], [0, 0, 1, 1], {'gauc': 1.0}, None),
      ([0, 1, 0, 0], [0, 0, 1, 1], {'auc': 1.0, 'ne': 1.0}, None),
      ([1, 1, 1, 1], [0, 0, 1, 1], {'logloss': 1.0}, None),
      ([1, 1, 1, 1], [0, 0, 1, 1], {'like/auc': 1.0, 'auc': 0.0}, None),
    ],
  )
  def test_one(self, click, user, select, message):
    labels = {'click': np.asarray(click), 'like': np.asarray([0, 1, 0, 1])}
    if message is None:
      self.check(labels, user, select)
      return
    with pytest.raises(ValueError, match=message):
      self.check(labels, user, select)

  def test_nothing_counts(self):
    known = types.SimpleNamespace(
      label_summary=lambda *_: rows.LabelSummary(0, 0, 0)
    )
    config = make(select={'logloss': 1.0}, leave_out={'cold_users': True})
    with pytest.raises(ValueError, match='leaves no candidate of the test spl'):
      config_lib.check_defined(config, 'test', None, known)
