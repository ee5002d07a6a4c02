"""The plan of a step: what it says holds of the step that runs, and fit=auto follows it."""

import dataclasses
import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import config, machine, run, rundir, sharding, train
from jaxgpt.config import (
    DpoConfig,
    GrpoConfig,
    MeshConfig,
    ModelConfig,
    PeftConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainConfig,
)  # fmt: skip
from jaxgpt.kernels.platform import compiler_options
from jaxgpt.model import gpt
from jaxgpt.plan import program, report, search
from jaxgpt.plan.step import Memory, Step, TooLarge, _too_large, compile_step

ROOT = Path(__file__).parents[2]
WIDE = ModelConfig(
    vocab_size=512, context_length=64, num_layers=3, model_dim=64, num_heads=4, mlp="gated",
    activation="silu", norm="rmsnorm", position="rope", tie_embeddings=False,
)  # fmt: skip
CFG = PretrainConfig(model=WIDE, train=TrainConfig(steps=100, batch_size=16, loss_chunk=64))
MESHES = {
    "one": {}, "data": {"data": 8}, "fsdp": {"data": 1, "fsdp": 8},
    "all three": {"data": 2, "fsdp": 2, "tensor": 2},
}  # fmt: skip


def script(path: str):
    """A file that is no module of the package."""
    file = importlib.util.spec_from_file_location("the_script", ROOT / path)
    made = importlib.util.module_from_spec(file)
    file.loader.exec_module(made)
    return made


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices() if sizes else jax.devices()[:1])


@pytest.fixture(autouse=True, scope="module")
def rolled():
    """As on accelerators; and a third of the program to compile, with less care."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compiler_options", lambda: {"xla_backend_optimization_level": "0"})
        patch.setattr(gpt, "layer_unroll", lambda *_, **__: 1)
        yield


@pytest.fixture(scope="module")
def steps(rolled) -> dict[str, Step]:
    build = partial(run.outline, "pretrain")
    return {name: compile_step(build, CFG, mesh_of(**sizes)) for name, sizes in MESHES.items()}


def test_the_state_is_divided_as_the_mesh_says(steps):
    one = steps["one"].memory
    assert one.parameters == 4 * steps["one"].parameters and one.moments == 2 * one.parameters + 8
    norms = 4 * (2 * 3 + 1) * 64  # whole everywhere
    shared = lambda ways, extra: (one.parameters - extra) / ways + extra
    assert steps["data"].memory.parameters == one.parameters
    assert steps["fsdp"].memory.parameters == shared(8, norms)
    assert steps["all three"].memory.parameters == shared(4, norms)
    for name, ways in (("data", 8), ("fsdp", 8), ("all three", 4)):
        memory = steps[name].memory
        assert memory.moments == 2 * memory.parameters + 8, "the moments lie as their parameters"
        assert memory.batch == one.batch / ways
        # Nothing that the compiler adds to them is as large as what a replica would be.
        assert memory.gradients == memory.parameters


def test_temporaries_shrink_with_the_rows(steps):
    """An activation that every device held whole would show."""
    one = steps["one"].memory.activations
    layer = 4 * (4 * 64 * 64 + 3 * 64 * 256)
    head = 4 * 512 * 64
    assert steps["data"].memory.activations < one / 8 * 1.5 + head + layer
    assert steps["fsdp"].memory.activations < one / 8 * 1.5 + 3 * head + 2 * layer
    assert steps["all three"].memory.activations < one / 4 * 1.5 + 2 * head + 2 * layer


def test_rows_stay_where_they_are(steps):
    """Nothing of an activation's size is exchanged without a tensor axis: only parameters are."""
    parameters = 4 * steps["one"].parameters
    embedded = 4 * 16 * 64 * 64  # what is looked up in a table that is cut along its width
    # Gathered twice and added up everywhere; a CPU's compiler has no reduce-scatter of its own.
    assert 0 < steps["fsdp"].exchanged < 1.1 * (2 + 2) * parameters + embedded
    assert 0 < steps["data"].exchanged < 1.1 * 2 * parameters, "gradients alone"
    assert not steps["one"].collectives


