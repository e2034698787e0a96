"""Serving: what stands above a `Scorer`. Import its modules by name."""
