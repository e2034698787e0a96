"""Operations with several implementations."""

from histjax.ops.history_attention.api import (
  history_attention,
  history_attention_backend,
)

__all__ = ['history_attention', 'history_attention_backend']
