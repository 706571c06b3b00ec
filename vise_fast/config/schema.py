"""The resolved configuration of a run: nested sections, one YAML file, dotted overrides, presets.
No environment variables.

Each field's description is its help text and the defaults are the `robust` preset. `load` puts the
layers on top of each other:
defaults < nano/nano.yaml (embedded model only) < preset < file < command line. Left out: reading
files and words (settings.py).
    python -m vise_fast.train --config my.yaml --train.steps 50 --data.dir photos
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vise_fast import nano
from vise_fast.config import places, settings
from vise_fast.system.errors import ConfigError

Switch = bool | Literal["auto"]
"""On, off, or where it gains."""


class Section(BaseModel):
    """A part of the configuration; what is assigned to a field is checked as what is read."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: Any) -> Any:
        """Texts of list fields are split at commas; true / false are no numbers; other texts can be
        names and be written down.
        """
        field = cls.model_fields[info.field_name]
        if isinstance(value, str) and "tuple" in str(field.annotation):
            return [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, bool) and field.annotation not in (bool, Switch):
            raise ValueError("true / false is not accepted here")
        text = field.annotation in (str, str | None) and isinstance(value, str)
        if text and not _writable(value):
            raise PydanticCustomError(
                settings.UNUSABLE,
                "expected UTF-8 text without control characters, as long as a path may be",
            )
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        """Numbers are such that arithmetic holds them."""
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, int | float) and abs(part) > LARGEST[type(part)]:
                raise PydanticCustomError(settings.UNUSABLE, "too large for any computation")
        return value


LARGEST = {bool: 1, int: 2**64 - 1, float: 1e12}
"""What a number may be at most: what seeds can be, and far more than any other setting means."""
LONGEST_PATH = 4095
LONGEST_NAME = 255


def _writable(text: str) -> bool:
    """Whether a text can be a path, and be written down."""
    if {unicodedata.category(letter) for letter in text} & {"Cc", "Cs"}:
        return False
    name = max(text.split("/"), key=lambda part: len(part.encode()))
    return len(text.encode()) <= LONGEST_PATH and len(name.encode()) <= LONGEST_NAME


