"""Train a small byte-level language model whose attention is dense, block-sparse or SPLA.

The text is the source of Python's standard library, so every machine with a Python has it.  The three models
start from the same weights and see the same batches; only the attention differs.  From the repository root:

    python -m examples.byte_lm --attention spla            # writes examples/results/byte_lm_spla.json
    python -m examples.byte_lm --attention dense --tiny    # a small model, for a CPU
    python -m examples.byte_lm --plot                      # examples/results/byte_lm.png from the JSON files
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import record

if TYPE_CHECKING:
    import splagen

AttentionKind = Literal["dense", "sparse", "spla", "spla_residual"]
KINDS: tuple[AttentionKind, ...] = ("dense", "sparse", "spla", "spla_residual")
# spla: both branches normalised (combine "rms"); spla_residual: o_s + gain RMS(o_r) with the gain 0 at the start
COMBINE = {"spla": "rms", "spla_residual": "rms_residual"}
RESULTS = Path(__file__).resolve().parent / "results"

VOCABULARY = 256  # bytes
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `context` is the training length in bytes."""

    layers: int = 4
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 4096
    attention: AttentionKind = "dense"
    block_size: int = 32  # of sparse attention
    budget: int = 8  # blocks beside the first, the one before and the current one

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.q_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Channels inside the MLP: 8/3 of the width, which is what a SwiGLU with 8 width² weights has."""
        return 64 * math.ceil(8 * self.width / (3 * 64))


TINY = Config(layers=2, q_heads=4, kv_heads=1, head_dim=16, context=256)


@dataclass(frozen=True)
class Training:
    """How a model is trained; `batch` counts windows of the model's context."""

    steps: int = 500
    batch: int = 8
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    validate_every: int = 50
    validation_windows: int = 16

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return learning_rate(step, self.steps, self.lr, self.warmup)


def learning_rate(step: int, steps: int, highest: float, warmup: int) -> float:
    """Learning rate of a step, counted from 0: a linear warm-up, then a cosine to a tenth."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# ---- text


def library_files() -> list[Path]:
    """Return the standard library's sources in one fixed order, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    # pydoc_data is one manual in a string: on either side it would outweigh the code of that side.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    files = (f.relative_to(root) for f in root.rglob("*.py"))
    kept = sorted(f.as_posix() for f in files if not left_out & set(f.parts))
    return [root / path for path in kept]


