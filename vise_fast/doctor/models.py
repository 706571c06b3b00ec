"""Models at hand: the embedded one, and what the hub's cache holds. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from vise_fast import nano
from vise_fast.doctor.finding import Finding, fail, ok, warn
from vise_fast.doctor.packages import imported
from vise_fast.doctor.resources import existing

NANO = nano.DIRECTORY
RESTORE = "reinstall vise_fast, or check out vise_fast/nano again"


def nano_files() -> Finding:
    """The files that transformers loads are there."""
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in wanted if not (NANO / name).is_file()]
    if missing:
        return fail("embedded model", f"lacks {', '.join(missing)}", RESTORE)
    size = sum(path.stat().st_size for path in NANO.iterdir() if path.is_file())
    return ok("embedded model", f"{size / 1e6:.1f} MB")


def nano_weights() -> Finding:
    """The weights against SHA256SUMS beside them, and every number finite."""
    data = (NANO / "model.safetensors").read_bytes()
    sums = NANO / "SHA256SUMS"
    if not sums.exists():
        advice = "in vise_fast/nano: sha256sum model.safetensors > SHA256SUMS"
        return warn("embedded weights", "no SHA256SUMS beside them", advice)
    stamp = f"{hashlib.sha256(data).hexdigest()}  model.safetensors"
    if stamp not in sums.read_text().splitlines():
        return fail("embedded weights", "differ from SHA256SUMS", RESTORE)
    tensors = imported("safetensors.torch").load(data).values()
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        return fail("embedded weights", "hold numbers that are not finite", RESTORE)
    count = sum(tensor.numel() for tensor in tensors)
    return ok("embedded weights", f"{count / 1e6:.2f} M numbers, sha256 as shipped")


def nano_tokenizer() -> Finding:
    """It knows the words of the method."""
    content = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token["content"] for token in content.get("added_tokens", [])]
    words = {*content["model"]["vocab"], *added}
    if "<box>" not in words:
        return fail("embedded tokenizer", "has no <box>", RESTORE)
    return ok("embedded tokenizer", f"{len(words)} tokens")


def hub_cache() -> Finding:
    """The hub's cache can be written; what it holds."""
    folder = Path(imported("huggingface_hub.constants").HF_HUB_CACHE)
    if not os.access(existing(folder), os.W_OK):
        advice = "set HF_HOME to a place of your own, or give --model.path a directory"
        return warn("hub cache", f"{folder} cannot be written", advice)
    cached = sorted(path.name for path in folder.glob("models--*Qwen3-VL*"))
    names = [name.removeprefix("models--").replace("--", "/") for name in cached]
    return ok("hub cache", f"{folder}: {', '.join(names) or 'no Qwen3-VL yet'}")


def offline() -> Finding:
    """Whether the hub may be asked."""
    if imported("huggingface_hub.constants").HF_HUB_OFFLINE:
        return ok("hub access", "offline (HF_HUB_OFFLINE): models from disk only")
    return ok("hub access", "not tried; asked only when model.path is a hub id")


def telemetry() -> Finding:
    """Ours is none; the hub's own client counts downloads unless told not to."""
    state = "on for downloads (HF_HUB_DISABLE_TELEMETRY=1 ends it)"
    if imported("huggingface_hub.constants").HF_HUB_DISABLE_TELEMETRY:
        state = "off"
    return ok("telemetry", f"none of ours; the hub client's is {state}")
