"""The tables of docs/clusters.md: python -m bench.zero_tables prints them, and with --write puts them into the page,
each between its two marks. All but the one that quotes the project's own estimate need the standard library alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.zero_arithmetic import (
    BF16,
    CLUSTER,
    FP32,
    GPUS,
    MODELS,
    NODE,
    RANK,
    STRATEGIES,
    Model,
    Strategy,
    activations,
    compute_seconds,
    head,
    largest,
    layer_activations,
    rates,
    traffic,
    trained,
)

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 99.95e9 else f"{size / 1e9:.0f}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def assumptions() -> str:
    c = CLUSTER
    rows = [
        ["GPUs a node, G", f"{c.a_node}"],
        ["memory of a GPU", f"{c.memory / 1e9:.0f} GB, of which {c.usable * c.memory / 1e9:.0f} GB are planned with"],
        ["bf16 operations of a GPU", f"{c.peak / 1e12:.0f}e12 a second, {c.mfu:.0%} of them reached (MFU)"],
        ["NVLink", f"{c.nvlink / 1e9:.0f} GB/s a GPU and direction, {c.reached:.0%} reached"],
        ["InfiniBand", f"{c.adapter / 1e9:.0f} GB/s (400 Gb/s) an adapter and direction, {c.reached:.0%} reached"],
        ["PCIe", f"{c.pcie / 1e9:.0f} GB/s a GPU and direction, reached"],
        [
            "memory of a node",
            f"{c.host_memory / 1e12:.0f} TB, {c.host / 1e9:.0f} GB/s reached by the optimiser on the CPU",
        ],
        ["shared file system", f"{c.disk / 1e9:.0f} GB/s written by all nodes together"],
    ]
    return table(["assumed", "value"], rows)


def models() -> str:
    rows = []
    for m in MODELS:
        shape = f"{m.layers}, {m.hidden}, {m.inner}, {m.heads}, {m.key_heads}, {m.vocabulary}"
        rows.append([m.name, shape, f"{m.layer_weights:,}", f"{m.parameters:,}", f"{m.adapters:,}"])
    shape = "layers, hidden, MLP, heads, key heads, vocabulary"
    return table(["model", shape, "weights of a layer's matrices", "Ψ", f"adapters of rank {RANK}"], rows)


def bytes_a_parameter() -> str:
    rows = []
    for s in STRATEGIES:
        figures = [f"{s.state(1, 1, n):.2f}".rstrip("0").rstrip(".") for n in (8, 32)]
        figures = [f"{s.state(1, 1, 1):.0f}", "-"] if s.alone else figures
        rows.append([s.name, f"`engine={s.engine}`", s.bf16, *figures, s.fp32])
    return table(["strategy", "settings", "bf16: bytes a GPU", "N = 8", "N = 32", "fp32: bytes a GPU"], rows)


def activation_table() -> str:
    rows = []
    for m in MODELS:
        for autocast in (True, False):
            name = "autocast (one GPU, DDP)" if autocast else "bf16 weights (ZeRO)"
            sizes = [gb(activations(m, 8192, on, autocast) - head(m, 8192, autocast)) for on in (False, True)]
            cast = gb(BF16 * m.layers * m.layer_weights) if autocast else "0"
            per_token = layer_activations(m, autocast)
            all_layers = f"{m.layers * per_token / 1e6:.2f} MB"
            rows.append([m.name, name, f"{per_token:,}", all_layers, cast, *sizes])
    names = ["model", "arithmetic", "bytes a token and layer", "a token, all layers", "cast weights, GB"]
    return table([*names, "8192 tokens, GB", "checkpointed, GB"], rows)


def head_table() -> str:
    rows = []
    for m in MODELS:
        for vocabulary in (m.vocabulary, 128_256):
            other = Model(m.name, m.layers, m.hidden, m.inner, m.heads, m.key_heads, vocabulary)
            chunked = [gb(head(other, 8192, autocast)) for autocast in (True, False)]
            rows.append([m.name, f"{vocabulary:,}", gb(3 * 8192 * vocabulary * FP32), *chunked])
    whole = "logits, their softmax and gradient whole, fp32, GB"
    names = ["the chunked head with its gradients, GB: autocast", "bf16 weights"]
    return table(["model", "vocabulary", whole, *names], rows)


def fits(model: Model, lora: bool) -> str:
    rows = []
    for s in STRATEGIES:
        cells = []
        for n in GPUS:
            if n > 1 if s.alone else n <= NODE if "hpZ" in s.name else n == 1 and s.name == "DDP":
                cells.append("")
                continue
            found = largest(model, s, n, lora)
            state = gb(s.state(*trained(model, lora), n))
            how = "does not fit" if found is None else f"**{found[0]}**{' c' if found[1] else ''}"
            cells.append(f"{state}: {how}")
        rows.append([s.name, *cells])
    return table(["strategy", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)], rows)


def said(strategy: Strategy, psi: int, t: int, gpus: int) -> int:
    """What the project's estimate says in bf16."""
    from alignment.training.memory import Load, state_bytes  # it needs PyTorch

    engine, _, setting = strategy.engine.partition(" engine.")
    name, _, value = setting.partition("=")
    offload, hpz = value if name == "offload" else "none", int(value) if name == "hpz" else 1
    return state_bytes(Load(8192, "bf16", psi, t, engine, gpus, offload, hpz))


