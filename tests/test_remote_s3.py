"""Copies in a bucket of S3, as s3fs writes and reads them, against the server of moto on this machine.

moto and s3fs bring more than they are worth to everybody who runs the tests: `pip install moto[server] s3fs` for these.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import dask
import pytest
import torch

import zcinfer as zc
from zcinfer import catalog
from zcinfer.errors import ModelNotFound, RemoteUnavailable
from zcinfer.parts import split
from zcinfer.registry import Registry
from zcinfer.remote import Remote

server = pytest.importorskip("moto.server", reason="moto is not installed: pip install moto[server] s3fs")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: moto brings it")

URL = "s3://models/there"


def layer(megabytes: int = 1) -> torch.nn.Linear:
    torch.manual_seed(megabytes)
    return torch.nn.Linear(1000, 250 * megabytes).eval()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with one bucket, which is where copies go."""
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    urlopen(
        Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()  # what other servers have is its own
    client.create_bucket(Bucket="models")
    with dask.config.set({"zcinfer.remote": URL}):
        yield client
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def sizes(bucket: Any) -> dict[str, int]:
    """Bytes by name of all that is in the bucket."""
    found = bucket.list_objects_v2(Bucket="models").get("Contents", [])
    return {entry["Key"]: entry["Size"] for entry in found}


def parts(bucket: Any) -> list[Any]:
    """Uploads in parts that were neither finished nor given up."""
    return list(bucket.list_multipart_uploads(Bucket="models").get("Uploads", []))


def test_what_one_machine_has_put_another_loads(registry: Path, bucket: Any, tmp_path: Path) -> None:
    model = layer(40)  # in three parts
    ref = zc.put(model, "layer")
    assert sum(sizes(bucket).values()) > ref.nbytes
    assert not parts(bucket)
    before = sizes(bucket)
    zc.put(model, "again")
    assert sizes(bucket) == before
    shutil.rmtree(registry)
    catalog.connect(f"file:{tmp_path}/elsewhere")
    loaded = zc.load(ref)
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded.bias, model.bias)
    catalog.connect(f"file:{tmp_path}/third")
    assert zc.put(f"{URL}/{ref.digest}", "found-again").digest == ref.digest
    with pytest.raises(ModelNotFound, match=f"no copy of 0+ at {URL}"):
        Registry(tmp_path / "third").archive("0" * 64)


def test_an_upload_that_is_interrupted_leaves_nothing_to_be_paid_for(registry: Path, bucket: Any) -> None:
    archive = Registry(registry).local(Registry(registry).add(split(layer(40)), "layer").digest)
    seen: list[int] = []

    def interrupt(nbytes: int) -> None:
        if parts(bucket):
            seen.append(nbytes)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Remote(URL).upload(archive, "layer@1", interrupt)
    assert seen
    assert sizes(bucket) == {}
    assert parts(bucket) == []


def test_a_bucket_that_is_not_there_is_told_and_not_made(registry: Path, bucket: Any) -> None:
    with dask.config.set({"zcinfer.remote": "s3://modles/there"}):
        for ask in (lambda: zc.put(layer(), "layer"), lambda: Registry(registry).archive("0" * 64)):
            with pytest.raises(RemoteUnavailable, match=r"s3://modles/there .*there is no bucket 'modles'"):
                ask()
    assert [found["Name"] for found in bucket.list_buckets()["Buckets"]] == ["models"]


def test_missing_keys_are_told(registry: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteUnavailable, match=r"s3://models/there cannot be listed: NoCredentialsError.*the rights"):
        zc.put(layer(), "layer")
