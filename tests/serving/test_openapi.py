"""The document is of what is served, and no body makes the server fail."""

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from histjax.serving import messages
from tests import support
from tests.serving import bodies
from tests.serving.test_app import post, problem_of


@pytest.fixture(scope='module')
def document(served):
  return schemathesis.openapi.from_url(f'{served.url}/openapi.json')


def test_paths(served):
  found = served.http.get('/openapi.json').json()
  assert found['openapi'] == '3.1.0'
  assert set(found['paths']) == {
    *('/health/live', '/health/ready', '/metrics'),
    *('/v1/schema', '/v1/score', '/v1/catalogue', '/v1/attention'),
  }
  fields = found['components']['schemas']['ScoreRequest']['properties']
  assert set(fields) == set(messages.ScoreRequest.__struct_fields__)


def test_examples_are_valid(served, document):
  """A request that is scored, and the answers, are as the document says."""
  case = document['/v1/score']['POST'].Case(
    body=bodies.body(), media_type=messages.JSON
  )
  case.call_and_validate()


@pytest.mark.parametrize('mode', list(schemathesis.GenerationMode))
@pytest.mark.parametrize('path', ['/v1/score', '/v1/attention'])
def test_no_body_fails(document, path, mode):
  """Bodies that are as the document says, and bodies that are not."""
  operation = document[path]['POST']

  @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
  @support.examples(50)
  def check(case):
    if isinstance(case.body, dict) and 'timeout_ms' in case.body:
      case.body['timeout_ms'] = 60_000  # Or it may be late, with 504.
    # Which columns there are is in /v1/schema, not in the document.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])

  check()


@pytest.mark.parametrize(
  'path', ['/health/live', '/health/ready', '/metrics', '/v1/schema',
  '/v1/catalogue'],
)  # fmt: skip
def test_answers_without_a_body(document, path):
  document[path]['GET'].Case().call_and_validate()


VALUES = st.one_of(
  st.integers(-2, 25),
  st.integers(),
  st.floats(allow_nan=False, allow_infinity=False),
  st.text(),
  st.booleans(),
  st.none(),
  st.lists(st.integers(), max_size=2),
)
COLUMNS = st.sampled_from(['item', 'category', 'click', 'like', 'time', 'user'])
TABLES = st.dictionaries(COLUMNS, st.lists(VALUES, max_size=3)) | st.lists(
  st.dictionaries(COLUMNS, VALUES), max_size=3
)


@hypothesis.given(
  changes=st.fixed_dictionaries(
    {},
    optional={
      'user': VALUES,
      'context': st.dictionaries(st.just('segment') | COLUMNS, VALUES),
      'candidates': TABLES,
      'events': TABLES,
      'first': VALUES,
      'timeout_ms': st.just(60_000) | st.integers(max_value=0) | st.text(),
    },
  )
)
@support.examples(100)
def test_values_of_known_columns(served, changes):
  """Nearly right ones, which get as far as the engine."""
  response = post(served, bodies.body(**changes))
  assert response.status_code in (200, 409, 413, 422), response.text
  if response.status_code != 200:
    assert problem_of(response).detail


def test_another_round_of_requests(served):
  """After all those."""
  assert post(served, bodies.body()).status_code == 200
