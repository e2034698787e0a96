"""The numbers of the README and `docs/results` are those of the files."""

import json
import re

import pytest
from absl.testing import absltest

from benchmarking import sizing
from tests.docs_pages import PAGES, ROOT

REQUESTS = {
  '2026-11-30-request-128-last-h200': 1e6,
  '2026-11-30-request-64-last-h200': 1e6,
  '2026-12-01-request-512-last-h200': 1e6,
  '2026-12-01-request-batch-last-h200': 1e6,
  '2026-12-01-request-256-last-h200': 1e6,
  '2026-11-30-request-epyc-cpu': 1e3,
  '2026-11-29-request-xeon-cpu': 1e3,
}
TOWERS = ('tower', 'tower-256', 'tower-ragged')
TRAINED = {
  'window 2 x 100': '2026-11-24-train-movielens-cpu',
  'window 2 x 25': '2026-11-29-train-kuairand-cpu',
  'history as it was when the split': '2026-11-29-train-kuairand-snapshot-cpu',
}
DATASETS = {'MovieLens 1M': 'ml1m', 'KuaiRand-Pure': 'kuairand'}
NUMBER = r'-?\d+(?:,\d{3})*(?:\.\d+)?'


def load(name):
  text = (ROOT / f'benchmarks/results/{name}.json').read_text()
  return json.loads(text)


def tables(page):
  """Rows of the page's tables, as cells."""
  for line in PAGES[page].splitlines():
    if line.startswith('| '):
      yield [cell.strip() for cell in line.strip('|').split('|')]


def numbers(text):
  return re.findall(NUMBER, text.replace('+- ', ''))


def agrees(said, value):
  """Whether `said` is `value`, rounded to as many digits."""
  digits = len(said.partition('.')[2])
  error = abs(float(said.replace(',', '')) - value)
  return error <= 0.5 * 10**-digits + 1e-9


def check(where, said, values):
  assert len(said) == len(values), (where, said, values)
  wrong = [x for x in zip(said, values, strict=True) if not agrees(*x)]
  assert not wrong, (where, wrong)


def of_request(result, unit):
  """What each cell of a row has: the library, its rival, the ratio."""
  ours, rival = (result['contenders'][n] for n in ('histjax', 'torch'))
  for what in ('score', 'new user', 'extend and score'):
    mine, other = (x[what]['p50'] * unit for x in (ours, rival))
    yield mine, other, other / mine
  mine, other = (x['in_flight']['8'] for x in (ours, rival))
  yield mine, other, mine / other


def test_demo():
  """The three ways to score, as `make demo` compares them."""
  found = load('2026-12-01-demo-epyc-cpu')
  (result,) = found['results']
  said = f'{found["num_layers"]} layers, width {found["width"]}, one user with '
  said += (
    f'{result["history_length"]} events, {result["candidates"]} candidates'
  )
  assert result['rows'] == 1 and said in ' '.join(PAGES['README.md'].split())
  rows = {c[0]: c for c in tables('README.md') if c[0] in result}
  times = {name: 1e3 * result[name]['median'] for name in ('encode', *rows)}
  assert list(rows) == ['plain', 'joint', 'cached']
  for name, (_, runs, time, difference) in rows.items():
    ratio = [times['plain'] / times[name]] if name != 'plain' else []
    check(name, numbers(time), [times[name], *ratio])
    expected = {'plain': [result['candidates']], 'cached': [times['encode']]}
    check(name, numbers(runs), expected.get(name, []))
    assert float(difference) == float(
      f'{result[name]["max_difference_from_plain"]:.0e}'
    )


@pytest.mark.parametrize(
  'page', ['README.md', 'docs/results/gpu.md', 'docs/results/cpu.md']
)
def test_requests(page):
  found = {}
  for name, unit in REQUESTS.items():  # The newest first.
    for result in load(name)['results']:
      w = result['workload']
      size = [w['num_rows'], w['num_candidates'], w['num_events']]
      key = (*size, w['width'], w['num_layers'], unit, 'xeon' in name)
      found.setdefault(key, list(of_request(result, unit)))
  unit = 1e3 if 'cpu' in page else 1e6
  seen = 0
  for cells in tables(page):
    if len(cells) < 5 or len(re.findall(r'\(\D*[\d.,]+: ', cells[1])) != 1:
      continue
    size = [int(n) for n in numbers(cells[0].partition('(')[0])][:5]
    if unit == 1e3:  # Of one user, 512 candidates.
      size = [1, 512, *size]
    expected = found[(*size, unit, 'Xeon' in cells[0])]
    for cell, values in zip(cells[1:5], expected, strict=True):
      check((page, cells[0]), numbers(cell), values)
    seen += 1
  assert seen == (4 if unit == 1e3 else 5)