def test_the_head_is_added_up_once_whatever_the_chunk(steps):
    head = [c for c in steps["fsdp"].collectives if c.kind == "reduce-scatter"]
    assert [(c.loops, c.bytes) for c in head] == [((), 4 * 512 * 64 * 7 / 8)]


def test_a_head_cut_over_tensor_is_scattered_as_it_lies(steps):
    """Gathering its rows first would take a whole gradient's memory: 2 GB for Llama 8B's shape."""
    head = [c for c in steps["all three"].collectives if c.name.endswith("reduce_scatter")]
    assert [(c.kind, c.bytes) for c in head] == [("reduce-scatter", 4 * 512 * 64 / 2 * 1 / 2)]


def test_flops_and_tokens_do_not_depend_on_the_mesh(steps):
    assert len({(step.tokens, step.flops_per_token) for step in steps.values()}) == 1
    for step in steps.values():
        assert 0.95 < step.flops / (step.flops_per_token * step.tokens) < 1.05


def test_the_report_has_it_all_and_is_json(steps):
    chip = machine.Chip(1e12, 16e9, 1e11, 1e10, 2.0)
    mesh = mesh_of(**MESHES["fsdp"])
    found = json.loads(json.dumps(report.as_json(CFG, mesh, steps["fsdp"], chip)))
    fast, slow = found["seconds_per_step"]
    assert 0 < fast < slow
    assert found["dollars"][0] == pytest.approx(fast * 100 / 3600 * 8 * 2.0)
    assert found["tokens_per_second"][0] == pytest.approx(16 * 64 / fast)
    assert found["memory_total"] == pytest.approx(sum(found["memory"].values()))
    text = report.describe(CFG, mesh, steps["fsdp"], chip)
    assert "fsdp 8" in text and "all-gather" in text and "$" in text
    assert "no estimate" in report.describe(CFG, mesh, steps["fsdp"], None)


OTHERS = {
    "sft": SftConfig(),
    "dpo": DpoConfig(),
    "dpo from disk": DpoConfig(reference="precomputed"),
    "kto": DpoConfig(loss="kto"),
    "reward": RewardConfig(margin=True),
    "grpo": GrpoConfig(),
    "grpo near a reference": GrpoConfig(kl=0.1),
    "ppo": PpoConfig(),
    "ppo by a judge": PpoConfig(reward_model="runs/reward", value="shared"),
    "lora": SftConfig(peft=PeftConfig(kind="lora", rank=4)),
    "qlora": DpoConfig(peft=PeftConfig(kind="qlora", rank=4)),
}


def kind_of(name: str) -> str:
    """The stage of one of the OTHERS."""
    kinds = {"kto": "dpo", "lora": "sft", "qlora": "dpo", "mixture": "pretrain"}
    return kinds.get(name, name.split()[0])


@pytest.mark.parametrize("name", OTHERS)
def test_every_stage_has_an_outline_that_can_be_traced(name):
    cfg = dataclasses.replace(OTHERS[name], model=WIDE, train=CFG.train)
    with jax.set_mesh(mesh_of()):
        stage = run.outline(kind_of(name), cfg)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
        params = stage.params | {"carry": stage.carry}
        loss, weight, _ = jax.eval_shape(stage.loss, params, stage.batch, keys)
    assert loss.shape == weight.shape == ()
    assert ("reference" in stage.params) == (
        name in ("dpo", "kto", "qlora", "grpo near a reference", "ppo", "ppo by a judge")
    )


# ---- the search, on a machine of which we know what it needs


def step_of(micro_batches: int, remat: str, total: float) -> Step:
    memory = Memory(0, 0, 0, 0, 0, 0, total, 0, 0)
    extra = {"none": 1.0, "dots": 1.1, "qkv": 1.2, "attention": 1.27, "full": 1.33}[remat]
    return Step(micro_batches, remat, 1, 0, 0, 1, 1.0, 1e12 * extra, memory, 1e8 * micro_batches,
                [], 1)  # fmt: skip


