"""What Ray raises, without Ray's processes."""

from unittest import mock

import pytest
import ray
from ray.serve import exceptions

from histjax.serving import batcher, cluster, engine
from tests.serving import bodies
from tests.serving.conftest import running, service_of


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
def test_what_ray_raises_is_of_its_requests_alone(scored, error, early):
  """When it is sent, and when its answer is waited for."""
  remote = object.__new__(cluster.RemoteEngine)
  remote.scorer = scored.scorer
  remote._buckets, remote._timeout_s = 256, 1.0
  remote._generation = remote._lost = 0
  remote._told, remote._handle = {}, mock.Mock()
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
