"""Turns a log of any size into shards of rows, within a bound of memory."""

from histjax.data.prepare.engines import Local, Ray
from histjax.data.prepare.plan import Options
from histjax.data.prepare.run import Summary, prepare

__all__ = ['Local', 'Options', 'Ray', 'Summary', 'prepare']
