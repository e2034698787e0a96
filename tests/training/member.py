"""One process of several that train the small run, as a program.

  python -m tests.training.member <address> <count> <id> <devices> <workdir> \
    <changes> [<fault>]

`changes` are fields of the config, as JSON. A fault is `{"step": s, ..}`: what
happens before step s is trained: `"kill"`, or an error with that text.
"""

import json
import os
import signal
import sys

from histjax.training import loop, watchdog
from tests.training import runs


def on_step(step, action):
  """Calls `action` before the update of a step."""
  make = loop.step_lib.make_train_step

  def make_wrapped(*args, **kwargs):
    update = make(*args, **kwargs)

    def wrapped(state, batch):
      if int(state.step) == step:
        action()
      return update(state, batch)

    return wrapped

  loop.step_lib.make_train_step = make_wrapped


def main(address, count, index, devices, workdir, changes, fault='{}'):
  fault = json.loads(fault)
  if fault:

    def act():
      print('FAULT', flush=True)
      if fault['what'] == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
      if fault['what'] == 'stop':
        os.kill(os.getpid(), signal.SIGSTOP)
      raise ValueError(fault['what'])

    on_step(fault['step'], act)
  with watchdog.joined(address, int(count), int(index)):
    result = runs.run(
      workdir, num_devices=int(devices) * int(count), **json.loads(changes)
    )
    print('RESULT', json.dumps(result), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