@pytest.fixture
def simulated(monkeypatch):
    """needs(m, remat) = 10 + size / m bytes; returns what was compiled."""
    compiled = []

    def install(capacity: float) -> list:
        def compile_one(_, cfg, __):
            size = dict(zip(search.REMAT, (64, 32, 20, 12, 8), strict=True))[cfg.model.remat]
            parts = cfg.train.micro_batches
            compiled.append((parts, cfg.model.remat))
            return step_of(parts, cfg.model.remat, 10 + size / parts)

        chip = machine.Chip(1e12, capacity / search.USABLE, 1e9, 1e9)
        monkeypatch.setattr(search, "compile_step", compile_one)
        monkeypatch.setattr(search.machine, "chip", lambda _: chip)
        return compiled

    return install


@pytest.mark.parametrize(
    ("capacity", "chosen"),
    [
        (100, (1, "none")),
        (74, (1, "none")),
        (45, (2, "none")),  # dots would take one
        (20, (2, "qkv")),  # dots would take four, full one
        (13, (4, "attention")),  # full would take four as well
        (11, (8, "full")),
        (10.5, (16, "full")),
    ],
)
def test_the_search_takes_the_fastest_that_fits(simulated, capacity, chosen):
    compiled = simulated(capacity)
    step = search.search(None, CFG, mesh_of())
    assert (step.micro_batches, step.remat) == chosen
    assert len(compiled) == len(set(compiled)) <= 15, "few settings are compiled, each once"


def test_what_fits_nowhere_says_by_how_much(simulated):
    simulated(10.25)
    with pytest.raises(
        ValueError, match=r"does not fit 1 x cpu .* lacks .* GB .* mesh\.fsdp.*moments"
    ):
        search.search(None, CFG, mesh_of())


def test_the_given_setting_is_refused_if_it_does_not_fit(simulated):
    simulated(20)
    with pytest.raises(ValueError, match=r"train\.micro_batches=1, model\.remat=none: lacks"):
        search.as_given(None, CFG, mesh_of())


def test_a_compiler_that_knows_better_is_believed():
    error = TooLarge(72e9, 16e9)
    tried = lambda parts, remat: error if parts < 8 else step_of(parts, remat, 1)
    assert search.largest_micro_batch(tried, "none", [1, 2, 4, 8, 16]).micro_batches == 8


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds "
        "available HBM (15.75G).",
    ],
)
def test_what_a_tpu_compiler_lacks_is_read_from_its_refusal(said):
    """Either number is of everything, weights and moments included."""
    error = _too_large(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}"), mesh_of())
    assert isinstance(error, TooLarge)
    assert (error.needed, error.available) == (20.5 * 2**30, 15.75 * 2**30)
    other = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    assert _too_large(other, mesh_of()) is other


def test_a_tpu_program_takes_what_its_compiler_lays_out():
    """Figures of libtpu 0.0.42: an 8B shape's step, and a prefill whose peak has on-chip memory."""
    sizes = partial(SimpleNamespace, generated_code_size_in_bytes=0)
    step = sizes(
        argument_size_in_bytes=8032, output_size_in_bytes=8032, alias_size_in_bytes=8032,
        temp_size_in_bytes=11374, peak_memory_in_bytes=15696,
    )  # fmt: skip
    prefill = sizes(
        argument_size_in_bytes=405, output_size_in_bytes=304, alias_size_in_bytes=0,
        temp_size_in_bytes=39, peak_memory_in_bytes=826,
    )  # fmt: skip
    assert program.total_bytes(step, "tpu") == 15696, "its buffers: 15,700"
    assert program.total_bytes(prefill, "tpu") == 748, "its buffers: 735"
    assert program.total_bytes(step, "cpu") == 8032 + 11374, "a CPU's peak has no temporaries"


def test_a_batch_that_no_device_divides_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size=12"):
        search.divisions(12, mesh_of(data=8))
    cfg = search.with_setting(CFG, 4, "none")
    with pytest.raises(ValueError, match=r"train\.micro_batches=4: leaves 4 rows"):
        compile_step(partial(run.outline, "pretrain"), cfg, mesh_of(data=8))


# ---- runs that follow it


def run_config(path, **changes) -> PretrainConfig:
    data = path / "text.txt"
    data.write_text("to be or not to be, that is the question\n" * 40)
    return dataclasses.replace(
        PretrainConfig(run=str(path / "run"), fit="auto"),
        model=dataclasses.replace(WIDE, num_layers=1, model_dim=16, context_length=16),
        train=TrainConfig(steps=3, batch_size=16),
        data=dataclasses.replace(CFG.data, path=str(data), tokenizer="byte"),
        sample=dataclasses.replace(CFG.sample, prompts=[]),
        **changes,
    )


