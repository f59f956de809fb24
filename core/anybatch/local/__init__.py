"""The embedded provider: OpenAI's files and batches API over one SQLite file, driven by the clock.

There is no background process. The state of a batch is computed from its record and the time of the request,
so that a worker, a triggerer and a sensor that open the same file see the same state. `anybatch.local.faults`
lists the behaviour that a model name can ask for (`local:echo?delay=20&fail=0.02`); `anybatch serve` offers
the same application on a port.

    from anybatch.local import LocalTransport, database_path
    httpx.Client(base_url="http://local/v1", transport=LocalTransport(database_path(None)))
"""

from .app import App
from .protocol import Request, Response
from .store import database_path
from .transport import LocalTransport

__all__ = ["App", "LocalTransport", "Request", "Response", "database_path"]
