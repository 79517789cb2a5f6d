"""The small Hub of ``tests.support.hub`` for datasets: other addresses, and one more request."""

from __future__ import annotations

import re
from http import HTTPStatus

from tests.support.hub import Hub, _Handler

IN_A_TREE = re.compile(r"/api/models/[^/]+/[^/]+/tree/[^/?]+/[^?]*")


class _DatasetHandler(_Handler):
    def do_GET(self) -> None:
        self.path = re.sub("^/api/datasets/", "/api/models/", re.sub("^/datasets/", "/", self.path))
        if IN_A_TREE.match(self.path):  # no repository here has a directory
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        else:
            super().do_GET()


class DatasetHub(Hub):
    handler_class = _DatasetHandler