def estimator() -> str:
    rows = []
    for m in MODELS:
        for lora in (False, True):
            psi, t = trained(m, lora)
            for s in STRATEGIES:
                if s.alone or "offload" in s.name:
                    continue
                estimated, true = said(s, psi, t, 32), s.state(psi, t, 32)
                by = f"{(estimated - true) / psi:.2f}Ψ"
                rows.append([m.name, "LoRA" if lora else "full", s.name, gb(true), gb(estimated), by])
    return table(["model", "trained", "32 GPUs", "by hand, bf16, GB", "`state_bytes`, GB", "difference, bytes"], rows)


def volumes() -> str:
    rows = [
        ["DDP", "8T", "8T (fp32 gradients)", "at the last micro-batch"],
        ["ZeRO-1", "4T", "4T + 2T (all-reduce, then weights)", "no: after the last backward pass"],
        ["ZeRO-2", "4T", "4KT + 2T (all-reduce, then weights)", "gradients yes, weights no"],
        ["ZeRO-3", "4Ψ + 2T", "K (4Ψ + 2T)", "yes, by the next layers' prefetch"],
        ["ZeRO-3, hpZ, all trained", "2Ψ + 2T", "2T + 2KT, and inside a node (4K - 2)Ψ", "yes"],
        ["ZeRO-3, hpZ, LoRA", "-", "4T + 2KT, and inside a node 4KΨ", "yes"],
    ]
    return table(["strategy", "papers, K = 1", "this code, bytes a GPU sends in a step", "behind computation"], rows)


def hidden() -> str:
    """Tokens of a micro-batch from which on computing takes longer than what the links carry meanwhile."""
    cases = [  # trained weights of a weight, micro-batches, operations a weight and token that hide it
        ("ZeRO-3, all trained", "ZeRO-3", 1, 1, 6),
        ("ZeRO-3, hpZ, all trained, K = 1", "ZeRO-3, hpZ", 1, 1, 6),
        ("ZeRO-3, hpZ, all trained, K = 8", "ZeRO-3, hpZ", 1, 8, 6),
        ("ZeRO-3, LoRA", "ZeRO-3", 0, 1, 4),
        ("ZeRO-3, hpZ, LoRA", "ZeRO-3, hpZ", 0, 1, 4),
        ("DDP, all trained, K = 1: in the backward pass", "DDP", 1, 1, 4),
        ("ZeRO-2, all trained: gradients, in the backward pass", "ZeRO-2", 1, 1, 4),
    ]
    rows = []
    for label, name, t, micro, operations in cases:
        moved = traffic(name, 1, t, micro, 32)
        across, cells = (moved.across - moved.after) / micro, []
        for adapters in (1, 8):
            outer, inner = rates(adapters, 32)
            taken = across / outer + moved.inside / micro / inner
            cells.append(f"{round(taken * CLUSTER.mfu * CLUSTER.peak / operations, -1):,.0f}")
        rows.append([label, f"{across:.2f}Ψ", f"{moved.inside / micro:.2f}Ψ", f"{operations}Ψ", *cells])
    names = ["case, 32 GPUs", "bytes across nodes", "inside", "operations a token"]
    return table([*names, "tokens, 1 adapter a node", "tokens, 8 adapters a node"], rows)


STEP = 16_384  # tokens of a GPU in a step


