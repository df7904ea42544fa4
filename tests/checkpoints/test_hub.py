"""Models on the Hub, played here by a small server on this machine."""

import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from parts import load_parts

from ddim_fast.checkpoints import Lookup, download, push_to_hub, save_pipeline
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks: a model's description, its tree, and its files."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        hub = self.server.hub
        if path.startswith("/api/models/"):
            repo, _, rest = "/".join(path.split("/")[3:5]), None, path.split("/")[5:]
            if repo not in hub.repos:
                return self.fail(404, "RepoNotFound")
            if rest[:1] == ["revision"] and rest[1] not in ("main", "v2", COMMIT):
                return self.fail(404, "RevisionNotFound")
            names = sorted(hub.names(repo))
            if rest[:1] == ["tree"]:
                sizes = [(name, (hub.repos[repo] / name).stat().st_size) for name in names]
                return self.answer(
                    json.dumps([{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes]).encode()
                )
            siblings = [{"rfilename": name} for name in names]
            return self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        owner, name, *rest = path.strip("/").split("/")
        if rest[:1] != ["resolve"]:
            return self.fail(404, "EntryNotFound")
        repo, file = f"{owner}/{name}", "/".join(rest[2:])
        if repo in hub.gated:
            return self.fail(403, "GatedRepo")
        if repo not in hub.repos or file not in hub.names(repo):
            return self.fail(404, "EntryNotFound")
        if self.command == "GET":
            hub.asked.append(file)
        self.answer((hub.repos[repo] / file).read_bytes(), ETag=f'"{file.replace("/", "-")}"')

    def answer(self, body, **headers):
        self.send_response(200)
        for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch, unet, scheduler):
    """A Hub with one model, "me/tiny", that holds more files than loading it needs."""
    folder = tmp_path / "on-the-hub"
    save_pipeline(unet, scheduler, folder)
    save_pipeline(unet, scheduler, folder, variant="fp16", max_shard_size="120KB")
    save_pipeline(unet, scheduler, tmp_path / "bin", safe_serialization=False)
    (tmp_path / "bin/unet/diffusion_pytorch_model.bin").rename(folder / "unet/diffusion_pytorch_model.bin")
    for name in ("README.md", "unet/flax_model.msgpack", "unet/optimizer.safetensors", "samples.zip", "inference.py"):
        (folder / name).write_text("not needed")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = types.SimpleNamespace(
        repos={"me/tiny": folder}, gated=set(), asked=[], cache=tmp_path / "cache"
    )
    hub.names = lambda repo: {
        str(path.relative_to(hub.repos[repo])) for path in hub.repos[repo].rglob("*") if path.is_file()
    }
    hub.folder = folder
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)

    def unplug():
        server.shutdown()
        server.server_close()

    hub.unplug = unplug
    hub.offline = lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["diffusion_pytorch_model.safetensors"]),
        ({"use_safetensors": False}, ["diffusion_pytorch_model.bin"]),
        (
            {"variant": "fp16"},
            [
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ],
        ),
    ],
)
def test_only_the_files_that_loading_reads_are_downloaded(hub, unet, same_weights, options, expected):
    loaded, scheduler = load_parts("me/tiny", **options)
    same_weights(loaded, unet)
    assert scheduler.config.beta_schedule == "scaled_linear"
    configs = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    assert sorted(set(hub.asked)) == sorted([*configs, *(f"unet/{name}" for name in expected)])
    assert len(hub.asked) == len(set(hub.asked))


def test_a_part_alone_needs_its_own_files_only(hub, unet, same_weights):
    DDIMScheduler.from_pretrained("me/tiny", subfolder="scheduler")
    assert hub.asked == ["scheduler/scheduler_config.json"]
    hub.asked.clear()
    same_weights(UNet2DModel.from_pretrained("me/tiny", subfolder="unet"), unet)
    assert sorted(hub.asked) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    hub.asked.clear()
    same_weights(UNet2DModel.from_pretrained("me/tiny"), unet)
    assert hub.asked == ["model_index.json"]


def test_the_second_load_comes_from_the_cache_and_force_download_does_not(hub):
    load_parts("me/tiny")
    hub.asked.clear()
    load_parts("me/tiny")
    assert hub.asked == []
    load_parts("me/tiny", force_download=True)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.asked


def test_the_old_flat_layout(hub, unet, same_weights):
    for folder in ("unet", "scheduler"):
        for file in (hub.folder / folder).iterdir():
            file.rename(hub.folder / file.name)
    same_weights(load_parts("me/tiny")[0], unet)
    assert "config.json" in hub.asked and "diffusion_pytorch_model.bin" not in hub.asked


