"""What a run shows and writes."""

import io
import json
import math
import signal
import sys
import threading
from typing import ClassVar

import pytest

from histjax.training import interrupt, report


class Terminal(io.StringIO):
  def isatty(self):
    return True


def progress(reporter, step):
  reporter.progress(step, loss=0.5, steps=10, candidates=1000, shapes=2)


class TestLines:
  def test_a_line_each_without_terminal(self, tmp_path):
    stream = io.StringIO()
    with report.Reporter(
      tmp_path, 20, tensorboard=False, stream=stream
    ) as reporter:
      progress(reporter, 10)
      reporter.message('hello')
      progress(reporter, 20)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and '\r' not in stream.getvalue()
    assert lines[0].startswith('step 10/20 (50%)  loss 0.5000  ')
    assert lines[1] == 'hello'

  def test_in_place_on_a_terminal(self, tmp_path):
    stream = Terminal()
    with report.Reporter(
      tmp_path, 30, tensorboard=False, stream=stream
    ) as reporter:
      progress(reporter, 10)
      progress(reporter, 20)
      reporter.message('hello')
      progress(reporter, 29)
    text = stream.getvalue()
    assert text.count('\r') == 3
    assert text.count('\n') == 3  # Before and after 'hello', and at the end.
    assert 'hello\n' in text and text.endswith('\n')

  def test_quiet(self, tmp_path):
    stream = io.StringIO()
    with report.Reporter(tmp_path, 20, stream=stream, quiet=True) as reporter:
      progress(reporter, 10)
      reporter.message('hello')
    assert not stream.getvalue() and not list(tmp_path.iterdir())

  def test_rate_and_eta_leave_pauses_out(self, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, 'monotonic', lambda: now[0])
    stream = io.StringIO()
    with report.Reporter(
      tmp_path, 3700, tensorboard=False, stream=stream
    ) as reporter:
      now[0] += 4
      reporter.pause()
      now[0] += 1000
      reporter.resume()
      now[0] += 6
      progress(reporter, 10)
      now[0] += 20
      progress(reporter, 20)
    first, second = stream.getvalue().splitlines()
    assert '  100 candidates/s  1 steps/s  2 shapes  ETA 1:01:30' in first
    assert '  50 candidates/s  0.5 steps/s  2 shapes  ETA 2:02:40' in second

  def test_rate_of_a_run_that_goes_on(self, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(report.time, 'monotonic', lambda: now[0])
    stream = io.StringIO()
    with report.Reporter(
      tmp_path, 40, start=16, tensorboard=False, stream=stream
    ) as reporter:
      now[0] += 2
      progress(reporter, 20)  # Of whose 10 steps 4 took this time.
      now[0] += 5
      progress(reporter, 30)
    first, second = stream.getvalue().splitlines()
    assert '  200 candidates/s  2 steps/s  2 shapes  ETA 0:00:10' in first
    assert '  200 candidates/s  2 steps/s  2 shapes  ETA 0:00:05' in second


class TestTensorBoard:
  def test_scalars(self, tmp_path):
    with report.Reporter(tmp_path, 20, stream=io.StringIO()) as reporter:
      progress(reporter, 10)
      reporter.scalars(10, {'test/auc': 0.5, 'test/gauc': math.nan})
    (events,) = (tmp_path / 'tensorboard').iterdir()
    data = events.read_bytes()
    assert b'train/loss' in data and b'test/auc' in data
    assert b'test/gauc' not in data

  def test_names_what_to_install(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    with pytest.raises(ImportError, match=r'histjax\[experiments\]'):
      report.Reporter(tmp_path, 20)


class TestMetricsFile:
  def test_round_trip(self, tmp_path):
    values = {
      'step': 3,
      'validation': {'a/auc': 0.5, 'a/gauc': math.nan},
      'test': {'a/auc': 0.25},
      'history': [{'step': 3, 'validation': {'a/gauc': math.nan}}],
      'config': {},
      'fingerprint': 'f',
    }
    assert report.read_metrics(tmp_path) is None
    report.write_metrics(tmp_path, values)
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.json']
    text = (tmp_path / 'metrics.json').read_text()
    assert json.loads(text)['validation'] == {'a/auc': 0.5, 'a/gauc': None}
    assert repr(report.read_metrics(tmp_path)) == repr(values)

  def test_a_failure_leaves_the_old_file(self, tmp_path):
    (tmp_path / 'metrics.json').write_text('old')
    with pytest.raises(TypeError):
      report.write_metrics(tmp_path, {'x': object()})
    assert (tmp_path / 'metrics.json').read_text() == 'old'


class TestValidation:
  VALUES: ClassVar = {
    f'{task}/{metric}': number
    for task, base in (('a', 0.1), ('b', 0.3))
    for metric, number in {
      'auc': base,
      'gauc': base + 0.01,
      'logloss': base + 0.02,
      'ne': base + 0.03,
    }.items()
  }

  def test_what_decides_and_no_other_task(self):
    assert (
      report.format_validation(self.VALUES, self.VALUES, {'b/gauc': 1.0})
      == 'by b/gauc 0.3100; b/auc 0.3000  b/logloss 0.3200'
    )

  def test_beside_the_best(self):
    best = {name: value + 0.5 for name, value in self.VALUES.items()}
    assert (
      report.format_validation(self.VALUES, best, {'a/auc': 1.0})
      == 'by a/auc 0.1000 (best 0.6000); a/logloss 0.1200'
    )
    weights = {'a/auc': 2.0, 'b/logloss': 1.0}
    # 2 x 0.1 - 0.32, and 2 x 0.6 - 0.82.
    assert report.format_validation(self.VALUES, best, weights) == (
      'by a/auc 0.1000 (best 0.6000)  b/logloss 0.3200 (best 0.8200)  '
      'weighted -0.1200 (best 0.3800); a/logloss 0.1200  b/auc 0.3000'
    )

  def test_history_has_all(self, tmp_path):
    history = [
      {'step': 1, 'loss': 0.5},
      {'step': 1, 'validation': {'a/auc': math.nan, 'a/ne': 0.25}},
    ]
    report.write_history(tmp_path, history)
    first, second = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(first) == history[0]
    assert json.loads(second)['validation'] == {'a/auc': None, 'a/ne': 0.25}


class TestInterrupt:
  def test_a_second_sigint_stops_at_once(self):
    before = signal.getsignal(signal.SIGINT)
    with interrupt.Interrupt() as caught:
      assert not caught.requested(0)
      signal.raise_signal(signal.SIGINT)
      assert caught.requested(0) and caught.signal == signal.SIGINT
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

  def test_other_threads_install_nothing(self):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
      with interrupt.Interrupt() as caught:
        seen.append((signal.getsignal(signal.SIGTERM), caught.received()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
