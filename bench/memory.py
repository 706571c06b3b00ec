"""Predicted against measured memory of a whole step, and what the published models need.

    python bench/memory.py                      a CPU: 16 configurations of random models, live and saved tensors counted; predictions for 2B-32B
    python bench/memory.py --device cuda        a GPU: full steps of random 2B-32B models under hard caps of the allocator
    python bench/memory.py --smoke              does everything run? a minute on a CPU

Measured on a CPU: the peak over one whole step (the second: the optimizer has its moments) of the bytes of all tensor storages alive, those
saved for the backward pass included, counted by a dispatch mode around the real rollout and update. Measured on a GPU: `max_memory_reserved`
of the same step, with the process capped by `set_per_process_memory_fraction`. Predicted: `vise_fast.estimate.rehearsal`, from shapes alone. Answers
are locked in length (see _subjects.py). Left out: what lies below torch on a CPU (scratch inside operators).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]

import _measure as measure  # noqa: E402
import _subjects as subjects  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from vise_fast.config.places import SHAPES  # noqa: E402
from vise_fast.config.schema import Config  # noqa: E402
from vise_fast.engine.fast import FastEngine  # noqa: E402
from vise_fast.estimate.live_bytes import Live  # noqa: E402
from vise_fast.estimate.planner import Planner  # noqa: E402
from vise_fast.estimate.rehearsal import rehearse  # noqa: E402
from vise_fast.method.experience import play_batch  # noqa: E402
from vise_fast.method.learner import Learner  # noqa: E402
from vise_fast.method.step_plan import Lengths  # noqa: E402
from vise_fast.model import load as model  # noqa: E402

GB = 1e9
MODELS = {
    "narrow": {
        "text": dict(
            hidden_size=128,
            num_hidden_layers=9,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=384,
        )
    },
    "wide": {
        "text": dict(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=1,
            head_dim=64,
            intermediate_size=1024,
        )
    },
    "vocal": {
        "text": dict(
            hidden_size=192,
            num_hidden_layers=7,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            intermediate_size=512,
            vocab_size=60_000,
        )
    },
}
"""Mid-size stand-ins: grouped heads as in nano, one key head for six, and an untied head that outweighs the decoder."""

CONFIGURATIONS = {
    "nano-like, G 8": ("narrow", 128, dict(batch=4, samples=8, views=2)),
    "nano-like, checkpointing": (
        "narrow",
        128,
        dict(batch=4, samples=8, views=2, checkpointing=True),
    ),
    "nano-like, one slice an image": (
        "narrow",
        128,
        dict(batch=4, samples=8, views=2, micro_batch=1),
    ),
    "paper preset": ("narrow", 256, dict(batch=1, preset="paper")),
    "paper preset, batch 6": ("narrow", 192, dict(batch=6, preset="paper")),
    "G 2, K 4": ("narrow", 192, dict(batch=3, samples=2, views=4)),
    "G 16": ("narrow", 128, dict(batch=2, samples=16, views=1)),
    "views too": (
        "narrow",
        128,
        dict(
            batch=4, samples=4, views=3, views_too=True, regrounder="policy", view_temperature=1.0
        ),
    ),
    "wide": ("wide", 160, dict(batch=3, samples=4, views=1)),
    "wide, checkpointing, cut": (
        "wide",
        160,
        dict(batch=4, samples=4, views=1, checkpointing=True, micro_batch=2),
    ),
    "wide, int8": ("wide", 160, dict(batch=2, samples=4, views=1, quant="int8")),
    "wide, nf4, 8-bit Adam": (
        "wide",
        160,
        dict(batch=2, samples=4, views=1, quant="nf4", optimizer="adamw8bit", checkpointing=True),
    ),
    "wide, rank 64": ("wide", 96, dict(batch=2, samples=2, views=1, rank=64)),
    "wide, large image": ("wide", 384, dict(batch=1, samples=4, views=1)),
    "head-heavy": ("vocal", 128, dict(batch=3, samples=8, views=1)),
    "head-heavy, checkpointing": (
        "vocal",
        128,
        dict(batch=3, samples=8, views=1, checkpointing=True, micro_batch=1),
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
    shape["text_config"] |= {"vocab_size": 2048} | MODELS[name]["text"]
    half = shape["text_config"]["head_dim"] // 2
    vocabulary = shape["text_config"]["vocab_size"]
    shape["text_config"]["rope_parameters"] |= {
        "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]
    }
    shape["tie_word_embeddings"] = shape["text_config"]["tie_word_embeddings"] = name != "vocal"
    ids = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    shape |= {key: vocabulary - 9 + i for i, key in enumerate(ids)}
    shape["text_config"] |= {"bos_token_id": None, "eos_token_id": vocabulary - 1}
    hidden = shape["text_config"]["hidden_size"]
    shape["vision_config"] |= dict(
        depth=6,
        hidden_size=hidden // 2,
        num_heads=4,
        intermediate_size=hidden,
        patch_size=8,
        out_hidden_size=hidden,
        num_position_embeddings=256,
        deepstack_visual_indexes=[1, 3],
    )
    return shape


def configured(subject: subjects.Subject, pixels: int, knobs: dict) -> Config:
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
    policy = model.load(config, weights=subject.weights)
    policy.tokens = subjects.Locked(policy.tokens)
    engine = FastEngine(policy.backbone, policy.tokens)
    return engine, Learner(policy, engine, config)


def counted(
    subject: subjects.Subject, config: Config, size: tuple[int, int]
) -> tuple[int, Lengths]:
    """Peak bytes of live tensor storages over the second step, on a CPU; and the prompts' lengths."""
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
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.Subject(shape, subjects._write(shape_of(shape), scratch), True)
        config = configured(subject, side * side, knobs)
        model_config = AutoConfig.from_pretrained(scratch)
        torch.manual_seed(0)
        measured, lengths = counted(subject, config, (side, side))
        start = time.perf_counter()
        rehearsed = rehearse(
            config, model_config, [(side, side)] * config.train.batch, torch.float32, lengths, "cpu"
        )
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
    """The leanest settings of a published model: one image at a time, checkpointing, paged 8-bit Adam; r 32 from 8B on."""
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
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, goal * GB / torch.cuda.mem_get_info(device)[1]), device
    )
    torch.cuda.reset_peak_memory_stats(device)
    row = predicted(name, quant, goal)
    with tempfile.TemporaryDirectory() as scratch:
        subject = subjects.find(name, True, scratch)
        config = lean(name, quant)
        config = subject.config(
            "robust",
            config.train.batch,
            [
                f"--model.quant={quant}",
                f"--lora.r={config.lora.r}",
                "--model.dtype=bfloat16",
                "--train.micro_batch=1",
                "--train.checkpointing=true",
                "--optim.name=paged_adamw8bit",
            ],
        )
        try:
            engine, learner = prepared(subject, config)
            images = subjects.pictures(480, 640, config.train.batch)
            for step in range(2):
                learner.learn(play_batch(engine, images, config, step), step)
            row |= {"reserved_gb": torch.cuda.max_memory_reserved(device) / GB, "fits": True}
        except torch.OutOfMemoryError as fault:
            row |= {"fits": False, "fault": str(fault).splitlines()[0]}
    return row


