"""The resolved configuration of a run: nested models, one YAML file, dotted overrides, presets. No environment variables.

Each field's description is its help text. A preset fills what neither the file nor the command line states.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class ModelConfig(Section):
    path: str = Field("nano", description="directory or hub id of a Qwen3-VL model; 'nano' is the embedded one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, float32 on a CPU")
    quant: Literal["none", "int8", "nf4"] = Field("none", description="bitsandbytes quantisation of the language linears")
    double_quant: bool = Field(True, description="nf4: quantise the quantisation constants too")
    int8_threshold: float = Field(6.0, ge=0, description="LLM.int8 outlier threshold")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    attention: Literal["auto", "flash-attn", "torch-flash", "sdpa", "plain"] = Field("auto", description="attention kernel; auto picks the best that runs here")
    engine: Literal["fast", "stock"] = Field("fast", description="fast: own forward over the same weights; stock: transformers' forward")
    kernels: Literal["auto", "plain"] = Field("auto", description="auto: Triton / native kernels where they run; plain: PyTorch only")


class LoraConfig(Section):
    r: int = Field(16, ge=1, description="LoRA rank")
    alpha: float = Field(32, gt=0, description="LoRA alpha; the update is scaled by alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="stored with the adapter; off while sampling and scoring")
    init_from: str | None = Field(None, description="adapter directory to start from")


class DataConfig(Section):
    dir: str | None = Field(None, description="folder of images, searched recursively; none: the embedded scenes")
    holdout: float = Field(0.05, ge=0, lt=1, description="share of the folder kept for the label-free figures")
    max_pixels: int = Field(307_200, ge=1024, description="an image is shrunk to at most this many pixels (640x480)")
    min_pixels: int = Field(1024, ge=1, description="an image is enlarged to at least this many pixels")
    max_header_pixels: int = Field(50_000_000, description="images whose header promises more are skipped before decoding")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="stop when a larger share of the files is unreadable")
    workers: int = Field(1, ge=0, description="decode threads ahead of the step")


class ScenesConfig(Section):
    size: int = Field(128, ge=32, description="side of a drawn scene in pixels")
    max_objects: int = Field(4, ge=1, le=6, description="objects per scene at most")


class TrainConfig(Section):
    steps: int = Field(60, ge=1, description="updates of the adapter")
    batch: int = Field(8, ge=1, description="images per update")
    micro_batch: int = Field(0, ge=0, description="images per forward-backward; 0: all at once")
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="gradient norm clip")
    seed: int = Field(0, ge=0)
    checkpointing: bool = Field(False, description="recompute activations layer by layer in the update")
    deterministic: bool = Field(False, description="bitwise repeatable kernels on a GPU, at a cost")
    resume: str | None = Field(None, description="'auto' or a checkpoint directory")
    stop_on_alarm: bool = Field(False, description="end early, keeping the best healthy checkpoint, when an alarm stays on")


class OptimConfig(Section):
    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class RolloutConfig(Section):
    samples: int = Field(8, ge=1, description="G: boxes sampled per image")
    views: int = Field(2, ge=1, description="K: transformed views per image")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; 1 is what REINFORCE assumes")
    query_tokens: int = Field(64, ge=1, description="new tokens for a query at most")
    box_tokens: int = Field(64, ge=1, description="new tokens for a box at most")


class ViewConfig(Section):
    kinds: tuple[Literal["affine", "crop", "flip"], ...] = Field(("affine", "crop", "flip"), description="drawn uniformly")
    degrees: float = Field(10.0, ge=0, description="rotation: uniform in +-degrees")
    scale: tuple[float, float] = (0.9, 1.1)
    shift_px: float = Field(50.0, ge=0, description="shift in x and y, at a short side of 480 px")
    crop: tuple[float, float] = (0.8, 1.0)
    literal_pixels: bool = Field(False, description="take shift and sigma literally instead of scaling with the short side")
    min_kept: float = Field(0.7, ge=0, le=1, description="a view keeping less of the projected box is dropped from the mean")
    side_words: Literal["drop", "swap", "keep"] = Field("drop", description="queries naming left/right under a flip")


class GhostConfig(Section):
    method: Literal["blur", "mean", "pixelate"] = "blur"
    sigma_px: float = Field(25.0, gt=0, description="Gaussian sigma at a short side of 480 px")
    radius_sigmas: float = Field(3.0, gt=0, description="taps reach this many sigmas (as released: 1)")
    feather_px: float = Field(0.0, ge=0, description="soft edge of the ghost, at a short side of 480 px")


class RewardConfig(Section):
    preset: Literal["robust", "paper", "as_released"] = Field("robust", description="fills what is not stated elsewhere")
    name: str = Field("vise", description="registered reward: vise, oracle, random, shuffled, area_only, or your own")
    sem: Literal["paper", "contrast"] = Field("contrast", description="paper: hard 0/1; contrast: necessity minus control")
    soft: bool = Field(True, description="probabilities instead of hard verdicts")
    sufficiency: bool = Field(True, description="multiply by p(visible | everything but the box ghosted)")
    judge: Literal["reference", "policy"] = "reference"
    gate: float = Field(0.5, ge=0, le=1, description="groups with p(x) below this carry no gradient; 0: off")
    w_geo: float = Field(0.5, ge=0)
    w_sem: float = Field(0.5, ge=0)
    w_area: float = Field(0.0, ge=0, description="subtract w_area * sqrt(area)")
    projection: Literal["ellipse", "corners"] = "ellipse"
    controls: int = Field(1, ge=1, description="control ghosts per box")
    plugin: str | None = Field(None, description="python file that registers further rewards")


class UpdateConfig(Section):
    advantage: Literal["rloo", "ema", "grpo", "dr_grpo"] = "rloo"
    ema_momentum: float = Field(0.9, ge=0, lt=1)
    kl: Literal["exact", "k2", "k1_reward", "k3", "k1_loss"] = "exact"
    beta: float = Field(1e-3, ge=0, description="initial KL weight")
    beta_min: float = Field(1e-3, ge=0)
    beta_max: float = Field(1e2, gt=0)
    tau: float = Field(0.02, gt=0, description="KL target in nat per token")
    eta: float = Field(0.1, ge=0, description="beta moves by this factor per step")
    views_too: bool = Field(False, description="gradient on the boxes of the views as well")


class EvalConfig(Section):
    scenes: int = Field(128, ge=0, description="held-out scenes before and after training")
    samples: int = Field(1, ge=1, description="sampled boxes per scene beside the greedy one")
    seed: int = Field(90_001, ge=0, description="of the held-out scenes; never used in training")
    batch: int = Field(32, ge=1)
    attention: bool = Field(True, description="visual attention share per layer")


class MemoryConfig(Section):
    budget_gb: float | Literal["auto"] | None = Field(None, description="auto or GB: choose quantisation, micro-batch, checkpointing, pixels")


class RunConfig(Section):
    dir: str = Field("runs/nano", description="where everything of this run goes")
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(3, ge=1, description="checkpoints kept")
    samples_every: int = Field(10, ge=1, description="steps between sample cards")
    report: bool = True
    loggers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()


class Config(Section):
    """Everything a run is made of."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
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
