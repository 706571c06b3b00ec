"""What a user would take instead, on the same work: TRL's GRPOTrainer beside this package.

    python -m venv build/peers && build/peers/bin/pip install -e '.[quant]' -e kernels trl
    build/peers/bin/python bench/peers.py --write       the embedded model, 8 images, G 2 and 8
    build/peers/bin/python bench/peers.py --smoke       one step, two images

Both sample G boxes of 22 tokens for one question about each image, score them by policy and
reference, and update the same LoRA: TRL as it comes (batched `generate`, a row for every answer,
gradient checkpointing off, no vLLM), with the embedded model's tokenizer and transformers' PIL
image processor, because the family's own processor needs torchvision. Ours is the fast engine's
part of a step: encode, prefill, sample, score, backward, AdamW; the other parts of the method
(queries, views, ghosts, verdicts) TRL does not have, and they are left out. Steps are taken in
turn, TRL's, ours, TRL's, ...; a figure is the median of the ratios of neighbours with least and
most. A CPU's figures are ratios of its CPU time, one thread. Left out: what is learned.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import _checkout
import _measure as measure
import _subjects as subjects
import torch
from naive import Processor
from PIL import Image as Pillow
from vise_kernels import linear_logprob_kl

from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import Answered
from vise_fast.method import roles
from vise_fast.method.learner import make_optimizer
from vise_fast.method.roles import Question, Sampling
from vise_fast.model import load as model
from vise_fast.model.qwen3_vl import LORA_TARGETS

CPU = torch.device("cpu")
BETA = 0.04
RESULT = _checkout.ROOT / "bench" / "results" / "peers-cpu.json"
SIZE = 128  # pixels


@dataclass
class Ours:
    """The fast engine on the same images, questions and lengths."""

    engine: FastEngine
    optimizer: torch.optim.Optimizer
    images: list
    group: int
    steps: int = 0

    @classmethod
    def of(cls, subject: subjects.Subject, images: list, group: int) -> Ours:
        """Weights, LoRA and optimizer of its own."""
        words = ["--model.dtype=float32", "--model.device=cpu"]
        config = subject.config("paper", len(images), words)
        policy = model.load(config, weights=subject.weights)
        policy.tokens = subjects.Locked(policy.tokens)
        engine = FastEngine(policy.backbone, policy.tokens)
        masters = list(policy.parameters().values())
        return cls(engine, make_optimizer(masters, config), images, group)

    def step(self) -> None:
        """Sample, score twice, go backwards, update."""
        engine = self.engine
        self.steps += 1
        features = engine.encode([image.pixels for image in self.images])
        query = subjects.QUERIES[engine.tokens.style.name]
        count = len(self.images) * self.group
        seeds = [self.steps * count + i for i in range(count)]
        questions = []
        for i in range(len(self.images)):
            questions.append(Question(i, query, seeds[i * self.group : (i + 1) * self.group]))
        sampling = Sampling(subjects.BOX_TOKENS)
        boxes = roles.ground(engine, engine.prefill(features, True), questions, sampling)
        answered = Answered(boxes.rows, boxes.answers, boxes.owner)
        with torch.no_grad():
            reference = engine.score(features, answered, False)
        hidden = engine.score(features, answered, True)
        answers = answered.answers
        ids = answers.ids[answers.mask().bool()]
        weight = engine.backbone.head.weight
        logprob, _, kl = linear_logprob_kl(hidden, reference, weight, ids, banned=engine.banned)
        (BETA * kl - logprob).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        engine.backbone.refresh()


# ---- TRL -----------------------------------------------------------------------------------------


def processor_of(directory: str) -> Any:
    """The tokenizer and the PIL image processor as one ProcessorMixin, which is what TRL asks
    for.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.processing_utils import ProcessorMixin

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    vision = AutoConfig.from_pretrained(directory, trust_remote_code=False).vision_config
    joined = Processor(tokenizer, vision, SIZE * SIZE)

    class Pictures(ProcessorMixin):
        def __init__(self) -> None:
            self.tokenizer = tokenizer
            self.image_processor = joined.image
            self.chat_template = tokenizer.chat_template

        def __call__(self, images=None, text=None, **options: Any) -> dict:
            flat = [image for row in images for image in row]
            pixels = self.image_processor(images=flat, return_tensors="pt")
            counts = [int(grid.prod()) // joined.merge**2 for grid in pixels["image_grid_thw"]]
            pairs = zip(text, counts, strict=True)
            chats = [t.replace("<|image_pad|>", "<|image_pad|>" * n) for t, n in pairs]
            batch = tokenizer(chats, padding=True, return_tensors="pt", add_special_tokens=False)
            ids = batch["input_ids"]
            types = (ids == joined.image_token).int()
            known = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
            return {**known, "mm_token_type_ids": types, **pixels}

        def apply_chat_template(self, conversation, tokenize=False, **options: Any) -> Any:
            options = {k: v for k, v in options.items() if k in TEMPLATE and v is not None}
            texts = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
            if not tokenize:
                return texts
            images = [_images(messages) for messages in conversation]
            found = self(images, texts)
            masks = found.pop("attention_mask").bool()
            for name in ("input_ids", "mm_token_type_ids"):
                rows = zip(found[name], masks, strict=True)
                found[name] = [row[mask].tolist() for row, mask in rows]
            return found

        def batch_decode(self, *words: Any, **options: Any) -> list[str]:
            return tokenizer.batch_decode(*words, **options)

    return Pictures()


TEMPLATE = ("add_generation_prompt", "continue_final_message", "chat_template")


def _images(messages: list[dict]) -> list:
    parts = [part for message in messages for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def trainer_of(subject: subjects.Subject, ours: Ours, steps: int, scratch: str) -> Any:
    """TRL's trainer for so many steps of the same work."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText
    from trl import GRPOConfig, GRPOTrainer

    base = AutoModelForImageTextToText.from_pretrained(
        subject.directory,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
    )
    style = ours.engine.tokens.style
    prompt = [{"role": "user", "content": style.ground(subjects.QUERIES[style.name])}]
    pictures = [Pillow.fromarray(image.pixels.numpy()) for image in ours.images]
    rows = {"prompt": [prompt] * len(pictures), "image": pictures}
    count = len(pictures) * ours.group
    config = GRPOConfig(
        output_dir=scratch,
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        per_device_train_batch_size=count,
        num_generations=ours.group,
        max_completion_length=subjects.BOX_TOKENS,
        generation_kwargs={"min_new_tokens": subjects.BOX_TOKENS},
        beta=BETA,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=base,
        reward_funcs=lambda completions, **rest: [float(len(str(c))) for c in completions],
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=processor_of(subject.directory),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS),
    )


@dataclass
class Turns:
    """Times of neighbouring steps, TRL's and ours."""

    peer: measure.Times
    ours: measure.Times
    peer_bytes: int = 0
    ours_bytes: int = 0


def taken_in_turn(subject: subjects.Subject, ours: Ours, repeats: int) -> Turns:
    """Warm up once, then TRL's step and ours, `repeats` times, then a look at memory."""
    from transformers import TrainerCallback

    turns = Turns(measure.Times(), measure.Times())

    class Turn(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.begun = measure.clock(CPU)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            between = measure.clock(CPU)
            ours.step()
            if 0 < state.global_step - 1 <= repeats:
                turns.peer.seconds.append(between - self.begun)
                turns.ours.seconds.append(measure.clock(CPU) - between)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(subject, ours, repeats + 2, scratch)
        trainer.add_callback(Turn())
        usual = trainer.training_step

        def looked_at(*words: Any, **options: Any) -> Any:
            if trainer.state.global_step <= repeats:
                return usual(*words, **options)
            kept = []
            run = lambda: kept.append(usual(*words, **options))  # noqa: E731
            turns.peer_bytes = measure.extra_bytes(run, CPU)
            return kept[0]

        trainer.training_step = looked_at
        trainer.train()
    turns.ours_bytes = measure.extra_bytes(ours.step, CPU)
    return turns


# ---- the command ---------------------------------------------------------------------------------


def case(subject: subjects.Subject, batch: int, group: int, repeats: int) -> dict:
    """One number of images and samples."""
    ours = Ours.of(subject, subjects.pictures(SIZE, SIZE, batch), group)
    turns = taken_in_turn(subject, ours, repeats)
    found = measure.ratio(turns.peer, turns.ours)
    print(
        f"{batch} images x {group} boxes: TRL's GRPOTrainer takes {found['median']:.1f} "
        f"({found['least']:.1f}-{found['most']:.1f}) times our CPU time and "
        f"{turns.peer_bytes / turns.ours_bytes:.1f} times our memory "
        f"({turns.peer_bytes / 2**20:.0f} MiB, {turns.ours_bytes / 2**20:.0f} MiB)"
    )
    return {
        "images": batch,
        "samples": group,
        "time": found,
        "trl": turns.peer.summary() | {"extra_bytes": turns.peer_bytes},
        "ours": turns.ours.summary() | {"extra_bytes": turns.ours_bytes},
    }


def main(words: list[str]) -> None:
    """Measure, tell; the last line is the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--group", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(words)
    if args.smoke:
        args.batch = 2
        args.group = [2]
        args.repeats = 1
    if not measure.installed("trl"):
        raise SystemExit("peers.py needs TRL, which is not installed; pip install trl")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find("nano", False, scratch)
        cases = [case(subject, args.batch, group, args.repeats) for group in args.group]
    document = {
        "bench": "peers",
        "machine": measure.machine(CPU),
        "setting": {"model": "nano", "size": f"{SIZE}x{SIZE}", "route": "TRL GRPOTrainer"},
        "cases": cases,
    }
    measure.finish(document, RESULT if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
