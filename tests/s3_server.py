"""An S3 over HTTP in this process (moto's server), and what a client must find in its environment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer


@contextmanager
def serving() -> Iterator[str]:
    """The URL of a server, as long as the context lasts."""
    found = ThreadedMotoServer(port=0, verbose=False)
    found.start()
    host, port = found.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        found.stop()


def variables(server: str, home: Path) -> dict[str, str]:
    """The environment in which every client asks this server, and nobody's own settings count."""
    return {
        "AWS_ENDPOINT_URL_S3": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
    }


def make_bucket(server: str, name: str) -> str:
    """The URI of an empty bucket; needs the variables."""
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}"