def test_download_gives_the_folder_in_the_chosen_cache(hub, tmp_path, unet, same_weights):
    folder = download("me/tiny", Lookup(cache_dir=tmp_path / "elsewhere", revision="v2"))
    assert folder.is_relative_to(tmp_path / "elsewhere")
    assert (folder / "unet/diffusion_pytorch_model.safetensors").is_file() and not (folder / "README.md").exists()
    same_weights(load_parts(folder)[0], unet)


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "no network"])
def test_what_was_downloaded_once_loads_offline(hub, unet, same_weights, how):
    load_parts("me/tiny")
    hub.asked.clear()
    options = {"local_files_only": True} if how == "local_files_only" else {}
    if how == "HF_HUB_OFFLINE":
        hub.offline()
    if how == "no network":
        hub.unplug()
    same_weights(load_parts("me/tiny", **options)[0], unet)
    assert hub.asked == []
    with pytest.raises(FileNotFoundError, match=r"in the cache of 'me/tiny'.*no weights for variant='fp16'"):
        load_parts("me/tiny", variant="fp16", **options)


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "no network"])
def test_what_was_never_downloaded_says_both_possibilities_offline(hub, how):
    options = {"local_files_only": True} if how == "local_files_only" else {}
    if how == "HF_HUB_OFFLINE":
        hub.offline()
    if how == "no network":
        hub.unplug()
    with pytest.raises(
        ConnectionError, match=r"'me/tiny' is no folder in .*not in the local cache and could not be down"
    ):
        load_parts("me/tiny", **options)


def test_a_model_that_is_not_there_says_both_possibilities(hub):
    with pytest.raises(FileNotFoundError, match=r"'me/tyni' is neither a folder in .* nor a model on the Hub"):
        load_parts("me/tyni")
    with pytest.raises(FileNotFoundError, match=r"'my model' is not a folder in .*cannot be a model on the Hub"):
        load_parts("my model")


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match="at revision 'v3'"):
        load_parts("me/tiny", revision="v3")


def test_a_gated_model_says_how_to_get_in(hub):
    hub.gated.add("me/tiny")
    with pytest.raises(PermissionError, match=r"gated: accept its conditions at https://huggingface.co/me/tiny"):
        load_parts("me/tiny")


def test_variants_on_the_hub_are_listed_before_anything_is_downloaded(hub):
    with pytest.raises(FileNotFoundError, match=r"no weights for variant='fp8'; it has: the default .*variant='fp16'"):
        load_parts("me/tiny", variant="fp8")
    assert hub.asked == ["model_index.json"]


def test_contradicting_options(hub):
    with pytest.raises(ValueError, match="local_files_only=True and force_download=True exclude"):
        load_parts("me/tiny", local_files_only=True, force_download=True)


def test_an_index_on_the_hub_cannot_reach_outside(hub):
    index = hub.folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../../me/other/x.safetensors"}}))
    with pytest.raises(ValueError, match=r"refers to '../../../me/other/x.safetensors'"):
        load_parts("me/tiny", variant="fp16")


@pytest.fixture
def uploads(monkeypatch):
    done = []

    def upload_folder(api, *, folder_path, **options):
        names = {str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()}
        card = folder_path / "README.md"
        done.append({"files": names, "token": api.token, "card": card.read_text() if card.exists() else "", **options})
        return f"https://huggingface.co/{options['repo_id']}/commit/1"

    def create_repo(api, repo_id, **options):
        done.append(options)
        return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda api, repo, name, **options: repo == "me/old")
    return done


def test_push_saves_creates_and_uploads_one_commit(unet, scheduler, uploads):
    def saves(folder, **options):
        save_pipeline(unet, scheduler, folder, **options)

    address = push_to_hub(
        saves, "new", private=True, token="hf_x", commit_message="First", create_pr=True, variant="fp16"
    )
    created, uploaded = uploads
    assert address == "https://huggingface.co/me/new/commit/1"
    assert created == {"private": True, "exist_ok": True}
    assert uploaded["files"] == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "scheduler/scheduler_config.json",
        "README.md",
    }
    assert 'DDIMPipeline.from_pretrained("me/new")' in uploaded["card"]
    assert (uploaded["token"], uploaded["commit_message"], uploaded["create_pr"]) == ("hf_x", "First", True)


def test_push_keeps_a_readme_that_is_there_and_takes_objects(unet, scheduler, uploads):
    push_to_hub(lambda folder: save_pipeline(unet, scheduler, folder), "me/old")
    assert "README.md" not in uploads[1]["files"]
    unet.push_to_hub("me/net")
    assert uploads[3]["files"] == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert uploads[3]["commit_message"] == "Upload UNet2DModel"
    with pytest.raises(TypeError, match="needs an object with save_pretrained, got int"):
        push_to_hub(3, "me/net")


def test_nothing_is_uploaded_if_saving_fails(unet, uploads):
    with pytest.raises(ValueError, match="meta device"):
        push_to_hub(unet.to("meta"), "me/net")
    assert uploads == []


def test_a_network_can_be_pushed_into_a_folder_of_a_branch(tiny_config, uploads):
    push_to_hub(UNet2DModel(**tiny_config), "me/net", subfolder="unet", revision="ema")
    assert uploads[1]["path_in_repo"] == "unet" and uploads[1]["revision"] == "ema"
