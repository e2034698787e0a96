"""One small model, exported once for all tests of a process."""

import atexit
import functools
import hashlib
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile
from unittest import mock

import numpy as np

from histjax import scoring
from histjax.serving import directory, export
from tests import support

SIZES = {
  'rows': (3,),
  'events': (8,),
  'candidates': (4,),
  'new_events': (2,),
}


@functools.cache
def exported() -> tuple[pathlib.Path, dict, list[str]]:
  """One model in a directory, for all tests; what was logged."""
  folder = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, folder)
  config = support.config()
  _, variables = support.init(config)
  lines: list[str] = []
  options = export.ExportConfig('cpu', **SIZES)
  (folder / 'model').mkdir()  # Empty: it is replaced.
  manifest = export.export_model(
    config, variables, folder / 'model', options, log=lines.append
  )
  return folder / 'model', manifest, lines


@functools.cache
def model():
  """Of the directory's own loader."""
  folder, _, _ = exported()
  spec = importlib.util.spec_from_file_location('load', folder / 'load.py')
  module = importlib.util.module_from_spec(spec)
  with (
    mock.patch.dict(sys.modules, {'load': module}),
    mock.patch.object(sys, 'dont_write_bytecode', True),
  ):
    spec.loader.exec_module(module)
  return module.load(folder)


@functools.cache
def scorer():
  """What was exported, with the same buckets, so that it compiles little."""
  config = support.config()
  options = scoring.ScorerConfig(
    history_buckets=SIZES['events'],
    candidate_buckets=SIZES['candidates'],
    row_buckets=SIZES['rows'],
  )
  return scoring.Scorer(config, support.init(config)[1], options)


def requests(num_rows=2, num_events=7, num_candidates=3, seed=0):
  rng = np.random.default_rng(seed)
  schema = support.SCHEMA
  return (
    support.features(rng, schema.history_features, (num_rows, num_events)),
    support.features(rng, schema.item_features, (num_rows, num_candidates)),
    support.features(rng, schema.context, (num_rows,)),
  )


def temporary(case):
  return pathlib.Path(case.enterContext(tempfile.TemporaryDirectory()))


def restamp(folder, name, data):
  """Writes a file with what a forger would write beside it."""
  (folder / name).write_bytes(data)
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  if name != path.name:
    digest = hashlib.sha256(data).hexdigest()
    manifest['files'][name] = [len(data), digest]
    path.write_text(json.dumps(manifest))
  text = f'{directory.sha256(path)}  manifest.json\n'
  (folder / 'manifest.sha256').write_text(text)
