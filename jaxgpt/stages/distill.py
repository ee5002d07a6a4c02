"""Distillation: a student imitates a teacher's distributions, or learns the answers it writes."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxgpt import files, kernels, losses, scoring, sharding, train, tree
from jaxgpt.config import DistillConfig, ModelConfig, sampling
from jaxgpt.convert import chatting
from jaxgpt.convert.load import Loaded, load, model_config
from jaxgpt.convert.table import Place
from jaxgpt.data import chat, conversations, examples, tuning
from jaxgpt.data.conversations import Dialogue
from jaxgpt.data.examples import Examples
from jaxgpt.episodes import Writer
from jaxgpt.model import gpt
from jaxgpt.rollouts import Problems, Rollouts
from jaxgpt.sampling.sample import for_decoding, generate
from jaxgpt.tasks.environment import Question
from jaxgpt.train import Stage, spec
from jaxgpt.types import Array, Batch, Metrics, Params

ANSWERED = 64  # prompts that the teacher answers at a time


def begin(cfg: DistillConfig) -> Loaded:
    """A student that reads the teacher's tokens: some of its layers, or a random network."""
    teacher = _load_teacher(cfg)
    if cfg.layers:
        return teacher._replace(
            config=replace(teacher.config, num_layers=cfg.layers, dropout=cfg.model.dropout),
            params=some_layers(teacher.config, teacher.params, cfg.layers),
        )
    model = replace(cfg.model, vocab_size=teacher.config.vocab_size)
    return teacher._replace(config=model, params=None)


def data(cfg: DistillConfig, start: Loaded) -> Stage:
    """The objective with its batches, of text or conversations, or of the student's answers."""
    teacher = _load_teacher(cfg, partial(sharding.place, jax.sharding.get_mesh()))
    _require_same_vocabulary(start, teacher)
    width = examples.row_width(
        cfg.data.max_tokens, min(cfg.model.context_length, teacher.config.context_length)
    )
    form = chatting.chat_format(start)
    said = tuning.dialogues(cfg.data)
    if cfg.sequence_level:
        said = (answers(cfg, teacher, said[0], form, width), said[1])
    train_rows, held_out = tuning.batches(
        cfg.data, said, form, width, cfg.train.batch_size, cfg.seed, cfg.run
    )
    if cfg.top_k:
        train_rows = _with_top_k(cfg, teacher, train_rows, "train")
        held_out = _with_top_k(cfg, teacher, held_out, "val")
    distance = partial(_divergence, cfg, teacher.config)

    @jax.jit
    def held_out_metrics(params: Params, batch: Batch) -> Metrics:
        _, weight, metrics = scoring.next_token_loss(
            cfg.model, params["policy"], batch, chunk=cfg.train.loss_chunk
        )
        kl = distance(params, batch, "forward_kl", 1.0)
        return {"loss": metrics["nll"], "accuracy": metrics["accuracy"], "kl": (kl, weight)}

    stage = objective(cfg, start.params, teacher)._replace(
        **scoring.on_rows(cfg, train_rows, held_out, held_out_metrics),
        prompts=examples.prompts(held_out, cfg.model.context_length),
    )
    if cfg.on_policy:
        return stage._replace(next_batch=_own_answers(cfg, start, form, said[0]))
    return stage


def objective(cfg: DistillConfig, params: Params, teacher: Loaded | None = None) -> Stage:
    """What is trained, towards what: the teacher's opinion of each token; `params` may be shapes.

    Args:
        teacher: None: its parameters are shapes, too.
    """
    model = teacher.config if teacher else teacher_config(cfg)
    shapes = lambda: jax.eval_shape(lambda: gpt.init(model, jax.random.key(0)))
    networks = {"policy": params}
    if not cfg.top_k:
        networks["teacher"] = teacher.params if teacher else shapes()
    distance = partial(_divergence, cfg, model)

    def loss(params: Params, batch: Batch, rng_B: Array) -> tuple[Array, Array, Metrics]:
        hard, weight, metrics = scoring.next_token_loss(
            cfg.model, params["policy"], batch, rng_B, params["carry"], chunk=cfg.train.loss_chunk
        )
        if cfg.hard == 1:
            return hard, weight, metrics
        soft = distance(params, batch, cfg.divergence, cfg.temperature, rng_B)
        metrics |= {cfg.divergence: (soft, weight)}
        soft *= cfg.temperature**2  # or its gradient would shrink with the temperature
        return cfg.hard * hard + (1 - cfg.hard) * soft, weight, metrics

    shortest = min(cfg.model.context_length, model.context_length)
    B, T = cfg.train.batch_size, examples.row_width(cfg.data.max_tokens, shortest)
    K = min(cfg.top_k, model.vocab_size - 1)
    known = {"teacher_logprobs": jnp.float32, "teacher_ids": jnp.int32} if K else {}
    return Stage(
        params=networks,
        trainable="^policy/",
        loss=loss,
        batch=spec(examples.KINDS, B, T) | spec(known, B, K, T),
        updates_per_rollout=cfg.rollout.updates if cfg.on_policy else 0,
        skips=cfg.on_policy,
    )


