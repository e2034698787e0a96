"""The page in a browser."""

import concurrent.futures
import dataclasses
import re
import shutil
import threading
from unittest import mock

import numpy as np
import pytest
from playwright import sync_api

import histjax
from histjax.data import datasets
from histjax.data.rows import RowConfig
from histjax.schema import Categorical, Dense, Schema, Task
from histjax.serving import app as app_lib
from histjax.serving import batcher, catalogue, messages, page
from histjax.serving.catalogue import of_log, read_titles
from tests.serving import bodies
from tests.serving.conftest import running, service_of
from tests.training import runs


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    found = playwright.chromium.launch(
      executable_path=shutil.which('chromium'),
      args=['--no-sandbox', '--disable-gpu'],
    )
    yield found
    found.close()


@pytest.fixture
def opened(browser, served):
  """The page, once it shows a ranking; what it complained of, and its asks."""
  context = browser.new_context(viewport={'width': 1200, 'height': 800})
  shown = context.new_page()
  complaints, asked = [], []
  shown.on(
    'console',
    # The engine may not know the events before; then all of them are sent.
    lambda m: '409' in m.text or complaints.append(m.text),
  )
  shown.on('pageerror', lambda e: complaints.append(str(e)))
  shown.on('request', lambda r: asked.append(r.url))
  shown.goto(served.url)
  ranked(shown, 0)
  yield shown, complaints, asked
  context.close()


def ranked(shown, num_events):
  """Waits until everything is ranked after so many events."""
  sync_api.expect(shown.locator('#events')).to_have_text(
    str(num_events), timeout=600_000
  )
  sync_api.expect(shown.locator('#status')).to_have_text(
    re.compile('items ranked'), timeout=600_000
  )
  sync_api.expect(shown.locator('#history li')).to_have_count(num_events)


class TestPage:
  def test_ranks_again_after_each_click(self, opened, served):
    shown, complaints, asked = opened
    items = shown.locator('#ranking button')
    sync_api.expect(items).to_have_count(20)
    before = items.all_inner_texts()
    for number in range(1, 4):
      title = items.nth(2).locator('span').nth(1).inner_text()
      items.nth(2).click()
      ranked(shown, number)
      latest = shown.locator('#history li').first.inner_text()
      assert title in latest
      assert 'click 1' in latest
    assert items.all_inner_texts() != before
    assert not complaints
    assert {url.partition('//')[2].partition('/')[0] for url in asked} == {
      served.url.partition('//')[2]
    }

  def test_shows_cost_and_attention(self, opened):
    shown, _, _ = opened
    for number in (1, 2):
      shown.locator('#ranking button').first.click()
      ranked(shown, number)
    assert shown.locator('#source').inner_text() in ('extended', 'encoded')
    for name in ('score', 'queue', 'decode', 'round'):
      assert re.fullmatch(r'\d+\.\d ms', shown.locator(f'#{name}').inner_text())
    rows = shown.locator('#history li').all_inner_texts()
    shares = [float(re.search(r'([\d.]+) %', x).group(1)) for x in rows]
    assert abs(sum(shares) - 100) < 0.2  # Each is rounded.

  def test_a_user_of_the_log(self, opened):
    shown, complaints, _ = opened
    shown.locator('#user').select_option(index=3)
    ranked(shown, 20)
    shown.locator('#did-like').select_option('1')
    shown.locator('#ranking button').nth(5).click()
    ranked(shown, 21)
    assert 'like 1' in shown.locator('#history li').first.inner_text()
    shown.locator('#task').select_option('like')
    shown.locator('#reset').click()
    ranked(shown, 20)
    assert not complaints

  def test_asks_for_the_token(self, browser, scored):
    config = app_lib.AppConfig(token='correct horse')
    with running(service_of(scored, config), with_page=True) as found:
      shown = browser.new_page()
      shown.goto(found.url)
      shown.locator('#token').fill('correct horse')
      shown.locator('#login button').click()
      ranked(shown, 0)
      assert not shown.locator('#login').is_visible()
      shown.close()

  def test_headers(self, served):
    for path in ('/', '/page/page.js', '/page/page.css'):
      response = served.http.get(path)
      assert response.status_code == 200
      policy = response.headers['content-security-policy']
      assert policy.startswith("default-src 'self'")


