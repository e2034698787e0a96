"""Serving: what stands above the scorer, each with dependencies of its own."""