def some_layers(cfg: ModelConfig, params: Params, count: int) -> Params:
    """`count` of the layers, evenly spaced with the first and the last among them.

    Raises:
        ValueError: there are not so many.
    """
    if count > cfg.num_layers:
        raise ValueError(f"layers={count}: the teacher has only {cfg.num_layers}")
    if cfg.dense_layers:
        raise ValueError(
            f"layers={count}: the teacher's layers are not alike (model.dense_layers="
            f"{cfg.dense_layers}); leave layers out"
        )
    last = cfg.num_layers - 1
    chosen = [round(i * last / (count - 1)) for i in range(count)] if count > 1 else [0]
    kept = jnp.array(chosen)
    take = lambda name, leaf: leaf[kept] if name.startswith("blocks/") else leaf
    return tree.map_named(take, jax.tree.map(jnp.asarray, params))


def answers(
    cfg: DistillConfig, teacher: Loaded, said: list[Dialogue], form: chat.Format, width: int
) -> list[Dialogue]:
    """The conversations with the teacher's own last turns, kept in the run's directory."""
    file = files.path(cfg.run) / "teacher_answers.jsonl"
    if not file.is_file():
        lines = _write_answers(cfg, teacher, said, form, width)
        files.write(file, "".join(lines))
    return list(conversations.dialogues(str(file)))


def _write_answers(
    cfg: DistillConfig, teacher: Loaded, said: list[Dialogue], form: chat.Format, width: int
) -> list[str]:
    """JSONL of the teacher's conversations; an answer that is cut off teaches nobody to stop."""
    policy = for_decoding(teacher.config, jax.tree.map(jnp.asarray, teacher.params))
    how = sampling(cfg.sample)
    asked = []
    for dialogue in said:
        question = dialogue._replace(messages=dialogue.messages[:-1])
        tokens = chat.prompt(form, question.messages, question.tools)
        asked += [(question, tokens)] if len(tokens) < width else []
    lines = []
    for first in range(0, len(asked), ANSWERED):
        some = asked[first : first + ANSWERED]
        written = generate(
            teacher.config, policy, [tokens for _, tokens in some], how,
            stop_ids=teacher.stop_ids, rng=jax.random.key(cfg.seed),
            rows=range(first, first + len(some)),
        )  # fmt: skip
        for (question, _), completion in zip(some, written, strict=True):
            if completion.stopped:
                text = teacher.tokenizer.decode(completion.tokens)
                row = {"messages": [*question.messages, {"role": "assistant", "content": text}]}
                row |= {"tools": list(question.tools)} if question.tools else {}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def _own_answers(
    cfg: DistillConfig, start: Loaded, form: chat.Format, said: list[Dialogue]
) -> Rollouts:
    """The student's answers to the data's prompts, which nobody judges but the teacher."""
    writer = Writer(cfg.model, form, start.stop_ids)
    prompts = Problems(len(said), lambda n: Question(said[n].messages[:-1]), judged=False)

    @jax.jit
    def score(params: Params, batch: Batch) -> dict[str, Array]:
        hidden_BTD = scoring.run(cfg.model, params["policy"], batch).hidden_BTD
        options = (cfg.rollout.temperature, cfg.train.loss_chunk)
        logprobs_BT, _ = scoring.token_scores(
            cfg.model, params["policy"], hidden_BTD, batch, *options
        )
        return {"logprobs": logprobs_BT}

    nothing_more = lambda rows, carry: ({}, {})
    return Rollouts(cfg, cfg.rollout, writer, prompts, score, nothing_more, ())


def vocab_size(cfg: DistillConfig) -> int:
    """The student's vocabulary is the teacher's."""
    return teacher_config(cfg).vocab_size


def teacher_config(cfg: DistillConfig) -> ModelConfig:
    """The teacher's network, without its weights."""
    return _teaching(cfg, model_config(_teacher_path(cfg)))


