"""Models of the Hub, from a server on loopback that imitates it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hub_server
import jax
import numpy as np
import pytest
import yaml

import jaxgpt
from jaxgpt import files, hub, lineage, rundir, tree
from jaxgpt.config import DataConfig, ModelConfig, PeftConfig, PretrainConfig
from jaxgpt.convert import gguf_write, hf, load, peft_hf, table, tensors
from jaxgpt.data import engines
from jaxgpt.weights import Lora

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    vocab_size=260, context_length=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=64, norm="rmsnorm", mlp="gated", position="rope", activation="silu",
)  # fmt: skip


def weights(seed: int = 0):
    random = np.random.default_rng(seed)
    shapes = table.parameter_shapes(MODEL).items()
    return tree.nest({n: random.normal(0, 0.1, s).astype(np.float32) for n, s in shapes})


def folder(path: Path, seed: int = 0, shard: int = 10**9) -> dict[str, bytes]:
    """The files of an exported model."""
    engines.byte_level().save(path.with_suffix(".json"))
    tokenizer = {"tokenizer.json": path.with_suffix(".json").read_bytes()}
    hf.save(path, MODEL, weights(seed), tokenizer_files=tokenizer, shard_bytes=shard)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("model") / "a")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The imitation, as this process's Hub, with an empty cache."""
    from huggingface_hub import constants

    with hub_server.serving(hub_server.Hub()) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        url = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        hub.path.cache_clear()
        yield found
        hub.path.cache_clear()


def offline(monkeypatch):
    from huggingface_hub import constants

    hub.path.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_fetched_by_name_and_only_what_is_needed(server, model, monkeypatch, capsys):
    extra = {"consolidated.safetensors": b"x", "pytorch_model.bin": b"x", "README.md": b"x",
             "onnx/model.safetensors": b"x"}  # fmt: skip
    commit = server.commit("org/name", model | extra)
    lm = jaxgpt.load("org/name")
    assert lm.name == f"hf://org/name@{commit}"
    assert lm.config == MODEL
    assert not any(server.fetched(name) for name in extra)
    assert server.fetched("model.safetensors") == 1
    offline(monkeypatch)  # from the cache
    capsys.readouterr()
    again = jaxgpt.load("org/name")
    assert again.name == lm.name
    assert capsys.readouterr().err == ""
    assert hub.cached(lm.name) == files.path(lm.name)


def test_shards_are_those_of_the_index(server, tmp_path):
    content = folder(tmp_path / "cut", shard=10_000)
    shards = [name for name in content if name.startswith("model-")]
    assert len(shards) > 2
    server.commit("org/cut", content | {"model-99999-of-99999.safetensors": b"x"})
    jaxgpt.load("org/cut")
    assert [server.fetched(name) for name in shards] == [1] * len(shards)
    assert not server.fetched("model-99999-of-99999.safetensors")


def test_the_shape_alone_needs_no_weights(server, model):
    server.commit("org/name", model)
    assert load.model_config("org/name") == MODEL
    assert not server.fetched("model.safetensors")


def test_a_revision_is_a_tag_a_branch_or_a_commit(server, model, tmp_path):
    first = server.commit("org/name", model, "v1")
    second = server.commit("org/name", folder(tmp_path / "b", seed=1))
    assert hub.find("init", "org/name@v1") == f"hf://org/name@{first}"
    assert hub.find("init", "hf://org/name") == f"hf://org/name@{second}"
    asked = len(server.asked)
    assert hub.find("init", f"org/name@{first}") == f"hf://org/name@{first}"
    assert len(server.asked) == asked


def test_a_folder_here_wins(server, model, tmp_path):
    server.commit("org/name", model)
    (tmp_path / "org/name").mkdir(parents=True)
    for name, content in model.items():
        (tmp_path / "org/name" / name).write_bytes(content)
    assert jaxgpt.load("org/name").name == "org/name"
    assert not server.asked


def test_names_that_can_only_be_paths_never_ask(server):
    for name in ("runs/sft", "a/b/c", "/tmp/none", "gpt2", "./a/b", "out/model.gguf", "s3://b/c"):
        assert hub.find("init", name) == name
    assert not server.asked


