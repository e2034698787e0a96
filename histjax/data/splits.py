"""Which events of a log to train on, to choose models by, and to test on."""

from __future__ import annotations

import dataclasses
import datetime
import fractions
import math
import re

import numpy as np

from histjax.data.events import EventLog

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_FRACTION = re.compile(r'[.,]([0-9]+)')


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
    for field in ('train', 'validation'):
      value = getattr(self, field)
      if not math.isfinite(value):
        raise ValueError(f'split: {field}={value} must be finite; set it >= 0')
    first, second = self._fractions()
    if not 0 <= first <= second <= 1:
      raise ValueError(
        f'split: train={self.train} and validation={self.validation} must be '
        '>= 0 and add up to at most 1'
      )

  def _fractions(self) -> tuple[fractions.Fraction, fractions.Fraction]:
    train, validation = (
      fractions.Fraction(repr(float(x))) for x in (self.train, self.validation)
    )
    return train, train + validation

  def masks(self, log: EventLog) -> dict[str, np.ndarray]:
    """`{'train', 'validation', 'test'}: bool [n]`."""
    count = np.diff(log.offsets)[log.user]
    ordinal = np.arange(len(log)) - log.offsets[log.user]
    first, second = (_floor(f, count) for f in self._fractions())
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

  def __post_init__(self):
    for field in ('validation_start', 'test_start'):
      value = getattr(self, field)
      if isinstance(value, np.number):  # As `EventLog.time` has them.
        object.__setattr__(self, field, value.item())

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
    if log.time.dtype.kind == 'i':  # Beyond 2**53 they are no floats.
      first, second = math.ceil(first), math.ceil(second)
    return _three(log.time, first, second)


Split = FractionSplit | TimeSplit


def _floor(fraction: fractions.Fraction, count: np.ndarray) -> np.ndarray:
  distinct, place = np.unique(count, return_inverse=True)
  # Numerators have up to 17 digits, so their products are no int64.
  floors = [math.floor(n * fraction) for n in distinct.tolist()]
  return np.array(floors, np.int64)[place]


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
    if not math.isfinite(value):
      raise ValueError(
        f"split: {field}={value} must be finite; give it in the column's unit"
      )
    return value
  if not log.is_timestamp:
    raise ValueError(
      f'split: {field}={value!r} is no number, but column '
      f"{log.schema.time!r} holds numbers; give it in the column's unit"
    )
  try:
    moment = datetime.datetime.fromisoformat(value)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'split: {field}={value!r} is no ISO 8601 moment ({error}); write it '
      "as '2022-05-01' or '2022-05-01T08:00'"
    ) from error
  since = moment.replace(tzinfo=moment.tzinfo or datetime.UTC) - _EPOCH
  nanoseconds = since // datetime.timedelta(microseconds=1) * 1000
  written = _FRACTION.search(value)
  if written:  # A datetime keeps six digits of it.
    digits = written[1].rstrip('0')
    if len(digits) > 9:
      raise ValueError(
        f'split: {field}={value!r} is finer than a nanosecond; write at most '
        'nine digits of a second'
      )
    nanoseconds += int(digits[6:].ljust(3, '0'))
  if not -(2**63) <= nanoseconds < 2**63:
    raise ValueError(
      f'split: {field}={value!r} is not within 1678 and 2261, which '
      'nanoseconds of 64 bits hold; give a moment within, after all events if '
      'none is to come later'
    )
  return np.int64(nanoseconds)