# ---- telling -------------------------------------------------------------------------------------


def tell(rows: list[dict], models: list[dict]) -> None:
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
        reserved = (
            f"{row['reserved_gb']:10.2f}"
            if "reserved_gb" in row
            else "     (GPU)"
            if row.get("fits", True)
            else "  no fit"
        )
        print(
            f"{row['model']:16s}{row['quant']:>6s}{row['goal_gb']:10.1f}{row['predicted_gb']:11.2f}{reserved}  {row['phase']}"
        )


def summary(rows: list[dict]) -> dict[str, float]:
    errors = sorted(abs(row["error"]) for row in rows)
    return (
        {
            "configurations": len(rows),
            "p95_error": errors[max(0, -(-95 * len(errors) // 100) - 1)],
            "worst_error": errors[-1],
        }
        if rows
        else {}
    )


def plot(rows: list[dict], models: list[dict], path: Path) -> None:
    """Predicted against measured; components of the published models beside their goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    measured, guess = (
        [row[key] / 2**20 for row in rows] for key in ("measured_bytes", "predicted_bytes")
    )
    left.plot(
        [0, max(measured, default=1)], [0, max(measured, default=1)], color="grey", linewidth=1
    )
    left.scatter(measured, guess)
    left.set(
        xlabel="measured, MiB",
        ylabel="predicted, MiB",
        title="one step, live and saved tensors (CPU)",
    )
    labels = [f"{row['model'][9:]} {row['quant']}" for row in models]
    floor = [0.0] * len(models)
    for part in dict.fromkeys(name for row in models for name in row["components_gb"]):
        heights = [row["components_gb"].get(part, 0.0) for row in models]
        right.bar(labels, heights, bottom=floor, label=part)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    right.scatter(
        labels, [row["goal_gb"] for row in models], marker="_", color="black", s=400, label="goal"
    )
    right.set(ylabel="GB", title="predicted peak, lean settings")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot", type=Path, help="write a PNG")
    parser.add_argument(
        "--write", action="store_true", help="put the document (and the PNG) under bench/results/"
    )
    parser.add_argument("--smoke", action="store_true", help="two small configurations, one model")
    args = parser.parse_args(words)
    if args.device == "cpu":
        torch.set_num_threads(1)
    names = list(CONFIGURATIONS)
    table = TABLE
    if args.smoke:
        names = ["G 16", "wide, nf4, 8-bit Adam"]
        table = TABLE[:1]
    rows = [compare(name) for name in names] if args.device == "cpu" else []
    models = [(predicted if args.device == "cpu" else capped)(*line) for line in table]
    tell(rows, models)
    place = (
        measure.ROOT / "bench" / "results" / f"memory-{args.device}.json" if args.write else None
    )
    if args.plot or place:
        plot(rows, models, args.plot or place.with_suffix(".png"))
    results = {
        "bench": "memory",
        "machine": measure.machine(torch.device(args.device)),
        "summary": summary(rows),
        "configurations": rows,
        "models": models,
    }
    measure.finish(results, place)


if __name__ == "__main__":
    main(sys.argv[1:])
