"""Losses and gradients of whole stages against TRL's trainers, on one batch of a random model.

TRL tokenises and collates; its batch is given to our losses as it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import losses, scoring
from jaxgpt.config import DistillConfig, DpoConfig, ModelConfig, RewardConfig
from jaxgpt.convert import hf
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.model import gpt
from jaxgpt.stages import distill, dpo, reward
from jaxgpt.types import Params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.slow,  # TRL alone takes half a minute to import
    pytest.mark.filterwarnings("ignore"),
]

MODEL = ModelConfig(
    vocab_size=260, context_length=64, num_layers=2, model_dim=16, num_heads=2, mlp_dim=24,
    mlp="gated", activation="silu", norm="rmsnorm", position="rope", tie_embeddings=False,
)  # fmt: skip
PAIRS = [
    {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five, I would say."},
    {"prompt": "Sky? ", "chosen": "It is blue today.", "rejected": "No."},
    {"prompt": "Name a fruit: ", "chosen": "pear", "rejected": "a stone"},
]
RATED = [
    {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
    for pair, name in zip(PAIRS, ("chosen", "rejected", "chosen"), strict=True)
]


class Exported(NamedTuple):
    """The same random weights on both sides."""

    params: Params
    path: Path

    def model(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype="float32")

    def tokenizer(self) -> Any:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(self.path / "tokenizer.json"),
            eos_token="<|endoftext|>", pad_token="<|pad|>",
        )  # fmt: skip

    def gradients(self, model: Any, folder: Path) -> Params:
        """What stands in `.grad`, read as weights."""
        with torch.no_grad():
            for parameter in model.parameters():
                filled = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.copy_(filled)
        model.save_pretrained(folder)
        return hf.load(folder)[1]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Exported]:
    """A policy and a reference."""
    made = []
    for seed in (1, 2):
        # Larger than at initialisation, so that answers differ in probability.
        params = jax.tree.map(lambda x: 4 * x, gpt.init(MODEL, jax.random.key(seed)))
        path = tmp_path_factory.mktemp(f"model{seed}")
        hf.save(path, MODEL, params)
        tokenizers.load("byte").save(path / "tokenizer.json")
        made.append(Exported(params, path))
    return made


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    return kind(
        output_dir=str(folder), per_device_train_batch_size=3, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False, **settings,
    )  # fmt: skip


def first_batch(trainer: Any) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def ours(tokens: Any, attention: Any, answer: Any) -> dict[str, jax.Array]:
    """TRL's [rows, T] tensors as rows of ours, where `answer` marks the targets."""
    tokens, attention, answer = (np.asarray(x) for x in (tokens, attention, answer))
    assert attention[:, 0].all(), "padded on the left"
    shifted = lambda x: np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "targets": jnp.asarray(shifted(tokens), jnp.int32),
        "mask": jnp.asarray(shifted(answer * attention), jnp.float32),
        "segments": jnp.asarray(attention, jnp.int32),
    }


def paired(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """[2 B, T], all chosen ones first, to [B, 2, T]."""
    return {n: jnp.stack(jnp.split(array, 2), axis=1) for n, array in batch.items()}


def compare(
    exported: Exported, trainer: Any, batch: dict[str, Any], loss_fn: Any, folder: Path
) -> None:
    """Loss and gradient on both sides; `loss_fn` maps the policy's parameters to ours."""
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    expected = exported.gradients(trainer.model, folder / "gradients")
    found, gradient = jax.value_and_grad(loss_fn)(exported.params)
    np.testing.assert_allclose(found, theirs.item(), rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected, atol=2e-5, rtol=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_sft(exports: list[Exported], tmp_path: Path) -> None:
    policy = exports[0]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    trainer = trl.SFTTrainer(
        policy.model(), arguments(trl.SFTConfig, tmp_path), processing_class=policy.tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    batch = first_batch(trainer)
    mine = ours(batch["input_ids"], batch["attention_mask"], batch["labels"] != -100)

    def loss(params: Params) -> jax.Array:
        total, weight, _ = scoring.next_token_loss(MODEL, params, mine)
        return total / weight

    compare(policy, trainer, batch, loss, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "sigmoid", "beta": 0.1},
        {"loss": "ipo", "beta": 0.2},
        {"loss": "hinge", "beta": 0.05},
    ],
    ids=["sigmoid", "ipo", "hinge"],
)
def test_dpo(settings: dict[str, Any], exports: list[Exported], tmp_path: Path) -> None:
    policy, reference = exports
    theirs = {"loss_type": settings["loss"], **settings}
    theirs.pop("loss")
    trainer = trl.DPOTrainer(
        policy.model(), ref_model=reference.model(), processing_class=policy.tokenizer(),
        args=arguments(trl.DPOConfig, tmp_path, **theirs),
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)
    mine = paired(ours(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]))
    cfg = DpoConfig(model=MODEL, **settings)

    def loss(params: Params) -> jax.Array:
        answers = [dpo.score(cfg, p, mine) for p in (params, reference.params)]
        total, weight, _ = dpo._pairs(cfg, *answers, jnp.ones(3))
        return total / weight

    compare(policy, trainer, batch, loss, tmp_path)


