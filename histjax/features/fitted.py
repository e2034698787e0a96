"""Derived features that have been fitted: computed, saved, loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histjax import config as config_lib
from histjax.features.base import (
  Counts,
  DerivedFeature,
  Events,
  Impressions,
  Lookback,
  State,
)
from histjax.schema import Feature, Schema
from histjax.vocabulary import Vocabulary

FILE = 'features.npz'
_VERSION = 1
"""Of the file's layout and of what the states mean."""
_META = 'meta.json'
_VOCABULARY = 'vocabulary'


@dataclasses.dataclass(frozen=True, eq=False)
class FittedFeatures:
  """Derived features in order, each with what it learnt.

  Attributes:
    configs: the features; a later one may read what earlier ones add.
    states: of each.
    added: what each adds to a schema's items.
    vocabularies: `{table: vocabulary}` of the log's features.
    is_timestamp: whether the log's times were timestamps; None: no feature
      reads them, or it was saved without.
  """

  configs: tuple[DerivedFeature, ...] = ()
  states: tuple[State, ...] = ()
  added: tuple[tuple[Feature, ...], ...] = ()
  vocabularies: Mapping[str, Vocabulary] = dataclasses.field(
    default_factory=dict
  )
  is_timestamp: bool | None = None

  @property
  def derived(self) -> tuple[Feature, ...]:
    """All features that are added, in order."""
    return tuple(f for added in self.added for f in added)

  @property
  def reads(self) -> frozenset[str]:
    """The features of items that are read."""
    return frozenset(n for config in self.configs for n in config.reads())

  def needs(self, what: str) -> bool:
    """Whether one reads 'time', 'user' or 'labels'."""
    return any(getattr(c, f'needs_{what}') for c in self.configs)

  def lookback(self, history_length: int | None) -> Lookback | None:
    """How far back all of them read together; None: to the first event.

    Args:
      history_length: as `Events.impressions`.
    """
    parts = [config.lookback(history_length) for config in self.configs]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
      return None
    return Lookback(
      max((part.events for part in known), default=0),
      max((part.seconds for part in known), default=0.0),
    )

  def of_new_events(
    self,
    events: Events,
    history_length: int | None,
    known: Mapping[str, np.ndarray],
  ) -> dict[str, np.ndarray]:
    """The features of a user's last events; equals the end of `of_events`.

    Args:
      events: one user's, old ones and new ones.
      history_length: as `Events.impressions`.
      known: `{name: [old]}`, those of the old events.

    Returns:
      `{name: [new]}`.
    """
    old = max((len(values) for values in known.values()), default=0)
    found: dict[str, np.ndarray] = {}
    features = dict(events.features)
    for config, state, added in zip(
      self.configs, self.states, self.added, strict=True
    ):
      now = dataclasses.replace(events, features=features)
      asked = now.impressions(history_length).since(old)
      found |= config.apply(now, asked, state)
      for feature in added:
        new = found[feature.name]
        before = known.get(feature.name, new[:0])
        features[feature.name] = np.concatenate([before, new])
    return found

  def of_events(
    self,
    events: Events,
    history_length: int | None,
    *,
    train: np.ndarray | None = None,
    before: Mapping[str, Counts] | None = None,
  ) -> dict[str, np.ndarray]:
    """The features of all events, as they were when they were shown.

    Args:
      events: of a log or a request.
      history_length: as `Events.impressions`.
      train: bool `[n]`, the training events, for rows to train on; None: as a
        server computes them.
      before: with `train`, for each of `counted`, of the training events, those
        of all users that come before; None: `events` are all of the log.

    Returns:
      `{name: [n]}`.
    """
    found: dict[str, np.ndarray] = {}
    for i, (config, state) in enumerate(
      zip(self.configs, self.states, strict=True)
    ):
      now = dataclasses.replace(events, features={**events.features, **found})
      if train is None:
        impressions = now.impressions(history_length)
        found |= config.apply(now, impressions, state)
      elif before is None:
        found |= config.apply_training(now, history_length, state, train)
      else:
        own = {
          name.removeprefix(f'{i}/'): counts
          for name, counts in before.items()
          if name.startswith(f'{i}/')
        }
        found |= config.apply_training(now, history_length, state, train, own)
    return found

  def of_impressions(
    self,
    events: Events,
    impressions: Impressions,
    known: dict[str, np.ndarray],
  ) -> dict[str, np.ndarray]:
    """The features of candidates.

    Args:
      events: of a log or a request.
      impressions: the candidates.
      known: `of_events` of the events.

    Returns:
      `{name: [c]}`.
    """
    found: dict[str, np.ndarray] = {}
    events = dataclasses.replace(events, features={**events.features, **known})
    for config, state, added in zip(
      self.configs, self.states, self.added, strict=True
    ):
      if impressions.event is not None and not config.of_view:
        found |= {f.name: known[f.name][impressions.event] for f in added}
        continue
      features = {**impressions.features, **found}
      asked = dataclasses.replace(impressions, features=features)
      found |= config.apply(events, asked, state)
    return found

  def digest(self) -> str:
    """Of configs and states; equal if and only if they are."""
    found = hashlib.sha256(json.dumps(self._meta(), sort_keys=True).encode())
    for name, array in sorted(self._arrays().items()):
      found.update(f'{name} {array.dtype.str} {array.shape} '.encode())
      found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

  def save(self, folder: pathlib.Path) -> None:
    """Writes `features.npz` into a folder, whole or not at all."""
    temporary = folder / f'{FILE}.{os.getpid()}.tmp'
    meta = json.dumps(
      {
        **self._meta(),
        'is_timestamp': self.is_timestamp,
        'digest': self.digest(),
      }
    )
    arrays = {**self._arrays(), _META: np.frombuffer(meta.encode(), np.uint8)}
    try:
      with open(temporary, 'wb') as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, folder / FILE)
    finally:
      temporary.unlink(missing_ok=True)  # As when the disk is full.

  def _meta(self) -> dict[str, Any]:
    return {
      'version': _VERSION,
      'features': config_lib.to_dict(_File(self.configs, self.added)),
    }

  def _arrays(self) -> dict[str, np.ndarray]:
    arrays = {
      f'{i}/{name}': np.asarray(array)
      for i, state in enumerate(self.states)
      for name, array in state.items()
    }
    for table, vocabulary in self.vocabularies.items():
      arrays[f'{_VOCABULARY}/{table}'] = vocabulary.digests
    return arrays


