"""The two baselines of the rollout bench: the loop as the paper describes it (NAIVE), and one a
good engineer writes in a day (NAIVE+).

Both speak transformers and PEFT only, through the interface of the engine, so that views, ghosts,
parsing, rewards and the loss are the very same code for every contender. Nobody's answers are cut
short: lengths are locked by banning the end tokens, as everywhere.

NAIVE: two copies of the weights (policy with LoRA, untouched reference), one image at a time, one
`generate` call per answer, the stock processor (image and text) before every call, verdicts as text
of 8 tokens, logits of the whole sequence in the update, PEFT defaults. NAIVE+: one copy with
adapters off for the reference, batched `generate` with left padding, `logits_to_keep`, SDPA
attention, one batched forward for policy and one for reference. Verdicts are still text: reading
them from one forward is one of the tricks under test.

"Stock processor" is transformers' PIL image processor for this family plus the tokenizer, joined as
Qwen3VLProcessor joins them: that class itself cannot be built without torchvision.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from _subjects import VERDICT_TOKENS, Subject
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Counters, Rollout, owners
from vise_fast.method.experience import Played
from vise_fast.method.learner import Learner
from vise_fast.method.token_scores import TokenScorer, TokenScores
from vise_fast.model import load as loading
from vise_fast.model.qwen3_vl import LORA_TARGETS
from vise_fast.system.machine.clock import Clock
from vise_fast.text import prompts


class Processor:
    """(images, texts) to model inputs, left-padded: chat template, one placeholder per merged
    patch, pixels, grids, token types.
    """

    def __init__(self, tokenizer, vision, max_pixels: int) -> None:
        self.tokenizer = tokenizer
        self.merge = vision.spatial_merge_size
        self.tokenizer.padding_side = "left"
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.image = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 1024, "longest_edge": max_pixels},
        )

    def __call__(
        self, images: list[Pillow.Image], texts: list[str], answers: list[list[int]] | None = None
    ) -> dict[str, Tensor]:
        """`answers`: ids to append, all of one length."""
        pixels = self.image(images=images, return_tensors="pt")
        places = [int(grid.prod()) // self.merge**2 for grid in pixels["image_grid_thw"]]
        chats = [self._chat(*each) for each in zip(texts, places, strict=True)]
        off = {"add_special_tokens": False, "return_token_type_ids": False}
        batch = self.tokenizer(chats, padding=True, return_tensors="pt", **off)
        ids = batch["input_ids"]
        mask = batch["attention_mask"]
        if answers is not None:
            ids = torch.cat([ids, torch.tensor(answers)], 1)
            mask = torch.cat([mask, torch.ones(len(answers), len(answers[0]), dtype=mask.dtype)], 1)
        types = (ids == self.image_token).int()
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **pixels}

    def _chat(self, text: str, places: int) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return chat.replace("<|image_pad|>", "<|image_pad|>" * places)


@dataclass
class Pictures:
    """Where the engine has features: the pictures, to be encoded again before every call."""

    images: list[Pillow.Image]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, chosen: list[int]) -> Pictures:
        """Some of them, in this order."""
        return Pictures([self.images[i] for i in chosen])


@dataclass
class Prefixes:
    """Where the engine has keys and values: the pictures, and whether adapters are on."""

    pictures: Pictures
    adapters: bool

    def __len__(self) -> int:
        return len(self.pictures)

    def select(self, chosen: list[int]) -> Prefixes:
        """Some of them, in this order."""
        return Prefixes(self.pictures.select(chosen), self.adapters)


@dataclass
class Prompts:
    """Texts behind prefixes; `owner`: which prefix each follows."""

    prefixes: Prefixes
    owner: list[int]
    rows: list[str]


class Texts:
    """The bench's locked tokens, except that a row is its text: the processor tokenizes it again
    before every call.
    """

    def __init__(self, locked) -> None:
        self._locked = locked

    def __getattr__(self, name: str):
        return getattr(self._locked, name)

    def row(self, text: str) -> str:
        """The text of a question."""
        return text

    def verdict_row(self, text: str) -> str:
        """The text of a question for a verdict; the answer is not opened."""
        return text


class NaiveEngine:
    """NAIVE. The interface is `rollout.Engine`'s; rows are texts."""

    batched = False
    keeps_keys = False
    measures_attention = False

    def __init__(self, subject: Subject, config: Config, locked) -> None:
        self.tokens = Texts(locked)
        self.counters = Counters()
        self.config = config
        self.device = loading.device_of(config.model.device)
        base = self._base(subject)
        self.reference = self._reference(base)
        lora = LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=LORA_TARGETS,
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, lora).eval()
        self.processor = Processor(
            AutoTokenizer.from_pretrained(subject.directory, trust_remote_code=False),
            base.config.vision_config,
            config.data.max_pixels,
        )
        self.suppressed = locked.banned().nonzero()[:, 0].tolist()
        self.banned = locked.banned()
        self.backbone = Unfused(base.lm_head)
        self.clock = Clock(self.device)

    def _base(self, subject: Subject) -> nn.Module:
        dtype = loading.dtype_of(self.config.model.dtype, self.device)
        settings = {"dtype": dtype, "attn_implementation": "sdpa"}
        torch.manual_seed(0)
        kind = AutoModelForImageTextToText
        if subject.random:
            shape = AutoConfig.from_pretrained(subject.directory, trust_remote_code=False)
            with torch.device(self.device):
                base = kind.from_config(shape, trust_remote_code=False, **settings)
        else:
            base = kind.from_pretrained(
                subject.directory, trust_remote_code=False, use_safetensors=True, **settings
            ).to(self.device)
        return base.requires_grad_(False).eval()

    def _reference(self, base: nn.Module) -> nn.Module:
        """A second copy of all weights."""
        return copy.deepcopy(base)

    def interrupted(self) -> None:
        """Nothing stops it."""

    def models(self) -> list[nn.Module]:
        """All copies of the weights."""
        return [model for model in (self.model, self.reference) if model is not None]

    @contextlib.contextmanager
    def _judge(self, adapters: bool):
        yield self.model if adapters else self.reference

    def home(self, values: Tensor) -> Tensor:
        """On the CPU."""
        return values.cpu()

    def encode(self, images: list[Tensor]) -> Pictures:
        """Nothing yet."""
        return Pictures([Pillow.fromarray(image.cpu().numpy()) for image in images])

    def prefill(self, features: Pictures, adapters: bool, *, graph: bool = False) -> Prefixes:
        """Nothing yet."""
        return Prefixes(features, adapters)

    def prompt(self, prefixes: Prefixes, owner: list[int], rows: list[str]) -> Prompts:
        """Nothing yet."""
        return Prompts(prefixes, owner, rows)

    def generate(
        self,
        prompts: Prompts,
        fan: list[int],
        limit: int,
        seeds: list[int],
        temperature: float = 1.0,
    ) -> Rollout:
        """`fan` answers to each prompt, all of `limit` tokens; seeds mean nothing here."""
        order = owners(fan)
        prefixes = prompts.prefixes
        images = [prefixes.pictures.images[prompts.owner[r]] for r in order]
        texts = [prompts.rows[r] for r in order]
        ids = self._answers(images, texts, limit, prefixes.adapters)
        return Rollout(ids, torch.zeros(ids.shape, device=ids.device), [limit] * len(order))

    def _answers(
        self, images: list[Pillow.Image], texts: list[str], limit: int, adapters: bool
    ) -> Tensor:
        """Sampled ids (N, limit)."""
        size = len(images) if self.batched else 1
        calls = [slice(i, i + size) for i in range(0, len(images), size)]
        return torch.cat([self._call(images[c], texts[c], limit, adapters) for c in calls])

    def _call(
        self, images: list[Pillow.Image], texts: list[str], limit: int, adapters: bool
    ) -> Tensor:
        inputs = self._inputs(images, texts)
        self.counters.decode_steps += limit - 1
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids = {"suppress_tokens": self.suppressed, "pad_token_id": self.tokens.pad}
        with torch.no_grad(), self._judge(adapters) as model:
            out = model.generate(**inputs, max_new_tokens=limit, **drawn, **ids)
        return out[:, -limit:]

    def _inputs(
        self, images: list[Pillow.Image], texts: list[str], answers: list[list[int]] | None = None
    ) -> dict[str, Tensor]:
        self.counters.forwards += 1
        self.counters.images_encoded += len(images)
        self.counters.prefixes += len(images)
        return {
            name: value.to(self.device)
            for name, value in self.processor(images, texts, answers).items()
        }

    def verdict_logits(self, features: Pictures, rows: list[str], adapters: bool) -> Tensor:
        """One question to each picture; as `forked_verdict_logits`."""
        prefixes = Prefixes(features, adapters)
        return self.forked_verdict_logits(prefixes, list(range(len(rows))), rows)

    def forked_verdict_logits(
        self, prefixes: Prefixes, owner: list[int], rows: list[str]
    ) -> Tensor:
        """Verdicts written as text, read, and put as logits of yes and no."""
        images = [prefixes.pictures.images[i] for i in owner]
        answers = self._answers(images, rows, VERDICT_TOKENS, prefixes.adapters).tolist()
        logits = torch.zeros(len(answers), len(self.banned))
        for row, ids in zip(logits, answers, strict=True):
            seen = prompts.read_verdict(self.tokens.text(ids))
            row[self.tokens.yes[0] if seen else self.tokens.no[0]] = 20.0
        return logits.to(self.device)

    def logprobs(
        self,
        pictures: Pictures,
        owner: list[int],
        texts: list[str],
        answers: list[list[int]],
        adapters: bool,
    ) -> Tensor:
        """Log-softmax of every position of every sequence, then the answers' own: full rows (N, T,
        V).
        """
        inputs = self._inputs(
            [pictures.images[i] for i in owner], [texts[i] for i in owner], answers
        )
        with self._judge(adapters) as model:
            logits = model(**inputs, use_cache=False).logits
        length = len(answers[0])
        return torch.log_softmax(logits.float(), -1)[:, -length - 1 : -1]


