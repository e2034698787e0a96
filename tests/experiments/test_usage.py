"""What programs of experiments/ refuse before they work."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parents[2]
# One process for all cases of a program: importing it is what takes time.
_SCRIPT = """
import json, sys
from absl import app, flags
from absl.testing import flagsaver
import {program} as program
flags.FLAGS.mark_as_parsed()
found = []
for case in json.loads(sys.argv[1]):
  with flagsaver.as_parsed(**case['flags']):
    try:
      program.main(['program', *case.get('argv', [])])
      found.append('no error')
    except (app.UsageError, SystemExit) as error:
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
    others = {
      'workloads': ('single_128', 'scoring'),
      'contenders': ('xla', 'cost'),
      'repeats': ('3', 'serving'),
      'seconds': ('1', 'spill'),
      'rows': ('1', 'request'),
      'lengths': ('8', 'request'),
      'candidates': ('8', 'train_step'),
      'width': ('8', 'tower'),
      'num_layers': ('1', 'attention'),
      'num_heads': ('1', 'devices'),
      'bfloat16': ('true', 'tower'),
      'users': ('1', 'request'),
      'http': ('false', 'request'),
      'workdir': ('run', 'serving'),
    }
    cases += [
      {'flags': {'suite': suite, name: value}}
      for name, (value, suite) in others.items()
    ]
    cases += [{'flags': {'workdir': 'absent', 'width': '8'}}]
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
    found = messages('benchmark', *cases)
    kept = found[: len(wrong)] + found[-4:]
    self.assertEqual(kept, expected)
    *some, last = found[len(wrong) : -4]
    for said, (name, (_, suite)) in zip(some, others.items(), strict=True):
      self.assertRegex(said, f'^--{name} is of --suite=.*, not of {suite}$')
    self.assertEqual(
      last,
      'ValueError: --width=8 is of a model without --workdir; leave it out',
    )

  def test_values_of_benchmark(self):
    whole = 'must be whole numbers above 0, as 64,512'
    cases = (
      ({'lengths': '8,x'}, f'--lengths=8,x {whole}'),
      ({'lengths': ''}, f'--lengths= {whole}'),
      ({'candidates': '0'}, f'--candidates=0 {whole}'),
      ({'rows': '-1'}, f'--rows=-1 {whole}'),
      ({'suite': 'serving', 'users': '1,0'}, f'--users=1,0 {whole}'),
      (
        {'seconds': 'inf'},
        '--seconds=inf must be finite; give a number, or leave it out',
      ),
      (
        {'seconds': 'nan'},
        '--seconds=nan must be finite; give a number, or leave it out',
      ),
      (
        {'suite': 'prepare', 'memory': 'nan'},
        '--memory=nan must be finite; give a number, or leave it out',
      ),
      (
        {'suite': 'histories', 'candidates': '4,8'},
        'suite=histories takes one of --candidates=[4, 8]',
      ),
    )
    found = messages('benchmark', *({'flags': x} for x, _ in cases))
    said = [text.removeprefix('ValueError: ') for text in found]
    self.assertEqual(said, [text for _, text in cases])

  def test_modules_that_are_not_there(self):
    given = {'workdir': 'absent', 'modules': 'my_own'}
    (found,) = messages('evaluate', {'flags': given})
    self.assertEqual(
      found,
      "ModuleNotFoundError: --modules: there is no module 'my_own'; run in the "
      'folder of its file, or name that in PYTHONPATH',
    )

  def test_size_and_scale(self):
    other = str(ROOT / 'benchmarks/results/2026-11-26-cost-cpu.json')
    prepare = str(ROOT / 'benchmarks/results/2026-11-28-prepare-epyc-cpu.json')
    model = {'num_layers': '1', 'width': '8', 'num_heads': '1'}
    of_size = (
      ({**model, 'lengths': '0'}, '--lengths=0 must be whole numbers above 0'),
      ({'results': other}, "is of suite 'cost'; give the JSON of benchmark.py"),
      ({'results': str(ROOT / 'setup.cfg')}, 'setup.cfg is of suite None'),
    )
    of_scale = (
      ({'chips': ''}, '--chips names none; use some of'),
      ({'prepare': other}, "is of suite 'cost'; give the JSON of benchmark.py"),
      ({'prepare': prepare, 'hours': '0'}, 'hours=0.0 must be above 0'),
      ({'prepare': prepare, 'events': 'nan'}, 'events=nan must be above 0'),
      ({'zipf': 'nan'}, 'zipf=nan must be >= 0 and finite'),
    )
    for program, cases in (('size', of_size), ('scale', of_scale)):
      found = messages(program, *({'flags': given} for given, _ in cases))
      for text, (_, said) in zip(found, cases, strict=True):
        self.assertIn(said, text)

  def test_load(self):
    self.check(
      'load',
      ({'check': 'true', 'engine': 'store'}, "--engine=['store'] is not of"),
      ({'check': 'true', 'tries': '1'}, '--tries=1 is not of --check'),
      ({'check': 'true', 'limit_ms': '9'}, '--limit_ms=9.0 is not of --check'),
      ({'rate': '9'}, '--rate=9.0 is of --check'),
      (
        {'workdir': 'run', 'width': '64'},
        '--width=64 is of runs made, without --workdir',
      ),
      ({'workdir': 'run', 'layers': '1'}, '--layers=1 is of runs made'),
      (
        {'engine': 'plain', 'store_mib': '9'},
        '--store_mib=9 is of --engine=store',
      ),
      ({'serve': '1', 'rate': '9'}, '--rate=9.0 is not of --serve'),
    )

  def test_values_of_load(self):
    cases = ('limit_ms', 'nan'), ('seconds', 'inf'), ('rate', 'nan')
    found = messages('load', *({'flags': {k: v}} for k, v in cases))
    for said, (name, value) in zip(found, cases, strict=True):
      self.assertStartsWith(
        said, f'ValueError: --{name}={value} must be finite; give'
      )

  def test_score(self):
    files = {name: 'x' for name in ('workdir', 'events', 'candidates')}
    self.check(
      'score',
      *(
        ({**files, 'output': 'x', name: '1'}, f'--{name}={said} is of --engine')
        for name, said in (('ray_workers', '1'), ('ray_gpus', '1.0'))
      ),
    )

  def test_serve(self):
    self.check(
      'serve',
      ({'workdir': 'x', 'replicas': '2'}, '--replicas=2 is of --engine=ray'),
    )

  def test_values_of_serve(self):
    cases = {
      ('warm_up', '0'): 'must be whole numbers above 0; give',
      ('warm_up', '16,x'): 'must be whole numbers above 0; give',
      ('warm_up', ''): 'must be whole numbers above 0; give',
      ('ttl_s', '-1.0'): 'must be above 0; leave it out',
      ('watch_s', 'nan'): 'must be finite; give a number, or leave it out',
      ('timeout_ms', 'nan'): 'must be finite; give a number',
      ('drain_s', 'nan'): 'must be finite; give a number',
      ('max_wait_ms', 'nan'): 'must be finite; give a number',
      ('token_file', 'nope'): 'No such file or directory; name a file',
    }
    found = messages(
      'serve', *({'flags': {'workdir': 'x', k: v}} for k, v in cases)
    )
    for said, ((name, value), wanted) in zip(found, cases.items(), strict=True):
      self.assertStartsWith(said, f'ValueError: --{name}={value}')
      self.assertIn(wanted, said)
    flags = {'workdir': 'x', 'cache_dir': f'{__file__}/programs'}
    (found,) = messages('serve', {'flags': flags})
    self.assertRegex(found, 'Error: .*--cache_dir=.*cannot be written to')

  def test_help_shows_the_config(self):
    done = subprocess.run(
      [sys.executable, 'experiments/train.py', '--help'],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertIn('\n  --config: The run. Every field can be', done.stdout)

  def test_help_of_serve(self):
    """Enough to act on; 'Serve it.' is not."""
    flags = 'flags.FLAGS.flags_by_module_dict()["serve"]'
    code = f"""
      from absl import flags
      import serve
      for x in {flags}: print(x.name + ': ' + x.help)
    """
    done = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code)],
      cwd=ROOT / 'experiments',
      capture_output=True,
      text=True,
      check=True,
    )
    lines = done.stdout.splitlines()
    self.assertGreater(len(lines), 20)
    for line in lines:
      self.assertEndsWith(line, '.')
      self.assertGreater(len(line.split()), 4, line)
    self.assertIn('at least 8 ASCII characters', done.stdout)

  def test_serve_at_a_port_in_use(self):
    with socket.create_server(('127.0.0.1', 0)) as other:
      port = str(other.getsockname()[1])
      (said,) = messages('serve', {'flags': {'workdir': 'none', 'port': port}})
    self.assertStartsWith(said, f'ValueError: --port={port} of --host=127.0')
    self.assertIn('Address already in use; end what listens there', said)

  def test_size(self):
    self.check('size', ({'lengths': '9'}, "--lengths=['9'] is of a model that"))

  def test_study(self):
    self.check(
      'study',
      *(
        ({'workdir': 'x', **given}, said)
        for given, said in (
          ({'rerun': 'a.json', 'report': 'true'}, '--report=True is not of'),
          ({'rerun': 'a.json', 'cost': 'b'}, '--cost=b is not of --rerun'),
          ({'report': 'true', 'only': 'a'}, "--only=['a'] is not of --report"),
          ({'only': 'a', 'cost': 'b'}, '--cost=b is of a report, which'),
        )
      ),
    )

  def check(self, program, *cases):
    found = messages(program, *({'flags': given} for given, _ in cases))
    for text, (_, said) in zip(found, cases, strict=True):
      self.assertStartsWith(text, f'ValueError: {said}')
      self.assertEndsWith(text, '; leave it out')

  def test_evaluate(self):
    both = {'workdir': 'absent', 'paths': 'a.csv', 'prepared': 'rows'}
    (found,) = messages('evaluate', {'flags': both})
    self.assertRegex(found, r"--paths=\['a.csv'\] and --prepared=rows are two")

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
