"""What a GRPO step has to do, and TRL's GRPOTrainer doing it (transformers' Qwen2, fp32)."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

from paras2s_jax.models.qwen2_config import Qwen2Config
from paras2s_jax.perf.decode import QWEN2_47M, torch_qwen2
from paras2s_jax.perf.race import Laps

LR, CLIP_NORM, ADAM_B2 = 1e-6, 1.0, 0.999  # TRL's and transformers' defaults.


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step has to do; the lengths are those of the paper's run with 15 s of answer.

    prompts: P. group: G. prompt_len, answer_len: tokens of every prompt and answer, T and R.
    beta: weight of the KL term to the reference.
    """

    config: Qwen2Config = QWEN2_47M
    prompts: int = 1
    group: int = 8
    prompt_len: int = 160
    answer_len: int = 190
    beta: float = 0.1


class TheirStep:
    """TRL's trainer, and one optimizer step of it as its training loop takes it.

    Off is all that writes or reports, and the recomputing of activations, on in TRL unless told
    otherwise, which would only make it slower.
    """

    def __init__(self, work: Work, ids: np.ndarray, folder: str, laps: Laps):
        reference = torch_qwen2(work.config)
        reference.save_pretrained(folder)  # TRL reads the reference from there.
        model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.01 * torch.randn_like(weights)
        prompts = [" ".join(f"w{i}" for i in row) for row in ids]
        args = trl.GRPOConfig(
            output_dir=str(Path(folder) / "unused"),
            per_device_train_batch_size=work.prompts * work.group,
            num_generations=work.group,
            max_completion_length=work.answer_len,
            beta=work.beta,
            loss_type="grpo",
            use_bias_correction_kl=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP_NORM,
            adam_beta2=ADAM_B2,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        self.trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=_even_share,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=_word_tokenizer(work.config.vocab_size),
        )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        self.trainer.current_gradient_accumulation_steps = 1
        self._rows = [{"prompt": text} for text in prompts for _ in range(work.group)]
        for part, method in (
            ("rollout", "_generate_single_turn"),
            ("experience", "_generate_and_score_completions"),
        ):
            self._note(laps, part, method)

    def _note(self, laps: Laps, part: str, method: str) -> None:
        inner = getattr(self.trainer, method)
        setattr(self.trainer, method, lambda *args, **kwargs: laps(part, inner, *args, **kwargs))

    def sample(self) -> dict[str, torch.Tensor]:
        """A batch that the loss takes: TRL's own answers, scored."""
        self.trainer.model.train()
        return self.trainer._generate_and_score_completions(list(self._rows))

    def loss_and_gradients(self, batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and its gradient by parameter."""
        model = self.trainer.model
        loss = self.trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {name: w.grad.numpy().copy() for name, w in model.named_parameters()}
        model.zero_grad()
        return loss.item(), gradients

    def __call__(self) -> torch.Tensor:
        trainer, model = self.trainer, self.trainer.model
        loss = trainer.training_step(model, list(self._rows), None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return loss


def _even_share(completion_ids, **_) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def _word_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Word "w7" has id 7. The end of an answer has an id that the model cannot name."""
    words = {f"w{i}": i for i in range(vocab_size + 1)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="w0", eos_token=f"w{vocab_size}"
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without TRL's report home, which it leaves out where CI is set, and without progress bars."""
    before = os.environ.get("CI")
    os.environ["CI"] = "1"
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before