class NaivePlusEngine(NaiveEngine):
    """NAIVE+."""

    batched = True

    def _reference(self, base: nn.Module) -> None:
        return None

    @contextlib.contextmanager
    def _judge(self, adapters: bool):
        with contextlib.nullcontext() if adapters else self.model.disable_adapter():
            yield self.model

    def logprobs(
        self,
        pictures: Pictures,
        owner: list[int],
        texts: list[str],
        answers: list[list[int]],
        adapters: bool,
    ) -> Tensor:
        """Log-softmax (N, T, V) of the answers' positions only."""
        inputs = self._inputs(
            [pictures.images[i] for i in owner], [texts[i] for i in owner], answers
        )
        length = len(answers[0])
        with self._judge(adapters) as model:
            logits = model(**inputs, use_cache=False, logits_to_keep=length + 1).logits
        return torch.log_softmax(logits[:, :-1].float(), -1)


@dataclass
class Unfused:
    """What the learner asks of a backbone."""

    head: nn.Module

    def refresh(self) -> None:
        """Nothing is cached."""


class NaivePolicy:
    """What the learner asks of a policy."""

    def __init__(self, engine: NaiveEngine) -> None:
        self.engine = engine
        self.backbone = engine.backbone
        self.device = engine.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapters', by name."""
        return {name: p for name, p in self.engine.model.named_parameters() if p.requires_grad}


