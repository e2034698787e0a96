"""Serving: users' states stay on the device, requests come over HTTP.

`engine` keeps states and scores, `app` is the ASGI application around it,
`cluster` its engines in Ray, `client` speaks to it, `messages` is what the two of them say. Not imported by
`histjax`: these need the packages of the extra `serving`.
"""
