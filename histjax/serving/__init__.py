"""Serving: users' states stay on the device, requests come over HTTP.

`engine` keeps states and scores, `app` is the ASGI application around it,
`cluster` puts engines into replicas, `client` speaks to the application,
`messages` is what the two of them say; `export` writes a directory that scores
without this library, `batch` scores files. Not imported by `histjax`: these
need the packages of the extra `serving`, and some `ray`.
"""