class ModelConfig(Section):
    """The frozen base model and how it is held."""

    path: str = Field(
        "nano",
        min_length=1,
        description=(
            "directory or hub id of a model of a family in docs/BACKBONES.md; 'nano' is the "
            "embedded one"
        ),
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    quant: Literal["none", "int8", "nf4"] = Field(
        "none", description="bitsandbytes quantisation of the language linears"
    )
    double_quant: bool = Field(True, description="nf4: quantise the quantisation constants too")
    int8_embedding: bool = Field(
        False,
        description=(
            "hold the rows of the token embedding in 8 bits, where the head is another matrix (8B "
            "and up)"
        ),
    )
    int8_threshold: float = Field(
        0.0,
        ge=0,
        description=(
            "int8: 0 rounds weights alone, so that slices of a batch change nothing; above 0 is "
            "LLM.int8 with this outlier threshold, which rounds activations too"
        ),
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    attention: Literal["auto", "plain"] = Field(
        "auto",
        description=(
            "auto: torch's fused kernels, FlashAttention where it runs; plain: the formula written "
            "out"
        ),
    )
    engine: Literal["auto", "fast", "generic", "stock"] = Field(
        "auto",
        description=(
            "fast: own forward over the same weights; generic: transformers' forward, images "
            "encoded and prefilled once; stock: the same, every row by itself; auto: fast where "
            "the family has one, else generic"
        ),
    )
    graphs: Switch = Field(
        "auto",
        description=(
            "decode by CUDA graphs; auto: on a GPU, where a graph gives what the "
            "step by hand gives; not for int8 with outliers"
        ),
    )
    kernels: Literal["auto", "plain"] = Field(
        "auto", description="auto: Triton / native kernels where they run; plain: PyTorch only"
    )


class PromptConfig(Section):
    """How the model is asked."""

    ask: str = Field(
        "auto",
        min_length=1,
        description=(
            "prompt style of the question for an object: natural, short, native (the family's "
            "trained format), json, or one of prompts.file; auto: the model's own default"
        ),
    )
    ground: str = Field("auto", min_length=1, description="prompt style of the question for a box")
    verify: str = Field(
        "auto", min_length=1, description="prompt style of the question whether it is visible"
    )
    system: str | None = Field(
        None, description="system turn before every question; none: the chat template's"
    )
    file: str | None = Field(None, description="YAML file of prompt styles of your own")
    paraphrases: int = Field(
        1,
        ge=1,
        le=8,
        description="wordings of the visibility question whose verdicts are averaged",
    )


class LoraConfig(Section):
    """The adapter: all that is trained."""

    r: int = Field(16, ge=1, description="LoRA rank")
    alpha: float = Field(32, gt=0, description="LoRA alpha; the update is scaled by alpha / r")
    dropout: float = Field(
        0.05, ge=0, lt=1, description="stored with the adapter; off while sampling and scoring"
    )
    projector: bool = Field(
        True,
        description=(
            "LoRA on the projectors as well; false: on the language model alone, all of which vLLM "
            "serves"
        ),
    )
    init_from: str | None = Field(None, description="adapter directory to start from")


class AdapterConfig(Section):
    """What the finished adapter says of itself."""

    base: str | None = Field(
        None,
        pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$",
        description="hub id of the base, where model.path is a directory; null: its bare name",
    )
    licence: str | None = Field(
        None,
        pattern=r"^[\w-][\w.-]*$",
        description="licence in the model card, as the hub writes it; null: the base's",
    )


class DataConfig(Section):
    """Your images: any photographs, no labels."""

    dir: str | None = Field(
        None,
        description="folder of images, searched recursively; or a list (.txt .jsonl .csv), an "
        "archive (.zip .tar), a table (.parquet), a pattern of them, hf:OWNER/NAME[@COMMIT]; none: "
        "the embedded scenes",
    )
    mix: tuple[str, ...] = Field(
        (), description="several such places instead of one, by weight: [PLACE=3, OTHER=1]"
    )
    column: str | None = Field(
        None, description="of a list or table, the column of images; none: image and the like"
    )
    stream: bool = Field(
        False,
        description="read shards, tables and lists in their own order, without listing them first",
    )
    buffer: int = Field(
        1000, ge=1, description="of a stream, the pictures that each next one is drawn from"
    )
    holdout: float = Field(
        0.05, ge=0, lt=1, description="share of the folder kept for the label-free figures"
    )
    max_pixels: int = Field(
        307_200, ge=1024, description="an image is shrunk to at most this many pixels (640x480)"
    )
    min_pixels: int = Field(
        1024, ge=1, description="an image is enlarged to at least this many pixels"
    )
    max_header_pixels: int = Field(
        50_000_000,
        ge=1,
        le=89_000_000,
        description="images whose header promises more are skipped before decoding",
    )
    max_bad_share: float = Field(
        0.05, ge=0, le=1, description="do not start when a larger share of the files is unreadable"
    )
    min_side: int = Field(
        0, ge=0, description="leave out images whose shorter side has fewer pixels; 0: none"
    )
    min_sharpness: float = Field(
        0, ge=0, description="leave out images whose Laplacian varies less (30 is blurred); 0: none"
    )
    min_contrast: float = Field(
        0, ge=0, description="leave out images whose greys deviate less (8 is flat); 0: none"
    )
    near_duplicates: int | None = Field(
        None,
        ge=0,
        le=16,
        description="leave out images whose 64-bit hash differs from another's in at most so many "
        "bits (4 is careful); none: keep them",
    )
    workers: int = Field(1, ge=0, le=256, description="decode threads ahead of the step")
    queries: str | None = Field(
        None,
        description="words of your own to ask for: .txt with a phrase a line, .jsonl or .csv with "
        "a phrase per image; none: the model's own queries",
    )
    queries_share: float = Field(
        1.0, gt=0, le=1, description="share of the images that are asked in words of your own"
    )
    queries_tries: int = Field(
        8,
        ge=0,
        le=64,
        description="of a list, phrases tried per image: the first that the asker sees is asked "
        "for, else what it names itself; 0: one, seen or not",
    )
    queries_template: str = Field(
        "{name}",
        min_length=1,
        description="what is asked for: each phrase, or class name, stands for {name}",
    )
    balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much less a query counts that was asked more often than the mean: its "
        "advantage times (mean / times asked) to this power; 0: all count alike",
    )

    @property
    def is_curated(self) -> bool:
        """Whether images may be left out by what they look like."""
        floors = (self.min_side, self.min_sharpness, self.min_contrast)
        return any(floors) or self.near_duplicates is not None

    @property
    def is_drawn(self) -> bool:
        """Whether no place is named: scenes are drawn, whose truth is known."""
        return self.dir is None and not self.mix

    @property
    def places(self) -> str:
        """What is named, for messages."""
        return " + ".join(self.mix) or self.dir or "drawn scenes"


class ScenesConfig(Section):
    """The embedded source: scenes drawn on the fly, used when data.dir is not set."""

    size: int = Field(128, ge=32, description="side of a drawn scene in pixels")
    max_objects: int = Field(4, ge=1, le=6, description="objects per scene at most")


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(60, ge=1, description="updates of the adapter")
    batch: int = Field(8, ge=1, description="images per update")
    micro_batch: int = Field(0, ge=0, description="images per forward-backward; 0: all at once")
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="gradient norm clip")
    seed: int = Field(0, ge=0, description="names every random draw of the run")
    checkpointing: bool = Field(
        False, description="recompute activations layer by layer in the update"
    )
    share_forward: Switch = Field(
        "auto",
        description=(
            "the rollout's forward pass over image and question serves the update too; whole "
            "batches without checkpointing only; auto: on a GPU only where the pass it saves "
            "takes longer than the launches it adds"
        ),
    )
    attention_every: int = Field(
        0,
        ge=0,
        description=(
            "steps between measurements of the attention on the image, as a training figure; 0: "
            "never"
        ),
    )
    deterministic: bool = Field(
        False,
        description="bitwise repeatable on a GPU, and on several ranks of CPUs, at a cost",
    )
    resume: str | None = Field(None, description="'auto' or a checkpoint directory")
    stop_on_alarm: bool = Field(
        False,
        description=(
            "end early (exit code 7), keeping the last healthy checkpoint, when an alarm stays on"
        ),
    )


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="the 8-bit ones need bitsandbytes"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")


