"""Predicted against measured memory of a whole step, and what the published models need.

    python bench/memory.py                a CPU: 16 configurations of random models, live and saved
                                          tensors counted; predictions for 2B-32B
    python bench/memory.py --device cuda  a GPU: full steps of random 2B-32B models under hard caps
                                          of the allocator
    python bench/memory.py --smoke        does everything run? a minute on a CPU

Measured on a CPU: the peak over one whole step (the second: the optimizer has its moments) of the
bytes of all tensor storages alive, those saved for the backward pass included, counted by a
dispatch mode around the real rollout and update. Measured on a GPU: `max_memory_reserved` of the
same step, with the process capped by `set_per_process_memory_fraction`. Predicted:
`vise_fast.estimate.rehearsal`, from shapes alone. Answers are locked in length (see _subjects.py).
Left out: what lies below torch on a CPU (scratch inside operators).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import _checkout
import _measure as measure
import _subjects as subjects
import torch
from transformers import AutoConfig

from vise_fast.config.places import SHAPES
from vise_fast.config.schema import Config
from vise_fast.engine.fast import FastEngine
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.planner import Planner
from vise_fast.estimate.rehearsal import rehearse
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import Lengths
from vise_fast.model import load as model

GB = 1e9
MODELS = {
    "narrow": {
        "hidden_size": 128,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
    },
    "wide": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 1024,
    },
    "vocal": {
        "hidden_size": 192,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 60_000,
    },
}
"""Mid-size stand-ins, sizes of the text model: grouped heads as in nano, one key head for six, and
an untied head that outweighs the decoder.
"""


class Setting(NamedTuple):
    """A stand-in, the side of its square images, and settings by the names of KEYS."""

    shape: str
    side: int
    knobs: dict


def _setting(shape: str, side: int, **knobs) -> Setting:
    return Setting(shape, side, knobs)


VIEWS_TOO = {"views_too": True, "regrounder": "policy", "view_temperature": 1.0}
CONFIGURATIONS = {
    "nano-like, G 8": _setting("narrow", 128, batch=4, samples=8, views=2),
    "nano-like, checkpointing": _setting(
        "narrow", 128, batch=4, samples=8, views=2, checkpointing=True
    ),
    "nano-like, one slice an image": _setting(
        "narrow", 128, batch=4, samples=8, views=2, micro_batch=1
    ),
    "paper preset": _setting("narrow", 256, batch=1, preset="paper"),
    "paper preset, batch 6": _setting("narrow", 192, batch=6, preset="paper"),
    "G 2, K 4": _setting("narrow", 192, batch=3, samples=2, views=4),
    "G 16": _setting("narrow", 128, batch=2, samples=16, views=1),
    "views too": _setting("narrow", 128, batch=4, samples=4, views=3, **VIEWS_TOO),
    "wide": _setting("wide", 160, batch=3, samples=4, views=1),
    "wide, checkpointing, cut": _setting(
        "wide", 160, batch=4, samples=4, views=1, checkpointing=True, micro_batch=2
    ),
    "wide, int8": _setting("wide", 160, batch=2, samples=4, views=1, quant="int8"),
    "wide, nf4, 8-bit Adam": _setting(
        "wide",
        160,
        batch=2,
        samples=4,
        views=1,
        quant="nf4",
        optimizer="adamw8bit",
        checkpointing=True,
    ),
    "wide, rank 64": _setting("wide", 96, batch=2, samples=2, views=1, rank=64),
    "wide, large image": _setting("wide", 384, batch=1, samples=4, views=1),
    "head-heavy": _setting("vocal", 128, batch=3, samples=8, views=1),
    "head-heavy, checkpointing": _setting(
        "vocal", 128, batch=3, samples=8, views=1, checkpointing=True, micro_batch=1
    ),
}
KEYS = {
    "batch": "train.batch",
    "samples": "rollout.samples",
    "views": "rollout.views",
    "checkpointing": "train.checkpointing",
    "micro_batch": "train.micro_batch",
    "views_too": "update.views_too",
    "regrounder": "rollout.regrounder",
    "view_temperature": "rollout.view_temperature",
    "quant": "model.quant",
    "optimizer": "optim.name",
    "rank": "lora.r",
}
TABLE = [
    ("qwen3-vl-2b", "none", 6.0),
    ("qwen3-vl-2b", "int8", 4.5),
    ("qwen3-vl-2b", "nf4", 3.5),
    ("qwen3-vl-4b", "nf4", 6.0),
    ("qwen3-vl-8b", "nf4", 10.0),
    ("qwen3-vl-32b", "nf4", 24.7),
]
"""(model, quantisation, goal in GB of 1e9 bytes; 23 GiB for the 32B)"""


# ---- one configuration ---------------------------------------------------------------------------


def shape_of(name: str) -> dict:
    """A transformers config as a dictionary: Qwen3-VL-2B's with the sizes of a stand-in."""
    shape = copy.deepcopy(json.loads((SHAPES / "qwen3-vl-2b.json").read_text()))
    text = shape["text_config"]
    text |= {"vocab_size": 2048} | MODELS[name]
    half = text["head_dim"] // 2
    third = half // 3
    text["rope_parameters"] |= {"mrope_section": [half - 2 * third, third, third]}
    shape["tie_word_embeddings"] = text["tie_word_embeddings"] = name != "vocal"
    vocabulary = text["vocab_size"]
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    shape |= {key: vocabulary - 9 + i for i, key in enumerate(ids)}
    text |= {"bos_token_id": None, "eos_token_id": vocabulary - 1}
    hidden = text["hidden_size"]
    shape["vision_config"] |= {
        "depth": 6,
        "hidden_size": hidden // 2,
        "num_heads": 4,
        "intermediate_size": hidden,
        "patch_size": 8,
        "out_hidden_size": hidden,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1, 3],
    }
    return shape


