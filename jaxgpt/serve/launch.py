"""From a checkpoint to a port that answers: load, compile, then open."""

import asyncio
import socket
import time
from collections.abc import Callable

import jax.numpy as jnp
import uvicorn
from jax.sharding import Mesh

from jaxgpt import language_model, machine, peft, sharding, tree
from jaxgpt.config import ModelConfig, ServeConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.machine import memory
from jaxgpt.plan import serving
from jaxgpt.sampling.sample import for_decoding
from jaxgpt.serve.app import Server, build
from jaxgpt.serve.engine import Engine
from jaxgpt.types import Array, Params

GRACE = 5.0  # seconds in which a server whose engine failed still says so
SMALLEST = 512  # tokens: a slot is not made smaller to fit into the memory


def serve(cfg: ServeConfig, show: Callable[[str], None]) -> int:
    """Serves until it is stopped; the exit status.

    Raises:
        ValueError: a checkpoint that cannot be opened, or settings that it does not have.
        OSError: the port is not free.
    """
    memory.share_heaps()
    machine.use_compilation_cache()
    with _bound(cfg) as listener:
        began = time.perf_counter()
        server = Server(cfg, *open_engine(cfg, show))
        show(f"compiled in {time.perf_counter() - began:.1f} s")
        server.engine.start()
        return asyncio.run(_listen(cfg, server, listener, show))


def open_engine(cfg: ServeConfig, show: Callable[[str], None]) -> tuple[LanguageModel, Engine]:
    """Loads the model and compiles every program; the engine's thread is not started yet."""
    adapters = dict(named.split("=", 1) for named in cfg.adapter)
    one = cfg.quantize != "stored" or sharding.make_mesh(cfg.mesh).size == 1
    quantize = cfg.quantize if one else None  # blocks are not cut over devices
    lm = language_model.load(cfg.checkpoint, cfg.dtype, adapters=adapters, quantize=quantize)
    mesh = mesh_of(cfg, lm.config)
    capacity = capacity_of(cfg, lm.config)
    show(f"{lm}: {cfg.slots} slots of {capacity:,} tokens")
    params = _decoding_params(lm, cfg.slots, mesh)
    engine = Engine(lm.config, params, cfg.slots, capacity, cfg.queue, cfg.prefix_cache << 20, mesh)
    engine.compile(lambda what: show(f"compiling: {what}"))
    memory.give_back()  # what loading and compiling took
    return lm, engine


def mesh_of(cfg: ServeConfig, model: ModelConfig) -> Mesh | None:
    """The devices; None for a single one."""
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_model(model, mesh)
    if cfg.slots % mesh.shape["data"]:
        ways = mesh.shape["data"]
        raise ValueError(
            f"slots={cfg.slots}: mesh.data={ways} must divide them; --slots "
            f"{-(-cfg.slots // ways) * ways} would fit"
        )
    return mesh if mesh.size > 1 else None


def _decoding_params(lm: LanguageModel, num_rows: int, mesh: Mesh | None = None) -> Params:
    """The weights of all adapters as the engine reads them; `lm` keeps no other copy of them."""
    networks = [lm.params, *lm.adapters.values()]
    if mesh is not None:
        placed: dict[int, Array] = {}  # the adapters share their base

        def place(name: str, leaf: Array) -> Array:
            if id(leaf) not in placed:
                placed[id(leaf)] = sharding.place(mesh, name, leaf)
            return placed[id(leaf)]

        networks = [tree.map_named(place, network) for network in networks]
    params = peft.for_rows(networks, range(len(networks))) if lm.adapters else networks[0]
    params = for_decoding(lm.config, params, num_rows)
    lm.params, *adapted = (peft.choose(params, jnp.array([n])) for n in range(len(networks)))
    lm.adapters = dict(zip(lm.adapters, adapted, strict=True))
    lm.loaded = lm.loaded._replace(params=lm.params)
    return params


def capacity_of(cfg: ServeConfig, model: ModelConfig) -> int:
    """The tokens of a slot: those asked for, or what the memory has for each."""
    if cfg.context > model.context_length:
        raise ValueError(
            f"context={cfg.context}: the model's context is {model.context_length}; give no more"
        )
    if cfg.context:
        return cfg.context
    capacity, most = model.context_length, serving.available_memory() / 4
    while capacity > SMALLEST and cfg.slots * serving.token_bytes(model) * capacity > most:
        capacity //= 2
    return capacity


def _bound(cfg: ServeConfig) -> socket.socket:
    """The port, taken before the long work begins; it is opened after it."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((cfg.host, cfg.port))
    except OSError as error:
        listener.close()
        raise ValueError(f"port={cfg.port}: {cfg.host} cannot be had, {error.strerror}") from None
    return listener


async def _listen(
    cfg: ServeConfig, server: Server, listener: socket.socket, show: Callable[[str], None]
) -> int:
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    web = uvicorn.Server(
        uvicorn.Config(build(server), log_level="warning", timeout_graceful_shutdown=5)
    )
    work = asyncio.create_task(web.serve(sockets=[listener]))
    while not web.started and not work.done():
        await asyncio.sleep(0.01)
    show(f"ready: {address}/v1")
    while not work.done() and server.engine.alive:
        await asyncio.wait([work], timeout=0.2)
    failure = server.engine.failure
    if not work.done():
        show(f"error: the engine has stopped: {type(failure).__name__}: {failure}")
        await asyncio.wait([work], timeout=GRACE)
        web.should_exit = True
    await work
    server.engine.stop()
    return 1 if failure else 0
