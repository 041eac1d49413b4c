"""The function behind a WSGI server: POST /score with the params as body, the result as answer."""

import json

from function import score


def application(environ, start_response):
    params = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    body = json.dumps(score(*params)).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]