def split(sources: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Split files 95 : 5 into training text and held-out text, a NUL after each file.

    The side follows from a hash of a file's bytes: copies of a file fall on one side, and a new file moves no
    other.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for source in sources:
        held_out = int.from_bytes(hashlib.sha256(source).digest()[:8], "big") % 100 < 5
        sides[held_out].append(source + b"\0")
    return b"".join(sides[0]), b"".join(sides[1])


def load_text() -> tuple[Tensor, Tensor]:
    """Return training and held-out text as uint8 tensors."""
    train, held_out = split([file.read_bytes() for file in library_files()])
    return _as_tensor(train), _as_tensor(held_out)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Sequence[int], context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64 [len(starts), context]: bytes from each start, and the next."""
    rows = torch.stack([text[start : start + context + 1] for start in starts]).to(device, torch.int64)
    return rows[:, :-1], rows[:, 1:]


def held_out_starts(text: Tensor, context: int, count: int) -> list[int]:
    """Return `count` starts spread evenly over the text, the same for every model."""
    last = len(text) - context - 1
    return [round(i * last / max(1, count - 1)) for i in range(count)]


# ---- model


class Attention(nn.Module):
    """Everything between the projections: o [B, L, Hq, D] from q [B, L, Hq, D] and k, v [B, L, Hkv, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind = config.attention
        self.op: Callable[..., Tensor] | None = None
        if self.kind != "dense":
            self.op = _generated(config)
        shape = (config.q_heads, config.head_dim)
        if self.kind == "spla":
            self.gamma_s = nn.Parameter(torch.ones(shape))
            self.gamma_r = nn.Parameter(torch.ones(shape))
        elif self.kind == "spla_residual":
            self.gamma_r = nn.Parameter(torch.zeros(shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally."""
        if self.op is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads before positions
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return self.op(q, k, v, **self.gains())

    def gains(self) -> dict[str, Tensor]:
        """Learned gains of the norms behind the two branches, by the op's names: [Hq, D]."""
        return {name: gain for name, gain in self.named_parameters() if name.startswith("gamma")}


def attention_spec(config: Config) -> splagen.SPLASpec:
    """What attention of the sparse kinds computes.  Raises ValueError for dense attention, which has no spec."""
    import splagen  # here, so that the dense model runs without it

    if config.attention == "dense":
        raise ValueError("dense attention is torch's: give another kind of attention")
    select = splagen.Select(block_size=config.block_size, budget=config.budget, sinks=1, local=1)
    group_size = config.q_heads // config.kv_heads
    spec = splagen.SPLASpec(head_dim=config.head_dim, group_size=group_size, select=select, linear=None)
    if config.attention in COMBINE:
        spec = replace(spec, linear=splagen.Residual(), combine=COMBINE[config.attention])
    return spec


def _generated(config: Config) -> Callable[..., Tensor]:
    import splagen

    op: Callable[..., Tensor] = splagen.load(attention_spec(config))
    return op


class Block(nn.Module):
    """One pre-norm transformer layer on x [B, L, width]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, config.hidden
        kv_width = config.kv_heads * config.head_dim
        self.norm_attention = nn.RMSNorm(width, eps=NORM_EPS)
        self.to_qkv = nn.Linear(width, width + 2 * kv_width, bias=False)
        self.attention = Attention(config)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width, eps=NORM_EPS)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def qkv(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention gets: q [B, L, Hq, D], rotated; k, rotated, and v [B, L, Hkv, D]."""
        c = self.config
        heads = self.to_qkv(self.norm_attention(x)).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split([c.q_heads, c.kv_heads, c.kv_heads], dim=2)
        return rotate(q, rotation), rotate(k, rotation), v

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the layer's output, [B, L, width]; `attend` takes the place of attention over x alone."""
        x = x + self.out((attend or self.attention)(*self.qkv(x, rotation)).flatten(2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        mixed: Tensor = self.down(F.silu(gate) * up)
        return x + mixed


class ByteLM(nn.Module):
    """Logits [B, L, 256] of the next byte from bytes [B, L] (int64)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and "gamma" not in name:
                # Layers write into one residual stream: its variance stays near that of the embedding.
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the model."""
        x, rotation = self.embedding(tokens), rotary(self.config.head_dim, _positions(tokens))
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def qkv(self, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the q, k, v that attention of layer `layer` (from 0) gets; shapes as in Block.qkv."""
        x, rotation = self.embedding(tokens), rotary(self.config.head_dim, _positions(tokens))
        for block in self.blocks[:layer]:
            x = block(x, rotation)
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block.qkv(x, rotation)


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)


def rotary(head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (float32 [..., 1, head_dim / 2]) of the rotary embedding at positions [...]."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None].to(torch.float32) * 10_000.0 ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, L, H, D] by position, in float32; the result has x's dtype."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---- training


def loss_of(model: ByteLM, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats per byte; on a GPU the model runs in bf16."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model(tokens)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: ByteLM, text: Tensor, count: int, device: torch.device) -> float:
    """Return the mean loss (nats per byte) over `count` fixed windows of held-out text, one at a time."""
    context = model.config.context
    starts = held_out_starts(text, context, count)
    return sum(loss_of(model, *windows(text, [s], context, device)).item() for s in starts) / count


def optimizer(model: ByteLM, training: Training) -> torch.optim.AdamW:
    """Return AdamW; gains of norms, and of the op, do not decay."""
    named = list(model.named_parameters())
    gains = [p for name, p in named if p.ndim < 2 or "gamma" in name]
    matrices = [p for name, p in named if p.ndim >= 2 and "gamma" not in name]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.95))


def train(
    model: ByteLM,
    texts: tuple[Tensor, Tensor],
    training: Training,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train in place on texts (training, held-out; uint8); the model's device decides where.

    Returns:
        loss: nats per byte of every step; validation: [(step, nats per byte), ...], before the first step and
        after the last one too; seconds: the time of all steps and validations.
    """
    text, held_out = texts
    device = next(model.parameters()).device
    context = model.config.context
    # On the CPU and apart from the weights' generator: every model sees the same batches.
    draw = torch.Generator().manual_seed(training.seed)
    adam = optimizer(model, training)
    losses: list[float] = []
    validation: list[tuple[int, float]] = []
    begun = time.perf_counter()

    def check(step: int) -> None:
        validation.append((step, validate(model, held_out, training.validation_windows, device)))
        trained = f"loss {losses[-1]:.4f}  " if losses else ""
        report(f"step {step:5d}  {trained}validation {validation[-1][1]:.4f}")

    check(0)
    for step in range(training.steps):
        for group in adam.param_groups:
            group["lr"] = training.lr_at(step)
        starts = torch.randint(len(text) - context, (training.batch,), generator=draw).tolist()
        loss = loss_of(model, *windows(text, starts, context, device))
        adam.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        adam.step()
        losses.append(loss.item())
        if (step + 1) % training.validate_every == 0 or step + 1 == training.steps:
            check(step + 1)
    return {"loss": losses, "validation": validation, "seconds": time.perf_counter() - begun}


def build(config: Config, seed: int, device: torch.device) -> ByteLM:
    """Return a model whose weights follow from the seed alone, on every device and with every attention."""
    torch.manual_seed(seed)
    return ByteLM(config).to(device)


# ---- results


def plot(directory: Path) -> Path:
    """Draw the curves of every byte_lm_*.json in `directory` to byte_lm.png; return its path.

    Raises:
        FileNotFoundError: there is no such JSON file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    paths = [path for kind in KINDS if (path := directory / f"byte_lm_{kind}.json").exists()]
    if not paths:
        raise FileNotFoundError(f"no byte_lm_*.json in {directory}; train with --attention first")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    top = 0.0
    for colour, path in enumerate(paths):
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        steps, held_out = zip(*figures["validation"], strict=True)
        label = f"{figures['config']['attention']}: {held_out[-1]:.3f}"
        losses = figures["loss"]
        axes.plot(range(1, len(losses) + 1), losses, color=f"C{colour}", alpha=0.3, linewidth=0.8)
        axes.plot(steps, held_out, "o-", color=f"C{colour}", markersize=4, label=label)
        # The first steps only unlearn the initialisation: they would flatten the rest of the picture.
        top = max(top, *losses[len(losses) // 20 :])
    axes.set_ylim(top=top)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_title("Byte-level model on Python's standard library")
    axes.grid(alpha=0.3)
    axes.legend(title="held-out loss (points), last value; thin: training")
    target = directory / "byte_lm.png"
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.byte_lm", description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", choices=KINDS, help="train with this attention")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--batch", type=int, default=Training.batch, help="windows per step")
    parser.add_argument("--seed", type=int, default=Training.seed)
    parser.add_argument("--tiny", action="store_true", help="2 layers, width 64, context 256")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the JSON files and the picture")
    parser.add_argument("--plot", action="store_true", help="draw the picture from the JSON files")
    given = parser.parse_args(arguments)
    if given.attention is None and not given.plot:
        parser.error("nothing to do: give --attention, --plot or both")
    if given.steps < 1 or given.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    if given.attention is not None:
        device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = replace(TINY if given.tiny else Config(), attention=given.attention)
        training = Training(steps=given.steps, batch=given.batch, seed=given.seed)
        model = build(config, training.seed, device)
        curves = train(model, load_text(), training)
        figures = {"config": asdict(config), "training": asdict(training), **curves}
        print(record.write(f"byte_lm_{config.attention}", figures, given.out))
    if given.plot:
        print(plot(given.out))


if __name__ == "__main__":
    main()