class TestAttention:
  def test_of_one_candidate(self, served):
    events = {'item': [1, 2, 3], 'category': [0, 1, 2], 'click': [1, 0, 1]}
    body = {
      'user': 3,
      'context': {'segment': 1},
      'events': {**events, 'like': [0, 0, 0]},
      'candidates': {'item': [5], 'category': [2]},
    }
    found = served.http.post('/v1/attention', json=body).json()
    assert found['first'] == 0
    assert len(found['weights']) == 3
    np.testing.assert_allclose(sum(found['weights']), 1, rtol=1e-6)
    for changes, field in (
      ({'first': 2}, 'first'),
      ({'candidates': {'item': [5, 6], 'category': [2, 2]}}, 'candidates'),
    ):
      response = served.http.post('/v1/attention', json={**body, **changes})
      assert response.status_code == 422
      assert response.json()['field'] == field

  def test_of_events_that_the_candidate_does_not_see(self, scored):
    """Those of its own time are the last ones."""
    run = scored.scorer.run
    rows = RowConfig('pointwise', 2, ties='strict')
    data = dataclasses.replace(run.config.data, rows=rows)
    config = dataclasses.replace(run.config, data=data)
    scorer = histjax.Scorer.of_run(dataclasses.replace(run, config=config))
    body = bodies.body(num_candidates=1, num_events=5)
    body['events']['time'] = [1, 2, 3, 4, 4]
    for time, first, seen in ((5, 3, 2), (4, 1, 2), (1, 0, 0)):
      late = {k: x[: seen + first] for k, x in body['events'].items()}
      events = body['events'] if time == 4 else late
      candidates = {**body['candidates'], 'time': [time]}
      message = messages.ScoreRequest(
        **{**body, 'events': events, 'candidates': candidates}
      )
      found = page.attention_of(scorer, message)
      assert (found.first, len(found.weights)) == (first, seen)

  def test_has_a_queue_and_deadlines(self, scored, monkeypatch):
    """As the OpenAPI document says."""
    go, begun = threading.Event(), threading.Event()

    def slow(*unused):
      begun.set()
      assert go.wait(60)
      return messages.AttentionReply([1.0], 0)

    monkeypatch.setattr(page, 'attention_of', slow)
    body = bodies.body(num_candidates=1)
    config = app_lib.AppConfig(batcher.BatcherConfig(max_queue=1), timeout_s=60)
    with (
      running(service_of(scored, config), with_page=True) as found,
      concurrent.futures.ThreadPoolExecutor() as pool,
    ):

      def post(**changes):
        return found.http.post('/v1/attention', json={**body, **changes})

      queue = found.service.aside
      first = pool.submit(post)
      assert begun.wait(60)
      late = post(timeout_ms=20)
      assert late.status_code == 504
      assert late.json()['field'] == 'timeout_ms'
      second = pool.submit(post)
      while not queue.waiting:
        threading.Event().wait(0.01)
      refused = post()
      assert refused.status_code == 429
      assert int(refused.headers['retry-after']) >= 1
      go.set()
      assert first.result().json() == {'weights': [1.0], 'first': 0}
      assert second.result().status_code == 200

  def test_of_a_model_that_looks_at_more(self, served, monkeypatch):
    def refuse(*unused):
      raise NotImplementedError('candidates look elsewhere')

    monkeypatch.setattr(page, 'last_attention', refuse)
    response = served.http.post(
      '/v1/attention', json=bodies.body(num_candidates=1)
    )
    assert response.status_code == 422
    assert response.json()['detail'] == 'candidates look elsewhere'


def log_of(schema, columns):
  return catalogue.EventLog.from_columns(columns, schema)