def step_rows(model: Model, lora: bool) -> Iterator[list[str]]:
    """On 32 GPUs, in the micro-batches that `largest` finds."""
    psi, t = trained(model, lora)
    for s in STRATEGIES:
        found = largest(model, s, 32, lora)
        if s.alone or "offload" in s.name or found is None:
            continue
        micro, checkpointing = STEP // found[0], found[1]
        moved = traffic(s.name, psi, t, micro, 32)
        compute, cells = compute_seconds(psi, STEP, lora, checkpointing), []
        for adapters in (1, 8):
            across, inside = rates(adapters, 32)
            links = (moved.across - moved.after) / across + moved.inside / inside
            cells.append(seconds(moved.across / across + moved.inside / inside))
            cells.append(seconds(max(compute, links) + moved.after / across))
        sent = f"{gb(moved.across)} + {gb(moved.inside)}" if moved.inside else gb(moved.across)
        how = f"{micro} x {found[0]}{' c' if checkpointing else ''}"
        yield [model.name, "LoRA" if lora else "full", s.name, how, sent, seconds(compute), *cells]


def steps() -> str:
    rows = [row for m in MODELS for lora in (False, True) for row in step_rows(m, lora)]
    links = [f"{word}, {a}" for a in ("1 adapter", "8 adapters") for word in ("links", "step")]
    return table(["model", "trained", "strategy", "micro-batches", "GB sent (+ inside)", "computing", *links], rows)


def offload_table() -> str:
    rows = []
    for m in MODELS:
        for nodes in (1, 2, 4):
            psi, t, n = m.parameters, m.parameters, nodes * NODE
            held = [gb(size * t / nodes) for size in (18, 20, 22)]
            pcie = (4 + 2) * t / n / CLUSTER.pcie
            adam = 30 * t / nodes / CLUSTER.host
            computing = compute_seconds(psi, STEP, False, True)
            rows.append([m.name, f"{nodes}", *held, seconds(pcie), seconds(adam), seconds(computing)])
    names = ["model, full", "nodes", *(f"GB a node: {how}" for how in ("ZeRO-2", "ZeRO-3", "ZeRO-3, `all`"))]
    return table([*names, "PCIe, s a step", "AdamW on the CPU, s", f"computing {STEP:,} tokens a GPU, s"], rows)


def checkpoint_table() -> str:
    rows = []
    for m in MODELS:
        for lora in (False, True):
            _, t = trained(m, lora)
            size, n = 12 * t, 32
            copy = size / n / CLUSTER.pcie
            written = gb(4 * m.parameters + (4 * t if lora else 0))
            took = seconds(copy), seconds(size / CLUSTER.disk)
            rows.append([m.name, "LoRA" if lora else "full", gb(size), gb(size / n), *took, written])
    names = [
        "model",
        "trained",
        "checkpoint, GB",
        "a process of 32, GB",
        "copy: training waits, s",
        "write: behind it, s",
    ]
    return table([*names, "the finished model, GB"], rows)


def host_table() -> str:
    rows = []
    for m in MODELS:
        psi = m.parameters
        rows.append([m.name, gb(NODE * 4 * psi), gb(2 * psi), gb(8 * psi)])
    names = ["model", f"DDP, ZeRO-1, ZeRO-2: {NODE} processes load 4Ψ each, GB", "ZeRO-3: rank 0 reads 2Ψ, GB"]
    return table([*names, "full: rank 0 at the end, 8Ψ, GB"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "assumptions": assumptions,
    "models": models,
    "bytes": bytes_a_parameter,
    "activations": activation_table,
    "head": head_table,
    "fits-7b-full": lambda: fits(MODELS[0], False),
    "fits-7b-lora": lambda: fits(MODELS[0], True),
    "fits-70b-full": lambda: fits(MODELS[1], False),
    "fits-70b-lora": lambda: fits(MODELS[1], True),
    "estimator": estimator,
    "volumes": volumes,
    "hidden": hidden,
    "steps": steps,
    "offload": offload_table,
    "host": host_table,
    "checkpoints": checkpoint_table,
}


def marked(name: str) -> re.Pattern[str]:
    """group 1: the lines of the table that follow its mark."""
    return re.compile(rf"(?<=<!-- arithmetic:{name} -->\n)((?:\|.*\n)*)(?=<!-- arithmetic:end -->)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}, instead of printing")
    if not parser.parse_args().write:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))
        return
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = marked(name).sub(lambda _, make=make: make() + "\n", text, count=1)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