def configured(subject: subjects.Subject, pixels: int, knobs: dict) -> Config:
    """The training configuration of some knobs at so many pixels."""
    words = [
        f"--{KEYS[name]}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in knobs.items()
        if name in KEYS and name != "batch"
    ]
    preset = knobs.get("preset", "robust")
    return subject.config(preset, knobs["batch"], [*words, f"--data.max_pixels={pixels}"])


def lengths_of(tokens: subjects.Locked) -> Lengths:
    """Exact lengths of the locked step's prompts."""
    style = tokens.style
    query = subjects.QUERIES[tokens.style.name]
    sizes = (
        tokens.head,
        tokens.tail,
        tokens.row(style.ask()),
        tokens.row(style.ground(query)),
        tokens.verdict_row(style.verify(query)),
    )
    return Lengths(*map(len, sizes))


def prepared(subject: subjects.Subject, config: Config) -> tuple[FastEngine, Learner]:
    """Ready to step, answers locked."""
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    engine = FastEngine(policy.backbone, policy.tokens)
    return engine, Learner(policy, engine, config)


def counted(
    subject: subjects.Subject, config: Config, size: tuple[int, int]
) -> tuple[int, Lengths]:
    """Peak bytes of live tensor storages over the second step, on a CPU; and the lengths of the
    prompts.
    """
    with Live("cpu") as live:
        engine, learner = prepared(subject, config)
        images = subjects.pictures(*size, config.train.batch)
        for step in range(2):
            live.restart()
            metrics = learner.learn(play_batch(engine, images, config, step), step)
            if metrics["scored"] < 1:
                raise RuntimeError(
                    f"only {metrics['scored']:.0%} of the boxes were scored; the step is not whole"
                )
    return live.peak, lengths_of(engine.tokens)


def compare(name: str) -> dict:
    """One of CONFIGURATIONS on a CPU: measured and predicted bytes."""
    shape, side, knobs = CONFIGURATIONS[name]
    size = (side, side)
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.Subject(shape, subjects._write(shape_of(shape), scratch), True)
        config = configured(subject, side * side, knobs)
        model_config = AutoConfig.from_pretrained(scratch, trust_remote_code=False)
        torch.manual_seed(0)
        measured, lengths = counted(subject, config, size)
        start = time.perf_counter()
        sizes = [size] * config.train.batch
        rehearsed = rehearse(config, model_config, sizes, torch.float32, lengths, "cpu")
    return {
        "name": name,
        "measured_bytes": measured,
        "predicted_bytes": rehearsed.peak,
        "error": rehearsed.peak / measured - 1,
        "phase": rehearsed.busiest,
        "components_bytes": rehearsed.at_peak,
        "prediction_s": time.perf_counter() - start,
    }


# ---- the published models ------------------------------------------------------------------------


def lean(name: str, quant: str) -> Config:
    """The leanest settings of a published model: one image at a time, checkpointing, paged 8-bit
    Adam; r 32 from 8B on.
    """
    config = Config()
    rank = 32 if name in ("qwen3-vl-8b", "qwen3-vl-32b") else 16
    config.model.path = f"Qwen/{name}"
    config.model.quant = quant
    config.model.dtype = "bfloat16"
    config.lora.r = rank
    config.lora.alpha = 2 * rank
    config.train.micro_batch = 1
    config.train.checkpointing = True
    config.optim.name = "paged_adamw8bit"
    config.data.dir = "images"
    return config


def predicted(name: str, quant: str, goal: float) -> dict:
    """What a published model needs, from its shape."""
    config = lean(name, quant)
    rehearsed = Planner(config, dtype=torch.bfloat16).rehearse(config)
    return {
        "model": name,
        "quant": quant,
        "rank": config.lora.r,
        "goal_gb": goal,
        "predicted_gb": rehearsed.peak / GB,
        "phase": rehearsed.busiest,
        "components_gb": {key: value / GB for key, value in rehearsed.at_peak.items()},
    }


