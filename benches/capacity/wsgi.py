"""Sleeps for as many seconds as the body says: POST /METHOD."""

import json
import time


def application(environ, start_response):
    seconds = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    time.sleep(seconds)
    headers = [("Content-Type", "application/json"), ("Content-Length", "4")]
    start_response("200 OK", headers)
    return [b"null"]