def test_serving():
  """Requests a second are what `size.py --results` prints of the files."""
  page = PAGES['docs/serving.md']
  name = r'(\d{4}-\d\d-\d\d-serving-(?:(?:\d+-)?h200|\w+-cpu)).json\)'
  found = set(re.findall(name, page)) - {'2026-11-28-serving-h200'}
  assert len(found) == 5
  cells = {}
  for name in found:
    report = load(name)
    for row in sizing.rates(report).splitlines():
      assert row in page, (name, row)
    for cell in report['results'] if name.endswith('h200') else ():
      cells[str(cell['length']), str(cell['candidates'])] = cell
  rows = [c for c in tables('docs/serving.md') if c[2].count(',') == 3]
  rows = [c for c in rows if (c[0], c[1]) in cells]
  assert len(rows) == 9
  ways = (('device', '1'), ('in process', '1'), ('http', '1'), ('device', '32'))
  for length, candidates, *texts in rows:
    for (way, users), text in zip(ways, texts, strict=True):
      found = cells[length, candidates][way][users]
      part = 'call' if way == 'device' else 'p50'
      kinds = ('hit', 'extend', 'miss', 'no cache')
      values = [1e3 * found[kind][part] for kind in kinds]
      check((length, candidates, way), numbers(text), values)


def towers():
  for name in TOWERS:
    for result in load(f'2026-11-27-{name}-h200')['results']:
      if not result['workload']['joint']:
        yield {
          name: 1e6 * found['throughput']['median']
          for name, found in result['contenders'].items()
        }


def test_kernels():
  rows = [c for c in tables('docs/results/gpu.md') if c[1].endswith(' us')]
  times = {round(t['histjax']): t for t in towers()}
  assert len(rows) == len(times) == 5
  for cells in rows:
    time = times[int(numbers(cells[1])[0])]
    rivals = [time['torch:sdpa'], time['jax:cudnn']]
    said = [numbers(cell)[0] for cell in cells[1:5]]
    best = min(rivals) / time['histjax']
    check(cells[0], said, [time['histjax'], *rivals, best])
  in_readme = [c[5] for c in tables('README.md') if len(c) == 6]
  in_readme = [numbers(c) for c in in_readme if re.match(r'\d+.* \(\d', c)]
  assert len(in_readme) == 3
  for said in in_readme:
    time = times[int(said[0])]
    other = time['torch:sdpa']
    check('README.md', said, [time['histjax'], other, other / time['histjax']])


def test_train_rows():
  page = 'docs/results/gpu.md'
  found = load('2026-12-01-train-step-rows-h200')['results'][0]['contenders']
  rate = {name: x['impressions_per_second'] for name, x in found.items()}
  seconds = {
    name: [1e3 * shape['seconds'] for shape in x['shapes']]
    for name, x in found.items()
  }
  rows = {c[0].partition(':')[0]: c for c in tables(page) if len(c) == 5}
  for kind in ('pointwise', 'packed'):
    name = f'histjax:{kind}'
    times = sorted({min(seconds[name]), max(seconds[name])})
    expected = [rate[name], rate[name] / rate['histjax:pointwise'], *times]
    if kind == 'pointwise':
      rival = seconds['torch:pointwise']
      expected += [rate['torch:pointwise'], min(rival), max(rival)]
    check(kind, numbers(' '.join(rows[kind][1:])), expected)
  ratio = rate['histjax:packed'] / rate['torch:pointwise']
  assert f'train {ratio:.0f} times as many' in PAGES[page]
  times = rate['histjax:packed'] / rate['histjax:pointwise']
  said = ' '.join(PAGES['README.md'].split())
  assert f'trains {times:.0f} times as many' in said
  assert f'{ratio:.0f} times PyTorch' in said
  share = found['histjax:packed']['input_share']
  assert f'batches in {share:.0%}'.replace('%', ' %') in PAGES[page]


@pytest.mark.parametrize(
  'page',
  ['README.md', 'docs/results/movielens.md', 'docs/results/kuairand.md'],
)
def test_metrics(page):
  seen = 0
  for cells in tables(page):
    for text, name in TRAINED.items():
      if text in cells[0] and re.match(r'0\.\d+$', cells[1]):
        test = load(name)['test']
        task = next(iter(test)).partition('/')[0]
        said = ('auc', 'gauc', 'logloss', 'ne')
        check(cells[0], cells[1:5], [test[f'{task}/{key}'] for key in said])
        if page != 'README.md':
          assert f'{name}.json' in PAGES[page]
        seen += 1
  assert seen == {'README.md': 3, 'docs/results/movielens.md': 1}.get(page, 2)


