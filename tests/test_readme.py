"""What the README and `docs/` print runs, and what they say is there is."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import typing

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import config_util
import histjax
import overrides
from benchmarking import workloads
from configs import events, synthetic
from fusion_study.config import StudyConfig
from histjax import config as config_lib
from histjax.data import datasets
from histjax.training import train_and_evaluate
from histjax.training.config import TrainConfig
from tests import children, docs_pages
from tests.docs_pages import PAGES, ROOT
from tests.training import runs

COMMANDS = docs_pages.commands()
# Their code needs the changes that they print, or a module of a name.
DIFFS = ('docs/extending/backend.md', 'docs/extending/fusion.md')
FEATURE = 'docs/extending/feature.md'  # tests/features/test_own.py
# `make demo`'s training, with fewer users and steps.
SMALL = (
  '--config.data.source.num_users=40 --config.num_steps=1 '
  '--config.eval_every=None --config.optimizer.warmup_steps=0 '
  '--config.tensorboard=False'
).split()
MY_LOG = (
  '--config.num_epochs=1 --config.tensorboard=False '
  '--config.model.encoder.num_layers=1 --config.pipeline.auto_buckets=1'
).split()
SCORING = '--lengths=8 --candidates=4 --seconds=0.001'.split()
# Commands that `test_commands` runs, in its order, as they are printed and with
# these flags behind. What is not among them must be in `NOT_RUN`.
RUN: dict[str, list[str]] = {
  'python experiments/train.py --config=experiments/configs/synthetic.py '
  '--workdir=runs/demo': SMALL,
  'cp experiments/configs/events.py my_log.py': [],
  'python experiments/train.py --config=my_log.py --workdir=runs/mine': MY_LOG,
  'python experiments/evaluate.py --workdir=runs/mine --split=test': [],
  'python experiments/score.py --workdir=runs/mine --events=log.parquet '
  '--candidates=candidates.parquet --top_k=10 --keep=item '
  '--output=ranked.csv': [],
  'python experiments/export.py --workdir=runs/demo --platform=cpu '
  '--output=/tmp/model': [],
  'python /tmp/model/load.py --check': [],
  'python experiments/score.py --workdir=/tmp/run --events=log.parquet '
  '--candidates=candidates.parquet --output=/tmp/ranked/': [],
  'python experiments/benchmark.py --workdir=/tmp/run '
  '--output=/tmp/scoring': SCORING,
  'python experiments/size.py': [],
}  # fmt: skip
OTHER_SUITES = (
  'cost',
  'fusions',
  'histories',
  'prepare',
  'serving',
  'spill',
  'tables',
)
# What the others need; their flags, extras and targets are looked up.
NOT_RUN = (
  (r'make \S+$', 'sets up an environment; `.ci/run` calls them'),
  (r'pip install ', 'a network'),
  (r'git clone |cd histjax', 'a network'),
  (r'curl ', 'a server: the end of `test_commands`'),
  (r'\(echo item,title', 'MovieLens: `test_titles`'),
  (r'.*configs/(movielens|kuairand)', 'official files, minutes'),
  (r'.*--workdir=/tmp/(ml1m|movielens)', 'a run on official files'),
  (r'python experiments/study\.py', 'GPU minutes'),
  (r'.*--engine=ray', 'a cluster: tests/serving/test_cluster.py'),
  (r'.*benchmark\.py.* --(suite|lengths)=', 'an idle machine, or a GPU'),
  (r'python experiments/load\.py', 'an idle machine'),
  (r'.*/tmp/data/', 'tests/test_docs_data.py runs them'),
  (r'.*--workdir=/tmp/synthetic', 'tests/test_training_docs.py runs them'),
  (r'gcloud |srun ', 'a cluster'),
  (r'.*runs/(2026-12-01|live)', "as README's, in a folder of another day"),
  (r'python experiments/scale\.py', 'tests/experiments/test_scale.py runs it'),
  (r'python experiments/train.*learning_rate=0.01', 'as the one before'),
  (r'python experiments/score.*--workdir=/tmp/run.*--top_k', 'as README'),
)


def printed(command):
  return ' '.join(command.words)


def ids(commands):
  return [f'{c.page}: {printed(c)[:60]}' for c in commands]


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
  """A folder in which `make demo` has trained, with fewer users and steps."""
  folder = tmp_path_factory.mktemp('demo')
  values = synthetic.get_config().to_dict()
  values['data']['source']['num_users'] = 40
  values |= {'num_steps': 1, 'eval_every': None, 'tensorboard': False}
  values['optimizer']['warmup_steps'] = 0
  config, dataset = config_util.load(values)
  train_and_evaluate(
    config, folder / 'runs/demo', dataset=dataset, mesh=runs.mesh()
  )
  return folder


def run_page(page, monkeypatch, folder):
  """Runs the code of a page from top to bottom; returns its names."""
  monkeypatch.chdir(folder)
  found: dict = {'__name__': pathlib.Path(page).stem}
  for number, code in enumerate(docs_pages.blocks(page, 'python')):
    exec(compile(code, f'{page}, block {number}', 'exec'), found)
  return found


class TestSnippets:
  def test_quickstart(self, monkeypatch, demo):
    found = run_page('README.md', monkeypatch, demo)
    assert found['logits']['click'].shape == (1, 200)
    assert found['cache'].info.length.tolist() == [2]
    # Attention averages: of two equal events it reads what one says.
    for task, logits in found['logits'].items():
      np.testing.assert_allclose(logits, found['joint'][task], atol=1e-5)

  @pytest.mark.parametrize(
    'page',
    [
      # It compiles an update of its own.
      pytest.param(page, marks=pytest.mark.slow)
      if page == 'docs/nnx.md'
      else page
      for page in PAGES
      if docs_pages.blocks(page, 'python')
      and page not in ('README.md', FEATURE, *DIFFS)
    ],
  )
  def test_page(self, monkeypatch, demo, page):
    run_page(page, monkeypatch, demo)

  def test_a_log_of_your_own(self, monkeypatch, tmp_path):
    found = run_page('docs/logs.md', monkeypatch, tmp_path)
    data = config_lib.from_dict(
      datasets.DataConfig, found['get_config']().to_dict()['data']
    )
    assert data.source.schema.item[0].column == 'sku'
    (ids,) = found['shop'].ids
    assert (ids.ids, ids.size) == ('vocabulary', 25) and ids.known <= 24
    assert found['times'].min() >= np.datetime64('2022-05-03', 'ns').astype(int)
    assert [f.name for f in found['shop'].schema.item_features][
      1
    ] == 'rate_shop'
    assert found['changed']['data']['source']['split']['type'] == 'time_split'
    with pytest.raises(ValueError, match=r'log\.parquet'):
      datasets.load(data)

  def test_derived_features(self):
    """Each is listed with the fields that it needs."""
    (table,) = re.findall(
      r'\n\| `type`, with .*?\n\n', PAGES['docs/logs.md'], re.S
    )
    listed = {
      name: ast.literal_eval(f'{{{fields.strip(", `")}}}')
      for name, fields in re.findall(r'^\| `(\w+)`(, `[^`]+`)?', table, re.M)
    }
    del listed['type']
    hint = typing.get_type_hints(datasets.DataConfig)['features']
    known = config_lib.members(typing.get_args(hint)[0])
    known = {k for k, c in known.items() if c.__module__.startswith('histjax.')}
    assert set(listed) == known
    for name, fields in listed.items():
      values = {
        'source': {'type': 'synthetic'},
        'features': [{'type': name, **fields}],
      }
      config_lib.from_dict(datasets.DataConfig, values)

  @pytest.mark.slow
  def test_diffs(self, tmp_path):
    """The worked changes apply, and what they add runs, in one process."""
    shutil.copytree(
      ROOT / 'histjax',
      tmp_path / 'histjax',
      ignore=shutil.ignore_patterns('__pycache__'),
    )
    for page in DIFFS:
      diffs = docs_pages.blocks(page, 'diff')
      assert len(diffs) == 2
      for diff in diffs:
        subprocess.run(
          ['git', 'apply', '--unidiff-zero', '-C1', '-'],
          input=diff,
          text=True,
          cwd=tmp_path,
          check=True,
          env=os.environ | {'GIT_CEILING_DIRECTORIES': str(tmp_path.parent)},
        )
    code = '\n'.join(
      code for page in DIFFS for code in docs_pages.blocks(page, 'python')
    )
    subprocess.run(
      [sys.executable, '-c', code],
      cwd=tmp_path,
      check=True,
      env=os.environ | {'PYTHONPATH': str(tmp_path)},
    )


class TestCommands:
  def test_each_is_run_or_listed(self):
    seen = {printed(c) for c in COMMANDS}
    assert set(RUN) <= seen
    for command in COMMANDS:
      text = printed(command)
      reasons = [why for what, why in NOT_RUN if re.match(what, text)]
      assert (text in RUN) != bool(reasons), f'{command.page}: {text}'

  @pytest.mark.parametrize(
    'command', found := [c for c in COMMANDS if c.binary], ids=ids(found)
  )
  def test_flags(self, command):
    source = (ROOT / f'experiments/{command.binary}.py').read_text()
    known = set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", source))
    if 'config_util.Config(' in source:
      known.add('config')
    own, changes = overrides.split_argv(command.flags, 'config')
    of_a_log = any('my_log.py' in x or 'events.py' in x for x in own)
    for flag in own:
      name, _, value = flag.removeprefix('--').partition('=')
      assert name in known
      if name == 'config' and value != 'my_log.py':
        assert (ROOT / value).is_file()
    cls = StudyConfig if command.binary == 'study' else TrainConfig
    of = events if of_a_log else synthetic
    overrides.apply(cls, of.get_config().to_dict(), changes)

  def test_suites_and_workloads(self):
    timed = {
      'attention': workloads.ATTENTION,
      'tower': workloads.TOWER,
      'request': workloads.REQUEST,
      'train_step': workloads.TRAIN_STEP,
    }
    for command in COMMANDS:
      flags = dict(f.removeprefix('--').split('=', 1) for f in command.flags
                   if '=' in f)  # fmt: skip
      if command.binary == 'benchmark' and 'workloads' in flags:
        named = set(flags['workloads'].split(','))
        assert named <= set(timed[flags['suite']])
      if command.binary == 'benchmark' and 'suite' in flags:
        assert flags['suite'] in (*timed, *OTHER_SUITES)

  def test_targets_and_extras(self):
    makefile = (ROOT / 'Makefile').read_text()
    extras = (ROOT / 'setup.cfg').read_text()
    for command in COMMANDS:
      text = printed(command)
      if text.startswith('make '):
        assert f'\n{command.words[1]}:' in makefile
      for extra in re.findall(r'\[([a-z0-9,]+)\]', text) * ('pip' in text):
        for name in extra.split(','):
          assert f'\n{name} =\n' in extras

  def test_titles(self, tmp_path):
    """MovieLens' titles: Latin-1, commas and quotes."""
    (command,) = [c for c in COMMANDS if c.text.startswith('(echo')]
    (tmp_path / 'ml-1m').mkdir()
    (tmp_path / 'ml-1m/movies.dat').write_bytes(
      '7::Amélie, "Le" (2001)::Comedy\n'.encode('latin-1')
    )
    subprocess.run(['bash', '-c', command.text], cwd=tmp_path, check=True)
    assert (tmp_path / 'titles.csv').read_text(encoding='utf-8') == (
      'item,title\n7,"Amélie, ""Le"" (2001)"\n'
    )

  @pytest.mark.slow
  def test_commands(self, tmp_path):
    write_log(tmp_path)
    (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
    of_tmp = str(tmp_path / 'tmp')
    os.mkdir(of_tmp)
    for text, flags in RUN.items():
      if '/tmp/run' in text:  # Of whichever run.
        text = text.replace('/tmp/run', 'runs/mine')
      text = ' '.join([text, *flags]).replace('/tmp/', f'{of_tmp}/')
      text = re.sub('^python', sys.executable, text)
      shell(text, tmp_path)
    assert (tmp_path / 'ranked.csv').is_file()
    self._serve(tmp_path)

  def _serve(self, folder):
    """The request that README prints, to what `make serve` starts."""
    makefile = (ROOT / 'Makefile').read_text()
    (serve,) = re.findall(r'experiments/serve\.py .*?programs', makefile, re.S)
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    serve = serve.replace('\\\n', ' ').replace('$(DEMO_DIR)', 'runs/demo')
    server = children.start(
      [
        sys.executable,
        *serve.split(),
        f'--port={port}',
        '--warm_up=16,4',
        '--max_batch=1',
      ],
      cwd=folder,
      env=environment(),
    )
    try:
      (request,) = [c for c in COMMANDS if c.text.startswith('curl')]
      text = request.text.replace(':8000', f':{port}')
      ready = ['curl', '-sf', f'127.0.0.1:{port}/health/ready']
      while subprocess.run(ready, check=False).returncode:  # It compiles.
        assert server.poll() is None
        time.sleep(0.5)
      reply = json.loads(shell(text, folder))
      assert len(reply['logits']['click']) == 3
    finally:
      server.terminate()
      server.wait(60)


def environment():
  values = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return values | {'PYTHONPATH': str(ROOT)}


def shell(text, folder):
  done = subprocess.run(
    ['bash', '-c', text],
    cwd=folder,
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, f'{text}\n{done.stdout}\n{done.stderr}'
  return done.stdout


def write_log(folder):
  """What `experiments/configs/events.py` names, and candidates."""
  rng = np.random.default_rng(0)
  schema = events.get_config().to_dict()['data']['source']['schema']
  assert schema['user'] == 'user'
  n = 400
  items = {
    'item': rng.integers(0, 30, n),
    'price': rng.uniform(1, 9, n),
    'user': (user := rng.integers(0, 20, n)),
    'country': np.array(['de', 'fr'])[user % 2],
    'time': np.arange(n) * 3600,
  }
  log = items | {'clicked': rng.integers(0, 2, n)}
  parquet.write_table(pa.table(log), folder / 'log.parquet')
  shown = {name: x[:50] for name, x in items.items()}
  shown['time'] = shown['time'] + n * 3600
  parquet.write_table(pa.table(shown), folder / 'candidates.parquet')


class TestPages:
  def test_readme_is_short(self):
    assert len(PAGES['README.md'].splitlines()) <= 200

  def test_links(self):
    """Sphinx checks those of docs/; README's are followed on GitHub."""
    for page in ('README.md', 'CONTRIBUTING.md'):
      for link in re.findall(r'\]\(([^)#]+)', PAGES[page]):
        assert link.startswith('https://') or (ROOT / link).exists(), link

  def test_anchors(self):
    """On GitHub, where a page that includes another has no headings."""
    for page, text in PAGES.items():
      for link, anchor in re.findall(r'\]\(([^):]*\.md)#([^)]+)\)', text):
        linked = (ROOT / page).parent / link
        headings = re.findall(r'^#+ (.*)$', linked.read_text(), re.MULTILINE)
        slugs = [
          re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in headings
        ]
        assert anchor in slugs, f'{page}: {link}#{anchor}'

  def test_named_results_are_there(self):
    results = ROOT / 'benchmarks/results'
    for page, text in PAGES.items():
      for name in re.findall(r'`(2026-[\w-]+\.(?:json|png))`', text):
        assert (results / name).is_file(), f'{page}: {name}'

  def test_pictures_are_drawn(self, tmp_path):
    matplotlib.use('Agg')
    path = ROOT / 'docs/figures.py'
    spec = importlib.util.spec_from_file_location('figures', path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figures.main(tmp_path)
    for drawn in tmp_path.iterdir():
      assert (ROOT / 'docs/images' / drawn.name).is_file()
      assert f'images/{drawn.name}' in PAGES['docs/idea.md']
    # Row H2 of the causal panel with a window of 2 sees H1 and H2.
    seen = figures.shared_history(4, (0, 2, 4), causal=True, window=2)
    np.testing.assert_array_equal(np.flatnonzero(seen[1]), [0, 1])
    np.testing.assert_array_equal(np.flatnonzero(seen[3]), [2, 3])
    np.testing.assert_array_equal(np.flatnonzero(seen[4]), [])
    np.testing.assert_array_equal(np.flatnonzero(seen[6]), [2, 3])

  def test_versions_agree(self):
    setup = (ROOT / 'setup.cfg').read_text()
    citation = (ROOT / 'CITATION.cff').read_text()
    version = histjax.__version__
    assert f'\nversion = {version}\n' in setup
    assert f'\nversion: {version}\n' in citation
