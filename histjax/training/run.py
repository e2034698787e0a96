"""A trained run, as it is loaded to score with."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

from histjax import features as features_lib
from histjax.features import FittedFeatures
from histjax.training import checkpoints, identity
from histjax.training import workdir as workdir_lib
from histjax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """What training saved.

  Attributes:
    config: of the run.
    variables: of `Ranker(config.model)`.
    features: what is derived of the user's past and of a request.
    meta: of the latest checkpoint, see `checkpoints.load_meta`.
  """

  config: TrainConfig
  variables: dict[str, Any]
  features: FittedFeatures
  meta: dict[str, Any]


def load(
  workdir: str | os.PathLike[str],
  which: Literal['best', 'latest'] = 'best',
) -> Run:
  """Loads a run, from the folder that `train_and_evaluate` filled.

  Args:
    workdir: of the run.
    which: the parameters that are best on validation, or the latest.

  Raises:
    FileNotFoundError: there is no complete checkpoint, no best one yet, or
      no `features.npz`.
    ValueError: `which` is neither, a file is damaged or of another run, or
      the run is of another version of histjax.
  """
  # Once: a link may point to another run before all is read.
  workdir = workdir_lib.resolve(workdir).resolve()
  meta = checkpoints.load_meta(workdir)
  config = identity.of_run(meta['config'], workdir)
  features = features_lib.load(workdir)
  if features.digest() != meta['features']:
    raise ValueError(
      f'{workdir}: features.npz is of another run than the checkpoints '
      'beside it; restore the workdir, or train again'
    )
  variables, _ = checkpoints.load_variables(workdir, which)
  return Run(config, variables, features, meta)
