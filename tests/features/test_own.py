"""A derived feature of one's own is one file: that of the documentation."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

from histjax import config as config_lib
from histjax import features
from histjax.data import datasets
from tests import docs_pages

PAGE = 'docs/extending/feature.md'


class OwnFeatureTest(absltest.TestCase):
  def test_the_documentation_s(self):
    names = {'__name__': 'my_features'}
    for code in docs_pages.blocks(PAGE, 'python'):
      exec(code, names)
    config = config_lib.from_dict(
      datasets.DataConfig,
      {
        'source': {'type': 'synthetic', 'num_users': 3},
        'features': [{'type': 'weekday'}],
      },
    )
    data = datasets.load(config)
    days = np.array(data.log.time, 'datetime64[s]').astype('datetime64[D]')
    expected = np.is_busday(days, '0000011')  # Saturday and Sunday.
    rows = data.splits['test']
    for r, row in enumerate(rows):
      np.testing.assert_array_equal(
        row.candidates['weekday'] >= 5, expected[rows.candidate_events(r)]
      )
    self.assertEqual(set(rows[0].history['weekday']), set(range(7)))
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    data.features.save(folder)
    self.assertEqual(features.load(folder).configs, config.features)
    self.assertEqual(
      config_lib.to_dict(config)['features'], [{'type': 'weekday'}]
    )


if __name__ == '__main__':
  absltest.main()
