"""Serving: users' states stay on the device, requests come over HTTP.

`engine` keeps states and scores, `app` is the ASGI application around it,
`server` runs that in uvicorn, `cluster` puts engines into Ray, `client` speaks
to it, and `messages` is what is said. Not imported by `histjax`: these need the
packages of the extras `serving` and `cluster`.
"""
