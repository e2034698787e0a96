"""Requests that wait together are scored together, and none is lost."""

import asyncio
import contextlib
import threading

from absl.testing import absltest, parameterized

from histjax.serving import batcher as lib


@contextlib.asynccontextmanager
async def batching(score, **config):
  found = lib.Batcher(score, lib.BatcherConfig(**config))
  found.start()
  try:
    yield found
  finally:
    await found.stop()


class Held:
  """Scores once it is let go; keeps the batches."""

  def __init__(self):
    self.go, self.begun = threading.Event(), threading.Event()
    self.batches = []

  def __call__(self, batch):
    self.batches.append(list(batch))
    self.begun.set()
    assert self.go.wait(30)
    return [10 * x for x in batch]


class BatcherTest(parameterized.TestCase):
  def test_those_that_wait_are_one_batch(self):
    async def run():
      held = Held()
      async with batching(held, max_batch=4, max_wait_s=0) as found:
        tasks = [asyncio.create_task(found.score(0, 30))]
        await asyncio.to_thread(held.begun.wait)
        tasks += [asyncio.create_task(found.score(i, 30)) for i in range(1, 7)]
        await asyncio.sleep(0)
        held.go.set()
        results = await asyncio.gather(*tasks)
      return held.batches, results

    batches, results = asyncio.run(run())
    self.assertEqual(batches, [[0], [1, 2, 3, 4], [5, 6]])
    self.assertEqual([x.result for x in results], [10 * i for i in range(7)])
    self.assertEqual([x.batch_size for x in results], [1, 4, 4, 4, 4, 2, 2])
    self.assertGreaterEqual(min(x.queue_s for x in results), 0)

  def test_a_full_batch_does_not_wait(self):
    async def run():
      async with batching(list, max_batch=3, max_wait_s=60) as found:
        return await asyncio.gather(*(found.score(i, 60) for i in range(3)))

    self.assertEqual([x.batch_size for x in asyncio.run(run())], [3, 3, 3])

  def test_company_is_waited_for(self):
    async def run():
      async with batching(list, max_batch=3, max_wait_s=0.05) as found:
        return await asyncio.gather(found.score(1, 60), found.score(2, 60))

    self.assertEqual([x.batch_size for x in asyncio.run(run())], [2, 2])

  def test_late_ones_are_dropped_before_work(self):
    async def run():
      held = Held()
      async with batching(held, max_wait_s=0) as found:
        first = asyncio.create_task(found.score(1, 30))
        await asyncio.to_thread(held.begun.wait)
        with self.assertRaisesRegex(lib.DeadlineError, 'within 20 ms'):
          await found.score(2, 0.02)
        self.assertEqual(found.waiting, 0)  # As /metrics says.
        held.go.set()
        await first
      return held.batches

    self.assertEqual(asyncio.run(run()), [[1]])

  def test_what_the_client_gave_is_what_is_said(self):
    async def run():
      held = Held()
      async with batching(held, max_queue=1, max_wait_s=0) as found:
        tasks = [asyncio.create_task(found.score(1, 30))]
        await asyncio.to_thread(held.begun.wait)
        with self.assertRaisesRegex(lib.DeadlineError, 'within 3600000 ms'):
          await found.score(2, 3600, 3600 - 1e-3)
        tasks += [asyncio.create_task(found.score(3, 30))]
        await asyncio.sleep(0)
        # Not that the queue is full: to come again would not help.
        for timeout_s, spent_s, said in (
          (0.02, 0.057, '20 ms were over before it was queued, after 57 ms'),
          (2e-4, 2e-4, '0.2 ms were over before it was queued, after 0.2 ms'),
        ):
          with self.assertRaisesRegex(lib.DeadlineError, f'^{said}$'):
            await found.score(2, timeout_s, spent_s)
        held.go.set()
        await asyncio.gather(*tasks)
      return held.batches

    self.assertEqual(asyncio.run(run()), [[1], [3]])

  def test_work_that_has_begun_is_never_late(self):
    async def run():
      held = Held()
      async with batching(held, max_wait_s=0) as found:
        first = asyncio.create_task(found.score(1, 0.05))
        await asyncio.to_thread(held.begun.wait)
        await asyncio.sleep(0.1)
        held.go.set()
        return await first

    self.assertEqual(asyncio.run(run()).result, 10)

  def test_a_full_queue_refuses(self):
    async def run():
      held = Held()
      async with batching(held, max_queue=2, max_wait_s=0) as found:
        tasks = [asyncio.create_task(found.score(0, 30))]
        await asyncio.to_thread(held.begun.wait)
        tasks += [asyncio.create_task(found.score(i, 30)) for i in (1, 2)]
        await asyncio.sleep(0)
        with self.assertRaisesRegex(lib.QueueFullError, '2 requests are wait'):
          await found.score(3, 30)
        held.go.set()
        await asyncio.gather(*tasks)
      return held.batches

    self.assertEqual(asyncio.run(run()), [[0], [1, 2]])

  def test_a_full_queue_says_when_there_is_room(self):
    """As many batches as wait, each as long as those before took."""

    async def run():
      held = Held()
      async with batching(held, max_batch=2, max_queue=4) as found:
        found._batch_s = 7.0
        tasks = [asyncio.create_task(found.score(0, 30))]
        await asyncio.to_thread(held.begun.wait)
        tasks += [asyncio.create_task(found.score(i, 30)) for i in range(1, 5)]
        await asyncio.sleep(0)
        with self.assertRaises(lib.QueueFullError) as refused:
          await found.score(5, 30)
        held.go.set()
        await asyncio.gather(*tasks)
        return refused.exception.retry_after_s, found._batch_s

    least, after = asyncio.run(run())
    self.assertEqual(least, 2 * 7.0)
    self.assertLess(after, 0.95**3 * 7.0)  # Three that took no time.

  def test_a_queue_of_those_whose_time_is_over_has_room(self):
    async def run():
      held = Held()
      async with batching(held, max_queue=2, max_wait_s=0) as found:
        tasks = [asyncio.create_task(found.score(0, 30))]
        await asyncio.to_thread(held.begun.wait)
        gone = asyncio.create_task(found.score(1, 30))
        await asyncio.sleep(0)
        with self.assertRaises(lib.DeadlineError):
          await found.score(2, 0.001)
        gone.cancel()
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(found.score(i, 30)) for i in (3, 4)]
        await asyncio.sleep(0)
        with self.assertRaises(lib.QueueFullError):
          await found.score(5, 30)
        held.go.set()
        await asyncio.gather(*tasks)
      return held.batches

    self.assertEqual(asyncio.run(run()), [[0], [3, 4]])

  def test_clients_that_are_gone_cost_nothing(self):
    async def run():
      held = Held()
      async with batching(held, max_wait_s=0) as found:
        first = asyncio.create_task(found.score(0, 30))
        await asyncio.to_thread(held.begun.wait)
        gone = asyncio.create_task(found.score(1, 30))
        last = asyncio.create_task(found.score(2, 30))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(first, last)
      return held.batches

    self.assertEqual(asyncio.run(run()), [[0], [2]])

  def test_errors_are_of_one_request_or_of_a_batch(self):
    def score(batch):
      if 'all' in batch:
        raise RuntimeError('broken')
      return [ValueError('bad') if x == 'bad' else x for x in batch]

    async def run():
      async with batching(score, max_batch=2, max_wait_s=60) as found:
        results = []
        for pair in (('bad', 1), ('all', 2), (3, 4)):
          results += await asyncio.gather(
            *(found.score(x, 60) for x in pair), return_exceptions=True
          )
      return results

    bad, one, *broken, three, four = asyncio.run(run())
    self.assertIsInstance(bad, ValueError)
    self.assertEqual([one.result, three.result, four.result], [1, 3, 4])
    self.assertEqual([str(x) for x in broken], ['broken', 'broken'])

  @parameterized.parameters(
    StopIteration, asyncio.CancelledError, GeneratorExit, SystemExit
  )
  def test_any_error_is_told_and_the_next_batch_is_scored(self, kind):
    """Those, too, which no future takes, or which end a task."""

    def score(batch):
      if 'all' in batch:
        raise kind
      return [kind() if x == 'one' else x for x in batch]

    async def run():
      async with batching(score, max_batch=1) as found:
        asked = (found.score(x, 5) for x in ('all', 'one', 3))
        calls = asyncio.gather(*asked, return_exceptions=True)
        return await asyncio.wait_for(calls, 30)

    *broken, three = asyncio.run(run())
    for error in broken:
      self.assertIsInstance(error, RuntimeError)
      self.assertRegex(str(error), kind.__name__)
      self.assertIsInstance(error.__cause__, kind)
    self.assertEqual(three.result, 3)

  def test_results_that_are_too_few_are_an_error(self):
    async def run():
      async with batching(lambda batch: []) as found:
        return await asyncio.gather(found.score(1, 5), return_exceptions=True)

    (error,) = asyncio.run(run())
    self.assertRegex(str(error), '0 results of 1 requests')

  def test_stop_answers_all_and_takes_no_more(self):
    async def run():
      held = Held()
      found = lib.Batcher(held, lib.BatcherConfig(max_batch=1, max_wait_s=0))
      found.start()
      tasks = [asyncio.create_task(found.score(i, 30)) for i in range(3)]
      await asyncio.to_thread(held.begun.wait)
      stopped = asyncio.create_task(found.stop())
      await asyncio.sleep(0)
      with self.assertRaises(lib.StoppedError):
        await found.score(3, 30)
      held.go.set()
      await stopped
      return [x.result for x in await asyncio.gather(*tasks)]

    self.assertEqual(asyncio.run(run()), [0, 10, 20])

  @parameterized.parameters(
    ({'max_batch': 0}, 'max_batch=0'),
    ({'max_queue': 0}, 'max_queue=0'),
    ({'max_wait_s': -1}, 'max_wait_s=-1'),
  )
  def test_bad_configs(self, config, said):
    with self.assertRaisesRegex(ValueError, said):
      lib.BatcherConfig(**config)


if __name__ == '__main__':
  absltest.main()
