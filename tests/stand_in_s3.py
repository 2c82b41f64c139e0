"""A local stand-in of S3, filled and read by boto3, which segdeconv does not use."""

import itertools
import threading
from contextlib import contextmanager

KEYS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_numbers = itertools.count()


class StandIn:
    """A stand-in in this process.

    Attributes:
        endpoint: its address.
    """

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.changed = threading.Condition()
        self.admitted = None

    def __call__(self, environ, start_response):
        """Answer a request; see `held`."""
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(".png"):
            with self.changed:
                if self.admitted is not None:
                    self.admitted -= 1
                    self.changed.notify_all()
                    if self.admitted < 0:
                        self.changed.wait_for(lambda: self.admitted is None)
                        start_response("503 Slow Down", [])
                        return []
        return self.app(environ, start_response)

    @contextmanager
    def held(self, after):
        """Admit so many PNGs in the context, and hold the next ones, which are never written.

        Yields a function that waits until one is held while a process runs, and returns whether it does.
        """
        self.admitted = after

        def wait(process):
            with self.changed:
                while not self.changed.wait_for(lambda: self.admitted < 0, timeout=0.1):
                    if process.poll() is not None:
                        return False
            return True

        yield wait
        with self.changed:
            self.admitted = None
            self.changed.notify_all()


@contextmanager
def stand_in():
    """Run a stand-in in this process and yield it."""
    found = StandIn()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()


class Bucket:
    """A new bucket of a stand-in."""

    def __init__(self, endpoint):
        import boto3

        self.name, self.environment = f"bucket-{next(_numbers)}", {**KEYS, "AWS_ENDPOINT_URL": endpoint}
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=KEYS["AWS_REGION"],
            aws_access_key_id="someone",
            aws_secret_access_key="secret",
        )
        self.client.create_bucket(Bucket=self.name)

    def put(self, name, content):
        self.client.put_object(Bucket=self.name, Key=name, Body=content)

    def upload(self, folder, prefix):
        """Copy the files of a folder to objects below a prefix, and return their address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return self.address(prefix)

    def address(self, prefix):
        return f"s3://{self.name}/{prefix}"

    def objects(self, prefix):
        """Return the content of the objects below a prefix by their names without it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {
            name[len(prefix) + 1 :]: self.client.get_object(Bucket=self.name, Key=name)["Body"].read() for name in names
        }
