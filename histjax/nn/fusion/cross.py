"""The candidate reads the events as they are: nothing else attends."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from histjax.nn import encoder as encoder_lib
from histjax.nn.fusion import append
from histjax.types import Segments


class CrossOnly(append.AppendCross):
  """The candidate attends to the history, in every layer; events do not.

  Stacked target-to-history cross-attention (STCA; Guan et al., arXiv
  2511.06077). With events `X`, layer by layer, of the candidate alone:

      K_i, V_i = norm_i(X) W_k, norm_i(X) W_v
      x += Attention(norm_i(x) W_q, K_i, V_i) W_o
      x += MLP_i(norm(x))

  No event depends on another, so to read a history costs two products a layer,
  `O(l n d^2)`, where the other Transformers attend, `O(l n^2 d)`; one more
  event changes nothing that is kept of the others; and with a window W a score
  depends on the last W events alone, however many layers there are.

  The paper's layers differ. Its keys and values are of `LN(SwiGLU_i(X))`, an
  MLP for each layer over every event; here of `norm_i(X)`, with the norm that
  the query has. It makes the next query of all layers' outputs and the
  candidate, `LN(SwiGLU([o_1 .. o_i, x_t] W_c))`, and its readout likewise, but
  for the norm; here both are the residual stream of the blocks that our other
  fusions have, which `ops.candidate_tower` computes as it is. Its equations
  have no positions; here `config.positions` decides. It never makes `K` and
  `V`, `q W_k^T` meeting the events themselves, which pays for one query; here
  they are kept, for many. And it serves longer histories than it trains on.
  """

  events_attend = False

  @staticmethod
  def hops(num_layers: int) -> int:
    """One: what a candidate sees has seen nothing."""
    del num_layers
    return 1

  @staticmethod
  def check(config: encoder_lib.EncoderConfig) -> None:
    """Raises ValueError at `causal=False`, which would change nothing."""
    if not config.causal:
      raise ValueError(
        "encoder.causal=False, but with fusion='cross_only' events see no "
        'events, earlier or later; set encoder.causal=True'
      )

  def _layer(
    self, i, tower, x, position, keys, values, key_range, *, count=None,
    block=None, train=False,
  ):  # fmt: skip
    """Events after layer `i`: as they were."""
    del i, tower, position, keys, values, key_range, count, block, train
    return x

  def __call__(
    self,
    history: Float[Array, 'B L D'],
    candidates: Float[Array, 'B C D'],
    length: Int[Array, 'B'],
    visible: Int[Array, 'B C'] | None,
    *,
    segments: Segments | None = None,
    train: bool = False,
  ) -> Float[Array, 'B C D']:
    """The fused candidates; the final norm's output."""
    keys, values = self.encode(history, length, segments=segments, train=train)
    return self.score(
      keys,
      values,
      length,
      candidates,
      visible,
      segments=segments,
      train=train,
    )
