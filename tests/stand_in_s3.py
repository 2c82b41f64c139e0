"""A local stand-in of S3, filled and read by boto3, which segdeconv does not use."""

import itertools
from contextlib import contextmanager

KEYS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_numbers = itertools.count()


@contextmanager
def stand_in():
    """Run a stand-in in this process and yield its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


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
