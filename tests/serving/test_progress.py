"""What is told of progress, and when."""

from absl.testing import absltest

from histjax.serving.progress import Progress


def test_lines():
  said, now = [], [0.0]
  progress = Progress(said.append, lambda: now[0])

  def tell(second, done, **options):
    now[0] = second
    progress.tell('scoring', done, 7500, 'users', **options)
    return said[-1] if said else None

  first = 'scoring: 0/7,500 users, time left not known yet'
  assert tell(100.0, 0) == first
  assert tell(100.9, 90) == first
  assert (
    tell(101.0, 100) == 'scoring: 100/7,500 users, 100 a second, 0:01:14 left'
  )
  assert len(said) == 2
  tell(105.9, 590)
  assert len(said) == 2  # Every five seconds from there on.
  tell(106.0, 600)
  assert len(said) == 3
  assert tell(107.0, 7500).startswith('scoring: 7,500/7,500 users, 1,071 a sec')
  now[0] = 200.0
  progress.tell('reading', 0.5, 2.0, 'MiB')
  assert len(said) == 4
  now[0] = 202.0
  progress.tell('reading', 1.0, 2.0, 'MiB')
  assert said[-1] == 'reading: 1.0/2.0 MiB, 0 a second, 0:00:02 left'


def test_what_was_done_before_is_no_rate():
  said, now = [], [0.0]
  progress = Progress(said.append, lambda: now[0])
  progress.tell('scoring', 9000, 10_000, 'users', 9000)
  now[0] = 10.0
  progress.tell('scoring', 9100, 10_000, 'users', 9000)
  assert said == [
    'scoring: 9,000/10,000 users, time left not known yet',
    'scoring: 9,100/10,000 users, 10 a second, 0:01:30 left',
  ]


if __name__ == '__main__':
  absltest.main()