def test_kto(exports: list[Exported], tmp_path: Path) -> None:
    policy, reference = exports
    trainer = trl.KTOTrainer(
        policy.model(), ref_model=reference.model(), processing_class=policy.tokenizer(),
        args=arguments(
            trl.KTOConfig, tmp_path, beta=0.1, desirable_weight=1.2, undesirable_weight=0.7
        ),
        train_dataset=datasets.Dataset.from_list(RATED),
    )  # fmt: skip
    batch = first_batch(trainer)
    parts = [
        ours(*(batch[prefix + n] for n in ("input_ids", "attention_mask", "completion_mask")))
        for prefix in ("", "KL_")
    ]
    width = max(part["tokens"].shape[1] for part in parts)
    wide = lambda x: jnp.pad(x, [(0, 0), (0, width - x.shape[1])])
    mine = {name: jnp.stack([wide(part[name]) for part in parts], axis=1) for name in parts[0]}
    good = jnp.asarray(np.asarray(batch["label"]), jnp.float32)
    cfg = DpoConfig(model=MODEL, loss="kto", beta=0.1, desirable_weight=1.2, undesirable_weight=0.7)

    def loss(params: Params) -> jax.Array:
        answers = [dpo.score(cfg, p, mine) for p in (params, reference.params)]
        total, weight, _ = dpo._kto(cfg, *answers, good, jnp.ones(3))
        return total / weight

    compare(policy, trainer, batch, loss, tmp_path)


@pytest.mark.parametrize("loss", ["simpo", "sigmoid"])
def test_without_a_reference(loss: str, exports: list[Exported], tmp_path: Path) -> None:
    """SimPO, and cDPO, whose label smoothing TRL has only here, against a flat reference."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = exports[0]
    beta, smoothing = (2.0, 0.0) if loss == "simpo" else (0.1, 0.2)
    trainer = CPOTrainer(
        policy.model(), processing_class=policy.tokenizer(),
        args=arguments(
            CPOConfig, tmp_path, loss_type=loss, cpo_alpha=0.0, beta=beta, simpo_gamma=0.5,
            label_smoothing=smoothing, max_length=64,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)
    cfg = DpoConfig(model=MODEL, loss=loss, beta=beta, gamma=0.5, label_smoothing=smoothing)
    compare(policy, trainer, batch, partial_loss(cfg, _from_arms(batch)), tmp_path)


def test_orpo(exports: list[Exported], tmp_path: Path) -> None:
    """TRL takes the likelihood of the prompt too, per token of the batch; ours is per answer."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = exports[0]
    trainer = ORPOTrainer(
        policy.model(), processing_class=policy.tokenizer(),
        args=arguments(ORPOConfig, tmp_path, beta=0.4, max_length=64),
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)
    mine = _from_arms(batch)
    whole = ours(
        batch["chosen_input_ids"], batch["chosen_attention_mask"], batch["chosen_attention_mask"]
    )
    cfg = DpoConfig(model=MODEL, loss="orpo", beta=0.4)

    def loss(params: Params) -> jax.Array:
        chosen_B = dpo.score(cfg, params, mine).mean_B2[:, 0]
        total, weight, _ = scoring.next_token_loss(MODEL, params, whole)
        return partial_loss(cfg, mine)(params) + chosen_B.mean() + total / weight

    compare(policy, trainer, batch, loss, tmp_path)