def test_a_run_keeps_what_was_chosen_and_never_compiles_twice(tmp_path, monkeypatch):
    choices = iter([(2, "full"), (4, "dots")])
    monkeypatch.setattr(search, "search", lambda *_: step_of(*next(choices), 1.0))
    compiled = []
    jit_step = train.jit_step
    monkeypatch.setattr(train, "jit_step", lambda *a: compiled.append(jit_step(*a)) or compiled[-1])
    cfg = run_config(tmp_path)
    run.launch("pretrain", cfg)
    assert compiled[-1]._cache_size() == 1, "the second step was compiled again"
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "micro_batches: 2" in settings and "remat: full" in settings

    rundir.enter(cfg)  # the same command is no other config
    again = run.fitted("pretrain", cfg, sharding.make_mesh(cfg.mesh))
    assert (again.train.micro_batches, again.model.remat) == (2, "full")
    elsewhere = run.fitted("pretrain", cfg, mesh_of())
    assert (elsewhere.train.micro_batches, elsewhere.model.remat) == (4, "dots")


def test_a_choice_is_for_the_devices_it_was_made_for(tmp_path):
    rundir.write_fit(tmp_path, {"data": 8}, {"micro_batches": 4})
    assert rundir.read_fit(tmp_path, {"data": 8}) == {"micro_batches": 4}
    assert rundir.read_fit(tmp_path, {"data": 4}) is None
    assert rundir.read_fit(tmp_path / "elsewhere", {"data": 8}) is None


# ---- the TPU's own compiler, where it is installed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "fsdp", "tensor"), [("none", 8, 1), ("full", 8, 1), ("none", 4, 2), ("full", 4, 2)]
)
def test_a_tpu_gathers_each_kernel_once_and_scatters_its_gradient(remat, fsdp, tensor, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setattr(train, "compiler_options", compiler_options)
    from jaxgpt.plan import devices

    model = dataclasses.replace(
        WIDE, model_dim=256, mlp_dim=768, context_length=128, dtype="bfloat16", remat=remat
    )
    cfg = dataclasses.replace(CFG, model=model, train=dataclasses.replace(CFG.train, batch_size=64))
    axes = MeshConfig(data=1, fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(axes, devices.topology("v5e:2x4"))
    step = compile_step(partial(run.outline, "pretrain"), cfg, mesh)
    assert report.per_layer(step)["all-gather"] == {"forward": 7, "backward": 7}
    assert report.per_layer(step)["reduce-scatter"] == {"forward": 0, "backward": 7}
    added = [c for c in step.collectives if c.kind == "all-reduce" and c.loops[-1:] == (3,)]
    if tensor == 1:  # else activations are added up, too
        assert sum(c.bytes for c in added) < 2 * 2 * 4 * 256 * 2, "only norms are, everywhere"
    assert np.isfinite(step.memory.total)


@pytest.mark.slow
def test_llama_8b_trains_whole_on_eight_chips_of_16_gb(monkeypatch):
    """With moments in bfloat16, and no copy of the kernels beside them."""
    pytest.importorskip("libtpu")
    monkeypatch.setattr(train, "compiler_options", compiler_options)
    from jaxgpt.plan import devices

    cfg = config.parse(config.PretrainConfig, "", [
        "--model", str(ROOT / "configs" / "model" / "llama-8b.yaml"),
        "--model.context_length", "2048", "--model.remat", "full", "--train.batch_size", "8",
        "--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "2",
        "--optim.moments", "bfloat16",
    ])  # fmt: skip
    mesh = sharding.make_mesh(cfg.mesh, devices.topology("v5e:2x4"))
    step = search.as_given(partial(run.outline, "pretrain"), cfg, mesh)
    assert step.memory.total < 15.5e9
    assert report.per_layer(step)["all-gather"] == {"forward": 7, "backward": 7}
    assert report.per_layer(step)["reduce-scatter"] == {"forward": 0, "backward": 7}
    with pytest.raises(ValueError, match="lacks"):
        in_float32 = dataclasses.replace(cfg, optim=config.OptimConfig())
        search.as_given(partial(run.outline, "pretrain"), in_float32, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chips"), [("v4:2x2x4", 16), ("v5p:2x2x4", 16), ("v5e:2x4", 8)])
def test_a_chip_is_one_device(name, chips):
    pytest.importorskip("libtpu")
    from jaxgpt.plan import devices

    assert len(devices.topology(name)) == chips


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, "mixture"])
def test_every_stage_is_planned_for_devices_that_are_not_here(name):
    pytest.importorskip("libtpu")
    from jaxgpt.plan import devices

    model = dataclasses.replace(WIDE, model_dim=128, context_length=128, dtype="bfloat16")
    if name == "mixture":
        model = dataclasses.replace(model, num_experts=4, balance="bias")
    cfg = dataclasses.replace(OTHERS.get(name, CFG), model=model, train=CFG.train)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4), devices.topology("v5e:2x4"))
    step = compile_step(partial(run.outline, kind_of(name)), cfg, mesh)
    assert 0 < step.memory.total < 16e9 and step.collectives


