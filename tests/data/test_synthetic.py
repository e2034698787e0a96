"""The planted probabilities are what the log is drawn from."""

import numpy as np
from absl.testing import absltest, parameterized
from sklearn import metrics

from histjax.data import synthetic
from histjax.data.rows import RowConfig, make_rows

SMALL = synthetic.SyntheticConfig(
  num_users=50, requests_per_user=8, num_items=30, num_categories=3
)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


class SyntheticTest(parameterized.TestCase):
  def test_probability_follows_from_the_history(self):
    """Recomputes, event by event, from what a model would be given."""
    log = synthetic.generate(SMALL)
    rows = make_rows(log, np.ones(len(log), bool), RowConfig('pointwise'))
    item = log.features['item']
    # Events without history give away each item's and segment's logit.
    click, like = log.extra['bayes_click'], log.extra['bayes_like']
    base = np.full((synthetic.NUM_SEGMENTS, SMALL.num_items), np.nan)
    first = log.visible() == log.offsets[log.user]
    segment = log.features['segment']
    base[segment[first], item[first]] = np.log(click / (1 - click))[first]
    checked = 0
    for i, row in enumerate(rows):
      category = row.candidates['category'][0]
      same = row.history['category'] == category
      sign = 2 * row.history['click'] - 1 + row.history['like']
      ages = -(-len(same) // SMALL.candidates_per_request)
      order = np.arange(len(same)) // SMALL.candidates_per_request
      liking = np.sum(same * sign * SMALL.decay ** (ages - 1 - order))
      start = base[segment[i], item[i]]
      if np.isfinite(start):
        checked += 1
        drive = SMALL.strength * liking
        np.testing.assert_allclose(click[i], sigmoid(start + drive), rtol=1e-5)
      np.testing.assert_allclose(
        like[i],
        click[i] * sigmoid(SMALL.like_bias + SMALL.strength * liking / 2),
        rtol=1e-5,
      )
    self.assertGreater(checked, len(log) // 2)

  def test_labels_are_drawn_from_it(self):
    log = synthetic.generate(synthetic.SyntheticConfig(num_users=1000))
    for task in synthetic.TASKS:
      chance = log.extra[f'bayes_{task}']
      for low in np.arange(0, 1, 0.2):
        part = (chance >= low) & (chance < low + 0.2)
        if part.sum() < 500:
          continue
        error = 5 * np.sqrt(0.25 / part.sum())
        self.assertAlmostEqual(
          log.labels[task][part].mean(), chance[part].mean(), delta=error
        )
    self.assertTrue(np.all(log.labels['like'] <= log.labels['click']))

  def test_no_other_score_is_better(self):
    config = synthetic.SyntheticConfig(num_users=1000)
    log = synthetic.generate(config)
    masks = synthetic.SPLIT.masks(log)
    splits = {k: make_rows(log, m, RowConfig()) for k, m in masks.items()}
    best = synthetic.bayes_auc(splits['test'])
    without = synthetic.no_history_auc(splits)
    for task in synthetic.TASKS:
      events = splits['test'].events
      labels, chance = log.labels[task][events], log.extra[f'bayes_{task}']
      self.assertAlmostEqual(
        best[task], metrics.roc_auc_score(labels, chance[events])
      )
      rng = np.random.default_rng(0)
      noisy = chance[events] + 0.1 * rng.normal(size=len(events))
      self.assertLess(metrics.roc_auc_score(labels, noisy), best[task])
      # Who does not read the history is far behind.
      self.assertLess(without[task] - 0.5, 0.75 * (best[task] - 0.5))
      self.assertGreater(without[task], 0.55)

  def test_deterministic(self):
    first, second = synthetic.draw(SMALL), synthetic.draw(SMALL)
    for name, values in first.items():
      np.testing.assert_array_equal(values, second[name])
    other = synthetic.draw(
      synthetic.SyntheticConfig(**{**vars(SMALL), 'seed': 1})
    )
    self.assertFalse(np.array_equal(first['click'], other['click']))

  def test_requests(self):
    log = synthetic.generate(SMALL)
    rows = make_rows(log, np.ones(len(log), bool), RowConfig('request'))
    self.assertLen(rows, 50 * 8)
    self.assertEqual(set(rows.candidate_counts.tolist()), {4})
    self.assertEqual(set(rows.history_lengths.tolist()), set(range(0, 32, 4)))
    self.assertNotIn('bayes_click', rows[0].candidates)

  @parameterized.parameters(
    ({'decay': 1.0}, 'decay'),
    ({'num_items': 0}, 'num_i'),
    ({'seed': -1}, 'seed=-1 must be >= 0'),
    ({'strength': float('nan')}, 'strength=nan must be finite'),
    ({'quality_scale': float('inf')}, 'quality_scale=inf must be >= 0 and'),
  )
  def test_bad_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      synthetic.SyntheticConfig(**fields)


if __name__ == '__main__':
  absltest.main()
