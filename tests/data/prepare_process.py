"""A `prepare` in a process of its own, which stops where it is told to.

python -m tests.data.prepare_process <folder> <where>
"""

import functools
import sys
import time

from histjax.data import atomic
from histjax.data.prepare import order, stages
from tests.data import test_prepare

NUM_SHARDS = 4


def config(folder):
  return test_prepare.config((f'{folder}/log',), vocabulary=True)


def pause(*unused):
  print('pause', flush=True)
  time.sleep(600)


def main(folder: str, where: str) -> None:
  if where == 'reading':  # Half a file is written.
    add = stages.Runs.add

    def added(self, *args):
      add(self, *args)
      self._write()
      pause()

    stages.Runs.add = added
  elif where == 'learning':  # One of the shards is.
    stages.collect = functools.partial(_second, stages.collect)
  elif where == 'counting':
    order._count_range = pause
  elif where == 'writing':  # Half a shard is: its records, not all of them.
    write = atomic.write

    def written(path, function):
      def then_pause(temporary):
        function(temporary)
        pause()

      half = path.name.startswith('validation')
      half = half and any(path.parent.glob('shard-*.json'))
      write(path, then_pause if half else function)

    atomic.write = written
  done = test_prepare.run(
    config(folder), f'{folder}/out', num_shards=NUM_SHARDS
  )
  print(f'resumed {done.num_resumed}', flush=True)


def _second(step, job, shard):
  if any(job.work.glob('fit-*')):
    pause()
  step(job, shard)


if __name__ == '__main__':
  main(*sys.argv[1:])
