"""What is told of progress, and when."""

from absl.testing import absltest

from histjax.progress import Progress


def test_lines():
  said, now = [], [0.0]
  progress = Progress(said.append, lambda: now[0])

  def tell(second, done, **options):
    now[0] = second
    progress.tell('scoring', done, 7500, 'users', **options)
    return said[-1] if said else None

  first = 'scoring: 0/7,500 users, time left not known yet'
  assert tell(100.0, 0) == first
  # The first batch takes what compiling takes, and tells no rate.
  second = 'scoring: 32/7,500 users, time left not known yet'
  assert tell(110.0, 32) == second
  assert tell(110.9, 122) == second
  third = 'scoring: 132/7,500 users, 100 a second, 0:01:14 left'
  assert tell(111.0, 132) == third
  assert tell(115.9, 590) == third  # Every five seconds from there on.
  assert tell(116.0, 632).startswith('scoring: 632/7,500 users, 100 a second')
  # In the end, of all.
  done = 'scoring: 7,500/7,500 users, 300 a second, 0:00:00 left'
  assert tell(125.0, 7500) == done
  assert len(said) == 5
  for second, part in ((200.0, 0.5), (201.0, 1.0), (202.0, 1.5)):
    now[0] = second
    progress.tell('reading', part, 2.0, 'MiB')
  assert said[5:] == [
    'reading: 1.0/2.0 MiB, 0 a second, 0:00:02 left',
  ]


def test_what_was_done_before_is_no_rate():
  said, now = [], [0.0]
  progress = Progress(said.append, lambda: now[0])
  for second, done in ((0.0, 9000), (5.0, 9050), (10.0, 9100)):
    now[0] = second
    progress.tell('scoring', done, 10_000, 'users', 9000)
  assert said == [
    'scoring: 9,000/10,000 users, time left not known yet',
    'scoring: 9,050/10,000 users, time left not known yet',
    'scoring: 9,100/10,000 users, 10 a second, 0:01:30 left',
  ]


if __name__ == '__main__':
  absltest.main()
