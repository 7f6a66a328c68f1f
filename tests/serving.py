"""A web server for tests."""

import http.server


class QuietServer(http.server.ThreadingHTTPServer):
    """On a free port of this machine; of callers that hang up it says nothing."""

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)

    def handle_error(self, request, client_address):
        pass