class RolloutConfig(Section):
    """What the policy samples."""

    samples: int = Field(8, ge=1, description="G: boxes sampled per image")
    views: int = Field(2, ge=1, description="K: transformed views per image")
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; 1 is what REINFORCE assumes"
    )
    asker: Literal["reference", "policy"] = Field(
        "reference",
        description=(
            "who writes the query: adapters off, so that training boxes cannot spoil it, or the "
            "policy"
        ),
    )
    regrounder: Literal["reference", "policy"] = Field(
        "reference",
        description=(
            "who boxes the views: adapters off, so that agreement cannot be trained, or the policy"
        ),
    )
    view_temperature: float = Field(
        0.0,
        ge=0,
        description=(
            "sampling temperature of the boxes in the views; 0: greedy, which agrees more with the "
            "truth, but taught the embedded model's greedy boxes less (docs/LEARNING.md)"
        ),
    )
    query_tokens: int = Field(64, ge=1, description="new tokens for a query at most")
    box_tokens: int = Field(64, ge=1, description="new tokens for a box at most")


VIEW_KINDS = ["affine", "crop", "flip"]
"""Those that can be drawn; `images.views.register` adds to them."""


class ViewConfig(Section):
    """The transforms of the geometric reward."""

    kinds: tuple[str, ...] = Field(
        ("affine", "crop", "flip"),
        description="affine, crop, flip, or a registered one; drawn uniformly",
    )
    degrees: float = Field(10.0, ge=0, le=180, description="rotation: uniform in +-degrees")
    scale: tuple[float, float] = Field(
        (0.9, 1.1), description="affine scale: uniform between the two"
    )
    shift_px: float = Field(50.0, ge=0, description="shift in x and y, at a short side of 480 px")
    crop: tuple[float, float] = Field(
        (0.8, 1.0), description="crop ratio of each side: uniform between the two"
    )
    literal_pixels: bool = Field(
        False, description="take shift and sigma literally instead of scaling with the short side"
    )
    min_kept: float = Field(
        0.7,
        ge=0,
        le=1,
        description="a view keeping less of the projected box is dropped from the mean",
    )
    side_words: Literal["drop", "swap", "keep"] = Field(
        "drop", description="queries naming left/right under a flip"
    )

    @field_validator("kinds", mode="after")
    @classmethod
    def _known(cls, kinds: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Kinds that can be drawn."""
        believed = info.context is not None and not info.context["plugins"]
        if not kinds or (set(kinds) - set(VIEW_KINDS) and not believed):
            raise PydanticCustomError(
                settings.UNUSABLE, f"expected {', '.join(VIEW_KINDS)}; plugins may register others"
            )
        return kinds


class GhostConfig(Section):
    """How the inside of a box is hidden."""

    method: Literal["blur", "mean", "pixelate"] = Field(
        "blur", description="Gaussian blur, mean colour or mosaic"
    )
    sigma_px: float = Field(
        25.0, ge=0.001, le=500, description="Gaussian sigma at a short side of 480 px"
    )
    radius_sigmas: float = Field(
        3.0, gt=0, le=10, description="taps reach this many sigmas (as released: 1)"
    )
    feather_px: float = Field(
        0.0, ge=0, description="soft edge of the ghost, at a short side of 480 px"
    )


class RewardConfig(Section):
    """What is rewarded."""

    preset: Literal["robust", "paper", "as_released", "consensus"] = Field(
        "robust", description="fills what is not stated elsewhere"
    )
    name: str = Field(
        "vise",
        min_length=1,
        description=(
            "registered reward: vise, random, shuffled, area_only, oracle (drawn scenes only), or "
            "your own"
        ),
    )
    sem: Literal["paper", "contrast"] = Field(
        "contrast", description="paper: hard 0/1; contrast: necessity minus control"
    )
    soft: bool = Field(True, description="probabilities instead of hard verdicts")
    sufficiency: bool = Field(
        True, description="multiply by p(visible | everything but the box ghosted)"
    )
    judge: Literal["reference", "policy"] = Field(
        "reference", description="who verifies: adapters off, or the policy itself"
    )
    gate: float = Field(
        0.5, ge=0, le=1, description="groups with p(x) below this carry no gradient; 0: off"
    )
    unique: bool = Field(
        False,
        description=(
            "the asker names what the group's boxes hold, cut out: groups whose words do not come "
            "back carry no gradient"
        ),
    )
    w_geo: float = Field(0.8, ge=0, description="weight of the geometric term")
    w_sem: float = Field(0.2, ge=0, description="weight of the semantic term")
    w_area: float = Field(
        0.7,
        ge=0,
        description="subtract w_area * sqrt(area); without it boxes grow (docs/LEARNING.md)",
    )
    unreadable: Literal["floor", "group"] = Field(
        "floor",
        description=(
            "what an unreadable answer is worth: -1 - w_area (0 under the paper's reward), or a "
            "little less than the lowest readable one of its group, so that it is not the loudest "
            "of all"
        ),
    )
    projection: Literal["ellipse", "corners"] = Field(
        "ellipse", description="hull of the inscribed ellipse, or of the four corners"
    )
    controls: int = Field(1, ge=1, description="control ghosts per box")
    shared_controls: bool = Field(
        False,
        description=(
            "the boxes of an image share one control; a box too large for one beside it keeps its "
            "own"
        ),
    )
    implied: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "a box that contains this share of one whose ghost surely hides is not asked about, "
            "nor one of which this share lies in a box whose ghost surely does not; 0: all are"
        ),
    )
    settled: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "a box whose ghost hides no more than this, p(x) (1 - p(ghosted)), has R_sem 0, and "
            "no further ghost of it is judged; 0: all are"
        ),
    )
    plugin: str | None = Field(None, description="python file that registers further rewards")


class UpdateConfig(Section):
    """KL-regularised REINFORCE."""

    advantage: Literal["rloo", "ema", "grpo", "dr_grpo"] = Field(
        "rloo", description="baseline: leave-one-out, running mean, group mean/std, group mean"
    )
    ema_momentum: float = Field(0.9, ge=0, lt=1, description="ema: momentum of the running mean")
    kl: Literal["exact", "k2", "k1_reward", "k3", "k1_loss"] = Field(
        "exact", description="estimator of KL(policy || reference)"
    )
    beta: float = Field(1e-3, ge=0, description="initial KL weight")
    beta_min: float = Field(1e-3, ge=0, description="beta never falls below")
    beta_max: float = Field(1e2, gt=0, description="beta never rises above")
    tau: float = Field(0.02, gt=0, description="KL target in nat per token")
    eta: float = Field(
        0.1, ge=0, lt=1, description="beta moves by this factor per step; 0: fixed beta"
    )
    views_too: bool = Field(False, description="gradient on the boxes of the views as well")
    reuse: int = Field(
        1,
        ge=1,
        description="updates per rollout; from the second on with clipped importance weights",
    )
    clip: float = Field(
        0.2, gt=0, lt=1, description="reuse: importance weights beyond 1 +- this gain nothing"
    )
    consensus: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "share of the update that moves every digit directly towards the boxes found in the "
            "views, the rest being REINFORCE; above 0 it is not VISE's update any more"
        ),
    )
    consensus_by: Literal["agreement", "likelihood"] = Field(
        "agreement",
        description=(
            "what the consensus raises: the expected agreement with it at every digit of the "
            "samples, or its own likelihood as an answer"
        ),
    )
    consensus_of: Literal["mean", "each"] = Field(
        "mean",
        description=(
            "what the digits are moved to: the mean of the boxes found in the views, or each of "
            "them, at its share"
        ),
    )
    tempered: bool = Field(
        False,
        description=(
            "score answers, reference and KL at the temperature the answers were sampled at, "
            "instead of 1"
        ),
    )


class EvalConfig(Section):
    """The table before and after training."""

    scenes: int = Field(128, ge=0, description="held-out scenes before and after training")
    samples: int = Field(1, ge=1, description="sampled boxes per scene beside the greedy one")
    seed: int = Field(90_001, ge=0, description="of the held-out scenes; never used in training")
    batch: int = Field(32, ge=1, description="images per forward")
    attention: bool = Field(True, description="visual attention share per layer")
    labels: str | None = Field(
        None,
        description="labelled pictures to check with, never to train on: COCO .json, .jsonl, "
        "YOLO data.yaml, or a folder of YOLO or Pascal VOC files",
    )
    label_images: str | None = Field(
        None, description="folder of the labelled pictures; none: beside the labels, or data.dir"
    )
    absent: str | None = Field(
        None,
        description=".txt of things that are in none of the held-out pictures, a phrase a line: is "
        "the answer no?",
    )
    describe: int = Field(
        32,
        ge=0,
        description=(
            "held-out images that are described freely and asked plain questions, for what was "
            "forgotten; 0: none, 20 at least for an alarm"
        ),
    )
    every: int = Field(
        0,
        ge=0,
        description="updates between evaluations while it trains; 0: before and after alone",
    )
    keep_best: str | None = Field(
        None,
        description=(
            "figure of the evaluation by which the best adapter is kept and exported; none: the "
            "last one is"
        ),
    )
    patience: int = Field(
        0,
        ge=0,
        description="evaluations without a new best after which training ends; 0: it goes on",
    )


class MemoryConfig(Section):
    """The planner of small cards."""

    budget_gb: float | Literal["auto"] | None = Field(
        None, description="auto or GB: choose quantisation, micro-batch, checkpointing, pixels"
    )


class RunConfig(Section):
    """What the run leaves behind."""

    dir: str = Field("runs/nano", min_length=1, description="where everything of this run goes")
    checkpoint_every: int = Field(
        50, ge=0, description="steps between checkpoints; 0: only at the end"
    )
    keep: int = Field(3, ge=1, description="checkpoints kept")
    samples_every: int = Field(10, ge=1, description="steps between sample cards")
    report: bool = Field(True, description="write report.html and plots at the end")
    plugins: tuple[str, ...] = Field(
        (),
        description=(
            "python files run before anything else, which may register model families, views, "
            "prompt styles and rewards"
        ),
    )
    loggers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="beside metrics.jsonl; a failing one is dropped, never the run"
    )

    @field_validator("plugins", mode="after")
    @classmethod
    def _paths(cls, plugins: tuple[str, ...]) -> tuple[str, ...]:
        """Texts that can be paths."""
        if not all(map(_writable, plugins)):
            raise PydanticCustomError(settings.UNUSABLE, "expected paths of python files")
        return plugins


class Config(Section):
    """Everything a run is made of."""

    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    lora: LoraConfig = LoraConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    scenes: ScenesConfig = ScenesConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    view: ViewConfig = ViewConfig()
    ghost: GhostConfig = GhostConfig()
    reward: RewardConfig = RewardConfig()
    update: UpdateConfig = UpdateConfig()
    eval: EvalConfig = EvalConfig()
    memory: MemoryConfig = MemoryConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        complaint = next(_contradictions(self), None)
        if complaint is not None:
            raise ValueError(complaint)
        return self


PAPER = {
    "rollout.samples": 1,
    "rollout.views": 1,
    "rollout.temperature": 1.0,
    "train.batch": 1,
    "rollout.asker": "policy",
    "rollout.regrounder": "policy",
    "rollout.view_temperature": 1.0,
    "reward.sem": "paper",
    "reward.soft": False,
    "reward.sufficiency": False,
    "reward.judge": "policy",
    "reward.gate": 0.0,
    "reward.w_geo": 0.5,
    "reward.w_sem": 0.5,
    "reward.w_area": 0.0,
    "reward.unreadable": "floor",
    "reward.shared_controls": False,
    "reward.settled": 0.0,
    "reward.projection": "corners",
    "update.advantage": "ema",
    "update.ema_momentum": 0.9,
    "update.kl": "exact",
    "update.views_too": False,
    "update.beta": 1e-3,
    "update.beta_min": 1e-6,
    "update.beta_max": 1e2,
    "update.tau": 0.02,
    "update.eta": 0.1,
    "ghost.method": "blur",
    "ghost.sigma_px": 25.0,
    "ghost.radius_sigmas": 3.0,
    "ghost.feather_px": 0.0,
}
AS_RELEASED = PAPER | {
    "update.kl": "k1_loss",
    "ghost.radius_sigmas": 1.0,
    "view.literal_pixels": True,
    "view.min_kept": 0.0,
    "view.side_words": "keep",
}
# Half of it is not VISE's update: digits are moved to the boxes that the reference samples in eight
# views; the other half is REINFORCE on the agreement with them. No verdict is asked for but the one
# on the image itself. Chosen on the embedded model alone.
CONSENSUS = {
    "update.consensus": 0.5,
    "update.consensus_of": "each",
    "update.tempered": True,
    "update.beta": 0.01,
    "update.beta_min": 0.01,
    "rollout.temperature": 0.6,
    "rollout.samples": 4,
    "rollout.views": 8,
    "rollout.view_temperature": 0.6,
    "train.batch": 16,
    "reward.w_geo": 1.0,
    "reward.w_sem": 0.0,
    "reward.w_area": 0.0,
    "reward.unreadable": "group",
}
# robust has no entries: its numbers are the defaults above
PRESETS: dict[str, dict[str, Any]] = {
    "robust": {},
    "paper": PAPER,
    "as_released": AS_RELEASED,
    "consensus": CONSENSUS,
}
NANO = nano.DIRECTORY / "nano.yaml"


def stated(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """{dotted key: value as written} of what a file and words say; the words win.

    Raises ConfigError.
    """
    written = settings.read(places.config_file(path), Config) if path is not None else {}
    return written | settings.parse(overrides, Config)


def kept_from_preset(path: str | Path | None, overrides: Sequence[str]) -> dict[str, tuple]:
    """{dotted key: (what the file says, what the preset would)} where a preset that was typed does
    not reach, since a file states otherwise. Raises ConfigError.
    """
    typed = settings.parse(overrides, Config)
    preset = typed.get("reward.preset")
    if path is None or not isinstance(preset, str) or preset not in PRESETS:
        return {}
    written = settings.read(places.config_file(path), Config)
    below = PRESETS[preset]
    if preset == "robust":
        usual = {key: field.default for key, field in settings.fields(Config)}
        usual |= _embedded(written | typed)
        below = {key: usual[key] for key in AS_RELEASED | CONSENSUS}
    return {
        key: (written[key], value)
        for key, value in below.items()
        if key in written and key not in typed and written[key] != value
    }


def _embedded(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What lies beneath everything where the embedded model is the one that is stated."""
    if stated.get("model.path", "nano") == "nano" and NANO.exists():
        return settings.read(NANO, Config)
    return {}


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with some settings, by dotted key, changed. Raises ConfigError for values that
    contradict each other.
    """
    values = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValidationError as fault:
        raise ConfigError(settings.complaint(fault, Config)) from None


def load(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, plugins: bool = True
) -> Config:
    """The resolved configuration of one YAML file (or none) and `--section.key value` /
    `--section.key=value` words. Where no such file is there, `path` may name a shipped preset.
    plugins: run the files of `run.plugins`; without them (to look at somebody's run) the names that
    they may bring are believed.

    Raises ConfigError, one line, for an unreadable file, an unknown key, a wrong type or values
    that contradict each other.
    """
    written = settings.read(places.config_file(path), Config) if path is not None else {}
    typed = settings.parse(overrides, Config)
    stated = written | typed
    if plugins:
        _run_plugins(stated)
    embedded = _embedded(stated)
    preset = stated.get("reward.preset", embedded.get("reward.preset", "robust"))
    below = embedded | (PRESETS.get(preset, {}) if isinstance(preset, str) else {})
    merged = _shortened(_shortened(below, written), typed)
    try:
        return Config.model_validate(settings.nest(merged), context={"plugins": plugins})
    except ValidationError as fault:
        raise ConfigError(settings.complaint(fault, Config)) from None


def _run_plugins(stated: Mapping[str, Any]) -> None:
    """The files of `run.plugins`, before any setting is checked: they may bring what it names."""
    try:
        named = RunConfig(plugins=stated.get("run.plugins", ())).plugins
    except ValidationError:
        return  # said of the whole configuration, in the words of its settings
    if not named:
        return
    from vise_fast.system import plugin  # it imports torch, which help does without

    for path in named:
        plugin.load(path, "run.plugins")


def _shortened(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, the upper over the lower; a run that it makes shorter than the lower's warm-up is no
    mistake but has a shorter warm-up.
    """
    steps = above.get("train.steps")
    warmup = below.get("train.warmup", 0)
    if isinstance(steps, int | float) and isinstance(warmup, int) and 0 < steps < warmup:
        below = below | {"train.warmup": int(steps)}
    return below | above


def to_yaml(config: Config) -> str:
    """Every value of the run as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _contradictions(config: Config) -> Iterator[str]:
    """What no single field can say: values that cannot be meant together, one complaint each."""
    yield from _contradicting_choices(config)
    yield from _contradicting_data(config)
    yield from _exceeded_limits(config)
    yield from _empty_ranges(config)
    yield from _unmeasured(config.eval)
    reward = config.reward
    if reward.w_geo + reward.w_sem + reward.w_area <= 0:
        yield "reward.w_geo, w_sem and w_area are all 0, so nothing is rewarded; raise one of them"
    budget = config.memory.budget_gb
    if isinstance(budget, float) and budget <= 0:
        yield f"memory.budget_gb {budget} must be positive; give GB, auto or null"


def _unmeasured(evaluation: EvalConfig) -> Iterator[str]:
    """What is to be done by figures that are not taken."""
    if evaluation.every > 0 and evaluation.scenes == 0:
        yield "eval.every looks at no image; set eval.scenes above 0, or eval.every to 0"
    if evaluation.keep_best is not None and evaluation.every == 0:
        yield "eval.keep_best chooses among evaluations while it trains; set eval.every"
    if evaluation.patience > 0 and evaluation.keep_best is None:
        yield "eval.patience waits for a new best; name its figure by eval.keep_best"


def _contradicting_choices(config: Config) -> Iterator[str]:
    if config.update.consensus > 0 and (
        config.rollout.views < 2 or config.rollout.regrounder != "reference"
    ):
        yield (
            "update.consensus needs two views at least that the reference boxes; set rollout.views "
            "to 2 or more and rollout.regrounder to reference"
        )
    rollout = config.rollout
    update = config.update
    model = config.model
    if update.advantage != "ema" and rollout.samples < 2:
        yield (
            f"update.advantage {update.advantage} compares samples of one image; set "
            "rollout.samples to 2 or more, or update.advantage to ema"
        )
    if update.advantage == "ema" and rollout.temperature != 1 and not update.tempered:
        yield (
            f"update.advantage ema learns from a constant reward where answers are sampled at "
            f"temperature {rollout.temperature:g} and scored at 1; set update.tempered to true, or "
            "rollout.temperature to 1"
        )
    alike = rollout.regrounder == "policy" and rollout.view_temperature == rollout.temperature
    if update.views_too and not alike:
        yield (
            "update.views_too trains boxes that the policy sampled; set rollout.regrounder policy "
            "and rollout.view_temperature as rollout.temperature"
        )
    if update.consensus > 0 and config.reward.preset == "as_released":
        yield (
            "update.consensus needs answers scored by themselves, and as_released scores image "
            "tokens too; set update.consensus to 0 or choose another reward.preset"
        )
    outliers = model.quant == "int8" and model.int8_threshold > 0
    if model.graphs is True and (model.engine not in ("auto", "fast") or outliers):
        yield (
            f"model.graphs needs engine fast, and with quant int8 int8_threshold 0, not "
            f"{model.engine} and {model.int8_threshold:g}; change them or leave model.graphs auto"
        )


def _contradicting_data(config: Config) -> Iterator[str]:
    if config.data.dir is not None and config.data.mix:
        yield (
            "data.dir and data.mix both say where images are; write the folder into data.mix with "
            "its weight, or leave one out"
        )
    if config.data.stream and config.data.is_drawn:
        yield (
            "data.stream has nothing to read, since the scenes are drawn; name shards, a table or "
            "a list in data.dir, or leave it out"
        )
    if config.data.stream and config.data.is_curated:
        yield (
            "data.stream shows images before all of them are known, so none can be left out by "
            "data.min_side, min_sharpness, min_contrast or near_duplicates; leave either out"
        )
    if "{name}" not in config.data.queries_template:
        yield (
            f"data.queries_template {config.data.queries_template!r} has no place for a phrase; "
            "write {name} where it goes"
        )


def _exceeded_limits(config: Config) -> Iterator[str]:
    update = config.update
    data = config.data
    train = config.train
    if update.beta_min > update.beta_max:
        yield (
            f"update.beta_min {update.beta_min:g} exceeds update.beta_max {update.beta_max:g}; "
            "swap them"
        )
    if update.beta > update.beta_max:
        yield (
            f"update.beta {update.beta:g} exceeds update.beta_max {update.beta_max:g}; lower "
            "update.beta"
        )
    if data.min_pixels > data.max_pixels:
        yield (
            f"data.min_pixels {data.min_pixels} exceeds data.max_pixels {data.max_pixels}; lower "
            "data.min_pixels"
        )
    if train.micro_batch > train.batch:
        yield (
            f"train.micro_batch {train.micro_batch} exceeds train.batch {train.batch}; lower it "
            "or set 0"
        )
    if train.warmup > train.steps:
        yield f"train.warmup {train.warmup} exceeds train.steps {train.steps}; lower it"


def _empty_ranges(config: Config) -> Iterator[str]:
    view = config.view
    betas = config.optim.betas
    if not 0 < view.scale[0] <= view.scale[1]:
        yield (
            f"view.scale {view.scale} is no range of positive numbers; write the smaller one first"
        )
    if not 0 < view.crop[0] <= view.crop[1] <= 1:
        yield f"view.crop {view.crop} is no range within (0, 1]; write the smaller one first"
    if not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas {betas} must lie in [0, 1); usual are 0.9 and 0.999"