def test_study():
  """AUC, GAUC and the difference with both intervals, of each fusion."""
  summary = load('2026-11-26-study-h200/summary')['datasets']
  dataset, seen = '', 0
  for cells in tables('docs/results/fusions.md'):
    dataset = DATASETS.get(cells[0], dataset)
    if len(cells) != 5 or not re.match(r'0\.\d+', cells[1]):
      continue
    auc = float(numbers(cells[1])[0])
    (result,) = [
      x
      for x in summary[dataset]
      if f'`{x["variant"]}`' == cells[0].partition(' (')[0]
      or (x['kind'] == 'floor' and round(x['auc']['mean'], 4) == auc)
    ]
    if result['fusion'] is not None:
      for cell, metric in zip(cells[1:3], ('auc', 'gauc'), strict=True):
        of = result[metric]
        check(cells[0], numbers(cell), [of['mean'], of['deviation']])
    if result.get('compared'):
      of, seeds = (result['compared'][k] for k in ('auc', 'auc_seeds'))
      values = [of['difference'], of['low'], of['high']]
      said = numbers(cells[3])
      check(cells[0], said, (*values, seeds['low'], seeds['high'])[: len(said)])
      verdict = f'{of["verdict"]} {seeds["verdict"]}'
      assert cells[4].startswith(of['verdict']), cells
      assert set(re.findall('better|worse|undecided', verdict)) <= set(
        re.findall('better|worse|undecided', cells[4])
      )
    seen += 1
  assert seen == 17
  for cells in tables('README.md'):
    differences = len(cells) == 5 and re.match(r'[+-]0\.\d{4}, ', cells[2])
    if differences and cells[0].startswith('`'):
      variant = cells[0].split('`')[1]
      for name, cell in zip(('ml1m', 'kuairand'), cells[2:4], strict=True):
        (result,) = [x for x in summary[name] if x['variant'] == variant]
        value = result['compared']['auc']['difference']
        check(cells[0], [numbers(cell)[0]], [value])
        assert result['compared']['auc_seeds']['verdict'] in cell


def test_cross_only():
  """AUC and GAUC of both fusions, and the differences with both intervals."""
  summaries = {
    (rows, dataset): load(f'{name}/summary')['datasets'][dataset]
    for rows, dataset, name in (
      (
        'pointwise',
        'kuairand',
        '2026-11-30-study-cross-only-pointwise-epyc-cpu',
      ),
      ('streaming', 'kuairand', '2026-11-30-study-cross-only-xeon-cpu'),
      ('streaming', 'ml1m', '2026-12-01-study-cross-only-h200'),
    )
  }
  seen = 0
  for cells in tables('docs/results/fusions.md'):
    title, _, rows = cells[0].partition(', ')
    summary = summaries.get((rows, DATASETS.get(title, '')))
    if len(cells) != 7 or summary is None:
      continue
    found = [x for x in summary if x['window'] == int(cells[1])]
    (one,) = [x for x in found if x['fusion'] == 'cross_only']
    (other,) = [x for x in found if x['fusion'] == 'append_cross']
    check(cells[0], numbers(cells[2]), [len(x['seeds']) for x in (one, other)])
    for cell, x in zip(cells[3:5], (one, other), strict=True):
      values = [x[m][k] for m in ('auc', 'gauc') for k in ('mean', 'deviation')]
      check(cells[0], numbers(cell), values)
    for cell, metric in zip(cells[5:], ('auc', 'gauc'), strict=True):
      of, seeds = (one['compared'][k] for k in (metric, f'{metric}_seeds'))
      values = [of['difference'], of['low'], of['high']]
      check(cells[0], numbers(cell), [*values, seeds['low'], seeds['high']])
    seen += 1
  assert seen == 5


def test_cost_of_fusions():
  found = load('2026-11-26-fusions-cpu')['fusions']
  rows = [c for c in tables('README.md') if c[-1].endswith(' ms')]
  rows = [c for c in rows if c[0].startswith('`')]
  assert len(rows) == 7
  for cells in rows:
    check(cells[0], numbers(cells[4]), [found[cells[0].split('`')[1]]])


def test_load():
  """What the page says of the load test."""
  result = load('2026-11-30-load-epyc-cpu')
  text = ' '.join(PAGES['docs/serving.md'].split())
  of = {name: x['rate'] for name, x in result['results'].items()}
  checks = [x['check'] for x in result['results'].values()]
  assert not any(x['wrong'] for x in checks)
  scores = sum(x['scores'] for x in checks)
  for said in (
    f'{of["store"]:.0f} requests/s with p99 <= 50 ms, {of["encode"]:.0f} with',
    f'A sample of {scores:,} scores of that run',
  ):
    assert said in text


if __name__ == '__main__':
  absltest.main()
