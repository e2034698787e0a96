"""Real processes: one is lost or fails, and the others end and say which."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from histjax.training import processes, watchdog
from tests import children
from tests.training import members

CODE = """
import os, signal, sys, time
from histjax.training import processes, watchdog
address, count, index, victim, how = sys.argv[1:]
with watchdog.joined(address, int(count), int(index)):
  print('values', *processes.exchange(f'v{index}'), flush=True)
  if index == victim:
    time.sleep(1)  # The others have read what process 0 keeps.
    if how == 'kill':
      os.kill(os.getpid(), signal.SIGKILL)
    if how == 'stop':
      os.kill(os.getpid(), signal.SIGSTOP)
    if how == 'error':
      raise SystemExit('ValueError: no such file')
  if how == 'other':
    processes.check_same({'the data': index == victim})
  if victim != 'nobody' and how != 'leave':
    processes.wait_for('what nobody publishes')
print('the end', flush=True)
"""


def start(count, victim, how):
  address = members.free_address()
  return [
    children.start(
      [
        *(sys.executable, '-c', CODE, address, str(count), str(index)),
        *(str(victim), how),
      ],
      env=members.environment(1),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def lines(text, pattern):
  return [x for x in text.splitlines() if re.search(pattern, x)]


class TestLost:
  @pytest.mark.parametrize(
    'victim, how',
    [
      (2, 'kill'),
      pytest.param(0, 'kill', marks=pytest.mark.slow),
      pytest.param(1, 'error', marks=pytest.mark.slow),
      pytest.param(0, 'error', marks=pytest.mark.slow),
    ],
  )
  def test_the_others_end_and_name_it(self, victim, how):
    started = start(3, victim, how)
    lost = started[victim]
    lost.wait()
    since = time.monotonic()
    for process in started:
      process.wait(timeout=30)
    assert time.monotonic() - since < 30
    name = rf'process {victim} \(host {re.escape(socket.gethostname())}, pid '
    name += rf'{lost.pid}\)'
    reason = 'is lost' if how == 'kill' else 'failed: ValueError: no such file'
    for index, process in enumerate(started):
      stdout, stderr = process.communicate()
      assert 'values v0 v1 v2' in stdout and 'the end' not in stdout
      if process is lost:
        assert process.returncode == (-signal.SIGKILL if how == 'kill' else 1)
        assert how == 'kill' or 'ValueError: no such file\n' in stderr
        continue
      assert process.returncode == processes.EXIT_CODE, stderr
      (line,) = lines(stderr, '^process')
      assert re.search(
        rf'^{name} {reason}.* process {index} .* ends, too', line
      )
      assert 'Traceback' not in stderr

  @pytest.mark.slow
  def test_one_that_hangs(self):
    """No connection is closed; it is JAX's heartbeat that is missed."""
    started = start(2, 1, 'stop')
    since = time.monotonic()
    _, stderr = started[0].communicate(timeout=90)
    started[1].kill()
    started[1].communicate()
    assert time.monotonic() - since < 60  # The start of both included.
    assert started[0].returncode != 0
    assert re.search('unhealthy|heartbeat', stderr)

  @pytest.mark.slow
  def test_what_differs_is_named(self):
    started = start(2, 1, 'other')
    outputs = [process.communicate(timeout=60) for process in started]
    codes = sorted(process.returncode for process in started)
    assert codes[0] == 1 and codes[1] in (1, processes.EXIT_CODE)
    assert any('the data: that of process 1 (host' in x for _, x in outputs)


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_one_that_never_comes(index):
  code = """
import sys
from histjax.training import processes
processes.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout_s=2)
"""
  done = subprocess.run(
    [sys.executable, '-c', code, members.free_address(), str(index)],
    env=members.environment(1),
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == processes.EXIT_CODE, done.stderr
  assert lines(done.stderr, '^not all of 2 processes came to localhost:.* 2 s:')


class TestLeaving:
  @pytest.mark.slow
  @pytest.mark.parametrize('victim', [0, 1])
  def test_one_after_the_other(self, victim):
    for process in start(2, victim, 'leave'):
      stdout, stderr = process.communicate(timeout=60)
      assert process.returncode == 0, stderr
      assert 'the end' in stdout and not lines(stderr, 'lost|failed')

  def test_one_process_has_no_watchdog(self):
    with pytest.raises(ValueError, match='as it was'), watchdog.watching():
      raise ValueError('as it was')
    assert processes.exchange('mine') == ['mine']
    processes.check_same({'the data': 1})


class TestProcessZero:
  """Its connections, without the other processes."""

  @pytest.fixture
  def connect(self, monkeypatch):
    who = {'process': 0, 'host': 'here', 'pid': 1}
    monkeypatch.setattr(processes, 'whoami', lambda: who)
    published = []
    monkeypatch.setattr(
      processes, 'publish', lambda key, value: published.append(value)
    )
    self.watchdog = watchdog.Watchdog('key')
    port, token, _ = json.loads(published[0])

    def connected(number=None):
      peer = socket.create_connection(('localhost', port), timeout=60)
      if number is not None:
        hello = {**who, 'process': number}
        peer.sendall(json.dumps({'hello': hello, 'token': token}).encode())
        peer.sendall(b'\n')
      return peer

    return connected

  @pytest.mark.parametrize('how', ['close', 'failed'])
  def test_all_are_told_before_it_leaves(self, connect, monkeypatch, how):
    """Also those that it had no time to accept: a stranger keeps it."""
    monkeypatch.setattr(watchdog, '_GRACE_S', 0)
    with connect() as stranger, connect(1) as one, connect(2) as other:
      stop = threading.Timer(0.5, stranger.close)
      stop.start()
      if how == 'close':
        self.watchdog.close()
      else:
        self.watchdog.failed('ValueError: no\nmore')
      for peer in (one, other):
        assert [*watchdog._messages(peer)] == [
          {'bye': True}
          if how == 'close'
          else {'end': 'process 0 (host here, pid 1) failed: ValueError: no'}
        ]
      stop.join()

  @pytest.mark.parametrize('said', [b'', b'5\n', b'{}\n', b'GET / HTTP\n'])
  def test_strangers_are_sent_away(self, connect, said):
    with connect() as stranger:
      stranger.sendall(said)
      stranger.shutdown(socket.SHUT_WR)
      assert stranger.recv(1) == b''
    with connect(1) as one:
      self.watchdog.close()
      assert [*watchdog._messages(one)] == [{'bye': True}]


class TestArguments:
  @pytest.mark.parametrize(
    'given, message',
    [
      (('host:1', None, None), 'num_processes and process_id must be given'),
      ((None, 2, 0), 'coordinator_address must be given, too'),
      (('host:1', 2, None), 'process_id must be given, too'),
      (('host', 2, 0), "address='host' must be 'host:port', as"),
      (('host:', 2, 0), "must be 'host:port'"),
      ((':1234', 2, 0), "must be 'host:port'"),
      (('host:http', 2, 0), "must be 'host:port'"),
      (('host:70000', 2, 0), "must be 'host:port'"),
      (('host:1', 0, 0), 'num_processes=0 must be >= 1'),
      (('host:1', 2, 2), r'process_id=2 must be in \[0, num_processes=2\)'),
      (('host:1', 2, -1), r'process_id=-1 must be in \[0'),
    ],
  )
  def test_wrong_combinations(self, given, message):
    with pytest.raises(ValueError, match=message):
      processes.initialize(*given)

  @pytest.mark.slow
  @pytest.mark.parametrize('given', ['', 'JAX_COORDINATOR_ADDRESS'])
  def test_no_cluster(self, given):
    code = 'from histjax.training import processes; processes.initialize()'
    done = subprocess.run(
      [sys.executable, '-c', code],
      env={
        **members.environment(1),
        **({given: 'localhost:1'} if given else {}),
      },
      capture_output=True,
      text=True,
    )
    assert 'ValueError: multi_host: no cluster was found' in done.stderr

  @pytest.mark.slow
  def test_slurm(self):
    """JAX takes address, count and number from what srun sets."""
    code = """
from histjax.training import processes
processes.initialize()
import jax
print(json.dumps([jax.process_index(), processes.exchange('a')]))
"""
    port = int(members.free_address().rpartition(':')[2])
    started = [
      children.start(
        [sys.executable, '-c', f'import json{code}'],
        env={
          **members.environment(1),
          'SLURM_JOB_ID': '1',
          'SLURM_STEP_NODELIST': 'localhost',
          'SLURM_NTASKS': '2',
          'SLURM_PROCID': str(index),
          'SLURM_LOCALID': str(index),
          'JAX_COORDINATOR_PORT': str(port),
        },
        stdout=subprocess.PIPE,
        text=True,
      )
      for index in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [json.loads(x) for x in outputs] == [
      [0, ['a', 'a']],
      [1, ['a', 'a']],
    ]