@dataclasses.dataclass(frozen=True)
class _File:
  """The part of a file that is a config."""

  configs: tuple[DerivedFeature, ...]
  added: tuple[tuple[Feature, ...], ...]


def fit(
  configs: Sequence[DerivedFeature], events: Events, train: np.ndarray
) -> FittedFeatures:
  """Fits features, one after the other.

  Args:
    configs: the features.
    events: all of a log.
    train: bool `[n]`, the training events.

  Raises:
    ValueError: one cannot be computed of this log; the message says why.
  """
  states: list[State] = []
  added: list[tuple[Feature, ...]] = []
  schema = events.schema
  for config in configs:
    config.check(schema)
    now = dataclasses.replace(events, schema=schema)
    states.append(config.fit(now, train))
    added.append(config.features(schema, states[-1]))
    derived = (*schema.derived, *added[-1])
    schema = dataclasses.replace(schema, derived=derived)
  return _fitted(configs, states, added, events.is_timestamp)


def collect(
  configs: Sequence[DerivedFeature], events: Events, train: np.ndarray
) -> dict[str, np.ndarray]:
  """What `merge` needs of some users' events; see `DerivedFeature.collect`."""
  return {
    f'{i}/{name}': np.asarray(array)
    for i, config in enumerate(configs)
    for name, array in config.collect(events, train).items()
  }


def counted(
  configs: Sequence[DerivedFeature], events: Events
) -> dict[str, np.ndarray]:
  """The values of `DerivedFeature.counted` of all features, `{name: [n]}`."""
  return {
    f'{i}/{name}': values
    for i, config in enumerate(configs)
    for name, values in config.counted(events).items()
  }


def merge(
  configs: Sequence[DerivedFeature],
  parts: Sequence[Mapping[str, np.ndarray]],
  schema: Schema,
  *,
  is_timestamp: bool,
) -> FittedFeatures:
  """As `fit`, of what was collected of parts of a log.

  Args:
    configs: the features.
    parts: of `collect`.
    schema: of the log.
    is_timestamp: whether its times are timestamps.

  Raises:
    ValueError: one cannot be computed of this log, or not of parts of it; the
      message says why.
  """
  states: list[State] = []
  added: list[tuple[Feature, ...]] = []
  for i, config in enumerate(configs):
    config.check(schema)
    own = [
      {
        name.removeprefix(f'{i}/'): array
        for name, array in part.items()
        if name.startswith(f'{i}/')
      }
      for part in parts
    ]
    states.append(config.merge(own, schema))
    added.append(config.features(schema, states[-1]))
    derived = (*schema.derived, *added[-1])
    schema = dataclasses.replace(schema, derived=derived)
  return _fitted(configs, states, added, is_timestamp)


def _fitted(configs, states, added, is_timestamp) -> FittedFeatures:
  fitted = FittedFeatures(tuple(configs), tuple(states), tuple(added))
  if not fitted.needs('time'):
    return fitted
  return dataclasses.replace(fitted, is_timestamp=bool(is_timestamp))


def check_mergeable(configs: Sequence[DerivedFeature]) -> None:
  """Raises ValueError if one can be fitted to nothing but a whole log."""
  for config in configs:
    cls, name = type(config), type(config).__name__
    if cls.fit is not DerivedFeature.fit:
      raise ValueError(
        f'data.features: {name}.fit reads a whole log, which is not in memory; '
        f'give {name}.collect and {name}.merge in place of it'
      )
    trained = cls.apply_training is not DerivedFeature.apply_training
    if trained and cls.counted is DerivedFeature.counted:
      raise ValueError(
        f'data.features: {name}.apply_training reads a whole log, which is not '
        f'in memory; give {name}.counted, and read `before`'
      )


def load(folder: pathlib.Path) -> FittedFeatures:
  """Reads what `FittedFeatures.save` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, of another version, or has a feature whose class
      is not imported.
  """
  path = folder / FILE
  try:
    with open(path, 'rb') as file, np.load(file) as archive:
      arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(arrays.pop(_META).tobytes())
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'{path} does not exist; it is written when a run begins. Restore it '
      'with the rest of the workdir, or train again'
    ) from error
  except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
    raise ValueError(
      f'{path} is damaged ({error}); restore it, or train again'
    ) from error
  if meta['version'] != _VERSION:
    raise ValueError(
      f'{path} is of version {meta["version"]}, this library reads '
      f'{_VERSION}; train again'
    )
  read = config_lib.from_dict(_File, meta['features'])
  states: list[dict[str, np.ndarray]] = [{} for _ in read.configs]
  vocabularies = {}
  for name, array in arrays.items():
    number, _, rest = name.partition('/')
    if number == _VOCABULARY:
      vocabularies[rest] = Vocabulary(array)
    else:
      states[int(number)][rest] = array
  fitted = FittedFeatures(
    read.configs,
    tuple(states),
    read.added,
    vocabularies,
    meta.get('is_timestamp'),
  )
  if fitted.digest() != meta['digest']:
    raise ValueError(
      f'{path} does not have its checksum; restore it, or train again'
    )
  return fitted
