"""Processes that end with the test that started them, also when it fails."""

import subprocess

_started: list[subprocess.Popen] = []


def start(*args, **kwargs):
  """As `subprocess.Popen`."""
  _started.append(subprocess.Popen(*args, **kwargs))
  return _started[-1]


def end():
  while _started:
    process = _started.pop()
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
      if pipe is not None:
        pipe.close()
