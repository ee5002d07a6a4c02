"""The losses of GRPO and its relatives against TRL's trainers, on the same drawn answers."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import GrpoConfig, ModelConfig, RolloutConfig
from jaxgpt.convert import hf
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.model import gpt
from jaxgpt.stages import grpo

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
PROMPT, LONGEST, GROUP, TEMPERATURE = 5, 9, 4, 0.7
# Name -> TRL's settings and ours.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"normalize": "sequences", "kl": 0.3},
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.4}, {"clip_high": 0.4}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"normalize": "constant", "baseline": "mean"},
    ),
    "reinforce++": ({"loss_type": "dapo", "scale_rewards": "batch"}, {"baseline": "batch"}),
    "rloo": ({}, {"baseline": "others", "ratio": "sequence", "normalize": "sequences"}),
}


def answers() -> dict[str, np.ndarray]:
    """Two groups of answers of unequal length, and what was thought of them when drawn."""
    rng = np.random.default_rng(0)
    length_B = rng.integers(1, LONGEST + 1, 2 * GROUP)
    return {
        "prompt": np.repeat(rng.integers(0, 256, (2, PROMPT)), GROUP, axis=0),
        "answer": rng.integers(0, 256, (2 * GROUP, LONGEST)),
        "mask": (np.arange(LONGEST)[None] < length_B[:, None]).astype(np.int64),
        "reward": rng.integers(0, 4, 2 * GROUP).astype(np.float32),
        "moved": rng.normal(0, 0.3, (2 * GROUP, LONGEST)).astype(np.float32),
    }


def as_rows(drawn: dict[str, np.ndarray], cfg: GrpoConfig) -> dict[str, jax.Array]:
    tokens = np.concatenate([drawn["prompt"], drawn["answer"]], axis=1)
    mask = np.concatenate([np.zeros_like(drawn["prompt"]), drawn["mask"]], axis=1)
    shifted = lambda x: np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)
    real = np.concatenate([np.ones_like(drawn["prompt"]), drawn["mask"]], axis=1)
    rows = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "targets": jnp.asarray(shifted(tokens), jnp.int32),
        "mask": jnp.asarray(shifted(mask), jnp.float32),
        "segments": jnp.asarray(real, jnp.int32),
    }
    made, _ = grpo.advantages(cfg, {**rows, "reward": drawn["reward"]}, {})
    return rows | {name: jnp.asarray(array) for name, array in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_trls(kind: str, tmp_path: Path) -> None:
    theirs, mine = KINDS[kind]
    cfg = GrpoConfig(
        model=MODEL, **{"clip_high": 0.2, **mine},
        rollout=RolloutConfig(
            samples=GROUP, temperature=TEMPERATURE, max_new_tokens=LONGEST
        ),
    )  # fmt: skip
    # Larger than at initialisation, so that answers differ in probability.
    params, other = (
        jax.tree.map(lambda x: 4 * x, gpt.init(MODEL, jax.random.key(seed))) for seed in (1, 2)
    )
    reference = jax.tree.map(lambda x, y: 0.9 * x + 0.1 * y, params, other)
    drawn = answers()
    rows = as_rows(drawn, cfg)
    now_BT, _ = grpo.token_scores(cfg, params, rows)
    moved_BT = jnp.zeros_like(now_BT).at[:, PROMPT - 1 : PROMPT - 1 + LONGEST].set(drawn["moved"])
    rows["logprobs"] = now_BT + moved_BT
    rows["reference"] = grpo.token_scores(cfg, reference, rows)[0]

    def loss(params: Any) -> jax.Array:
        networks = {"policy": params, "carry": {}}
        total, weight, _ = grpo.loss(cfg, networks, rows, jnp.zeros(0))
        return total / weight

    found, gradient = jax.value_and_grad(loss)(params)

    hf.save(tmp_path / "model", MODEL, params)
    tokenizers.load("byte").save(tmp_path / "model" / "tokenizer.json")
    trainer, model = make_trainer(kind, theirs, tmp_path)
    own = slice(PROMPT - 1, PROMPT - 1 + LONGEST)
    tensor = lambda x: torch.tensor(np.asarray(x))
    inputs = {
        "prompt_ids": tensor(drawn["prompt"]),
        "prompt_mask": torch.ones_like(tensor(drawn["prompt"])),
        "completion_ids": tensor(drawn["answer"]),
        "completion_mask": tensor(drawn["mask"]),
        "advantages": expected_advantages(kind, drawn["reward"]),
        "old_per_token_logps": tensor(rows["logprobs"][:, own]),
        "old_logps": tensor((rows["logprobs"][:, own] * drawn["mask"]).sum(1)),
        "ref_per_token_logps": tensor(rows["reference"][:, own]),
        "num_items_in_batch": tensor(drawn["mask"]).sum(),
    }
    chex.assert_trees_all_close(
        np.asarray(rows["advantages"]).max(1) + np.asarray(rows["advantages"]).min(1),
        inputs["advantages"].numpy(), atol=1e-5,
    )  # fmt: skip
    expected = trainer._compute_loss(model, inputs)
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
    model.save_pretrained(tmp_path / "gradient")
    chex.assert_trees_all_close(gradient, hf.load(tmp_path / "gradient")[1], atol=2e-5, rtol=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


def make_trainer(kind: str, settings: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    rloo = kind == "rloo"
    trainer_of, config_of = (
        (trl.RLOOTrainer, trl.RLOOConfig) if rloo else (trl.GRPOTrainer, trl.GRPOConfig)
    )
    args = config_of(
        output_dir=str(folder / "out"), per_device_train_batch_size=2 * GROUP, use_cpu=True,
        bf16=False, report_to="none", gradient_checkpointing=False, num_generations=GROUP,
        max_completion_length=LONGEST, temperature=TEMPERATURE, **settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"),
        eos_token="<|endoftext|>", pad_token="<|pad|>",
    )  # fmt: skip
    trainer = trainer_of(
        model=model, args=args, processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, trainer.model


def expected_advantages(kind: str, reward_B: np.ndarray) -> Any:
    """As TRL's trainers compute them from rewards, inside a method that also generates."""
    groups = torch.tensor(reward_B).view(-1, GROUP)
    mean = groups.mean(1, keepdim=True)
    if kind == "rloo":
        return (groups - (groups.sum(1, keepdim=True) - groups) / (GROUP - 1)).view(-1)
    if kind == "reinforce++":
        mean, std = groups.mean(), groups.std()
    else:
        std = groups.std(1, keepdim=True)
    centred = groups - mean
    return (centred if kind == "dr_grpo" else centred / (std + 1e-4)).view(-1)
