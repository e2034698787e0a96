"""Serving: users' histories stay cached between requests.

`engine` answers requests, `cache_store` keeps users' states for it.
"""
