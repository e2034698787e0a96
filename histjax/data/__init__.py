"""Logs of events become rows, and rows become batches."""