def capped(name: str, quant: str, goal: float) -> dict:
    """A full step of random weights on this GPU with the allocator capped at the goal."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    share = min(1.0, goal * GB / torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(share, device)
    torch.cuda.reset_peak_memory_stats(device)
    row = predicted(name, quant, goal)
    try:
        step_twice(name, quant)
    except torch.OutOfMemoryError as fault:
        return row | {"fits": False, "fault": str(fault).splitlines()[0]}
    return row | {"reserved_gb": torch.cuda.max_memory_reserved(device) / GB, "fits": True}


def step_twice(name: str, quant: str) -> None:
    """Two leanest steps of a published model with random weights."""
    settings = lean(name, quant)
    words = [
        f"--model.quant={quant}",
        f"--lora.r={settings.lora.r}",
        "--model.dtype=bfloat16",
        "--train.micro_batch=1",
        "--train.checkpointing=true",
        "--optim.name=paged_adamw8bit",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(name, True, scratch)
        config = subject.config("robust", settings.train.batch, words)
        engine, learner = prepared(subject, config)
        images = subjects.pictures(480, 640, config.train.batch)
        for step in range(2):
            learner.learn(play_batch(engine, images, config, step), step)


# ---- telling -------------------------------------------------------------------------------------


def tell(rows: list[dict], models: list[dict]) -> None:
    """Both tables on screen."""
    print(
        f"\n{'configuration':32s}{'measured':>12s}{'predicted':>12s}{'error':>9s}  phase of the "
        "peak"
    )
    for row in rows:
        print(
            f"{row['name']:32s}{row['measured_bytes'] / 2**20:10.1f} "
            f"M{row['predicted_bytes'] / 2**20:10.1f} M{row['error']:+9.2%}  {row['phase']}"
        )
    print(
        f"\n{'model':16s}{'quant':>6s}{'goal GB':>10s}{'predicted':>11s}{'reserved':>10s}  phase "
        "of the peak"
    )
    for row in models:
        sizes = f"{row['goal_gb']:10.1f}{row['predicted_gb']:11.2f}{_reserved(row)}"
        print(f"{row['model']:16s}{row['quant']:>6s}{sizes}  {row['phase']}")


def _reserved(row: dict) -> str:
    if "reserved_gb" in row:
        return f"{row['reserved_gb']:10.2f}"
    return "     (GPU)" if row.get("fits", True) else "  no fit"


def summary(rows: list[dict]) -> dict[str, float]:
    """How far predictions are off, as shares."""
    if not rows:
        return {}
    errors = sorted(abs(row["error"]) for row in rows)
    p95 = errors[max(0, -(-95 * len(errors) // 100) - 1)]
    return {"configurations": len(rows), "p95_error": p95, "worst_error": errors[-1]}


def plot(rows: list[dict], models: list[dict], path: Path) -> None:
    """Predicted against measured; components of the published models beside their goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    measured = [row["measured_bytes"] / 2**20 for row in rows]
    most = max(measured, default=1)
    left.plot([0, most], [0, most], color="grey", linewidth=1)
    left.scatter(measured, [row["predicted_bytes"] / 2**20 for row in rows])
    title = "one step, live and saved tensors (CPU)"
    left.set(xlabel="measured, MiB", ylabel="predicted, MiB", title=title)
    _stack(models, right)
    figure.savefig(path, dpi=120)


def _stack(models: list[dict], axes) -> None:
    """Components one on the other, and goals."""
    labels = [f"{row['model'][9:]} {row['quant']}" for row in models]
    floor = [0.0] * len(models)
    parts: dict[str, None] = {}
    for row in models:
        parts |= dict.fromkeys(row["components_gb"])
    for part in parts:
        heights = [row["components_gb"].get(part, 0.0) for row in models]
        axes.bar(labels, heights, bottom=floor, label=part)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    goals = [row["goal_gb"] for row in models]
    axes.scatter(labels, goals, marker="_", color="black", s=400, label="goal")
    axes.set(ylabel="GB", title="predicted peak, lean settings")
    axes.legend(fontsize=7)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    names = [f"{name}:{quant}" for name, quant, _ in TABLE]
    add("--model", nargs="+", choices=names, help="these published models only")
    add("--plot", type=Path, help="write a PNG")
    add("--write", action="store_true", help="put document and PNG under bench/results/")
    add("--smoke", action="store_true", help="two small configurations, one model")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """Measure, predict, tell, and write where asked to."""
    args = parse(words)
    if args.device == "cpu":
        torch.set_num_threads(1)
    names = ["G 16", "wide, nf4, 8-bit Adam"] if args.smoke else list(CONFIGURATIONS)
    table = TABLE[:1] if args.smoke else TABLE
    rows = [compare(name) for name in names] if args.device == "cpu" else []
    if args.model:
        table = [line for line in TABLE if f"{line[0]}:{line[1]}" in args.model]
    models = [(predicted if args.device == "cpu" else capped)(*line) for line in table]
    tell(rows, models)
    place = _checkout.ROOT / "bench" / "results" / f"memory-{args.device}.json"
    if args.plot or args.write:
        plot(rows, models, args.plot or place.with_suffix(".png"))
    results = {
        "bench": "memory",
        "machine": measure.machine(torch.device(args.device)),
        "summary": summary(rows),
        "configurations": rows,
        "models": models,
    }
    measure.finish(results, place if args.write else None)


if __name__ == "__main__":
    main(sys.argv[1:])
