"""Errors go from one process to another: of a pool, of Ray, of a user's own."""

import importlib
import inspect
import pickle
import pkgutil

import pytest

import histjax
from histjax.data import parts
from histjax.serving import batcher, client, messages

_PROBLEM = messages.Problem('Refused', 422, 'bad', 'item', '7', 'send another')
# Of those with arguments of their own.
_ERRORS = {
  parts.MissingColumnError: ('no such column', 'item'),
  messages.BadRequestError: (_PROBLEM, 2.5),
  client.ServerError: (_PROBLEM,),
  batcher.QueueFullError: (7, 2.5),
}
_OF_A_GPU = 'pallas_gpu'  # Its modules need a plugin.


def classes():
  """Classes of errors that are defined in the library."""
  for info in pkgutil.walk_packages(histjax.__path__, 'histjax.'):
    if _OF_A_GPU not in info.name:
      module = importlib.import_module(info.name)
      for _, kind in inspect.getmembers(module, inspect.isclass):
        if issubclass(kind, Exception) and kind.__module__ == info.name:
          yield kind


def test_come_back_whole():
  found = set(classes())
  assert set(_ERRORS) <= found
  for kind in found:
    of = next((x for x in kind.__mro__ if '__init__' in vars(x)), None)
    error = kind(*_ERRORS.get(of, ('said',)))
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error) != ''
    assert vars(back) == vars(error)


@pytest.mark.parametrize(
  ('error', 'said'),
  [
    (parts.MissingColumnError('no such column', 'item'), 'no such column'),
    (messages.BadRequestError(_PROBLEM), 'bad'),
    (client.ServerError(_PROBLEM), '422 Refused: bad; send another'),
    (batcher.QueueFullError(7, 2.5), '7 requests are waiting'),
  ],
)
def test_what_they_say(error, said):
  assert str(error) == said
