"""Trains the small run until it is killed, as a program.

  python -m tests.training.victim <workdir> <number>

It gets SIGKILL at the so manieth time that Python opens, renames, makes or
removes something in the workdir; a whole run does so some 200 times.
"""

import itertools
import os
import signal
import sys

from tests import conftest  # noqa: F401  The same flags give the same bits.
from tests.training import runs

_EVENTS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')


def main(workdir, number):
  count = itertools.count(1)

  def on_event(event, arguments):
    if event in _EVENTS and str(arguments[0]).startswith(workdir):
      if next(count) == int(number):
        print(f'killed before {event} {arguments[0]}', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(on_event)
  runs.run(workdir)


if __name__ == '__main__':
  main(*sys.argv[1:])