@pytest.mark.slow
def test_the_sampler_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    from jaxgpt.plan import devices
    from jaxgpt.sampling.sample import Sampling

    model = dataclasses.replace(WIDE, context_length=256, dtype="bfloat16")
    mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2), devices.topology("v5e:2x4"))
    reads, writes = script("benchmarks/topologies.py").compile_sampler(
        model, mesh, 8, 128, Sampling()
    )
    assert "splash" in reads.as_text()
    cache = 2 * 2 * 3 * 8 * 256 * 64 // 4  # keys and values of each group of devices' rows
    assert writes.memory_analysis().alias_size_in_bytes >= cache // 2, "the cache is copied"


def test_an_unknown_slice_is_refused():
    pytest.importorskip("libtpu")
    from jaxgpt.plan import devices

    with pytest.raises(ValueError, match="topology=v5e:7"):
        devices.topology("v5e:7")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_slice_without_its_compiler_says_what_to_install():
    from jaxgpt.plan import devices

    with pytest.raises(ValueError, match=r"topology=v5e:2x4: .*\[tpu\]"):
        devices.topology("v5e:2x4")


# ---- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script's main in this process: (exit status, standard output, standard error)."""
    main = script("scripts/plan.py").main
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):  # which the command sets, and nobody takes back
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *args])
        code = 0
        try:
            config.exit_cleanly(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--stage", "nothing"), "stage=nothing"),
        (("--devices", "8", "--topology", "v5e:2x4"), "devices=8"),
        (("--price", "-1"), "price=-1"),
        (("--chip", "L4"), "needs --devices"),
        (("--devices", "8", "--chip", "H1000"), "chip=H1000: must be one of TPU v2"),
        (("--train.batch_size", "12", "--data.tokenizer", "byte"), "train.batch_size=12"),
        (("--mesh.fsdp", "3"), "mesh=fsdp 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, monkeypatch, args, named):
    monkeypatch.setattr(machine, "use_compilation_cache", lambda: None)
    code, out, err = command(*args)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert named in err


def test_the_command_ends_with_one_json_object(command, monkeypatch):
    monkeypatch.setattr(machine, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(search, "compile_step", lambda *_: step_of(1, "none", 1e9))
    file = str(ROOT / "configs" / "sft" / "arithmetic.yaml")
    code, out, _ = command("--config", file, "--price", "3")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["dollars_per_device_hour"] == 3 and found["steps"] == 2000


def test_a_chip_that_is_not_here_is_planned_by_its_data_sheet(command, monkeypatch):
    monkeypatch.setattr(machine, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(search, "compile_step", lambda *_: step_of(1, "none", 70e9))
    file = str(ROOT / "configs" / "sft" / "arithmetic.yaml")
    args = ("--config", file, "--devices", "8", "--chip")
    code, out, _ = command(*args, "H100 80GB HBM3")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["memory_available"] == 80e9
    assert found["dollars_per_device_hour"] == machine.data_sheet("H100 80GB HBM3").price
    assert command(*args, "A100-SXM4-40GB")[0] == 2  # which 70 GB do not fit
