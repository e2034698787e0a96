"""What Ray raises, without Ray's processes."""

import dataclasses
import itertools
import sys
import threading
from unittest import mock

import pytest
import ray
from ray.serve import exceptions

from histjax.serving import batcher, cluster, engine
from tests.serving import bodies
from tests.serving.conftest import running, service_of


@pytest.fixture
def remote(scored):
  """An engine of replicas that are not there; its handle is the test's."""
  found = object.__new__(cluster.RemoteEngine)
  found.scorer = scored.scorer
  found._buckets, found._timeout_s = 256, 1.0
  found._lost = found._roll_overs = 0
  found._told, found._handle = {}, mock.Mock()
  return found


def test_a_batch_has_one_time_limit(remote):
  limits = []

  def result(timeout_s):
    limits.append(timeout_s)
    return ['scored'], 'r1', 0.0, {}

  remote._handle.options.return_value.score.remote.return_value.result = result
  users = [engine.Request(**{**bodies.body(), 'user': u}) for u in ('a', 'b')]
  clock = mock.Mock(monotonic=mock.Mock(side_effect=itertools.count(5, 0.375)))
  with mock.patch.object(cluster, 'time', clock):
    assert remote.score(users) == ['scored', 'scored']
  assert 0 <= limits[1] < limits[0] < 1


@pytest.mark.parametrize('early', [True, False])
@pytest.mark.parametrize(
  'error',
  [
    ray.exceptions.RayActorError(),
    exceptions.DeploymentUnavailableError('engine'),
    exceptions.BackPressureError(1, 1),
    exceptions.ReplicaUnavailableError('r1'),
    exceptions.RayServeException('of Ray Serve'),
    TimeoutError(),
  ],
  ids=lambda error: type(error).__name__,
)
def test_what_ray_raises_is_of_its_requests_alone(remote, error, early):
  """When it is sent, and when its answer is waited for."""
  lost = remote.bucket(bodies.body()['user'])

  def options(multiplexed_model_id):
    handle, answer = mock.Mock(), mock.Mock()
    handle.score.remote.return_value = answer
    answer.result.return_value = (['scored'], 'r1', 0.0, {})
    if multiplexed_model_id == lost:
      failing = handle.score.remote if early else answer.result
      failing.side_effect = error
    return handle

  remote._handle.options = options
  body = bodies.body()
  other = {**body, 'user': f'not {body["user"]}'}
  mine, theirs = remote.score([engine.Request(**body), engine.Request(**other)])
  assert theirs == 'scored'
  assert isinstance(mine, batcher.UnavailableError)
  assert str(mine).startswith('a replica does not answer: ')
  assert remote.metrics()['lost'] == 1
  with running(service_of(remote)) as found:
    response = found.http.post('/v1/score', json=body)
  assert response.status_code == 503
  assert response.headers['retry-after'] == '1'


def test_a_user_has_one_bucket_however_the_key_is_written(remote):
  """As the engine has one state; two replicas would have two."""
  assert remote.bucket(7) == remote.bucket('7')
  assert remote.bucket('007') != remote.bucket('7')
  config = remote.scorer.config
  schema = dataclasses.replace(
    config.schema, column_types={config.schema.user: 'integer'}
  )
  remote.scorer = mock.Mock(config=dataclasses.replace(config, schema=schema))
  assert len({remote.bucket(x) for x in (7, '7', '007', '+7', '7.0')}) == 1
  assert 0 <= int(remote.bucket('no key')) < 256


def test_metrics_while_replicas_answer(remote):
  interval, seen = sys.getswitchinterval(), []
  sys.setswitchinterval(1e-6)
  try:
    for name in range(2000):
      remote._keep(f'r{name}', 0.0, {})

    def keep():
      for name in range(20_000):
        remote._keep(f's{name}', 0.0, {'hits': name})

    thread = threading.Thread(target=keep)
    thread.start()
    while thread.is_alive():
      seen.append(len(remote.metrics()['replicas']))
    thread.join()
  finally:
    sys.setswitchinterval(interval)
  assert seen == sorted(seen)
  assert len(remote.metrics()['replicas']) == 22_000  # None is lost.


def test_a_roll_over_that_fails_is_not_counted(remote):
  remote._run = mock.Mock(side_effect=[RuntimeError('broken'), None])
  with pytest.raises(RuntimeError, match='broken'):
    remote.roll_over(remote.scorer)
  assert remote.metrics()['roll_overs'] == 0
  remote.roll_over(remote.scorer)
  assert remote.metrics()['roll_overs'] == 1


@pytest.mark.parametrize(
  'cause', [ValueError('max_events=64'), None], ids=['told', 'lost']
)
def test_a_roll_over_that_one_replica_refuses(remote, cause):
  remote._run, before = mock.Mock(), remote.scorer
  error = ray.exceptions.RayTaskError('roll_over', 'a traceback', cause)
  remote._handle.roll_over.remote.return_value.result.side_effect = error
  with pytest.raises(type(cause or error)):
    remote.roll_over(mock.Mock(fingerprint='other'))
  remote._run.assert_not_called()
  assert remote.scorer is before


@pytest.mark.parametrize(
  ('each', 'said'),
  [
    ({'num_cpus': 1}, 'replicas=3 take 3 CPUs, and the Ray cluster has 2: it'),
    ({'num_gpus': 0.5}, 'replicas=3 take 1.5 GPUs, and the Ray cluster has 0'),
    ({'num_cpus': 0.5}, ''),
  ],
)
def test_what_a_cluster_lacks_is_told(each, said):
  with (
    mock.patch.object(ray, 'cluster_resources', lambda: {'CPU': 2.0}),
    mock.patch.object(cluster.logging, 'error') as error,
  ):
    cluster._tell_what_lacks(3, each)
  lines = [call.args[0] % call.args[1:] for call in error.call_args_list]
  assert len(lines) == bool(said)
  assert said in ''.join(lines)
