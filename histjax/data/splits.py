"""Which events of a log to train on, to choose models by, and to test on."""

from __future__ import annotations

import dataclasses
import datetime
import fractions

import numpy as np

from histjax.data.events import EventLog


@dataclasses.dataclass(frozen=True)
class FractionSplit:
  """Splits each user's events in time order, by number.

  Of a user's n events, the first `floor(train n)` are for training, those up
  to `floor((train + validation) n)` for validation, the rest for testing.
  The fractions are taken as the decimals they are written as, so that 0.8 of
  10 is 8 and 0.8 + 0.1 is 0.9.

  Attributes:
    train: the fraction to train on.
    validation: the fraction to choose models on.
  """

  train: float = 0.8
  validation: float = 0.1

  def __post_init__(self):
    first, second = self._fractions()
    if not 0 <= first <= second <= 1:
      raise ValueError(
        f'split: train={self.train} and validation={self.validation} must be '
        '>= 0 and add up to at most 1'
      )

  def _fractions(self) -> tuple[fractions.Fraction, fractions.Fraction]:
    train = fractions.Fraction(repr(self.train))
    return train, train + fractions.Fraction(repr(self.validation))

  def masks(self, log: EventLog) -> dict[str, np.ndarray]:
    """`{'train', 'validation', 'test'}: bool [n]`."""
    count = np.diff(log.offsets)[log.user]
    ordinal = np.arange(len(log)) - log.offsets[log.user]
    first, second = (
      count * f.numerator // f.denominator for f in self._fractions()
    )
    return _three(ordinal, first, second)


@dataclasses.dataclass(frozen=True)
class TimeSplit:
  """Splits events by two moments, the same for all users.

  Attributes:
    validation_start: the first moment of validation; training is before it.
    test_start: the first moment of testing. Both are numbers in the time
      column's unit or, if it holds timestamps, ISO 8601 strings (without a
      time zone: UTC).
  """

  validation_start: int | float | str
  test_start: int | float | str

  def masks(self, log: EventLog) -> dict[str, np.ndarray]:
    """`{'train', 'validation', 'test'}: bool [n]`.

    Raises:
      ValueError: the moments are not of the log's kind, or not in order.
    """
    first = _moment(self.validation_start, log, 'validation_start')
    second = _moment(self.test_start, log, 'test_start')
    if first > second:
      raise ValueError(
        f'split: validation_start={self.validation_start!r} is after '
        f'test_start={self.test_start!r}; swap them'
      )
    return _three(log.time, first, second)


Split = FractionSplit | TimeSplit


def _three(position, first, second) -> dict[str, np.ndarray]:
  return {
    'train': position < first,
    'validation': (position >= first) & (position < second),
    'test': position >= second,
  }


def _moment(value, log: EventLog, field: str):
  if isinstance(value, int | float):
    if log.is_timestamp:
      raise ValueError(
        f'split: {field}={value!r} is a number, but column '
        f"{log.schema.time!r} holds timestamps; write it as '2022-05-01'"
      )
    return value
  if not log.is_timestamp:
    raise ValueError(
      f'split: {field}={value!r} is no number, but column '
      f"{log.schema.time!r} holds numbers; give it in the column's unit"
    )
  try:
    moment = datetime.datetime.fromisoformat(value)
  except ValueError as error:
    raise ValueError(
      f'split: {field}={value!r} is no ISO 8601 moment ({error}); write it '
      "as '2022-05-01' or '2022-05-01T08:00'"
    ) from error
  if moment.tzinfo is not None:
    moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
  return np.datetime64(moment, 'ns').astype(np.int64)
