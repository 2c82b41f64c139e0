"""Networks from and to a local stand-in of the Hugging Face Hub, with its HTTP interface."""

import base64
import hashlib
import json
import re
from collections import defaultdict

import http_server
import pytest
import torch

import segdeconv
from segdeconv.checkpoints import cards
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models import SegmentationModel, SegNet

pytestmark = pytest.mark.extras
CLASSES = ["background", "cell"]


class Repositories:
    """Repositories with branches of commits; called as the server's table of answers.

    Attributes:
        commits: The files of each commit, by repository and commit.
        branches: The newest commit of each branch, by repository.
        requests: The method and path of each request.
    """

    def __init__(self):
        self.commits, self.branches = defaultdict(dict), defaultdict(dict)
        self.requests = []

    def __getitem__(self, path):
        return self.answer

    def answer(self, handler):
        path = handler.path.partition("?")[0]
        self.requests.append((handler.command, path))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(handler, *match.groups())
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            self.branches[name].setdefault("main", "0" * 40)
            self.commits[name].setdefault("0" * 40, {})
            self.send(handler, {"url": f"http://{handler.headers['Host']}/{name}", "id": name})
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.branches[match[1]][match[2]] = self.branches[match[1]]["main"]
            self.send(handler, {})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.send(handler, {"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            files = dict(self.commits[match[1]][self.branches[match[1]][match[2]]])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = self.add(match[1], files, branch=match[2])
            url = f"http://{handler.headers['Host']}/{match[1]}/commit/{commit}"
            self.send(handler, {"commitUrl": url, "commitOid": commit})
        else:
            self.refuse(handler, 404, "RepoNotFound")

    def resolve(self, handler, name, revision, file):
        if name.endswith("/gated"):
            self.refuse(handler, 403, "GatedRepo")
        elif name.endswith("/broken"):
            self.refuse(handler, 400, "")
        elif name not in self.commits:
            self.refuse(handler, 401, "RepoNotFound")
        elif (commit := self.branches[name].get(revision, revision)) not in self.commits[name]:
            self.refuse(handler, 404, "RevisionNotFound")
        elif file not in self.commits[name][commit]:
            self.refuse(handler, 404, "EntryNotFound", X_Repo_Commit=commit)
        else:
            content = self.commits[name][commit][file]
            etag = hashlib.sha256(content).hexdigest()
            handler.head(200, Content_Length=len(content), ETag=f'"{etag}"', X_Repo_Commit=commit)
            if handler.command == "GET":
                handler.wfile.write(content)

    def refuse(self, handler, code, error, **headers):
        handler.head(code, Content_Length=0, X_Error_Code=error, **headers)

    def send(self, handler, content):
        text = json.dumps(content).encode()
        handler.head(200, Content_Length=len(text), Content_Type="application/json")
        handler.wfile.write(text)

    def add(self, name, files, branch="main"):
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name][commit], self.branches[name][branch] = files, commit
        return commit


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """Repositories on a local server, which the Hub's library uses in place of the Hub, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    found = Repositories()
    with http_server.serving() as server:
        server.answers = found
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield found


def network(seed=0):
    torch.manual_seed(seed)
    return SegNet(2, stages=[[4], [8]])


def files_of(seed, folder):
    weights = network(seed).save_pretrained(folder / str(seed), classes=CLASSES)
    return {path.name: path.read_bytes() for path in (weights, cards.card_of(weights))}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_pushed_network_is_the_one_that_is_loaded(repositories):
    address = network().push_to_hub("me/net", classes=CLASSES, token="secret")
    commit = repositories.branches["me/net"]["main"]
    assert address == f"hf://me/net@{commit}"
    assert set(repositories.commits["me/net"][commit]) == {"model.safetensors", "model.json"}
    assert b"secret" not in b"".join(repositories.commits["me/net"][commit].values())
    for name in ("hf://me/net", address):
        assert same(SegNet.from_pretrained(name), network())
    assert segdeconv.load("hf://me/net").classes.names == tuple(CLASSES)


def test_a_revision_is_pinned(repositories, tmp_path):
    first = repositories.add("me/net", files_of(1, tmp_path))
    repositories.add("me/net", files_of(2, tmp_path))
    address = network(3).push_to_hub("me/net", classes=CLASSES, revision="dev", token="secret")
    assert same(SegNet.from_pretrained(f"hf://me/net@{first}"), network(1))
    assert same(SegNet.from_pretrained("hf://me/net"), network(2))
    assert same(SegNet.from_pretrained("hf://me/net@dev"), network(3))
    assert same(SegNet.from_pretrained(address), network(3))


def test_a_commit_is_downloaded_once(repositories, tmp_path):
    commit = repositories.add("me/net", files_of(1, tmp_path))
    SegNet.from_pretrained(f"hf://me/net@{commit}")
    assert {path for _, path in repositories.requests} == {
        f"/me/net/resolve/{commit}/{file}" for file in ("model.json", "model.safetensors")
    }
    repositories.requests.clear()
    SegNet.from_pretrained(f"hf://me/net@{commit}")
    assert repositories.requests == []


def test_nothing_is_fetched_unless_asked_for(repositories):
    SegNet.from_pretrained("camvid-small")
    with pytest.raises(UsageError, match="not found"):
        SegNet.from_pretrained("me/net")
    assert repositories.requests == []


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("hf://me/none", UsageError, "not found: the Hub has no such repository"),
        ("hf://me/net@v9", UsageError, "not found: the Hub has no such revision"),
        ("hf://me/gated", UsageError, "asks for consent - accept its terms"),
        ("hf://me/broken", UsageError, "the Hub cannot be used (Bad request"),
        ("hf://me/empty", CheckpointError, "has no model.safetensors with its card model.json"),
        ("hf://me/weights", CheckpointError, "has no model.safetensors with its card"),
        ("hf://me/other-card", CheckpointError, "does not belong to model.json"),
        ("hf://me/pickle", CheckpointError, "is not a readable .safetensors file"),
        ("hf://me/foreign", CheckpointError, "names os.system, which is not part of segdeconv"),
        ("hf://me/no-config", CheckpointError, "is not a segdeconv checkpoint"),
    ],
)
def test_a_wrong_repository_gets_one_line(repositories, tmp_path, address, error, message):
    files = files_of(1, tmp_path)
    card = json.loads(files["model.json"])
    pickle = b"\x80\x04cos\nsystem\n."

    def with_card(weights=files["model.safetensors"], **changes):
        return {"model.safetensors": weights, "model.json": json.dumps({**card, **changes}).encode()}

    for name, content in {
        "net": files, "empty": {"README.md": b""}, "weights": {"model.safetensors": files["model.safetensors"]},
        "other-card": {**files, "model.safetensors": files["model.safetensors"][:-1] + b"!"},
        "pickle": with_card(pickle, sha256=hashlib.sha256(pickle).hexdigest()),
        "foreign": with_card(config={**card["config"], "model": {"_target_": "os.system", "command": "true"}}),
        "no-config": with_card(config="none"),
    }.items():  # fmt: skip
        repositories.add(f"me/{name}", content)
    with pytest.raises(error, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        SegmentationModel.from_pretrained(address)
    assert "\n" not in str(caught.value)