def test_gguf_files_are_named_wholly_or_by_their_type(server, model, tmp_path):
    tokenizer = {"tokenizer.json": model["tokenizer.json"]}
    for kind in ("f16", "q8_0"):
        gguf_write.save(tmp_path / f"m-{kind}.gguf", MODEL, weights(), tokenizer, kind, (256,))
    held = {
        f"m-{kind}.gguf": (tmp_path / f"m-{kind}.gguf").read_bytes() for kind in ("f16", "q8_0")
    }
    commit = server.commit("org/m-GGUF", held | {"sub/a.gguf": b"x", ".gitattributes": b""})
    for name in ("org/m-GGUF:m-q8_0.gguf", "org/m-GGUF/m-q8_0.gguf", "org/m-GGUF:Q8_0",
                 "org/m-GGUF@main:m-q8_0.gguf"):  # fmt: skip
        assert hub.find("checkpoint", name) == f"hf://org/m-GGUF@{commit}/m-q8_0.gguf"
    assert jaxgpt.load("org/m-GGUF:Q8_0").config.model_dim == 32
    assert not server.fetched("m-f16.gguf")
    for name, has in (
        ("org/m-GGUF:q5_k", "m-f16.gguf, m-q8_0.gguf, sub/a.gguf"),
        ("org/m-GGUF:m", "m-f16"),
    ):
        with pytest.raises(ValueError, match=f"must name one file of org/m-GGUF, which has {has}"):
            hub.find("checkpoint", name)
    with pytest.raises(ValueError, match="must name one file of org/m-GGUF, which has m-f16"):
        jaxgpt.load("org/m-GGUF:none.gguf")
    with pytest.raises(ValueError, match=r"has no none\.gguf, but \.gitattributes, m-f16\.gguf"):
        jaxgpt.load("org/m-GGUF/none.gguf")
    with pytest.raises(ValueError, match=r"has no safetensors, but \.gitattributes, m-f16\.gguf"):
        jaxgpt.load("org/m-GGUF")


def test_a_split_gguf_file_comes_whole(server):
    held = {f"q/m-{n:05d}-of-00002.gguf": bytes([n]) for n in (1, 2)}
    server.commit("org/split", held | {".gitattributes": b""})
    found = files.path(hub.find("checkpoint", "org/split:m-"))
    assert found.name == "m-00001-of-00002.gguf"
    assert len(list(found.parent.iterdir())) == 2


def test_a_download_that_broke_off_goes_on_where_it_stopped(server, model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    server.commit("org/name", model)
    server.cut = 100 << 10
    jaxgpt.load("org/name")
    asked = [r for m, path, r in server.asked if m == "GET" and path.endswith("/model.safetensors")]
    assert asked == ["", f"bytes={server.cut}-"]


def test_every_failure_is_one_line(server, model, monkeypatch):
    server.commit("org/closed", model)
    server.commit("org/name", model)
    server.gated.add("org/closed")
    told = {
        "org/none": "checkpoint=org/none: is no file or folder here, and the Hub shows no model",
        "org/closed": "is gated: ask for access at http.*/org/closed, and give a token by HF_TOKEN",
        "org/name@v9": "checkpoint=org/name@v9: the Hub has the model, but not that revision",
    }
    for name, line in told.items():
        with pytest.raises(ValueError, match=line) as error:
            jaxgpt.load(name)
        assert "\n" not in str(error.value)
    offline(monkeypatch)
    with pytest.raises(ValueError, match=r"cannot be reached \(HF_HUB_OFFLINE is set") as error:
        jaxgpt.load("org/name")
    assert "org/name: is no file or folder here, it is not whole in the Hub's cache" in str(
        error.value
    )


def test_without_a_network_the_line_says_so(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"org/name: is no file .* cannot be reached \(.*\)$"):
        jaxgpt.load("org/name")


def begun(cfg):
    """A run that began with these settings, of which nothing was computed yet."""
    pinned = lineage.pinned(cfg)
    run = rundir.enter(pinned)
    (run / "tokenizer.json").write_text("{}")
    lineage.begin("pretrain", pinned, cfg)
    (run / "metrics.jsonl").write_text('{"step": 0}')  # from now on its settings count
    return pinned


def test_a_run_keeps_its_commit(server, model, tmp_path):
    cfg = PretrainConfig(init="org/name", run="r", data=DataConfig(path=__file__))
    first = server.commit("org/name", model)
    pinned = f"hf://org/name@{first}"
    assert begun(cfg).init == pinned
    assert yaml.safe_load(Path("r/config.yaml").read_text())["init"] == pinned
    (parent,) = lineage.read("r")["parents"]
    assert (parent["path"], parent["asked"]) == (pinned, ["org/name"])
    second = server.commit("org/name", folder(tmp_path / "b", seed=1))
    for name in (pinned, f"org/name@{first}", "org/name"):
        assert begun(replace(cfg, init=name)).init == pinned
    names = [pinned, "org/name", f"org/name@{first}"]
    assert lineage.read("r")["parents"][0]["asked"] == names
    with pytest.raises(ValueError, match=f"init: {pinned} -> hf://org/name@{second}"):
        begun(replace(cfg, init="org/name@main"))
    assert f"init: {pinned} (weights" in lineage.show("r")
    assert [told for _, told in lineage.check("r") if told] == []
    Path("cache").rename("moved")  # a model of the Hub can be had again
    assert (f"{pinned} (not here)", "") in list(lineage.check("r"))


@pytest.mark.slow
def test_the_same_command_goes_on_from_the_same_commit(server, model, tmp_path, command):
    (tmp_path / "data.txt").write_text("abc " * 2000)
    first = server.commit("org/name", model)
    run = ("--run=r", "--data.path=data.txt", "--init=org/name", "--train.batch_size=8",
           "--eval.batches=1", "--sample.prompts=[]", "--optim.schedule=constant")  # fmt: skip
    assert command("pretrain.py", *run, "--train.steps=1")[0] == 0
    server.commit("org/name", folder(tmp_path / "b", seed=1))
    code, _, said = command("pretrain.py", *run, "--train.steps=2")
    assert code == 0, said
    code, out, said = command("lineage.py", "r")
    assert code == 0, said
    assert f"init: hf://org/name@{first}" in out


def test_adapters_name_their_base_on_the_hub(server, model):
    commit = server.commit("org/name", model)
    pinned = f"hf://org/name@{commit}"
    lora = PeftConfig(kind="lora")
    cfg = PretrainConfig(init=pinned, run="r", peft=lora)
    Path("r").mkdir()
    rundir.write_config(cfg)
    rundir.write_base(cfg)
    assert rundir.read_base("r") == (pinned, lora)
    params = load.load("org/name").params
    query = params["blocks"]["attention"]["query"]
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 1, s).astype(np.float32) for s in ((2, 32, 3), (2, 3, 32)))
    changed = jax.tree.map(np.asarray, params)
    changed["blocks"]["attention"]["query"] = {"kernel": Lora(np.asarray(query["kernel"]), a, b)}
    peft_hf.save("out", MODEL, changed, str(load.source_of("r")))
    told = tensors.read_json(Path("out/adapter_config.json"))
    assert (told["base_model_name_or_path"], told["revision"]) == ("org/name", commit)
    assert peft_hf.base_of("out") == pinned
    # The adapter itself may lie there, too.
    server.commit("org/lora", {file.name: file.read_bytes() for file in Path("out").iterdir()})
    for name in ("out", "org/lora"):
        jax.tree.map(np.testing.assert_array_equal, load.load(name).params, changed)
    assert jaxgpt.load("org/name", adapters={"a": "org/lora"}).adapters.keys() == {"a"}


