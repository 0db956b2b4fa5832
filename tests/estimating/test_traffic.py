"""Bytes that are sent, and their seconds, are those of docs/clusters.md."""

from __future__ import annotations

import pytest

from alignment.config.hardware import Hardware
from alignment.estimating import traffic
from alignment.estimating.hardware import Processor, catalogue, device
from alignment.training.memory import Load
from bench import zero_arithmetic as arithmetic
from bench.zero_arithmetic import CLUSTER, MODELS, STRATEGIES, Strategy

GPUS = (8, 16, 32)


def load(strategy: Strategy, psi: int, t: int, gpus: int, precision: str = "bf16") -> Load:
    name, _, setting = strategy.engine.partition(" engine.")
    key, _, value = setting.partition("=")
    offload, hpz = value if key == "offload" else "none", int(value) if key == "hpz" else 1
    return Load(1, precision, psi, t, name, gpus, offload, hpz)  # type: ignore[arg-type]


def of(**changes: float | None) -> Processor:
    plain = {"peak": CLUSTER.peak, "utilisation": CLUSTER.mfu, "memory": 3e12, "link": CLUSTER.nvlink, "network": 50e9}
    figures = {**plain, "watts": 700.0, "room": 80e9, **changes}
    return Processor(name="H100", on_gpu=True, told="", **figures)  # type: ignore[arg-type]


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", [one for one in STRATEGIES if not one.alone], ids=lambda strategy: strategy.name)
def test_bytes_of_a_step_are_those_of_the_page(strategy: Strategy, lora: bool, micro: int) -> None:
    for model in MODELS:
        psi, t = arithmetic.trained(model, lora)
        for gpus in GPUS:
            ours = traffic.traffic(load(strategy, psi, t, gpus), micro, arithmetic.NODE)
            page = arithmetic.traffic(strategy.name, psi, t, micro, gpus)
            if "hpZ" in strategy.name and gpus == arithmetic.NODE:
                continue  # the page has no such column
            assert ours == pytest.approx((page.across, page.inside, page.after)), (model.name, gpus)


@pytest.mark.parametrize("gpus", GPUS)
def test_rates_are_those_of_the_page(gpus: int) -> None:
    """An adapter for each GPU."""
    across, inside = arithmetic.rates(8, gpus)
    sent = traffic.Traffic(across=3e9, inside=2e9, after=1e9)
    took = traffic.seconds(sent, of(), gpus // arithmetic.NODE, arithmetic.NODE)
    assert took == pytest.approx((2e9 / across + 2e9 / inside, 1e9 / across))


def test_one_process_sends_nothing_and_numbers_of_fp32_are_twice_as_large() -> None:
    single = Load(1, "fp32", 100, 100)
    assert traffic.traffic(single, 3, 1) == traffic.Traffic()
    assert traffic.seconds(traffic.Traffic(), of(link=None), 1, 1) == (0.0, 0.0)
    for name, times in (("zero1", 2), ("zero2", 2), ("zero3", 2), ("ddp", 1)):
        loads = Load(1, "bf16", 100, 100, name, 4), Load(1, "fp32", 100, 100, name, 4)
        half, whole = (traffic.traffic(one, 2, 4).across for one in loads)
        assert whole == times * half, name


def test_a_rate_that_nobody_knows_is_no_time() -> None:
    sent = traffic.Traffic(across=1e9)
    assert traffic.seconds(sent, of(link=None), 1, 8) is None
    assert traffic.seconds(sent, of(network=None), 2, 8) is None
    assert traffic.seconds(sent, of(network=None), 1, 8) is not None
    assert traffic.optimiser(Load(1, "bf16", 100, 100), 1, of(memory=None), 1) is None


def test_the_optimiser_of_a_share_takes_a_share_of_the_time() -> None:
    """7B on the host of 8 GPUs: the page's seconds of PCIe and of AdamW on the CPU."""
    whole = traffic.optimiser(Load(1, "bf16", 800, 800, "ddp", 8), 1, of(), 1)
    shared = traffic.optimiser(Load(1, "bf16", 800, 800, "zero2", 8), 1, of(), 1)
    assert whole is not None and shared is not None and whole == pytest.approx(8 * shared)
    psi = MODELS[0].parameters
    held = Load(1, "bf16", psi, psi, "zero2", 8, "optimizer")
    assert traffic.optimiser(held, 1, of(), 1) == pytest.approx(
        (4 + 2) * psi / 8 / CLUSTER.pcie + 30 * psi / CLUSTER.host
    )


def test_a_gpu_is_found_by_its_name_and_what_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "NVIDIA H200")
    auto = Hardware(name="auto", **dict.fromkeys(list(Hardware.model_fields)[1:]))
    found = device(auto, "bf16", here=True)
    assert found is not None and (found.name, found.peak, found.watts) == ("NVIDIA H200", 989.4e12, 700.0)
    half = device(auto.model_copy(update={"utilisation": 0.5, "link_gb_s": 100.0}), "fp32", here=True)
    assert half is not None and half.rate == pytest.approx(66.9e12 / 2) and half.link == 100e9
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *given: "NVIDIA H200 NVL")
    assert device(auto, "bf16", here=True) is None, "another card is not guessed at"
    assert device(auto, "bf16", here=False) is None, "nor the cards of another machine"
    assert {"NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X"} <= set(catalogue())


def test_a_cpu_is_measured() -> None:
    auto = Hardware(name="auto", **dict.fromkeys(list(Hardware.model_fields)[1:]))
    found = device(auto, "fp32", here=True, threads=1)
    assert found is not None and not found.on_gpu and found.watts is None
    assert found.peak is not None and 1e9 < found.peak < 1e13