def test_reward(exports: list[Exported], tmp_path: Path) -> None:
    policy = exports[0]
    tokenizer = policy.tokenizer()
    body = transformers.AutoModelForSequenceClassification.from_pretrained(
        policy.path, num_labels=1, dtype="float32"
    )
    body.config.pad_token_id = tokenizer.pad_token_id
    trainer = trl.RewardTrainer(
        body, processing_class=tokenizer,
        args=arguments(trl.RewardConfig, tmp_path, center_rewards_coefficient=0.02),
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip
    batch = first_batch(trainer)
    head = {"score": {"kernel": jnp.asarray(body.score.weight.detach().numpy().T)}}
    attention = batch["attention_mask"]
    mine = paired(ours(batch["input_ids"], attention, attention))
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()
    cfg = RewardConfig(model=MODEL, centering=0.02)

    def loss(params: Params) -> jax.Array:
        reward_B2 = reward.score_pairs(MODEL, params, mine)
        loss_B = losses.bradley_terry(reward_B2[:, 0], reward_B2[:, 1], 0.0, cfg.centering)
        return loss_B.mean()

    found, gradient = jax.value_and_grad(loss)({"policy": policy.params, "reward": head})
    np.testing.assert_allclose(found, theirs.item(), rtol=1e-5)
    chex.assert_trees_all_close(
        gradient["reward"]["score"]["kernel"], body.score.weight.grad.numpy().T, atol=1e-5
    )
    chex.assert_trees_all_close(
        gradient["policy"]["embed"]["embedding"],
        body.model.embed_tokens.weight.grad.numpy(), atol=2e-5, rtol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_generalized_jsd(beta: float, exports: list[Exported]) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = exports
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (3, 20))
    answer = np.arange(20)[None] >= np.array([[3], [9], [15]])
    mine = ours(tokens, np.ones_like(tokens), answer)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    cfg = DistillConfig(model=MODEL, divergence=kind, jsd_beta=beta or 0.5 if beta < 1 else 0.5)

    def loss(params: Params) -> jax.Array:
        networks = {"policy": params, "teacher": teacher.params}
        return distill._divergence(cfg, MODEL, networks, mine, kind, 2.0) / mine["mask"].sum()

    models = [student.model(), teacher.model()]
    logits = [model(torch.tensor(tokens)).logits[:, :-1] for model in models]
    labels = torch.tensor(np.where(answer, tokens, -100))[:, 1:]
    theirs = GKDTrainer.generalized_jsd_loss(
        logits[0], logits[1].detach(), labels, beta=beta, temperature=2.0
    )
    theirs.backward()
    found, gradient = jax.value_and_grad(loss)(student.params)
    np.testing.assert_allclose(found, theirs.item(), rtol=1e-5)
    chex.assert_trees_all_close(
        gradient["embed"]["embedding"], models[0].model.embed_tokens.weight.grad.numpy(),
        atol=1e-5, rtol=1e-3,
    )  # fmt: skip


def partial_loss(cfg: DpoConfig, batch: dict[str, jax.Array]) -> Any:
    """The loss of a stage that has no reference."""

    def loss(params: Params) -> jax.Array:
        policy = dpo.score(cfg, params, batch)
        nothing = dpo.Answers(jnp.zeros_like(policy.logprobs_B2), policy.counts_B2)
        total, weight, _ = dpo._pairs(cfg, policy, nothing, jnp.ones(len(batch["tokens"])))
        return total / weight

    return loss


def _from_arms(batch: dict[str, Any]) -> dict[str, jax.Array]:
    arms = [
        ours(batch[f"{n}_input_ids"], batch[f"{n}_attention_mask"], batch[f"{n}_labels"] != -100)
        for n in ("chosen", "rejected")
    ]
    width = max(arm["tokens"].shape[1] for arm in arms)
    wide = lambda x: jnp.pad(x, [(0, 0), (0, width - x.shape[1])])
    return {name: jnp.stack([wide(arm[name]) for arm in arms], axis=1) for name in arms[0]}
