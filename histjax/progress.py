"""Tells on one line at a time how far work is, how fast, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable

_FIRST, _EVERY = 1.0, 5.0
"""Seconds after which the first line is told, and the next ones."""


class Progress:
  """Of one piece of work after another.

  A line of each comes when it begins, if that is told, and after a second.
  """

  def __init__(
    self,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    clock: Callable[[], float] = time.monotonic,
  ):
    self._say, self._clock = say, clock
    self._what = ''
    self._begun: tuple[float, float] = (0.0, 0.0)
    self._from: tuple[float, float] | None = None
    self._next = 0.0

  def tell(
    self, what: str, done: float, total: float, unit: str, skipped: float = 0
  ) -> None:
    """Says it if it is time to.

    Args:
      what: is done; another than before begins anew.
      done: so much of it, what was skipped included.
      total: of so much.
      unit: of both.
      skipped: done before, by another process.
    """
    now = self._clock()
    begins = what != self._what
    if begins:
      self._what, self._from, self._next = what, None, now + _FIRST
      self._begun = now, skipped
    if self._from is None and done > skipped:
      self._from = now, done  # What came before was to compile, too.
    if now < self._next and done < total and not (begins and done == skipped):
      return
    begun = self._from if self._from and done < total else self._begun
    self._next = now + (_EVERY if begun[1] < done else _FIRST)
    line = f'{what}: {_number(done)}/{_number(total)} {unit}'
    if done > begun[1] and now > begun[0]:
      rate = (done - begun[1]) / (now - begun[0])
      line += f', {rate:,.0f} a second, {_time((total - done) / rate)} left'
    elif done < total:
      line += ', time left not known yet'
    self._say(line)

  def bytes(self, what: str, done: int, total: int) -> None:
    """As `tell`, of bytes."""
    self.tell(what, done / 2**20, total / 2**20, 'MiB')


def _number(value: float) -> str:
  return f'{value:,}' if isinstance(value, int) else f'{value:,.1f}'


def _time(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'