def test_push_needs_a_token_and_a_name(server, model, tmp_path, command, monkeypatch):
    code, _, said = command("convert.py", "--checkpoint=x", "--push=me/new")
    assert (code, said) == (2, "error: push=me/new: give a token by HF_TOKEN, or by the command "
                               "hf auth login\n")  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, said = command("convert.py", "--checkpoint=x", "--push=me/new")
    assert code == 2
    assert "push=me/new: the Hub answers 401" in said
    for args, line in (
        (["--push=new"], "push=new: must be org/name"),
        (["--push=me/new", "--to=jaxgpt"], "push=me/new: takes no run directory"),
        ([], "output=: is empty; give --output or --push"),
        (["--output=a", "--public"], "public=True: is for push"),
    ):
        code, _, said = command("convert.py", "--checkpoint=x", *args)
        assert (code, said) == (2, f"error: {line}\n")


def test_push_puts_a_model_and_its_card(server, model, tmp_path, command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    server.commit("org/name", model)
    code, out, said = command("convert.py", "--checkpoint=org/name", "--push=me/new")
    assert code == 0, said
    sha = server.refs["me/new", "main"]
    assert f"{server.url}/me/new/commit/{sha}" in out
    assert server.private["me/new"] is True
    held = dict(server.repos["me/new"][sha])
    card = held.pop("README.md").decode()
    assert card.startswith("---\nlibrary_name: jaxgpt\n---\n# me/new")
    assert {name: held[name] for name in model} == model
    # What jaxgpt wrote is written anew; what others wrote is left alone.
    code, _, said = command("convert.py", "--checkpoint=me/new", "--push=me/new", "--to=gguf")
    assert code == 0, said
    assert "new.gguf" in server.repos["me/new"][server.refs["me/new", "main"]]
    server.commit("me/theirs", {"a.bin": b"x"})
    code, _, said = command("convert.py", "--checkpoint=me/new", "--push=me/theirs")
    assert code == 2
    assert "push=me/theirs: holds other than jaxgpt's files (a.bin)" in said
    before = tree.flatten(jaxgpt.load("org/name").params)
    after = tree.flatten(jaxgpt.load("me/new").params)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert rundir.fingerprint("org/name") != ""


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(model, tmp_path):
    with hub_server.serving(hub_server.Hub()) as server:
        server.commit("org/name", model)
        environment = os.environ | {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        run = lambda **more: subprocess.run(
            [sys.executable, "-m", "jaxgpt", "sample", "--checkpoint", "org/name", "--prompt", "a",
             "--max_new_tokens", "2"],
            cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        done = run()
        assert done.returncode == 0, done.stderr
    again = run(HF_HUB_OFFLINE="1")  # the server is gone
    assert (again.returncode, again.stdout) == (0, done.stdout)
