"""What experiments/benchmark.py and scale.py refuse before they work."""

import json
import pathlib
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]
# One process for all cases of a program: importing it is what takes time.
_SCRIPT = """
import json, sys
from absl import app, flags
from absl.testing import flagsaver
import {program} as program
flags.FLAGS([sys.argv[0]])
found = []
for case in json.loads(sys.argv[1]):
  with flagsaver.as_parsed(**case['flags']):
    try:
      program.main(['program', *case.get('argv', [])])
      found.append('no error')
    except app.UsageError as error:
      found.append(str(error))
print(json.dumps(found))
"""


def messages(program, *cases):
  done = subprocess.run(
    [
      *(sys.executable, '-c', _SCRIPT.format(program=program)),
      json.dumps(cases),
    ],
    cwd=ROOT / 'experiments',
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


class UsageTest(absltest.TestCase):
  def test_benchmark(self):
    wrong = {
      'calls': ('3', 'request'),
      'fusions': ('concat', 'histories'),
      'folder': ('logs', 'prepare or spill'),
      'events': ('10', 'prepare or spill'),
      'memory': ('1', 'prepare or spill'),
      'workers': ('1', 'prepare or spill'),
    }
    cases = [
      {'flags': {'suite': 'tables', name: value}}
      for name, (value, _) in wrong.items()
    ]
    expected = [
      f'--{name} is of --suite={suites}, not of tables'
      for name, (_, suites) in wrong.items()
    ]
    cases += [
      {'flags': {'suite': 'tables'}, 'argv': ['more']},
      {'flags': {'suite': 'cost', 'rows': '1,2'}},
      {'flags': {'suite': 'fusions', 'lengths': '8,16', 'candidates': '4'}},
      {'flags': {'suite': 'fusions', 'lengths': '8', 'candidates': '4,8'}},
    ]
    expected += [
      "unknown arguments: ['more']",
      'suite=cost takes one of --rows=[1, 2]',
      'suite=fusions takes one of --lengths=[8, 16] and one of '
      '--candidates=[4]',
      'suite=fusions takes one of --lengths=[8] and one of --candidates=[4, 8]',
    ]
    self.assertEqual(messages('benchmark', *cases), expected)

  def test_scale(self):
    self.assertEqual(
      messages(
        'scale',
        {'flags': {}, 'argv': ['more']},
        {'flags': {'events': '10'}},
        {'flags': {'hours': '1'}},
      ),
      [
        "unknown arguments: ['more']",
        '--events is of a log: give --prepare, too',
        '--hours is of a log: give --prepare, too',
      ],
    )


if __name__ == '__main__':
  absltest.main()