def _load_teacher(cfg: DistillConfig, place: Place | None = None) -> Loaded:
    loaded = load(_teacher_path(cfg), place=place, merged=True)
    return loaded._replace(config=_teaching(cfg, loaded.config))


def _teaching(cfg: DistillConfig, teacher: ModelConfig) -> ModelConfig:
    return replace(teacher, dtype=cfg.model.dtype, dropout=0.0)


def _teacher_path(cfg: DistillConfig) -> str:
    if not cfg.teacher:
        raise ValueError("teacher is empty: give the model to imitate, --teacher PATH")
    return cfg.teacher


def _require_same_vocabulary(student: Loaded, teacher: Loaded) -> None:
    same = student.tokenizer.fingerprint == teacher.tokenizer.fingerprint
    if not same or student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"teacher: has another vocabulary ({teacher.config.vocab_size} ids) than the student "
            f"({student.config.vocab_size}); distil its answers instead: generate them, then sft"
        )


def _divergence(
    cfg: DistillConfig,
    teacher: ModelConfig,
    params: Params,
    batch: Batch,
    kind: str,
    temperature: float,
    rng_B: Array | None = None,
) -> Array:
    """Summed over the target tokens: how far the student is from the teacher."""
    between = {
        "forward_kl": losses.forward_kl,
        "reverse_kl": losses.reverse_kl,
        "jsd": partial(losses.generalized_jsd, beta=cfg.jsd_beta),
    }[kind]
    flat = lambda array: array.reshape(-1, array.shape[-1])
    student_AD = flat(scoring.run(cfg.model, params["policy"], batch, rng_B).hidden_BTD)

    def said(model: ModelConfig, params: Params, hidden_AD: Array) -> Array:
        return losses.tempered(gpt.logits(model, params, hidden_AD), temperature)

    if cfg.top_k:
        known = (batch["teacher_ids"], batch["teacher_logprobs"])
        known = tuple(flat(jnp.swapaxes(array_BKT, 1, 2)) for array_BKT in known)

        def one(student_CD: Array, *known: Array) -> Array:
            ids_CK, logprobs_CK = known
            student_CV = said(cfg.model, params["policy"], student_CD)
            return between(losses.with_rest(student_CV, ids_CK), losses.append_rest(logprobs_CK))
    else:
        known = (flat(scoring.run(teacher, params["teacher"], batch).hidden_BTD),)

        def one(student_CD: Array, *known: Array) -> Array:
            student_CV = said(cfg.model, params["policy"], student_CD)
            return between(student_CV, said(teacher, params["teacher"], *known))

    distance_A = kernels.by_chunks(one, (student_AD, *known), cfg.train.loss_chunk)
    return (distance_A * batch["mask"].reshape(-1)).sum()


def _with_top_k(cfg: DistillConfig, teacher: Loaded, rows: Examples, name: str) -> Examples:
    """The rows with the teacher's likeliest tokens, from the run's directory if they are there."""
    if rows.text is not None or not cfg.data.packing:
        raise ValueError(
            f"top_k={cfg.top_k}: only packed conversations can be kept on disk; set "
            "data.text_share to 0 and data.packing, or top_k to 0"
        )
    K = min(cfg.top_k, teacher.config.vocab_size - 1)

    def likeliest(params: Params, batch: Batch) -> dict[str, Array]:
        hidden_BTD = scoring.run(teacher.config, params, batch).hidden_BTD

        def one(hidden_CD: Array) -> Array:
            logits_CV = gpt.logits(teacher.config, params, hidden_CD)
            logprobs_CV = losses.tempered(logits_CV, cfg.temperature)
            kept_CK, ids_CK = jax.lax.top_k(logprobs_CV, K)
            return jnp.stack([kept_CK, ids_CK.astype(jnp.float32)], axis=-1)

        both_AK2 = kernels.by_chunks(
            one, (hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),), cfg.train.loss_chunk
        )
        both_BKT2 = jnp.swapaxes(both_AK2.reshape(*hidden_BTD.shape[:2], K, 2), 1, 2)
        return {
            "teacher_logprobs": both_BKT2[..., 0],
            "teacher_ids": both_BKT2[..., 1].astype(jnp.int32),
        }

    mesh = jax.sharding.get_mesh()
    params = jax.device_put(
        teacher.params, sharding.shardings(mesh, {"teacher": teacher.params})["teacher"]
    )
    key = f"{train.fingerprint(params)} top {K} at {cfg.temperature}"
    return scoring.precompute(files.path(cfg.run) / "teacher" / name, key, likeliest, params, rows)