class NaiveLearner(Learner):
    """The learner with the update's log-probs from whole stock forwards."""

    def __init__(self, policy: NaivePolicy, engine: NaiveEngine, config: Config) -> None:
        super().__init__(policy, engine, config)
        self.scorer = NaiveScorer(engine, config)


class NaiveScorer(TokenScorer):
    """One stock forward per sampled box and model (NAIVE+: one for all)."""

    def score(self, played: Played, chosen: list[int], gap: bool = False) -> TokenScores:
        """gap: not looked at."""
        size = len(chosen) if self.engine.batched else 1
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        calls = [self._one_call(played, part) for part in parts]
        return TokenScores(
            torch.cat([call.logprob for call in calls]),
            torch.cat([call.reference for call in calls]),
            torch.cat([call.kl for call in calls]),
            [played.boxes.answers.lengths[n] for n in chosen],
        )

    def _one_call(self, played: Played, chosen: list[int]) -> TokenScores:
        """Of some answers, in one forward per model."""
        boxes = played.boxes
        answers = boxes.answers.select(chosen)
        owner = [boxes.owner[n] for n in chosen]
        place = (played.features, owner, boxes.rows, answers.rows())
        with torch.no_grad():
            reference = self.engine.logprobs(*place, False)
        current = self.engine.logprobs(*place, True)
        kl = torch.zeros(current.shape[:2], device=current.device)
        if self.config.update.kl == "exact":
            kl = (current.exp() * (current - reference)).sum(-1)
        ids = answers.ids[..., None]
        own, others = (table.gather(-1, ids).flatten() for table in (current, reference))
        return TokenScores(own, others, kl.flatten(), answers.lengths)