class TestCatalogue:
  def test_of_the_synthetic_log(self):
    log = runs.dataset().log
    found = of_log(log, num_users=5, titles={'3': 'Three'})
    assert found.key == 'item'
    assert sorted(found.items['item']) == list(range(20))
    assert found.titles[found.items['item'].index(3)] == 'Three'
    assert found.titles[found.items['item'].index(4)] == 'item 4'
    assert found.actions == {'click': [0, 1], 'like': [0, 1]}
    assert found.did['click'] == 1
    assert not found.is_key_read
    nobody, *users = found.users
    assert not nobody.events
    assert nobody.key not in log.keys
    assert [len(u.events['item']) for u in users] == [20] * 5
    assert set(users[0].events) == {
      *('item', 'category', 'click', 'like', 'time', 'request')
    }
    assert of_log(log, max_items=7).items['item'] == found.items['item'][:7]

  def test_values_are_the_log_s_own(self):
    schema = Schema(
      user='uid',
      time='ts',
      context=(Categorical('uid', 8),),
      item=(
        Categorical('item', 9, column='sku'),
        Dense('price', column='eur', offset=1, scale=2, log=True),
      ),
      action=(Categorical('stars', 6),),
      tasks=(Task('like', column='stars', threshold=4),),
    )
    columns = {
      'uid': [1, 1, 2],
      'ts': ['2024-01-01T00:00:00', '2024-01-02T00:00:00', '2024-01-03'],
      'sku': [5, 6, 5],
      'eur': [1.5, 20.0, 2.5],
      'stars': [5, 2, 5],
    }
    log = log_of(schema, columns)
    found = of_log(log)
    assert found.items['sku'] == [5, 6]
    # Float32 through a logarithm; the latest price is kept.
    np.testing.assert_allclose(found.items['eur'], [2.5, 20.0], rtol=1e-5)
    assert found.did == {'stars': 5}
    assert found.is_key_read
    nobody, one, _ = found.users
    assert nobody.key == nobody.context['uid'] == 0
    again = log_of(
      schema,
      {
        'uid': [one.key] * 2,
        'ts': one.events['ts'],
        **{n: one.events[n] for n in ('sku', 'eur', 'stars')},
      },
    )
    assert again.is_timestamp
    np.testing.assert_array_equal(again.time, log.time[:2])

  def test_hashed_columns_cannot_be_shown(self, tmp_path):
    schema = Schema(
      user='uid', time='ts', item=(Categorical('item', 9, ids='hash'),),
      tasks=(Task('like'),),
    )  # fmt: skip
    columns = {'uid': [1], 'ts': [1], 'item': ['a'], 'like': [1]}
    with pytest.raises(ValueError, match="column 'item' has ids='hash'"):
      of_log(log_of(schema, columns))

  def test_titles(self, tmp_path):
    path = tmp_path / 'titles.csv'
    path.write_text('item,title\n1,"One, or more"\n')
    assert read_titles(str(path)) == {'1': 'One, or more'}
    latin = tmp_path / 'latin.csv'
    latin.write_bytes('item,title\n7,Amélie\n'.encode('latin-1'))
    with pytest.raises(ValueError, match=r"latin\.csv.*line 2: '7,Amélie'"):
      read_titles(str(latin))
    path.write_text('item,title\n1\n')
    with pytest.raises(ValueError, match='line 2 has 1 columns'):
      read_titles(str(path))

  def test_where_there_is_none(self, scored, monkeypatch, capsys):
    service = service_of(scored)
    assert page.of_run(service, scored, 'no') == []
    with pytest.raises(ValueError, match='not served; add --page=yes'):
      page.of_run(service, scored, 'no', 'titles.csv')

    def fail(self, tasks):
      raise FileNotFoundError('no such file')

    monkeypatch.setattr(datasets.Synthetic, 'load', fail)
    assert page.of_run(service, scored, 'auto') == []
    assert 'without the page: no such file' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
      page.of_run(service, scored, 'yes')
    own = mock.Mock()
    own.scorer.run.config.data.source = datasets.Events(
      ('log.csv',), scored.scorer.config.schema
    )
    assert page.of_run(service, own) == []
    assert '--page=yes serves it' in capsys.readouterr().out
